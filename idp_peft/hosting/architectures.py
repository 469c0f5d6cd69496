"""What IDP needs to know about a base model's decoder, read from its modules and config where they tell."""

from __future__ import annotations

import inspect
from functools import cache
from itertools import chain
from types import CodeType

import torch
from torch import nn
from transformers import PreTrainedModel

from idp_peft.hosting.sharding import gathers, whole_shape

ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
_POSITION_TABLES = ("wpe", "embed_positions")
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
    """Name and list of the decoder's layers: its `ModuleList` with one entry per hidden layer."""
    layers = getattr(decoder.config, "num_hidden_layers", None)
    for name, child in decoder.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == layers:
            return name, child
    return None


def find_attention(block: nn.Module) -> str | None:
    """Name of a layer's self-attention module."""
    return next((name for name in ATTENTION_NAMES if isinstance(getattr(block, name, None), nn.Module)), None)


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
def names_in_forward(module_class: type[nn.Module]) -> list[str]:
    """Every name that a module class's forward looks up."""

    def names(code) -> list[str]:
        inner = (names(part) for part in code.co_consts if isinstance(part, CodeType))
        return [*code.co_names, *chain.from_iterable(inner)]

    return names(inspect.unwrap(module_class.forward).__code__)


@cache
def uses_interface(attention_class: type[nn.Module]) -> bool:
    """Whether an attention class gets its attention function from transformers' `AttentionInterface`."""
    return "ALL_ATTENTION_FUNCTIONS" in names_in_forward(attention_class)


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


def adds_positions(decoder: nn.Module) -> bool:
    """Whether positions are added to the embeddings, learned (GPT-2) or computed (XGLM), so that where a text starts changes
    what it means."""
    return any(isinstance(getattr(decoder, name, None), nn.Module) for name in _POSITION_TABLES)


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
    if name is not None and any(other in named for other in _CACHE_NAMES if other != name):
        named = with_cache(named, given_cache(named), name)
    return named
