"""Which base models can take a prompt as keys and values, and the errors for those that cannot.

Everything is read from the model's modules, the signatures of their `forward`, and the cache that transformers makes for it,
so an untested class is judged by its structure. docs/models.md has the outcome for transformers' own classes.
"""

from __future__ import annotations

import inspect

from torch import nn
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from idp_peft.hosting.architectures import (
    ATTENTION_NAMES,
    cache_name,
    find_attention,
    find_blocks,
    find_decoder,
    forward_parameters,
    masks_by_reach,
    position_limit,
    uses_interface,
)
from idp_peft.hosting.introspection import constants_in_forward, names_in_forward

_TEXT = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
_CONDITIONS = ("cross_attention_states", "t_cond")  # arguments of layers: pictures in Mllama, sound in Voxtral Realtime
_PLAIN_CACHES = ("Cache", "DynamicCache", "StaticCache", "HybridCache", "EncoderDecoderCache")
_NO_CACHE = getattr(cache_utils, "DummyLayer", DynamicLayer)  # of a layer that reads the keys and values of another
_PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, _NO_CACHE)
_HYBRID = "has_previous_state"  # what hybrid decoders ask their cache; the caches of transformers 5.0 do not know


def check_promptable(model: nn.Module) -> None:
    """Raise for a model in which a prompt's keys and values cannot replace the prompt.

    Raises:
        `ValueError`: with what it is in the model that stands against it.
    """
    name, decoder = type(model).__name__, find_decoder(model)
    _check_call(model, name)
    _check_parts(model, decoder, name)
    _check_what_attention_reads(decoder, name)
    _check_cache(decoder, name)
    _check_layers(decoder, name)


def _check_call(model: nn.Module, name: str) -> None:
    """The model must be one that is called with text."""
    if type(model).forward is nn.Module.forward:
        raise ValueError(f"IDP needs a model that can be called: {name} has no `forward`, `generate` alone")
    arguments = inspect.signature(type(model).forward).parameters
    for key, argument in list(arguments.items())[1:]:
        if key not in _TEXT and argument.default is argument.empty and argument.kind is argument.POSITIONAL_OR_KEYWORD:
            raise ValueError(f"IDP needs a model that reads text: {name} cannot be called without `{key}`")
    if getattr(model.config, "is_encoder_decoder", False) or "decoder_input_ids" in arguments:
        raise ValueError(f"IDP needs a decoder-only model: {name} is an encoder-decoder")


def _check_parts(model: nn.Module, decoder: nn.Module, name: str) -> None:
    """The model must be one table of embeddings, a decoder, and a head."""
    classifies = model.get_output_embeddings() is None and not model.can_generate()
    if classifies or decoder is model:
        raise ValueError(f"IDP needs a causal language model with its head (AutoModelForCausalLM), got {name}")
    if "image_embeds" in forward_parameters(type(decoder)):
        raise ValueError(
            f"IDP needs a decoder that is given text alone: that of {name} puts pictures between its tokens itself "
            "(`image_embeds`)"
        )
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:
        embeddings = None
    if getattr(embeddings, "weight", None) is None:
        kind = "none" if embeddings is None else f"a {type(embeddings).__name__}"
        raise ValueError(f"IDP needs one table of input embeddings (`get_input_embeddings()`): {name} has {kind}")


def _check_what_attention_reads(decoder: nn.Module, name: str) -> None:
    """A prompt's keys and values must depend on the prompt alone: not on what stands behind it, nor on anything else."""
    if (beside := _beside_text(decoder)) is not None:
        raise ValueError(
            f"IDP needs layers that read nothing but their text: those of {name} also read what comes from elsewhere "
            f"(`{beside}`), and a prompt's keys and values would depend on it"
        )
    blocks = find_blocks(decoder)
    modules = decoder.modules() if blocks is None else (getattr(b, find_attention(b) or "", None) for b in blocks[1])
    causal = [each for module in modules if isinstance(each := getattr(module, "is_causal", None), bool)]
    every_way = not any(causal) if blocks is None else not all(causal)
    if (causal and every_way) or getattr(decoder.config, "is_causal", True) is False:
        raise ValueError(
            f"IDP needs causal attention: {name} attends in both directions, and a prompt's keys and values would depend on "
            "the input behind it"
        )


def _beside_text(decoder: nn.Module) -> str | None:
    """Name of what a decoder's layers read beside their own hidden states: an encoder, pictures, a condition."""
    blocks = find_blocks(decoder)
    if blocks is None:
        return None
    for name, module in decoder.named_modules():
        last = name.rpartition(".")[2]
        if last == "encoder_attn" or "cross_att" in last or "CrossAttention" in type(module).__name__:
            return name
    return next((name for b in blocks[1] for name in _CONDITIONS if name in forward_parameters(type(b))), None)


def _check_cache(decoder: nn.Module, name: str) -> None:
    """Each layer must keep keys and values per token, and nothing else, and a token's place must be known to the decoder."""
    kind = type(decoder).__name__
    if cache_name(type(decoder)) is None:
        raise ValueError(f"IDP needs a decoder that takes a cache of keys and values, which {kind} does not")
    if find_blocks(decoder) is None:
        raise ValueError(
            f"IDP needs the decoder's layers in one list, one module per hidden layer: {kind} of {name} has no such list"
        )
    names = names_in_forward(type(decoder))
    own = next((each for each in names if each.endswith("Cache") and each not in _PLAIN_CACHES), None)
    if own is None and _HYBRID in names and not hasattr(DynamicCache, _HYBRID):
        own = "cache of hybrid layers"  # even where all of them are attention
    if own is not None:
        raise ValueError(f"IDP needs layers that keep keys and values alone: {name} keeps a {own}")
    for layer, cache_layer in enumerate(DynamicCache(config=decoder.config).layers):
        if type(cache_layer) not in _PLAIN_LAYERS:
            raise ValueError(
                f"IDP needs plain, sliding or chunked attention in every layer of the decoder: layer {layer} of {name} keeps "
                f"a {type(cache_layer).__name__}"
            )
        kept = getattr(cache_layer, "sliding_window", None)
        limit = getattr(decoder.config, "max_position_embeddings", None)
        if kept is not None and not masks_by_reach(decoder) and (limit is None or kept < limit):
            raise ValueError(
                f"IDP needs masks and a cache that agree: layer {layer} of {name} keeps the last {kept} positions, its mask "
                "shows them all, and so its own generation differs from one pass over the same text"
            )
    if position_limit(decoder) is not None and "position_ids" not in forward_parameters(type(decoder)):
        raise ValueError(
            f"IDP needs a decoder that takes `position_ids`, which {kind} does not: its padded batches could not be right"
        )


def _check_layers(decoder: nn.Module, name: str) -> None:
    """Attention must be where IDP reads it, in every layer, once per token."""
    for layer, block in enumerate(find_blocks(decoder)[1]):
        if (found := find_attention(block)) is None:
            raise ValueError(
                f"IDP needs attention in every layer of the decoder: found none in layer {layer} of {name} (looked for "
                f"{', '.join(f'`{known}`' for known in ATTENTION_NAMES)})"
            )
        attention = getattr(block, found)
        for child, module in block.named_children():
            if "cache_params" in forward_parameters(type(module)):
                raise ValueError(
                    f"IDP needs layers that keep keys and values alone: layer {layer} of {name} also keeps a state (`{child}`)"
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
    constants = constants_in_forward(type(decoder))
    return decoder.config._attn_implementation == "eager" or "allow_is_causal_skip" in constants
