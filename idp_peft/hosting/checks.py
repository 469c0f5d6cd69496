"""Checks of a call: what IDP refuses to run, with the reason."""

from __future__ import annotations

import torch
from torch import nn
from transformers import Cache, EncoderDecoderCache, StaticCache

from idp_peft.hosting.architectures import (
    distances_from_slots,
    first_scaled_slot,
    gathers_layers,
    given_cache,
    has_changing_rotary,
    position_limit,
    shares_keys_in_cache,
)
from idp_peft.hosting.input_cache import is_prompted
from idp_peft.hosting.introspection import (
    continuous_batching_under_construction,
    is_continuous_batching,
    variables_of_generate,
)
from idp_peft.hosting.prompt_ids import CHOOSES, check_prompt_ids
from idp_peft.hosting.trainers import packs_rows

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


def checked_tokens(
    decoder: nn.Module, positions: int, inputs: dict, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """Which tokens of an input are no padding, bool `[batch, n]`; the input must fit behind `positions` prompt positions."""
    source = checked_inputs(inputs)
    mask = checked_mask({"attention_mask": attention_mask}, *source.shape[:2], "the input")
    real = source.new_ones(source.shape[:2], dtype=torch.bool) if mask is None else mask.to(source.device).bool()
    check_room(decoder, real.shape[1], positions, real)
    return real


def refuse_packed(kwargs: dict, mask: torch.Tensor) -> None:
    """Raise where a row holds several documents: each would need a prompt of its own."""
    packed = any(kwargs.get(name) is not None for name in ("cu_seq_lens_q", "seq_idx", "cu_seqlens"))
    positions = kwargs.get("position_ids")
    if not packed and positions is not None and positions.ndim == 2 and positions.shape[-1] == mask.shape[-1] > 1:
        both_real = mask[:, 1:] & mask[:, :-1]
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
    if is_continuous_batching(type(cache)):
        raise ValueError(_NO_CONTINUOUS)
    raise ValueError(
        f"IDP needs a cache of the decoder's own keys and values (transformers' `DynamicCache`, `StaticCache`, or a subclass of "
        f"`Cache` with layers), got a {type(cache).__name__}: pass one of these, or none"
    )


def refuse_continuous_batching(model: nn.Module) -> None:
    """Raise while a manager of transformers' continuous batching is constructed. The attention implementation is restored."""
    frame = continuous_batching_under_construction()
    if frame is None:
        return
    manager, paged = frame.f_locals.get("self"), model.config._attn_implementation
    before = getattr(manager, "_original_attn_impl", None) or paged.removeprefix("paged|")
    if before != paged:
        model.set_attn_implementation(before)
    raise ValueError(_NO_CONTINUOUS)


def refuse_lost_cache(model: nn.Module, call, kwargs: dict, tokens: int) -> None:
    """Raise for a step of `generate` that lost both the cache and the tokens before it."""
    mask = kwargs.get("attention_mask")
    covers_more = isinstance(mask, torch.Tensor) and mask.shape[-1] > tokens
    if call.generating and call.checked and covers_more:
        raise ValueError(
            f"`generate` of {type(model).__name__} dropped the cache and passed {tokens} of {mask.shape[-1]} tokens, as "
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


def refuse_right_padding_by_hosts_generate(model: nn.Module, call, mask: torch.Tensor | None) -> None:
    """The same within a `generate` that did not come through [`IDPModel.generate`], which asks for itself."""
    if not call.generating and variables_of_generate(model):
        refuse_right_padding(mask)


def refuse_cache_under_checkpointing() -> None:
    """Raise for a cache that the layers would drop, and the prompt in it."""
    raise ValueError(
        "a model in training mode with gradient checkpointing drops the cache: call `model.eval()` before "
        "`generate`, or pass `use_cache=False`"
    )


def refuse_key_values(checkpointing: bool, padding_first: bool) -> None:
    """Raise where a prompt would have to be computed with its input, which one of keys and values cannot be."""
    if checkpointing:
        why = "gradient checkpointing drops the cache that holds the prompt: turn it off, or use prompts='tokens'"
    elif padding_first:
        why = (
            "this decoder measures distance in slots, and padding would stand between the prompt and its text: pad on the right, "
            "send rows of one length, or use prompts='tokens'"
        )
    else:
        why = "this cache does not give back what it was given: use the default cache, or prompts='tokens'"
    raise ValueError(f"a prompt of keys and values stands in a cache alone, and {why}")


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


def check_room(decoder: nn.Module, tokens: int, positions: int, mask: torch.Tensor | None = None) -> None:
    """Raise where a decoder with a position table has no positions left for the input behind the prompt.

    Args:
        tokens (`int`): length of the input, padding included.
        positions (`int`): K.
        mask (`torch.Tensor`, *optional*): bool `[batch, n]`; padding takes no position.
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
    tokens = tokens if mask is None else int(mask.sum(-1).max())
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


def padding_must_stand_first(
    decoder: nn.Module, mask: torch.Tensor | None, tokens: int, positions: int, call, goes_on: bool
) -> bool:
    """Whether left padding between prompt and input would be counted as distance, now or later in this text.

    Args:
        mask (`torch.Tensor`, *optional*): `[batch, n]`, the caller's.
        tokens (`int`): n, padding included.
        positions (`int`): K.
        goes_on (`bool`): whether further tokens may follow: as many as `generate` says, or nobody knows how many.
    """
    if mask is None:
        return False
    slots = (call.total if call.generating else None) if goes_on else tokens
    slots = None if slots is None else slots + positions
    refuse_scaled_padding(decoder, tokens + positions if slots is None else slots, mask)
    return distances_from_slots(decoder, slots) and not bool(mask[:, 0].all())


def refuse_tokens_without_prompt(cache, adapter: str) -> None:
    """Raise for a cache that holds tokens with no prompt in front of them."""
    held = 0 if cache is None else int(cache.get_seq_length())
    if held:
        raise ValueError(
            f"the cache already holds {held} tokens that no prompt of adapter {adapter!r} stands in front of: start from an "
            "empty cache"
        )


def refuse_later_tokens_in_a_turn(call) -> None:
    """Raise for new tokens of a later turn that see tokens behind them."""
    if call.ready is not None:
        raise ValueError(
            "IDP cannot add tokens that see later ones (those of a picture) to a cache: give a model all its pictures in "
            "the first turn, and in one piece (without `prefill_chunk_size`)"
        )


def prompts_of_earlier_turn(layer, call, front, rows: int) -> torch.Tensor:
    """The prompts that a cache was started with; a call may not ask for others, since a choice is kept for every turn.

    Args:
        layer (`IDPLayer`): whose adapter is active.
        front (`Front`): the prompts at the front of the cache.
        rows (`int`): rows that the caller gave.

    Returns:
        `torch.Tensor`: int64 `[rows]`, the prompts that were chosen before.
    """
    kept = front.prompt_ids[:: len(front.prompt_ids) // rows]
    if front.started_by != layer.signature:
        raise ValueError(
            f"the cache was started by adapter {front.started_by[1]!r} of "
            f"{'this' if front.started_by[0] == layer.signature[0] else 'another'} model, adapter "
            f"{layer.active_name!r} is active: start a new cache, or switch back"
        )
    if call.prompt_ids is not None:
        config = layer.active_config
        forced = check_prompt_ids(call.prompt_ids, rows, config.num_prompts, config.prompt_names).to(kept.device)
        forced = torch.where(forced == CHOOSES, kept, forced)
        if not torch.equal(forced, kept):
            raise ValueError(
                f"`prompt_ids` {forced.tolist()} differ from those the cache was started with, {kept.tolist()}: a choice is "
                "kept for every turn; start a new cache to change it"
            )
    if call.selection_mask is not None:
        raise ValueError("`selection_mask` cannot steer a choice that the cache was started with: start a new cache")
    return kept


def refuse_without_own_generate(model: nn.Module, chooses: bool, call, kwargs: dict) -> None:
    """Raise for a `generate` that did not come through [`IDPModel.generate`] and needs what only that does.

    Args:
        chooses (`bool`): whether the active adapter has several prompts to choose from.
    """
    if call.generating or call.prompt_ids is not None:
        return
    frames = variables_of_generate(model)
    if not frames:
        return
    cache = given_cache(kwargs)
    settings = next((frame["generation_config"] for frame in frames if "generation_config" in frame), None)
    held = [given_cache(frame["model_kwargs"]) for frame in frames if "model_kwargs" in frame]
    argument = None
    if cache is not None and cache.is_compileable and not is_prompted(cache):
        argument, why = "cache_implementation='static'", "sizes a static cache without room for the prompt"
    elif chooses:
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
        elif any(is_prompted(one) and one.idp_front is not None for one in held):
            argument, why = "...", "dropped the cache that holds its prompt, and would choose again"
    if argument is None:
        return
    raise ValueError(
        f"generate({argument}) {why} when the adapter was added by transformers' own adapter methods: wrap the model with "
        "peft (`PeftModel.from_pretrained`, `get_peft_model`), or use the default cache"
    )
