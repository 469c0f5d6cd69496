"""One way to call any model under evaluation: dense, compressed, IDP, LoRA, prompt tuning or prefix tuning."""

from __future__ import annotations

import torch

from idp_peft.hosting.prompt_ids import AUTO, check_prompt_ids
from idp_peft.layer import IDPLayer
from idp_peft.selection import select
from idp_peft.texts.tokens import padded_batch


def idp_layer(model) -> IDPLayer | None:
    """The module that owns a model's prompt bank; `None` without an IDP adapter, or while it is disabled."""
    layer = next((module for module in model.modules() if isinstance(module, IDPLayer)), None)
    return layer if layer is not None and layer.active_name is not None else None


def num_prompts(model) -> int | None:
    """M of the active IDP adapter; `None` for a model that has no prompt to choose."""
    layer = idp_layer(model)
    return None if layer is None else layer.active_config.num_prompts


def virtual_tokens(model) -> int:
    """Positions that a prompt takes in front of the input: the longest of a bank, or PEFT's; 0 without."""
    if (layer := idp_layer(model)) is not None:
        return layer.active_bank.max_length
    return model.active_peft_config.num_virtual_tokens if is_prompt_learning(model) else 0


def is_prompt_learning(model) -> bool:
    """Whether this is one of PEFT's own prompt methods, which cannot do left-padded batches."""
    config = getattr(model, "active_peft_config", None)
    return config is not None and config.is_prompt_learning


def check_prompt_id(model, prompt_id: int | str | None) -> int | None:
    """The number of a prompt that is to be forced, given by number or name; `None` where each input is to choose.

    Raises:
        `ValueError`: where a prompt is forced on a model without a bank, or on one without that prompt.
    """
    if prompt_id is None or prompt_id == AUTO:
        return None
    if (layer := idp_layer(model)) is None:
        raise ValueError(
            f"`prompt_id` needs a model with an active IDP adapter, got prompt_id={prompt_id} for one without"
        )
    config = layer.active_config
    return int(check_prompt_ids(prompt_id, 1, config.num_prompts, config.prompt_names))


@torch.no_grad()
def select_prompts(model, rows: list[list[int]], batch_size: int) -> list[int]:
    """The prompt that an IDP model chooses by exactly these tokens, for each row; nothing above the selection layer runs."""
    layer, chosen = idp_layer(model), []
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for start in range(0, len(rows), batch_size):
        ids, mask = padded_batch([rows[index] for index in order[start : start + batch_size]], model.device)
        chosen += select(layer, {"input_ids": ids}, mask).prompt_ids.tolist()
    by_row = dict(zip(order, chosen, strict=True))
    return [by_row[index] for index in range(len(rows))]


@torch.no_grad()
def input_logits(model, input_ids: torch.Tensor, attention_mask: torch.Tensor, **idp) -> torch.Tensor:
    """Logits at the input's own positions, `[batch, n, vocabulary]`.

    Args:
        model: any causal language model, in evaluation mode.
        input_ids, attention_mask (`torch.Tensor`): int64 `[batch, n]`, right padded.
        idp: `prompt_ids` and `selection_mask`, for IDP models alone.
    """
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **idp).logits
    return logits[:, -input_ids.shape[1] :]  # PEFT's prompt tuning returns those of its virtual tokens too
