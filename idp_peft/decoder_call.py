"""The hooks on the decoder: a prompt in front of each row on the way in, the caller's own shapes on the way out."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import nn
from transformers import DynamicCache, StaticCache

from idp_peft import call as calls
from idp_peft.choice import prompts_for
from idp_peft.concatenation import Concatenation
from idp_peft.decoder import by_name, distances_from_slots, forward_parameters, has_alibi, needs_full_mask
from idp_peft.input_checks import (
    check_room,
    checked_inputs,
    checked_mask,
    refuse_packed,
    refuse_without_own_generate,
)
from idp_peft.prompt_cache import check_finite
from idp_peft.prompted_cache import PromptPart, adopt, decoder_view, is_prompted
from idp_peft.selection import check_prompt_ids


@dataclass
class _Frame:
    """What `before` leaves for `after` of the same forward."""

    cache: object = None  # the caller's cache, which counts input positions
    view: object = None  # what the decoder worked on
    returns_cache: bool = True
    concatenation: Concatenation | None = None


_frames: ContextVar[_Frame | None] = ContextVar("idp_frame", default=None)


class DecoderCall:
    """Puts a prompt in front of every row of a decoder's input, or recognises the one that is there.

    Args:
        layer (`IDPLayer`): whose prompts are applied.
    """

    def __init__(self, layer) -> None:
        self.layer = layer

    def before(self, decoder: nn.Module, args: tuple, kwargs: dict):
        """Forward pre-hook."""
        if calls.is_internal_run():
            return None
        kwargs = by_name(decoder, args, kwargs)
        cache = kwargs.get("past_key_values")
        started = is_prompted(cache) and cache.idp_part is not None
        name = self.layer.active_name
        if name is None:
            if started and cache.idp_part.positions:
                cache.refuse()
            if is_prompted(cache):
                _enter(kwargs, _Frame(cache=cache, view=decoder_view(cache)))
        elif started:
            self._continue(decoder, kwargs, cache)
        else:
            held = 0 if cache is None else int(cache.get_seq_length())
            if held:
                raise ValueError(
                    f"`past_key_values` already holds {held} tokens that no prompt of adapter {name!r} stands in front "
                    "of: start from an empty cache"
                )
            self._start(decoder, kwargs, cache)
        return (), kwargs

    def after(self, decoder: nn.Module, args: tuple, kwargs: dict, output):
        """Forward post-hook: the caller's cache and the caller's n positions; runs after errors too."""
        frame = _frames.get()
        if calls.is_internal_run() or frame is None:
            return None
        _frames.set(None)
        if output is None:
            return None
        cache = frame.cache if frame.returns_cache else None
        if isinstance(output, tuple):
            if frame.concatenation is not None:
                output = (output[0][:, frame.concatenation.front :], *output[1:])
            return tuple(cache if part is frame.view and part is not None else part for part in output)
        if frame.concatenation is not None:
            frame.concatenation.drop_front(output)
        if getattr(output, "past_key_values", None) is not None:
            output["past_key_values"] = cache
        return output

    # ------------------------------------------------------------------ a cache that holds its prompt already

    def _continue(self, decoder: nn.Module, kwargs: dict, cache) -> None:
        part: PromptPart = cache.idp_part
        inputs = checked_inputs(kwargs)
        batch, tokens = inputs.shape[:2]
        if batch != len(part.prompt_ids):
            raise ValueError(f"`past_key_values` holds {len(part.prompt_ids)} rows, the input has {batch}")
        call = calls.current_call(self.layer)
        if call is not None and call.prompt_ids is not None:
            forced = check_prompt_ids(call.prompt_ids, batch, self.layer.active_bank.num_prompts).to(
                part.prompt_ids.device
            )
            if not torch.equal(forced, part.prompt_ids):
                raise ValueError(
                    f"`prompt_ids` {forced.tolist()} differ from those `past_key_values` was started with, "
                    f"{part.prompt_ids.tolist()}: a choice is kept for every turn; start a new cache to change it"
                )
        past = int(cache.get_seq_length())
        mask = checked_mask(kwargs, batch, past + tokens, "past_key_values and the input")
        check_room(decoder, past + tokens, part.positions)
        if kwargs.get("position_ids") is not None:
            positions = kwargs["position_ids"]
        elif mask is not None:
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]
        else:
            positions = torch.arange(past, past + tokens, device=inputs.device)[None]
        kwargs["attention_mask"] = _mask_with_prompt(decoder, cache, part, mask, batch, past + tokens)
        _set_positions(decoder, kwargs, positions + part.shift)
        _enter(kwargs, _Frame(cache=cache, view=decoder_view(cache)))

    # ------------------------------------------------------------------ a fresh input

    def _start(self, decoder: nn.Module, kwargs: dict, cache) -> None:
        layer, bank = self.layer, self.layer.active_bank
        bank.is_new = False
        inputs = checked_inputs(kwargs)
        batch, tokens = inputs.shape[:2]
        refuse_without_own_generate(layer, kwargs)
        mask = checked_mask(kwargs, batch, tokens, "the input")
        real = torch.ones(batch, tokens, dtype=torch.bool, device=inputs.device) if mask is None else mask.bool()
        refuse_packed(kwargs, real)
        check_room(decoder, tokens, bank.max_length, real if mask is not None else None)

        with_graph = torch.is_grad_enabled() and (bank.weight.requires_grad or decoder.training)
        checkpointing = decoder.training and with_graph and getattr(decoder, "gradient_checkpointing", False)
        returns_cache = _returns_cache(decoder, kwargs)
        padded_between = (
            mask is not None
            and distances_from_slots(decoder, None if returns_cache else bank.max_length + tokens)
            and not bool(real[:, 0].all())
        )
        prompt_cache = None
        if with_graph and not (checkpointing or padded_between):
            prompt_cache = layer.prompt_cache_with_graph()

        prompt_ids = prompts_for(layer, kwargs, real, prompt_cache).to(inputs.device)
        has_prompt = prompt_ids >= 0
        all_prompted = bool(has_prompt.all())
        any_prompted = all_prompted or bool(has_prompt.any())
        if not any_prompted and cache is None and not returns_cache:
            return  # the base model, exactly
        part = PromptPart(prompt_ids, positions=0, shift=0, mask=None)
        if any_prompted:
            part.positions = bank.max_length
            part.shift = bank.max_length if all_prompted else (has_prompt * bank.max_length)[:, None]  # [B, 1]
            if not all_prompted or len(set(bank.lengths)) > 1:
                part.mask = bank.real_slots()[prompt_ids.clamp(min=0)].to(inputs.device) & has_prompt[:, None]  # [B, K]
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = (real.long().cumsum(-1) - 1).clamp(min=0)
        positions = positions + part.shift  # [B or 1, n]

        if checkpointing or (padded_between and any_prompted):
            returns_cache = returns_cache and not checkpointing
            self._start_concatenated(decoder, kwargs, cache, part, real, positions, returns_cache, padded_between)
            return
        cache = DynamicCache(config=decoder.config) if cache is None else cache
        adopt(cache)
        view = decoder_view(cache)
        if any_prompted:
            if prompt_cache is None:
                prompt_cache = layer.prompt_cache()
            prompt_cache.put_rows(prompt_ids.clamp(min=0), view)
        kwargs["attention_mask"] = _mask_with_prompt(decoder, cache, part, mask, batch, tokens)
        _set_positions(decoder, kwargs, positions)
        cache.idp_part = part
        _enter(kwargs, _Frame(cache=cache, view=view, returns_cache=returns_cache))

    def _start_concatenated(self, decoder, kwargs, cache, part, real, positions, returns_cache, padding_first) -> None:
        """Prepend embeddings; the decoder computes the prompt with the input."""
        bank = self.layer.active_bank
        embeds = kwargs.pop("inputs_embeds", None)
        ids = kwargs.pop("input_ids", None)
        embeds = self.layer.get_base_layer()(ids) if embeds is None else embeds
        tokens = bank.tokens()
        check_finite(bank, tokens)
        rows = part.prompt_ids.clamp(min=0)
        prompts = tokens.to(embeds.dtype)[bank.token_index("right")][rows]  # [B, K, d]
        slots = part.mask if part.mask is not None else real.new_ones(len(embeds), bank.max_length)
        joined = Concatenation.build(prompts, slots, embeds, real, positions.expand(len(embeds), -1), padding_first)
        kwargs.update(inputs_embeds=joined.inputs_embeds, attention_mask=joined.attention_mask)
        _set_positions(decoder, kwargs, joined.position_ids)
        frame = _Frame(returns_cache=returns_cache, concatenation=joined)
        if returns_cache:
            frame.cache = DynamicCache(config=decoder.config) if cache is None else cache
            adopt(frame.cache)
            frame.view = decoder_view(frame.cache)
            part.mask, part.covered = joined.attention_mask.bool(), embeds.shape[1]
            frame.cache.idp_part = part
        _enter(kwargs, frame)


def _enter(kwargs: dict, frame: _Frame) -> None:
    if frame.view is not None:
        kwargs["past_key_values"] = frame.view
    _frames.set(frame)


def _returns_cache(decoder: nn.Module, kwargs: dict) -> bool:
    """Whether the caller gets a cache back, and so may go on from it."""
    use_cache = kwargs.get("use_cache")
    wanted = decoder.config.use_cache if use_cache is None else use_cache
    return bool(wanted) or kwargs.get("past_key_values") is not None


def _mask_with_prompt(decoder, cache, part: PromptPart, mask, batch: int, total: int) -> torch.Tensor | None:
    """What the decoder gets as `attention_mask`: `[batch, positions + total]`, or `None`."""
    whole = part.extend_mask(mask, batch, total, always=needs_full_mask(decoder))
    if whole is not None and isinstance(cache, StaticCache) and has_alibi(decoder):
        # The bias is built from the mask and must be as long as the keys: all slots of a static cache.
        whole = nn.functional.pad(whole, (0, cache.layers[0].max_cache_len - whole.shape[1]))
    return whole


def _set_positions(decoder: nn.Module, kwargs: dict, positions: torch.Tensor) -> None:
    """Give the decoder explicit positions; transformers 5.0's cache positions then follow from the cache."""
    kwargs.pop("cache_position", None)
    if "position_ids" in forward_parameters(type(decoder)):
        kwargs["position_ids"] = positions
