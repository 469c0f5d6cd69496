"""Attention maps of the layer that chooses: which tokens look at which prompt."""

from __future__ import annotations

import torch

from idp_peft.hosting.architectures import check_selection_layer, find_blocks
from idp_peft.hosting.checks import checked_tokens
from idp_peft.layer import active_layer
from idp_peft.probe import attention_on_bank


def attention_map(model, input_ids, attention_mask=None, layer: int | None = None) -> torch.Tensor:
    """Attention that each token pays to each prompt when all M stand in front of the input at once.

    The choice is the argmax of this map's mean over the tokens that may steer (with `selection_reduction="mean"`, after
    division by each prompt's length); what a row lacks to 1 went to the input itself.

    Args:
        model: a model with an active IDP adapter.
        input_ids (`torch.Tensor` or `list[int]`): `[n]` of one input, or `[batch, n]`.
        attention_mask (`torch.Tensor`, *optional*): of the same shape; by default every token is real. Rows of padding
            mean nothing.
        layer (`int`, *optional*): which layer's attention, negative from the end; by default the adapter's selection
            layer. Above layer 0, the layers below see all M prompts as well.

    Returns:
        `torch.Tensor`: float32 `[n, M]` (or `[batch, n, M]`) on the CPU, from 0 to 1: summed over a prompt's tokens, mean
        over heads.

    Raises:
        `ValueError`: without an active IDP adapter, or for a layer that there is not.
    """
    owner = active_layer(model)
    ids = torch.as_tensor(input_ids, device=owner.get_base_layer().weight.device)
    if ids.ndim not in (1, 2) or not ids.numel():
        raise ValueError(f"`input_ids` must be token ids [n] or [batch, n], not empty, got shape {list(ids.shape)}")
    real = torch.ones_like(ids) if attention_mask is None else torch.as_tensor(attention_mask, device=ids.device)
    if real.shape != ids.shape:
        raise ValueError(
            f"`attention_mask` must have the shape of `input_ids` {list(ids.shape)}, got {list(real.shape)}"
        )
    if layer is None:
        layer = owner.selection_layer
    check_selection_layer(owner.decoder, layer)
    rows = {"input_ids": ids.view(-1, ids.shape[-1])}
    number = layer % len(find_blocks(owner.decoder)[1])
    on_prompts = attention_on_bank(
        owner,
        number,
        rows,
        checked_tokens(owner.decoder, owner.active_bank.max_length, rows, real.view(-1, ids.shape[-1])),
    )
    return on_prompts.view(*ids.shape, -1).cpu()
