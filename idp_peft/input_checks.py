"""What IDP refuses to run, and the error that says why: never silently different."""

from __future__ import annotations

import sys

import torch
from torch import nn
from transformers import StaticCache

from idp_peft import call as calls
from idp_peft.decoder import gathers_layers, given_cache, has_changing_rotary, position_limit
from idp_peft.host_loop import packs_rows
from idp_peft.prompted_cache import is_prompted
from idp_peft.reach import first_scaled_slot


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
            "prompt (transformers builds one for static caches; through peft's `generate` they work)"
        )
    if isinstance(given_cache(kwargs), StaticCache) and mask.shape[1] > slots:
        mask = mask[:, :slots]  # BLOOM pads its mask to the static cache's length
    if tuple(mask.shape) != (batch, slots):
        raise ValueError(f"`attention_mask` must cover {of}, [{batch}, {slots}], got {list(mask.shape)}")
    return mask


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


def refuse_cache_under_checkpointing() -> None:
    """Raise for a cache that the layers would drop, and the prompt in it."""
    raise ValueError(
        "a model in training mode with gradient checkpointing drops the cache: call `model.eval()` before "
        "`generate`, or pass `use_cache=False`"
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
    frames = _generate_frames(layer.model)
    if not frames:
        return
    cache, config = given_cache(kwargs), layer.active_config
    settings = next((frame["generation_config"] for frame in frames if "generation_config" in frame), None)
    argument = None
    if isinstance(cache, StaticCache) and not is_prompted(cache):
        argument, why = "cache_implementation='static'", "sizes a static cache without room for the prompt"
    elif config.num_prompts > 1 and config.selection != "fixed":
        if kwargs.get("use_cache") is False and cache is None:
            argument, why = "use_cache=False", "would choose a prompt again at every step"
        elif any("candidate_generator" in frame for frame in frames):
            argument, why = "assisted decoding", "would let drafted tokens steer the choice"
        elif getattr(settings, "prefill_chunk_size", None) is not None:
            argument, why = "prefill_chunk_size=...", "would choose by the first chunk alone"
        elif getattr(settings, "guidance_scale", None) not in (None, 1):
            argument, why = "guidance_scale=...", "would choose a second prompt for the unconditional pass"
    if argument is None:
        return
    raise ValueError(
        f"generate({argument}) {why} when the adapter was added by transformers' own adapter methods: wrap the model with "
        "peft (`PeftModel.from_pretrained`, `get_peft_model`), or use the default cache"
    )


def _generate_frames(model: nn.Module) -> list[dict]:
    """Local variables of the functions of this model's `generate` that are running its forward; empty outside of one."""
    found, frame = [], sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "transformers.generation.utils" and frame.f_locals.get("self") is model:
            found.append(frame.f_locals)
        frame = frame.f_back
    return found
