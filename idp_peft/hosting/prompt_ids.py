"""What a caller may write for `prompt_ids`: numbers, names, no prompt, or "auto"; one per row, or one for all rows."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch

# The entry of a row that chooses for itself beside forced ones; no prompt may have this name.
AUTO = "auto"
# Its mark in what `check_prompt_ids` returns. Nobody can pass it: numbers below -1 are refused.
CHOOSES = -2


def check_prompt_ids(prompt_ids, batch: int, num_prompts: int, names: list[str] | None = None) -> torch.Tensor:
    """Forced prompts, checked: int64 `[batch]`, each from -1 (no prompt for that row) to M-1, or `CHOOSES`.

    Args:
        prompt_ids (`torch.Tensor`, `list`, `str` or `int`): integers `[batch]`; or a list of one entry per row, each a
            number, a name, `None` (no prompt, as -1) or `"auto"` (this row chooses, as every row does without
            `prompt_ids`); or one number or name for all rows; `None` is `"auto"` for all. What goes through `Trainer` must be a tensor:
            [`IDPConfig.prompt_id`] turns a name into its number.
        batch (`int`): rows of the input.
        num_prompts (`int`): M.
        names (`list[str]`, *optional*): the adapter's `prompt_names`.

    Raises:
        `ValueError`: on another shape, type or range, an unknown name, or a name where prompts have none.
    """
    chooses, prompt_ids = [], AUTO if prompt_ids is None else prompt_ids
    if not isinstance(prompt_ids, torch.Tensor):
        entries = _entries(prompt_ids, batch)
        chooses = [row for row, entry in enumerate(entries) if isinstance(entry, str) and entry == AUTO]
        prompt_ids = _tensor([_number(entry, num_prompts, names) for entry in entries], batch)
    if prompt_ids.shape != (batch,) or prompt_ids.is_floating_point() or prompt_ids.dtype == torch.bool:
        raise ValueError(
            f"`prompt_ids` must be integers of shape [{batch}], one per row, got {prompt_ids.dtype} of shape "
            f"{list(prompt_ids.shape)}"
        )
    values = prompt_ids.tolist()
    if batch and (min(values) < -1 or max(values) >= num_prompts):
        raise ValueError(f"`prompt_ids` must be between -1 (no prompt) and {num_prompts - 1}, got {values}")
    prompt_ids = prompt_ids.long()
    if chooses:
        prompt_ids[chooses] = CHOOSES
    return prompt_ids


def number_of(name: str, num_prompts: int, names: list[str] | None) -> int:
    """The number of the prompt of this name.

    Raises:
        `ValueError`: for an unknown name, or where prompts have none.
    """
    if names is None:
        raise ValueError(
            f"`prompt_ids` names {name!r}, but this adapter's prompts have no names (`prompt_names` is None in its config): "
            f"pass a number from 0 to {num_prompts - 1}, or set `prompt_names`"
        )
    if name not in names:
        raise ValueError(
            f"`prompt_ids` names {name!r}, which is no prompt of this adapter: it has {', '.join(map(repr, names))}"
        )
    return names.index(name)


def _entries(prompt_ids, batch: int) -> list:
    """One entry per row, whatever they are."""
    given = prompt_ids
    if hasattr(prompt_ids, "tolist"):  # an array
        prompt_ids = prompt_ids.tolist()
    if isinstance(prompt_ids, (str, Integral)) and not isinstance(prompt_ids, bool):
        return [prompt_ids] * batch
    if isinstance(prompt_ids, Sequence):
        return list(prompt_ids)
    raise ValueError(
        f"`prompt_ids` must be a tensor or a list of one entry per row ({batch}), or one name or number for all, got "
        f"{given!r}"
    )


def _number(entry, num_prompts: int, names: list[str] | None):
    if entry is None or (isinstance(entry, str) and entry == AUTO):
        return -1
    return number_of(entry, num_prompts, names) if isinstance(entry, str) else entry


def _tensor(numbers: list, batch: int) -> torch.Tensor:
    try:
        return torch.as_tensor(numbers)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"`prompt_ids` must have one number or name per row ({batch}), got {numbers}") from error


def checked_names(names: list[str] | None, num_prompts: int) -> list[str] | None:
    """`prompt_names` of a config.

    Raises:
        `ValueError`: for anything but one distinct name per prompt.
    """
    if names is None:
        return None
    if not isinstance(names, (list, tuple)) or len(names) != num_prompts:
        count = f"{len(names)} names {list(names)}" if isinstance(names, (list, tuple)) else repr(names)
        raise ValueError(
            f"`prompt_names` must be a list of one name per prompt (num_prompts={num_prompts}), got {count}"
        )
    seen = set()
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"`prompt_names` must hold texts that are not empty, got {name!r}")
        if name == AUTO:
            raise ValueError(
                f"`prompt_names` must not hold {AUTO!r}, which in `prompt_ids` lets a row choose, got {list(names)}"
            )
        if name in seen:
            raise ValueError(f"`prompt_names` must hold distinct names, got {name!r} twice")
        seen.add(name)
    return list(names)
