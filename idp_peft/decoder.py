"""What IDP needs to know about a base model's decoder, read from its modules and config where they tell."""

from __future__ import annotations

import inspect
from functools import cache

import torch
from torch import nn
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from idp_peft.sharding import gathers, whole_shape

_ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
_POSITION_TABLES = ("wpe", "embed_positions")
_CACHE_NAMES = ("cache", "past_key_values")  # transformers 5.24 renamed the argument, and takes the old name too
_PLAIN_CACHES = (DynamicLayer, DynamicSlidingWindowLayer)
_NO_CACHE = getattr(cache_utils, "DummyLayer", DynamicLayer)  # of a layer that reads the keys and values of another
_BIDIRECTIONAL = ("bert", "roberta", "xlm-roberta", "electra", "camembert", "megatron-bert")


def find_decoder(model: nn.Module) -> nn.Module:
    """The decoder of a causal language model: what turns embeddings into the hidden states its head reads.

    Raises:
        `ValueError`: for a model that is no decoder-only causal language model, has no attention, or is only the
            decoder without its head.
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not callable(getattr(model, "get_decoder", None)):
        raise ValueError(f"IDP needs a transformers model with `get_decoder()`, got {name}")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"IDP needs a decoder-only model: {name} is an encoder-decoder")
    decoder = model.get_decoder()
    classifies = model.get_output_embeddings() is None and not model.can_generate()
    if classifies or decoder is model or decoder is None or getattr(decoder, "config", None) is None:
        raise ValueError(f"IDP needs a causal language model with its head (AutoModelForCausalLM), got {name}")
    if decoder.config.model_type in _BIDIRECTIONAL and not decoder.config.is_decoder:
        raise ValueError(f"IDP needs causal attention: {name} attends in both directions (`is_decoder=False`)")
    blocks = find_blocks(decoder)
    without = None if blocks is None else next((i for i, b in enumerate(blocks[1]) if find_attention(b) is None), None)
    if blocks is None or without is not None:
        where = "" if without is None else f" in layer {without}"
        raise ValueError(f"IDP needs attention in every layer of the decoder: found none{where} of {name}")
    if not all(getattr(getattr(block, find_attention(block)), "is_causal", True) for block in blocks[1]):
        raise ValueError(
            f"IDP needs causal attention: {name} attends in both directions over its input, so the keys and values of a "
            "prompt would depend on the input behind it"
        )
    _refuse_unknown_caches(decoder, name)
    return decoder


def _refuse_unknown_caches(decoder: nn.Module, name: str) -> None:
    """Raise where a layer keeps more than keys and values per token, or the decoder cannot be told positions."""
    parameters = forward_parameters(type(decoder))
    if cache_name(type(decoder)) is None:
        raise ValueError(
            f"IDP needs a decoder that takes a cache of keys and values, which {type(decoder).__name__} does not"
        )
    if position_limit(decoder) is not None and "position_ids" not in parameters:
        raise ValueError(
            f"IDP needs a decoder that takes `position_ids`, which {type(decoder).__name__} does not: its padded batches "
            "could not be right"
        )
    for layer, cache_layer in enumerate(DynamicCache(config=decoder.config).layers):
        if type(cache_layer) not in (*_PLAIN_CACHES, _NO_CACHE):
            raise ValueError(
                f"IDP needs plain or sliding attention in every layer of the decoder: layer {layer} of {name} keeps a "
                f"{type(cache_layer).__name__}"
            )
    for block in find_blocks(decoder)[1]:
        if not hasattr(getattr(block, find_attention(block)), "layer_idx"):
            raise ValueError(f"IDP needs attention modules that know their `layer_idx`, which those of {name} do not")


def find_blocks(decoder: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """Name and list of the decoder's layers: its `ModuleList` with one entry per hidden layer."""
    layers = getattr(decoder.config, "num_hidden_layers", None)
    for name, child in decoder.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == layers:
            return name, child
    return None


def find_attention(block: nn.Module) -> str | None:
    """Name of a layer's self-attention module."""
    return next((name for name in _ATTENTION_NAMES if isinstance(getattr(block, name, None), nn.Module)), None)


def gathers_layers(decoder: nn.Module) -> bool:
    """Whether what makes a layer's keys and values is gathered over processes for that layer alone (FSDP2)."""
    blocks = find_blocks(decoder)[1]
    return any(gathers(part) for block in blocks for part in (block, getattr(block, find_attention(block))))


