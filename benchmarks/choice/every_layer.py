"""The library's own scores at every layer, from one pass through the model instead of one for each layer.

A choice at layer l runs the layers below it with all prompts in front of the input. The choice at the last layer has
therefore passed every other choice on its way: here each layer's attention is kept before the pass goes on.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import replace

import torch
from torch import nn
from transformers import AttentionInterface

from idp_peft import probe
from idp_peft.decoder import find_attention, find_blocks, uses_interface
from idp_peft.prompt_cache import PromptCache
from idp_peft.selection import BlockMask, scores_from_attention

_IMPLEMENTATION = "idp_every_layer"
_kept: ContextVar[list[torch.Tensor]] = ContextVar("idp_every_layer")


@torch.no_grad()
def scores_at_every_layer(
    decoder: nn.Module, prompt_cache: PromptCache, input_ids: torch.Tensor, reduction: str
) -> torch.Tensor:
    """What each layer would choose by, were it the selection layer.

    Args:
        decoder (`nn.Module`): the base model's decoder.
        prompt_cache (`PromptCache`): keys and values of the bank.
        input_ids (`torch.Tensor`): int64 `[batch, n]`, the context, without padding: all of it is read.
        reduction (`str`): as in `IDPConfig.selection_reduction`.

    Returns:
        `torch.Tensor`: float32 `[layers, batch, M]`.

    Raises:
        `ValueError`: for a model whose attention does not go through transformers' interface.
    """
    blocks = find_blocks(decoder)[1]
    attention = getattr(blocks[0], find_attention(blocks[0]))
    if not uses_interface(type(attention)):
        raise ValueError(
            f"`model` must use transformers' AttentionInterface to be read at every layer in one pass, and "
            f"{type(attention).__name__} does not"
        )
    AttentionInterface.register(_IMPLEMENTATION, _keep_and_go_on)
    real = torch.ones_like(input_ids, dtype=torch.bool)
    mask, cache = BlockMask(prompt_cache.lengths, real), prompt_cache.side_by_side(len(real), len(blocks))
    kept: list[torch.Tensor] = []
    token = _kept.set(kept)
    try:
        inputs = {"input_ids": input_ids}
        probe._run(decoder, len(blocks) - 1, mask, inputs, cache, mask.input_positions(), _IMPLEMENTATION)
    finally:
        _kept.reset(token)
    return torch.stack([scores_from_attention(part, real, prompt_cache.lengths, reduction) for part in kept])


def _keep_and_go_on(module, *args, **kwargs):
    """The probe's attention function, asked twice: as at the selection layer, and as at a layer below it."""
    current = probe._current.get()
    token = probe._current.set(replace(current, layer=module.layer_idx))
    try:
        probe._probe_attention(module, *args, **kwargs)
    except probe._Reached as reached:
        _kept.get().append(reached.result)
    finally:
        probe._current.reset(token)
    return probe._probe_attention(module, *args, **kwargs)
