"""What IDP refuses to run, and the error that says why: never silently different."""

from __future__ import annotations

import sys

import torch
from torch import nn
from transformers import Cache, EncoderDecoderCache, StaticCache

from idp_peft import call as calls
from idp_peft.hosting.architectures import (
    gathers_layers,
    given_cache,
    has_changing_rotary,
    position_limit,
    shares_keys_in_cache,
)
from idp_peft.hosting.input_cache import is_prompted
from idp_peft.hosting.reach import first_scaled_slot
from idp_peft.hosting.trainers import frames_of_generate, packs_rows

_CONTINUOUS = "transformers.generation.continuous_batching"
_NO_CONTINUOUS = (
    "IDP cannot run in transformers' continuous batching (`generate_batch`, `init_continuous_batching`, "
    "cache_implementation='paged'), which packs the tokens of several texts into one row over paged memory: there is no "
    "place in front of each text for its own prompt. Use `generate`, or write the prompts into the vocabulary (`idp-peft "
    "export --to-vocab`) and batch the exported model"
)


def checked_inputs(kwargs: dict) -> torch.Tensor:
    """`input_ids` `[batch, n]` or `inputs_embeds` `[batch, n, d]` of a call, not empty."""
    inputs = kwargs.get("input_ids")
    inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
    if inputs is None:
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    if 0 in inputs.shape[:2]:
        raise ValueError(f"the input is empty: got {inputs.shape[0]} rows of {inputs.shape[1]} tokens")
    return inputs


def checked_mask(kwargs: dict, batch: int, slots: int, of: str) -> torch.Tensor | None:
    """The caller's `attention_mask`, 2-D `[batch, slots]` or `None`."""
    mask = kwargs.get("attention_mask")
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        kind = f"a {mask.ndim}-D tensor" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(
            f"IDP needs a 2-D `attention_mask` [batch, tokens], got {kind}: ready-made masks have no room for the "
            "prompt. Give the 2-D one to the model itself, not to its decoder (transformers' `generate` makes others for "
            "static caches; through peft's they work)"
        )
    if isinstance(given_cache(kwargs), StaticCache) and mask.shape[1] > slots:
        mask = mask[:, :slots]  # BLOOM pads its mask to the static cache's length
    if tuple(mask.shape) != (batch, slots):
        raise ValueError(f"`attention_mask` must cover {of}, [{batch}, {slots}], got {list(mask.shape)}")
    return mask


