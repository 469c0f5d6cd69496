"""What IDP needs to know about a base model's decoder, read from its modules and config where they tell."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from itertools import chain
from types import CodeType

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from idp_peft.sharding import gathers, whole_shape

_ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
_POSITION_TABLES = ("wpe", "embed_positions")
_REACH_MASKS = {"create_sliding_window_causal_mask", "create_chunked_causal_mask"}
_PLAIN = ("DynamicCache", "EncoderDecoderCache", "StaticCache", "Cache", "HybridCache")
_HYBRID = "has_previous_state"  # what hybrid decoders ask their cache; the caches of transformers 5.0 do not know
_CACHE_NAMES = ("cache", "past_key_values")  # transformers 5.24 renamed the argument, and takes the old name too
_TEXT = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
_CONDITIONS = ("cross_attention_states", "t_cond")  # arguments of layers: pictures in Mllama, sound in Voxtral Realtime


def find_decoder(model: nn.Module) -> nn.Module:
    """The decoder of a causal language model: what turns embeddings into the hidden states its head reads.

    Raises:
        `ValueError`: for a model on which a prompt's keys and values could not stand for the prompt, with what it is in the
            model that stands against it.
    """
    name = type(model).__name__
    if getattr(model, "config", None) is None or not callable(getattr(model, "get_decoder", None)):
        raise ValueError(f"IDP needs a transformers model with `get_decoder()`, got {name}")
    decoder = decoder_of(model)
    _refuse_other_than_text(model, decoder, name)
    _refuse_other_layers(decoder, name)
    return decoder


def decoder_of(model: nn.Module) -> nn.Module:
    """The innermost decoder of a model: `get_decoder()`, and on from classes with a head of their own on the way (Llama 4,
    BLIP-2) or at which it stops too early (ModernBERT's decoder)."""
    found, passed = model, []
    while not any(found is module for module in passed):
        passed.append(found)
        inner = (found.get_decoder(), found.base_model, getattr(found, "model", None))
        found = next((m for m in inner if isinstance(m, PreTrainedModel) and m is not found), found)
    return found


def _refuse_other_than_text(model: nn.Module, decoder: nn.Module, name: str) -> None:
    """Raise for a model that is no causal language model of text alone."""
    takes = inspect.signature(type(model).forward).parameters
    if type(model).forward is nn.Module.forward:
        raise ValueError(f"IDP needs a model that can be called: {name} has no `forward`, `generate` alone")
    needed = [
        argument.name
        for argument in list(takes.values())[1:]
        if argument.default is argument.empty
        and argument.kind is argument.POSITIONAL_OR_KEYWORD
        and argument.name not in _TEXT
    ]
    if needed:
        raise ValueError(f"IDP needs a model that reads text: {name} cannot be called without `{needed[0]}`")
    if getattr(model.config, "is_encoder_decoder", False) or "decoder_input_ids" in takes:
        raise ValueError(f"IDP needs a decoder-only model: {name} is an encoder-decoder")
    if "image_embeds" in forward_parameters(type(decoder)):
        raise ValueError(
            f"IDP needs a decoder that is given text alone: that of {name} puts pictures between its tokens itself "
            "(`image_embeds`)"
        )
    if decoder is model:
        raise ValueError(f"IDP needs a causal language model with its head (AutoModelForCausalLM), got {name}")
    beside = _beside_text(decoder)
    if beside is not None:
        raise ValueError(
            f"IDP needs layers that read nothing but their text: those of {name} also read what comes from elsewhere "
            f"(`{beside}`), and a prompt's keys and values would depend on it"
        )
    causal = [m.is_causal for m in decoder.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    if getattr(decoder.config, "is_causal", True) is False or (causal and not any(causal)):
        raise ValueError(f"IDP needs causal attention: {name} attends in both directions")
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:
        embeddings = None
    if getattr(embeddings, "weight", None) is None:
        kind = "none" if embeddings is None else f"a {type(embeddings).__name__}"
        raise ValueError(f"IDP needs one table of input embeddings (`get_input_embeddings()`): {name} has {kind}")


def _beside_text(decoder: nn.Module) -> str | None:
    """Name of what a decoder's layers read beside their own hidden states: an encoder, pictures, a condition."""
    blocks = find_blocks(decoder)
    if blocks is None:
        return None
    for name, module in decoder.named_modules():
        last = name.rpartition(".")[2]
        if last == "encoder_attn" or "cross_att" in last or "CrossAttention" in type(module).__name__:
            return name
    for block in blocks[1]:
        for name in _CONDITIONS:
            if name in forward_parameters(type(block)):
                return name
    return None


def _refuse_other_layers(decoder: nn.Module, name: str) -> None:
    """Raise where a prompt could not stand in the layers as keys and values at positions, or its layers are not where IDP
    reads them."""
    kind = type(decoder).__name__
    if cache_name(type(decoder)) is None:
        raise ValueError(f"IDP needs a decoder that takes a cache of keys and values, which {kind} does not")
    blocks = find_blocks(decoder)
    if blocks is None:
        raise ValueError(
            f"IDP needs the decoder's layers in one list, one module per hidden layer: {kind} of {name} has no such list"
        )
    own = next(
        (made for made in names_in_forward(type(decoder)) if made.endswith("Cache") and made not in _PLAIN), None
    )
    if own is not None:
        raise ValueError(f"IDP needs layers that keep keys and values alone: {name} keeps a {own}")
    for layer, cache_layer in enumerate(DynamicCache(config=decoder.config).layers):
        if type(cache_layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ValueError(
                f"IDP needs plain, sliding or chunked attention in every layer of the decoder: layer {layer} of {name} keeps "
                f"a {type(cache_layer).__name__}"
            )
        kept = getattr(cache_layer, "sliding_window", None)
        if (
            kept is not None
            and not masks_by_reach(decoder)
            and kept < getattr(decoder.config, "max_position_embeddings", kept)
        ):
            raise ValueError(
                f"IDP needs masks and a cache that agree: layer {layer} of {name} keeps the last {kept} positions, its mask "
                "shows them all, and so its own generation differs from one pass over the same text"
            )
    if position_limit(decoder) is not None and "position_ids" not in forward_parameters(type(decoder)):
        raise ValueError(
            f"IDP needs a decoder that takes `position_ids`, which {kind} does not: its padded batches could not be right"
        )
    for layer, block in enumerate(blocks[1]):
        if (found := find_attention(block)) is None:
            raise ValueError(
                f"IDP needs attention in every layer of the decoder: found none in layer {layer} of {name} (looked for "
                f"{', '.join(f'`{known}`' for known in _ATTENTION_NAMES)})"
            )
        attention = getattr(block, found)
        own = next(
            (child for child, it in block.named_children() if "cache_params" in forward_parameters(type(it))), None
        )
        if own is not None:
            raise ValueError(
                f"IDP needs layers that keep keys and values alone: layer {layer} of {name} also keeps a state (`{own}`)"
            )
        if "cache_offset" in forward_parameters(type(attention)):
            raise ValueError(
                f"IDP needs layers that keep one set of keys and values: those of {name} run several times for a token, and "
                "keep one set for each (`cache_offset`)"
            )
        if hasattr(attention, "prepare_dynamic_mask") and not _always_masks(decoder):
            raise ValueError(
                f"IDP needs causal attention: in this version of transformers, {name} attends in both directions where no mask "
                "is needed: load it with attn_implementation='eager'"
            )
        if uses_interface(type(attention)) and not hasattr(attention, "layer_idx"):
            raise ValueError(f"IDP needs attention modules that know their `layer_idx`, which those of {name} do not")


def _always_masks(decoder: nn.Module) -> bool:
    """Whether a decoder whose layers write into their mask (Doge) makes one even where attention could do without."""
    constants = str(inspect.unwrap(type(decoder).forward).__code__.co_consts)
    return decoder.config._attn_implementation == "eager" or "allow_is_causal_skip" in constants


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
    return found


@cache
def names_in_forward(module_class: type[nn.Module]) -> list[str]:
    """Every name that a module class's forward looks up."""

    def names(code) -> list[str]:
        inner = (names(part) for part in code.co_consts if isinstance(part, CodeType))
        return [*code.co_names, *chain.from_iterable(inner)]

    return names(inspect.unwrap(module_class.forward).__code__)


def masks_by_reach(decoder: nn.Module) -> bool:
    """Whether a decoder asks transformers for masks of windows or chunks: Moshi's cache keeps a window, and its masks do not
    know of it."""
    return not _REACH_MASKS.isdisjoint(names_in_forward(type(decoder)))


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


def needs_full_mask(decoder: nn.Module) -> bool:
    """Whether the decoder must be given a mask even where nothing is masked: the mask code of some transformers 5.0
    models (StableLM) counts a slot too many behind a filled cache unless a mask says how many there are."""
    return hasattr(decoder, "_update_causal_mask")


def rotary_length(decoder: nn.Module, tokens: int) -> int | None:
    """The length by which the decoder chooses its rotary frequencies for `tokens` tokens; `None` where they are fixed
    (they depend on the length with `rope_type` "dynamic" and "longrope", beyond the original context)."""
    config = decoder.config
    rope = getattr(config, "rope_parameters", None) or {}
    for group in [rope] if "rope_type" in rope else [part for part in rope.values() if isinstance(part, dict)]:
        kind = group.get("rope_type") or "default"
        original = group.get("original_max_position_embeddings") or config.max_position_embeddings
        if kind == "longrope" and tokens > original:
            return original + 1
        if "dynamic" in kind and tokens > config.max_position_embeddings:
            return tokens
    return None


def has_changing_rotary(decoder: nn.Module) -> bool:
    """Whether [`rotary_length`] can be anything but `None`."""
    return rotary_length(decoder, 2**40) is not None


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
