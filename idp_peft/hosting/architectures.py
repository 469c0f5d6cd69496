"""What IDP needs to know about a base model's decoder: every architecture's quirk, and every table of names."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from idp_peft.hosting.introspection import names_in_forward
from idp_peft.hosting.sharding import gathers, whole_shape

ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
_POSITION_TABLES = ("wpe", "embed_positions")
_MASKS = {"create_sliding_window_causal_mask", "create_chunked_causal_mask"}  # for layers that do not reach all
PER_LAYER_INPUTS = "per_layer_inputs"
_CACHE_NAMES = ("cache", "past_key_values")  # transformers 5.24 renamed the argument, and takes the old name too


def find_decoder(model: nn.Module) -> nn.Module:
    """The innermost decoder of a model, which turns embeddings into the hidden states that its head reads: where
    `get_decoder()` leads, and on from classes with a head of their own on the way (Llama 4, BLIP-2) or where it does not
    lead to one (ModernBERT's decoder). The model itself where there is none inside.

    Raises:
        `ValueError`: for what is no transformers model.
    """
    if getattr(model, "config", None) is None or not callable(getattr(model, "get_decoder", None)):
        raise ValueError(f"IDP needs a transformers model with `get_decoder()`, got {type(model).__name__}")
    found, passed = model, []
    while not any(found is module for module in passed):
        passed.append(found)
        inner = (found.get_decoder(), getattr(found, "base_model", None), getattr(found, "model", None))
        found = next((m for m in inner if isinstance(m, PreTrainedModel) and m is not found), found)
    return found


def find_blocks(decoder: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """Name and `ModuleList` of the decoder's layers; `None` where no list has one entry per hidden layer."""
    layers = getattr(decoder.config, "num_hidden_layers", None)
    for name, child in decoder.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == layers:
            return name, child
    return None


def find_attention(block: nn.Module) -> str | None:
    """Name of a layer's self-attention module."""
    return next((name for name in ATTENTION_NAMES if isinstance(getattr(block, name, None), nn.Module)), None)


def gathers_layers(decoder: nn.Module) -> bool:
    """Whether FSDP2 gathers the weights behind a layer's keys and values for that layer alone."""
    blocks = find_blocks(decoder)[1]
    return any(gathers(part) for block in blocks for part in (block, getattr(block, find_attention(block))))


@cache
def forward_parameters(module_class: type[nn.Module]) -> tuple[str, ...]:
    """Names of the arguments of a module class's forward, in order, without `self`."""
    return tuple(inspect.signature(module_class.forward).parameters)[1:]


@cache
def cache_name(module_class: type[nn.Module]) -> str | None:
    """The name of the cache argument of a module class's forward; `None` where it takes no cache."""
    return next((name for name in _CACHE_NAMES if name in forward_parameters(module_class)), None)


def given_cache(kwargs: dict):
    """The cache among the arguments of a call, or in a model's output, by whichever name; `None` without one."""
    return next((kwargs[name] for name in _CACHE_NAMES if kwargs.get(name) is not None), None)


def with_cache(kwargs: dict, cache, name: str) -> dict:
    """A call's arguments, with a cache under this name alone."""
    return {**{key: value for key, value in kwargs.items() if key not in _CACHE_NAMES}, name: cache}


def replace_cache(output, cache) -> None:
    """Replace the cache in a model's output, where it holds one."""
    name = next((name for name in _CACHE_NAMES if name in output), None)
    if name is not None:
        output[name] = cache


@cache
def uses_interface(attention_class: type[nn.Module]) -> bool:
    """Whether an attention class gets its attention function from transformers' `AttentionInterface`."""
    return "ALL_ATTENTION_FUNCTIONS" in names_in_forward(attention_class)


def has_alibi(decoder: nn.Module) -> bool:
    """Whether distances enter the attention as an ALiBi bias that the decoder builds itself."""
    config = decoder.config
    return config.model_type in ("bloom", "mpt") or (config.model_type == "falcon" and bool(config.alibi))


def check_selection_layer(decoder: nn.Module, layer: int, reads_attention: bool = True) -> None:
    """Raise for a selection layer that does not work on this decoder.

    Args:
        layer (`int`): as in `IDPConfig.selection_layer`, negative from the end.
        reads_attention (`bool`): whether the choice reads that layer's attention at all.

    Raises:
        `ValueError`: outside the decoder, or above the first layer of a model whose attention cannot be shown several
            prompts at the same distance.
    """
    layers = len(find_blocks(decoder)[1])
    if not -layers <= layer < layers:
        raise ValueError(f"`selection_layer` must be between {-layers} and {layers - 1} for this model, got {layer}")
    if reads_attention and has_alibi(decoder) and layer % layers:
        raise ValueError(
            f"`selection_layer` must be 0 on {decoder.config.model_type!r}, a model with ALiBi, got {layer}: its deeper "
            "layers cannot be shown all prompts at their own distances"
        )
    if reads_attention and layer % layers and decoder.config.model_type == "gpt_neo":
        raise ValueError(
            f"`selection_layer` must be 0 on 'gpt_neo', got {layer}: the windows of its deeper layers count cache slots, in "
            "which prompts stand one after the other"
        )


def needs_full_mask(decoder: nn.Module) -> bool:
    """Whether the decoder must be given a mask even where nothing is masked: the mask code of some transformers 5.0
    models (StableLM) counts a slot too many behind a filled cache unless a mask says how many there are."""
    return hasattr(decoder, "_update_causal_mask")


def shares_keys_in_cache(decoder: nn.Module) -> bool:
    """Whether layers that share another's keys and values find them in the cache alone, and compute others without one
    (Gemma 3n in transformers 5.0)."""
    attention = (getattr(block, find_attention(block)) for block in find_blocks(decoder)[1])
    return any(getattr(each, "is_kv_shared_layer", False) and hasattr(each, "k_proj") for each in attention)


def rotary_length(decoder: nn.Module, tokens: int) -> int | None:
    """The length that decides the decoder's rotary frequencies for `tokens` tokens; `None` where they are fixed
    (they depend on the length with `rope_type` "dynamic" and "longrope", beyond the original context)."""
    config = decoder.config
    for rope in _ropes(decoder):
        kind = rope.get("rope_type") or "default"
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if kind == "longrope" and tokens > original:
            return original + 1
        if "dynamic" in kind and tokens > config.max_position_embeddings:
            return tokens
    return None


def _ropes(decoder: nn.Module) -> list[dict]:
    """The rotary settings of a decoder: one, or one for each type of its layers."""
    rope = getattr(decoder.config, "rope_parameters", None) or {}
    return [rope] if "rope_type" in rope else [part for part in rope.values() if isinstance(part, dict)]


def has_changing_rotary(decoder: nn.Module) -> bool:
    """Whether [`rotary_length`] can be anything but `None`."""
    return rotary_length(decoder, 2**40) is not None


def keeps_rotary(decoder: nn.Module) -> bool:
    """Whether the decoder keeps the rotary frequencies of its longest input for later, shorter inputs, as it does with
    `rope_type` "dynamic": what it makes of an input then depends on what it ran before."""
    return any("dynamic" in (rope.get("rope_type") or "") for rope in _ropes(decoder))


def reads_again(model: nn.Module) -> bool:
    """Whether the model's own `generate` drops its cache and reads the whole text again where the rotary frequencies change
    (Phi-3 and its kin)."""
    return hasattr(model.config, "original_max_position_embeddings")


def position_limit(decoder: nn.Module) -> int | None:
    """How many positions the decoder's position table holds; `None` where positions are computed, not looked up."""
    if decoder.config.model_type in ("gptj", "codegen"):
        return decoder.config.max_position_embeddings
    for name in _POSITION_TABLES:
        table = getattr(decoder, name, None)
        if isinstance(table, nn.Embedding):
            return table.num_embeddings - getattr(table, "offset", 0)
    return None


def adds_positions(decoder: nn.Module) -> bool:
    """Whether positions are added to the embeddings, learned (GPT-2) or computed (XGLM), so that where a text starts changes
    what it means."""
    return any(isinstance(getattr(decoder, name, None), nn.Module) for name in _POSITION_TABLES)


def embedding_dtype(embeddings: nn.Module, decoder: nn.Module) -> torch.dtype:
    """The dtype in which the decoder expects its input embeddings."""
    dtype = embeddings.weight.dtype
    return dtype if dtype.is_floating_point else decoder.dtype


def embedding_width(embeddings: nn.Module) -> int:
    """d, the width of the decoder's input embeddings, quantised tables included."""
    return whole_shape(embeddings.weight)[-1] if embeddings.weight.is_floating_point() else embeddings.embedding_dim


def by_name(module: nn.Module, args: tuple, kwargs: dict) -> dict:
    """A call's arguments by name, as a new dict; a cache by the name that the module's own forward has for it."""
    named = {**dict(zip(forward_parameters(type(module)), args, strict=False)), **kwargs} if args else dict(kwargs)
    name = cache_name(type(module))
    if name is not None and any(other in named for other in _CACHE_NAMES if other != name):
        named = with_cache(named, given_cache(named), name)
    return named


def key_value_layout_of(config) -> list[tuple[int, int, int]]:
    """`(kv_heads, key_dim, value_dim)` of each layer, as a config says: right for layers that are all alike."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return [(kv_heads, head_dim, head_dim)] * config.num_hidden_layers


# ------------------------------------------------------------------ how far back layers attend


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


# ------------------------------------------------------------------ embeddings per layer (Gemma 3n, Gemma 4)


def has_per_layer_inputs(decoder: nn.Module) -> bool:
    """Whether the decoder looks up embeddings per layer."""
    return PER_LAYER_INPUTS in forward_parameters(type(decoder)) and bool(decoder.config.hidden_size_per_layer_input)


def of_prompts_alone(decoder: nn.Module, prompts: torch.Tensor) -> dict[str, torch.Tensor]:
    """Further arguments of a decoder that is run on prompts `[m, K, d]` alone."""
    needed = has_per_layer_inputs(decoder) and not _can_go_without(decoder)
    return {PER_LAYER_INPUTS: _of_padding(decoder, prompts)} if needed else {}


def of_input(decoder: nn.Module, ids: torch.Tensor | None, embeds: torch.Tensor) -> torch.Tensor | None:
    """The looked-up part of an input, `[batch, n, layers, width]`; `None` where the decoder goes without.

    Args:
        ids (`torch.Tensor`, *optional*): `[batch, n]`. Without them Gemma 4 finds them by the embeddings.
        embeds (`torch.Tensor`): `[batch, n, d]`.
    """
    if ids is not None:
        return _looked_up(decoder, ids)
    return None if _can_go_without(decoder) else decoder.get_per_layer_inputs(None, embeds)


def of_prompts_beside_input(decoder: nn.Module, prompts: torch.Tensor) -> torch.Tensor:
    """The part of prompts `[batch, K, d]` where the tokens beside them have one: `[batch, K, layers, width]`.

    Gemma 3n computes `(projected + looked_up) * scale` for a token with an id, and `projected` for one without: so its
    prompts are given what comes to the same.
    """
    if not _can_go_without(decoder):
        return _of_padding(decoder, prompts)
    projected = decoder.project_per_layer_inputs(prompts)
    return projected / decoder.per_layer_input_scale.to(projected) - projected


def _can_go_without(decoder: nn.Module) -> bool:
    return "inputs_embeds" not in inspect.signature(decoder.get_per_layer_inputs).parameters


def _of_padding(decoder: nn.Module, embeds: torch.Tensor) -> torch.Tensor:
    padding = torch.full(embeds.shape[:2], decoder.config.pad_token_id or 0, device=embeds.device)
    return _looked_up(decoder, padding)


def _looked_up(decoder: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """What layers look up by token id. Some versions of Gemma 4 must be given embeddings too, or `None`."""
    return decoder.get_per_layer_inputs(ids) if _can_go_without(decoder) else decoder.get_per_layer_inputs(ids, None)
