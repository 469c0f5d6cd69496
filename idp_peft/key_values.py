"""Prompts of keys and values: the keys and values of every layer are the parameters.

A row of the bank is one token: its keys of layer 0, its values of layer 0, its keys of layer 1, and so on, each
`[kv_heads * head_dim]`; P numbers in all. Rows start at what a model makes of real text.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from peft.utils.integrations import gather_params_ctx
from torch import nn

from idp_peft.hosting.architectures import find_decoder, key_value_layout_of
from idp_peft.hosting.call import internal_run
from idp_peft.hosting.decoder_copy import evaluating, run_unmasked
from idp_peft.hosting.sharding import is_parted

_layouts: WeakKeyDictionary = WeakKeyDictionary()  # decoder -> [`key_value_layout`]


@torch.no_grad()
def keys_and_values(model: nn.Module, token_ids: torch.Tensor) -> torch.Tensor:
    """What a model makes of texts, as rows of a bank: float32 `[texts * k, P]`.

    Args:
        model (`PreTrainedModel`): the base, or the dense model that it was.
        token_ids (`torch.Tensor`): int64 `[texts, k]`.
    """
    decoder = find_decoder(model)
    token_ids = token_ids.to(model.get_input_embeddings().weight.device)
    positions = torch.arange(token_ids.shape[1], device=token_ids.device).expand_as(token_ids)
    with internal_run(), evaluating(decoder), gather_params_ctx(list(decoder.parameters()), modifier_rank=None):
        layers = run_unmasked(decoder, positions, input_ids=token_ids)
    parts = [part for layer in layers for part in (layer.keys, layer.values)]  # [texts, kv_heads, k, head_dim] each
    return torch.cat([part.transpose(1, 2).flatten(2).float().to(token_ids.device) for part in parts], -1).flatten(0, 1)


def key_value_layout(decoder: nn.Module) -> list[tuple[int, int, int]]:
    """`(kv_heads, key_dim, value_dim)` of each layer that keeps any: what the decoder itself puts into a cache."""
    known = _layouts.get(decoder)
    if known is None and is_parted(decoder):  # ZeRO-3 parts weights before anything gathers them
        known = _layouts[decoder] = key_value_layout_of(decoder.config)
    if known is None:
        table = next(module for module in decoder.modules() if isinstance(module, nn.Embedding))
        ids = torch.zeros(1, 1, dtype=torch.long, device=table.weight.device)
        try:
            with torch.no_grad(), internal_run(), evaluating(decoder):
                layers = run_unmasked(decoder, ids, input_ids=ids)
            known = [(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in layers]
        except RuntimeError:  # transformers 5.0 runs nothing on the meta device
            if not ids.is_meta:
                raise
            known = key_value_layout_of(decoder.config)
        _layouts[decoder] = known
    return known


def layout_width(layout: list[tuple[int, int, int]]) -> int:
    """P: how many numbers the keys and values of one token are."""
    return sum(heads * (key + value) for heads, key, value in layout)


def unpack(tokens: torch.Tensor, layout: list[tuple[int, int, int]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Rows of a bank as keys and values, per layer `[m, kv_heads, k, head_dim]`.

    Args:
        tokens (`torch.Tensor`): `[m, k, P]`.
        layout (`list`): as [`key_value_layout`].
    """
    sizes = [heads * width for heads, *widths in layout for width in widths]
    heads = [heads for heads, *widths in layout for _ in widths]
    parts = [
        part.unflatten(-1, (number, -1)).transpose(1, 2)
        for part, number in zip(tokens.split(sizes, -1), heads, strict=True)
    ]
    return parts[::2], parts[1::2]
