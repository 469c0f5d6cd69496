"""Masks and positions that a multimodal model builds for its decoder, corrected for the prompt.

A causal language model hands its decoder what the caller wrote. A multimodal one may build the masks itself (Gemma 3 and 4,
Molmo 2) and the positions (EXAONE 4.5, Fuyu, Gemma 4), for the caller's tokens alone. For text, both follow from the
caller's 2-D mask, so the decoder gets that one and builds its own, with the prompt in them. Masks that show tokens to
earlier ones, as within a picture, follow from nothing else: they are kept, and get room for the prompt (`ready_masks.py`).
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import StaticCache

from idp_peft.hosting.architectures import PER_LAYER_INPUTS, given_cache
from idp_peft.hosting.ready_masks import ReadyMasks, is_ready_made

_DECODER_INPUTS = ("input_ids", "inputs_embeds")
_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
_NEEDED_TO_TRAIN = {"gemma3": "token_type_ids", "molmo2": "mm_token_type_ids"}  # Gemma 3: in transformers 5.0


def take_back(kwargs: dict, call, cache, past: int) -> None:
    """Put the caller's mask and positions back into a decoder's call, in place. Masks that show later tokens stay with the call.

    Args:
        kwargs (`dict`): the decoder's call.
        call (`Call`): the model's.
        cache (`transformers.Cache`, *optional*): the caller's.
        past (`int`): tokens in it.

    Raises:
        `ValueError`: where they do in a form that has no room for a prompt.
    """
    call.ready = None
    if call.given.get("position_ids") is None and _counts_slots(kwargs.get("position_ids"), past):
        kwargs["position_ids"] = None
    made, given = kwargs.get("attention_mask"), call.given.get("attention_mask")
    if not is_ready_made(made) or is_ready_made(given):
        return
    kwargs["attention_mask"] = given
    ready = ReadyMasks(made)
    static = isinstance(cache, StaticCache)
    types = [call.given[name] for name in _TOKEN_TYPES if call.given.get(name) is not None]
    if ready.are_tensors:
        special = ready.show_later_tokens(given, past if static else None)
    else:
        special = any(bool(each.any()) for each in types)
    if special and (static or not ready.are_tensors):
        what = "a static cache" if static else "flex attention"
        raise ValueError(
            f"IDP cannot put a prompt into the masks of {what} where they show tokens of a picture to earlier ones: use the "
            "default cache, and load the base model with attn_implementation='sdpa'"
        )
    call.ready = ready if special else None


def read_by_choice(kwargs: dict, call) -> dict[str, torch.Tensor]:
    """What a choice reads of a decoder's call, each `[batch, n, ...]`.

    Beside `input_ids` or `inputs_embeds` (and `per_layer_inputs`) what the model around the decoder knows more of:
    `token_ids` `[batch, n]` of embeddings, `axes` `[batch, n, axes]` of positions with several (M-RoPE), and `masks`
    `[batch, n, kinds, n]` of pictures, whose tokens see later ones.
    """
    inputs = {name: kwargs[name] for name in (*_DECODER_INPUTS, PER_LAYER_INPUTS) if kwargs.get(name) is not None}
    ids, positions = call.given.get("input_ids"), kwargs.get("position_ids")
    if "inputs_embeds" in inputs and ids is not None and ids.shape == inputs["inputs_embeds"].shape[:2]:
        inputs["token_ids"] = ids
    if positions is not None and positions.ndim == 3:
        inputs["axes"] = positions.movedim(0, -1)
    if call.ready is not None:
        inputs["masks"] = call.ready.stack()
    return inputs


def is_made_by_model(cache, call) -> bool:
    """Whether an empty cache is one that the model brought along by itself (SmolVLM), in a call that gave none."""
    if cache is None or call.generating or given_cache(call.given) is not None:
        return False
    return not int(cache.get_seq_length())


def marked_as_text(model: nn.Module, kwargs: dict) -> dict:
    """A training call of text alone, with the token types that some models need in training: all of them text.

    Args:
        model (`nn.Module`): the causal language model.
        kwargs (`dict`): its call, by name.
    """
    name = _NEEDED_TO_TRAIN.get(model.config.model_type)
    ids = kwargs.get("input_ids")
    rest = [value for key, value in kwargs.items() if key != "attention_mask"]
    other = any(isinstance(value, torch.Tensor) and value.is_floating_point() for value in rest)
    if name is None or kwargs.get(name) is not None or ids is None or other:
        return kwargs
    return {**kwargs, name: torch.zeros_like(ids)}


def _counts_slots(positions, past: int) -> bool:
    """Whether positions are just slot numbers, padding included."""
    if positions is None or positions.ndim != 2:
        return False
    slots = torch.arange(past, past + positions.shape[1], device=positions.device)
    return bool((positions == slots).all())