def real_tokens(layer, inputs: dict, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Which tokens of an input that has room behind a layer's prompts are no padding: bool `[batch, n]`."""
    source = checked_inputs(inputs)
    mask = checked_mask({"attention_mask": attention_mask}, *source.shape[:2], "the input")
    real = source.new_ones(source.shape[:2], dtype=torch.bool) if mask is None else mask.to(source.device).bool()
    check_room(layer.decoder, real.shape[1], layer.active_bank.max_length, real)
    return real


def refuse_packed(kwargs: dict, real: torch.Tensor) -> None:
    """Raise where a row holds several documents: each would need a prompt of its own."""
    packed = any(kwargs.get(name) is not None for name in ("cu_seq_lens_q", "seq_idx", "cu_seqlens"))
    positions = kwargs.get("position_ids")
    if not packed and positions is not None and positions.ndim == 2 and positions.shape[-1] == real.shape[-1] > 1:
        both_real = real[:, 1:] & real[:, :-1]
        packed = bool(((positions[:, 1:] <= positions[:, :-1]) & both_real).any())
    if packed or packs_rows():
        raise ValueError(
            "IDP cannot run packed rows (several documents in one row, `position_ids` that start again): each document "
            "would need its own prompt; turn packing off (TRL: `packing=False`, `padding_free=False`)"
        )


def refuse_foreign_cache(cache) -> None:
    """Raise for a cache that is not one decoder's keys and values, row by row."""
    if cache is None or (isinstance(cache, Cache) and not isinstance(cache, EncoderDecoderCache)):
        return
    if type(cache).__module__.startswith(_CONTINUOUS):
        raise ValueError(_NO_CONTINUOUS)
    raise ValueError(
        f"IDP needs a cache of the decoder's own keys and values (transformers' `DynamicCache`, `StaticCache`, or a subclass of "
        f"`Cache` with layers), got a {type(cache).__name__}: pass one of these, or none"
    )


def refuse_continuous_batching(model: nn.Module) -> None:
    """Raise inside the making of a manager for transformers' continuous batching, and leave the attention as it was."""
    frame = sys._getframe(1)
    while frame is not None and not frame.f_globals.get("__name__", "").startswith(_CONTINUOUS):
        frame = frame.f_back
    if frame is None:
        return
    manager, paged = frame.f_locals.get("self"), model.config._attn_implementation
    before = getattr(manager, "_original_attn_impl", None) or paged.removeprefix("paged|")
    if before != paged:
        model.set_attn_implementation(before)
    raise ValueError(_NO_CONTINUOUS)


def refuse_lost_cache(layer, kwargs: dict, tokens: int) -> None:
    """Raise for a step of `generate` that lost both the cache and the tokens before it."""
    call, mask = calls.current_call(layer), kwargs.get("attention_mask")
    covers_more = isinstance(mask, torch.Tensor) and mask.shape[-1] > tokens
    if call is not None and call.generating and call.seen and covers_more:
        raise ValueError(
            f"`generate` of {type(layer.model).__name__} dropped the cache and passed {tokens} of {mask.shape[-1]} tokens, as "
            "Phi-3 does in transformers 5.0 where its rotary frequencies change: use a newer transformers, or texts that "
            "stay on one side of that length"
        )


def refuse_right_padding(mask: torch.Tensor | None) -> None:
    """Raise where `generate` would write a row's new tokens behind its padding.

    Args:
        mask (`torch.Tensor`, *optional*): `[batch, tokens]`, over the whole input.
    """
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        return
    wrong = mask.any(-1) & ~mask[:, -1].bool()
    if bool(wrong.any()):
        raise ValueError(
            f"`generate` needs padding on the left: row(s) {wrong.nonzero().flatten().tolist()} end in padding, and new "
            "tokens would come behind it. Set `tokenizer.padding_side = 'left'` before you tokenize"
        )


def refuse_right_padding_by_hosts_generate(layer, mask: torch.Tensor | None) -> None:
    """The same within a `generate` that did not come through [`IDPModel.generate`], which asks for itself."""
    call = calls.current_call(layer)
    if (call is None or not call.generating) and frames_of_generate(layer.model):
        refuse_right_padding(mask)


def refuse_cache_under_checkpointing() -> None:
    """Raise for a cache that the layers would drop, and the prompt in it."""
    raise ValueError(
        "a model in training mode with gradient checkpointing drops the cache: call `model.eval()` before "
        "`generate`, or pass `use_cache=False`"
    )


def refuse_shared_keys_without_cache(decoder: nn.Module) -> None:
    """Raise for layers that share keys and values in the cache, under gradient checkpointing, which drops it."""
    if shares_keys_in_cache(decoder):
        raise ValueError(
            f"{type(decoder).__name__} of this transformers version shares keys and values between layers in its cache alone, and "
            "gradient checkpointing drops the cache: what it trained would not be what it generates; turn gradient "
            "checkpointing off, or upgrade transformers"
        )


def refuse_lengths_by_layer(decoder: nn.Module) -> None:
    """Raise for rotary frequencies that depend on the length where layers are gathered over processes one by one: a
    process with longer rows would compute a prompt cache that the others do not, and wait for them for ever."""
    if has_changing_rotary(decoder) and gathers_layers(decoder):
        raise ValueError(
            "IDP cannot run a model whose rotary frequencies depend on the length (`rope_type` 'dynamic' or 'longrope') under "
            "FSDP2 with layers of their own: wrap the model as a whole (`fsdp_auto_wrap_policy: NO_WRAP`), or use DDP"
        )


def check_room(decoder: nn.Module, tokens: int, positions: int, real: torch.Tensor | None = None) -> None:
    """Raise where a decoder with a position table has no positions left for the input behind the prompt.

    Args:
        tokens (`int`): length of the input, padding included.
        positions (`int`): K.
        real (`torch.Tensor`, *optional*): bool `[batch, n]`, the attention mask; padding takes no position.
    """
    keys = getattr(decoder.config, "keep_window_size", None)
    if keys is not None and tokens + positions > keys:
        raise ValueError(
            f"{tokens} input tokens and {positions} prompt positions are more than the {keys} keys that the model attends to "
            "at once (`keep_window_size`), and which of them it drops depends on later tokens: shorten the input to "
            f"{max(keys - positions, 0)} tokens"
        )
    limit = position_limit(decoder)
    if limit is None or tokens + positions <= limit:
        return
    tokens = tokens if real is None else int(real.sum(-1).max())
    if tokens + positions > limit:
        raise ValueError(
            f"{tokens} input tokens and {positions} prompt positions need {tokens + positions} positions, but the model "
            f"has {limit}: shorten the input to {max(limit - positions, 0)} tokens"
        )


def refuse_scaled_padding(decoder: nn.Module, slots: int, mask: torch.Tensor | None) -> None:
    """Raise where left padding would be counted as text by a decoder that scales its attention by the slot of a token.

    Args:
        slots (`int`): how many slots will be used at most, the prompt's among them.
        mask (`torch.Tensor`, *optional*): `[batch, slots so far]`, the caller's.
    """
    first = first_scaled_slot(decoder)
    if first is not None and slots > first and mask is not None and not bool(mask[:, 0].all()):
        raise ValueError(
            f"IDP cannot run left-padded rows of {slots} positions on {type(decoder).__name__}: from {first} on it scales "
            "attention by a token's place in the cache, padding included: run each row alone"
        )


def refuse_without_own_generate(layer, kwargs: dict) -> None:
    """Raise for a `generate` that did not come through [`IDPModel.generate`] and needs what only that does."""
    call = calls.current_call(layer)
    if call is not None and (call.generating or call.prompt_ids is not None):
        return
    frames = frames_of_generate(layer.model)
    if not frames:
        return
    cache, config = given_cache(kwargs), layer.active_config
    settings = next((frame["generation_config"] for frame in frames if "generation_config" in frame), None)
    held = [given_cache(frame["model_kwargs"]) for frame in frames if "model_kwargs" in frame]
    argument = None
    if cache is not None and cache.is_compileable and not is_prompted(cache):
        argument, why = "cache_implementation='static'", "sizes a static cache without room for the prompt"
    elif config.chooses:
        if any(frame.get("custom_generate") is not None for frame in frames):
            argument, why = "custom_generate=...", "may choose again, or by a part of the input"
        elif kwargs.get("use_cache") is False and cache is None:
            argument, why = "use_cache=False", "would choose a prompt again at every step"
        elif any("candidate_generator" in frame for frame in frames):
            argument, why = "assisted decoding", "would let drafted tokens steer the choice"
        elif getattr(settings, "prefill_chunk_size", None) is not None:
            argument, why = "prefill_chunk_size=...", "would choose by the first chunk alone"
        elif getattr(settings, "guidance_scale", None) not in (None, 1):
            argument, why = "guidance_scale=...", "would choose a second prompt for the unconditional pass"
        elif any(is_prompted(one) and one.idp_part is not None for one in held):
            argument, why = "...", "dropped the cache that holds its prompt, and would choose again"
    if argument is None:
        return
    raise ValueError(
        f"generate({argument}) {why} when the adapter was added by transformers' own adapter methods: wrap the model with "
        "peft (`PeftModel.from_pretrained`, `get_peft_model`), or use the default cache"
    )
