"""How far back the layers of a decoder attend: sliding windows, chunks, and what counts cache slots instead of positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import DynamicCache

from idp_peft.hosting.architectures import forward_parameters, names_in_forward

_MASKS = {"create_sliding_window_causal_mask", "create_chunked_causal_mask"}


@dataclass(frozen=True)
class Reach:
    """How far back a layer attends, in positions.

    Args:
        window (`int`, *optional*): the last `window` positions (sliding attention).
        chunk (`int`, *optional*): the positions of the same chunk of `chunk` (Llama 4).
    """

    window: int | None = None
    chunk: int | None = None

    @property
    def size(self) -> int | None:
        """The most positions that a token attends to; `None` where it attends to all before it."""
        return self.chunk if self.window is None else self.window

    def covers(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Which of the positions `keys` are near enough to the positions `queries`, of shapes that broadcast."""
        if self.window is not None:
            return queries - keys < self.window
        return queries // self.chunk == keys // self.chunk


EVERYTHING = Reach()


def reaches(decoder: nn.Module) -> list[Reach]:
    """How far back each layer attends: what the cache that transformers makes for the decoder keeps."""
    config = decoder.config
    if config.model_type == "gpt_neo":  # keeps all keys, and masks them itself
        return [Reach(window=config.window_size if kind == "local" else None) for kind in config.attention_layers]
    kinds = getattr(config, "layer_types", None) or []
    every_layer_chunked = not kinds and getattr(config, "sliding_window", None) is None
    found = []
    for layer, cache_layer in enumerate(DynamicCache(config=config).layers):
        size = getattr(cache_layer, "sliding_window", None)
        chunked = kinds[layer] == "chunked_attention" if kinds else every_layer_chunked
        found.append(Reach(chunk=size) if chunked else Reach(window=size))
    # Layers that read the keys of earlier ones keep none in transformers 5.0; those with a window say so when they attend.
    return found + [EVERYTHING] * (config.num_hidden_layers - len(found))


def masks_by_reach(decoder: nn.Module) -> bool:
    """Whether a decoder asks transformers for masks of windows or chunks: Moshi's cache keeps a window, and its masks do not
    know of it."""
    return not _MASKS.isdisjoint(names_in_forward(type(decoder)))


def distances_from_slots(decoder: nn.Module, slots: int | None) -> bool:
    """Whether the decoder measures some distance in cache slots, padding included: an ALiBi bias built from the length
    (MPT), or a sliding window or a chunk that `slots` slots fill.

    Args:
        slots (`int`, *optional*): how many slots will be used at most; `None` where the sequence may go on.
    """
    if decoder.config.model_type == "mpt":
        return True
    sizes = [reach.size for reach in reaches(decoder) if reach.size is not None]
    return bool(sizes) and (slots is None or slots >= min(sizes))


def first_scaled_slot(decoder: nn.Module) -> int | None:
    """The first cache slot from which a decoder scales attention by the slot, padding included; `None` where by positions, or
    not at all (Llama 4 in layers without rotary positions; Ministral 3 in transformers 5.0)."""
    config = decoder.config
    if getattr(config, "attn_temperature_tuning", False) and not all(getattr(config, "no_rope_layers", None) or [True]):
        return config.floor_scale - 1
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("llama_4_scaling_beta") and "cache_position" in forward_parameters(type(decoder)):
        return rope["original_max_position_embeddings"]
    return None
