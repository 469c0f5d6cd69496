"""The library's own scores at every layer, from one pass through the model instead of one for each layer.

A choice at layer l runs the layers below it with all prompts in front of the input. The choice at the last layer has
therefore passed every other choice on its way: here each layer's attention is kept before the pass goes on.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from transformers import AttentionInterface

from idp_peft.hosting.architectures import find_attention, find_blocks, uses_interface
from idp_peft.hosting.decoder_copy import Reached
from idp_peft.probe import BlockMask, attend, run
from idp_peft.prompt_cache import PromptCache
from idp_peft.selection import scores_from_attention

_IMPLEMENTATION = "idp_every_layer"


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
    lengths, real = prompt_cache.lengths, torch.ones_like(input_ids, dtype=torch.bool)
    attention = _attention_at_every_layer(decoder, prompt_cache, input_ids, lengths)
    return torch.stack([scores_from_attention(part, real, lengths, reduction) for part in attention])


def first_token_shares(decoder: nn.Module, prompt_cache: PromptCache, input_ids: torch.Tensor) -> torch.Tensor:
    """Of the attention that a context pays to a prompt, the share that falls on the prompt's first token, mean over
    contexts: float32 `[layers, M]`. For models without sliding windows.

    Each prompt is computed alone, so its first token sees nothing but itself, as the first token of any text does.
    """
    parts = [part for length in prompt_cache.lengths for part in (1, length - 1)]
    attention = _attention_at_every_layer(decoder, prompt_cache, input_ids, parts)
    first, rest = torch.stack(attention).mean(2).unflatten(-1, (-1, 2)).unbind(-1)  # [layers, batch, M] each
    return (first / (first + rest)).mean(1)


@torch.no_grad()
def _attention_at_every_layer(
    decoder: nn.Module, prompt_cache: PromptCache, input_ids: torch.Tensor, parts: list[int]
) -> list[torch.Tensor]:
    """Attention on stretches of the bank of so many tokens each, per layer float32 `[batch, n, parts]`."""
    blocks = find_blocks(decoder)[1]
    attention = getattr(blocks[0], find_attention(blocks[0]))
    if not uses_interface(type(attention)):
        raise ValueError(
            f"`model` must use transformers' AttentionInterface to be read at every layer in one pass, and "
            f"{type(attention).__name__} does not"
        )
    real = torch.ones_like(input_ids, dtype=torch.bool)
    mask, of_parts = BlockMask(prompt_cache.lengths, real), BlockMask(parts, real)
    kept: list[torch.Tensor] = []

    def keep_and_go_on(module, *args, **kwargs):
        """The probe's attention function, asked twice: as at the selection layer, and as at a layer below it."""
        reader = module.config.idp_reader
        try:
            attend(module, *args, **kwargs, reader=replace(reader, layer=module.layer_idx, mask=of_parts))
        except Reached as reached:
            kept.append(reached.result)
        last = replace(reader, layer=-1)
        if module.layer_idx == len(blocks) - 1:
            raise Reached(kept[-1])
        return attend(module, *args, **kwargs, reader=last)

    AttentionInterface.register(_IMPLEMENTATION, keep_and_go_on)
    cache = prompt_cache.side_by_side(len(real), len(blocks))
    run(decoder, len(blocks) - 1, mask, {"input_ids": input_ids}, cache, _IMPLEMENTATION)
    return kept