@cache
def forward_parameters(module_class: type[nn.Module]) -> tuple[str, ...]:
    """Names of the arguments of a module class's forward, in order, without `self`."""
    return tuple(inspect.signature(module_class.forward).parameters)[1:]


@cache
def cache_name(module_class: type[nn.Module]) -> str | None:
    """What a module class's forward calls its cache of keys and values; `None` where it takes none."""
    return next((name for name in _CACHE_NAMES if name in forward_parameters(module_class)), None)


def given_cache(kwargs: dict):
    """The cache among the arguments of a call, or in a model's output, by whichever name; `None` without one."""
    return next((kwargs[name] for name in _CACHE_NAMES if kwargs.get(name) is not None), None)


def with_cache(kwargs: dict, cache, name: str) -> dict:
    """A call's arguments with a cache under its one name."""
    return {**{key: value for key, value in kwargs.items() if key not in _CACHE_NAMES}, name: cache}


def replace_cache(output, cache) -> None:
    """Hand back another cache in a model's output that holds one."""
    name = next((name for name in _CACHE_NAMES if name in output), None)
    if name is not None:
        output[name] = cache


@cache
def uses_interface(attention_class: type[nn.Module]) -> bool:
    """Whether an attention class gets its attention function from transformers' `AttentionInterface`."""
    return "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(attention_class.forward).__code__.co_names


def has_alibi(decoder: nn.Module) -> bool:
    """Whether distances enter the attention as an ALiBi bias that the decoder builds itself."""
    config = decoder.config
    return config.model_type in ("bloom", "mpt") or (config.model_type == "falcon" and bool(config.alibi))


def check_selection_layer(decoder: nn.Module, layer: int, reads_attention: bool = True) -> None:
    """Raise for a layer that cannot decide.

    Args:
        layer (`int`): as in `IDPConfig.selection_layer`, negative from the end.
        reads_attention (`bool`): whether the choice reads that layer's attention at all.

    Raises:
        `ValueError`: outside the decoder, or above the first layer of a model with ALiBi.
    """
    layers = len(find_blocks(decoder)[1])
    if not -layers <= layer < layers:
        raise ValueError(f"`selection_layer` must be between {-layers} and {layers - 1} for this model, got {layer}")
    if reads_attention and has_alibi(decoder) and layer % layers:
        raise ValueError(
            f"`selection_layer` must be 0 on {decoder.config.model_type!r}, a model with ALiBi, got {layer}: its deeper "
            "layers cannot be shown all prompts at their own distances"
        )


def distances_from_slots(decoder: nn.Module, slots: int | None) -> bool:
    """Whether the decoder measures some distance in cache slots, padding included: an ALiBi bias built from the length
    (MPT), or a sliding window that `slots` slots fill.

    Args:
        slots (`int`, *optional*): how many slots will be used at most; `None` where the sequence may go on.
    """
    config = decoder.config
    if config.model_type == "mpt":
        return True
    window = getattr(config, "sliding_window", None)
    if window is None or not getattr(config, "use_sliding_window", True):
        return False
    return slots is None or slots >= window


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
    """The length by which the decoder chooses its rotary frequencies for `tokens` tokens; `None` where they are fixed
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
    """Whether the decoder keeps the rotary frequencies of its longest input for shorter ones behind it, as it does with
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


def has_learned_positions(decoder: nn.Module) -> bool:
    """Whether positions are looked up in a learned table, so that where a text starts changes what it means."""
    return any(isinstance(getattr(decoder, name, None), nn.Embedding) for name in _POSITION_TABLES)


def embedding_dtype(embeddings: nn.Module, decoder: nn.Module) -> torch.dtype:
    """The dtype in which the decoder expects its input embeddings."""
    dtype = embeddings.weight.dtype
    return dtype if dtype.is_floating_point else decoder.dtype


def embedding_width(embeddings: nn.Module) -> int:
    """d, the width of the decoder's input embeddings (of a quantised table: what it says of itself)."""
    return whole_shape(embeddings.weight)[-1] if embeddings.weight.is_floating_point() else embeddings.embedding_dim


def by_name(module: nn.Module, args: tuple, kwargs: dict) -> dict:
    """A call's arguments by name, as a new dict; a cache by the name that the module's own forward has for it."""
    named = {**dict(zip(forward_parameters(type(module)), args, strict=False)), **kwargs} if args else dict(kwargs)
    name = cache_name(type(module))
    if any(other in named for other in _CACHE_NAMES if other != name):
        named = with_cache(named, given_cache(named), name)
    return named
