"""What a training loop knows and does not pass to the model: labels, packing, rows that are compared.

transformers' `Trainer` and TRL's trainers sometimes call the model without the labels that they hold (label smoothing, a
custom loss, metrics that need logits), and with packed rows that look like single documents (TRL's
`packing_strategy="wrapped"`). Both would silently change what a choice reads. Nothing is patched: the loop that is
running is looked up in the call stack (`introspection.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import FrameType

import torch
from torch import nn

from idp_peft.hosting.introspection import frames_of_step, is_generate, variables_of_generate

_IGNORED = -100


def labels_of_step(input_ids: torch.Tensor | None) -> torch.Tensor | None:
    """The labels of `input_ids` that a trainer's running step holds, where it calls the model without them.

    Looked for in the variables of the functions between the step and the model, and in the dicts among these. A tensor of
    the input's shape (or longer: some loops drop the last token) is its labels where each entry is -100 or the input's token,
    -100 at least once, whatever its name; or where it is called `labels` and the step's own rows are run. TRL's code may
    hold no such tensor but say where its completions begin.

    Args:
        input_ids (`torch.Tensor`, *optional*): int64 `[batch, n]`, of the call.

    Returns:
        `torch.Tensor` or `None`: `[batch, n]`, -100 for what is no target; `None` outside of such a step, in a `generate`
        that it runs, or where it holds no labels of these rows.
    """
    frames = frames_of_step()
    if not frames or input_ids is None or input_ids.ndim != 2 or any(is_generate(frame) for frame in frames):
        return None
    batch = frames[-1].f_locals.get("inputs")
    rows = batch.get("input_ids") if isinstance(batch, Mapping) else None
    runs_its_rows = isinstance(rows, torch.Tensor) and _same(rows, input_ids)
    for frame in frames:
        named = list(_variables(frame))
        for name, value in named:
            if value is not input_ids and _could_be_labels(value, input_ids):
                labels = value[:, : input_ids.shape[1]]
                if (runs_its_rows and name == "labels") or _are_labels(labels, input_ids):
                    return labels
        if frame.f_globals.get("__name__", "").startswith("trl."):
            labels = _by_trl_names({**dict(named), **frame.f_locals}, input_ids)
            if labels is not None:
                return labels
    return None


def in_training(model: nn.Module, layer: nn.Module) -> bool:
    """Whether a forward that runs now trains: its modules do, and it is no step of transformers' `generate`."""
    return layer.training and not variables_of_generate(model)


def packs_rows() -> bool:
    """Whether the running trainer's arguments say that its rows hold several documents (`packing`, `eval_packing`)."""
    frames = frames_of_step()
    if not frames:
        return False
    step = frames[-1]
    arguments = step.f_locals["self"].args
    packing = getattr(arguments, "packing", False)
    if step.f_code.co_name == "prediction_step" and getattr(arguments, "eval_packing", None) is not None:
        packing = arguments.eval_packing
    return bool(packing)


def compares_answers() -> bool:
    """Whether the running trainer is one of TRL's whose forwards must agree on the prompt of a context: it weighs answers,
    given or sampled, against each other or a reference (DPO, GRPO, ...)."""
    frames = frames_of_step()
    if not frames:
        return False
    classes = type(frames[-1].f_locals["self"]).__mro__
    from_trl = any(each.__module__.startswith("trl.") for each in classes)
    return from_trl and not any(each.__name__ == "SFTTrainer" for each in classes)


def _variables(frame: FrameType) -> Iterator[tuple[str, object]]:
    """A frame's variables, and the entries of the dicts among them."""
    for name, value in frame.f_locals.items():
        yield name, value
        if isinstance(value, Mapping):
            yield from ((str(key), entry) for key, entry in value.items())


def _could_be_labels(value: object, input_ids: torch.Tensor) -> bool:
    integers = isinstance(value, torch.Tensor) and not value.is_floating_point() and value.dtype != torch.bool
    return integers and value.ndim == 2 and len(value) == len(input_ids) and value.shape[1] >= input_ids.shape[1]


def _are_labels(value: torch.Tensor, input_ids: torch.Tensor) -> bool:
    ignored = value.to(input_ids.device) == _IGNORED
    return bool(ignored.any()) and _same(value.to(input_ids).masked_fill(ignored, 0), input_ids.masked_fill(ignored, 0))


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.to(other), other)


def _by_trl_names(named: dict, input_ids: torch.Tensor) -> torch.Tensor | None:
    """Labels by what TRL calls the parts of prompts with completions: a mask of the completions, how many tokens they have
    at the end of all rows, or the prompts in front of them. (As a model's argument, `logits_to_keep` is one more.)"""
    mask, tokens, prompts = (named.get(name) for name in ("completion_mask", "logits_to_keep", "prompt_ids"))
    if isinstance(mask, torch.Tensor) and mask.shape == input_ids.shape:
        return input_ids.masked_fill(mask.to(input_ids.device) == 0, _IGNORED)
    if type(tokens) is int and tokens:
        begin = input_ids.shape[1] - tokens
    elif isinstance(prompts, torch.Tensor) and prompts.ndim == 2 and _same(prompts, input_ids[:, : prompts.shape[1]]):
        begin = prompts.shape[1]
    else:
        return None
    labels = input_ids.clone()
    labels[:, : max(begin, 0)] = _IGNORED
    return labels
