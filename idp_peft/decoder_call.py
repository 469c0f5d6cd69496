"""The hooks on the decoder: a prompt in front of each row on the way in, the caller's own shapes on the way out."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import nn
from transformers import DynamicCache, StaticCache

from idp_peft import call as calls
from idp_peft.choice import prompts_for
from idp_peft.hosting.architectures import (
    by_name,
    cache_name,
    find_blocks,
    forward_parameters,
    gathers_layers,
    given_cache,
    has_alibi,
    has_changing_rotary,
    keeps_rotary,
    needs_full_mask,
    reads_again,
    replace_cache,
    rotary_length,
    shares_keys_in_cache,
    with_cache,
)
from idp_peft.hosting.checks import (
    check_room,
    checked_inputs,
    checked_mask,
    refuse_cache_under_checkpointing,
    refuse_foreign_cache,
    refuse_lengths_by_layer,
    refuse_lost_cache,
    refuse_packed,
    refuse_right_padding_by_hosts_generate,
    refuse_scaled_padding,
    refuse_shared_keys_without_cache,
    refuse_without_own_generate,
)
from idp_peft.hosting.concatenation import Concatenation, keep_last
from idp_peft.hosting.input_cache import PromptPart, adopt, decoder_view, is_prompted, stores_exactly
from idp_peft.hosting.outer_model import is_made_by_model, take_back
from idp_peft.hosting.per_layer_inputs import NAME, has_per_layer_inputs, of_input, of_prompts_beside_input
from idp_peft.hosting.prompt_ids import CHOOSES, check_prompt_ids
from idp_peft.hosting.reach import distances_from_slots
from idp_peft.hosting.sharding import unwrapped
from idp_peft.hosting.trainers import frames_of_generate
from idp_peft.prompt_cache import check_finite
from idp_peft.selection import Selection


@dataclass
class _Frame:
    """What `before` leaves for `after` of the same forward."""

    cache: object = None  # the caller's cache, which counts input positions
    view: object = None  # what the decoder worked on
    returns_cache: bool = True
    keep: int = 0  # the caller's positions, where the decoder ran others in front of them


_frames: ContextVar[_Frame | None] = ContextVar("idp_frame", default=None)


class DecoderCall:
    """Puts a prompt in front of every row of a decoder's input, or recognises the one that is there.

    Args:
        layer (`IDPLayer`): whose prompts are applied.
    """

    def __init__(self, layer) -> None:
        self.layer = layer

    @torch.compiler.disable
    def before(self, decoder: nn.Module, args: tuple, kwargs: dict):
        """Forward pre-hook."""
        if calls.is_internal_run():
            return None
        _frames.set(None)
        kwargs = by_name(decoder, args, kwargs)
        cache = given_cache(kwargs)
        started = is_prompted(cache) and cache.idp_part is not None
        name = self.layer.active_name
        if name is not None:
            refuse_foreign_cache(cache)
        if name is not None and _is_checkpointing(decoder):
            if is_made_by_model(cache, calls.current_call(self.layer)):
                kwargs, cache = with_cache(kwargs, None, cache_name(type(decoder))), None
            if cache is not None or self._generates_with_cache(kwargs):
                refuse_cache_under_checkpointing()
            refuse_shared_keys_without_cache(decoder)
        if name is None:
            if started and cache.idp_part.positions:
                cache.refuse()
            if is_prompted(cache):
                _enter(decoder, kwargs, _Frame(cache=cache, view=decoder_view(cache)))
        elif started:
            self._continue(decoder, kwargs, cache)
        else:
            held = 0 if cache is None else int(cache.get_seq_length())
            if held:
                raise ValueError(
                    f"the cache already holds {held} tokens that no prompt of adapter {name!r} stands in front "
                    "of: start from an empty cache"
                )
            self._start(decoder, kwargs, cache)
        return (), kwargs

    @torch.compiler.disable
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
            if frame.keep:
                output = (output[0][:, -frame.keep :], *output[1:])
            return tuple(cache if part is frame.view and part is not None else part for part in output)
        if frame.keep:
            keep_last(output, frame.keep)
        replace_cache(output, cache)
        return output

    # ------------------------------------------------------------------ a cache that holds its prompt already

    def _generates_with_cache(self, kwargs: dict) -> bool:
        call = calls.current_call(self.layer)
        return call is not None and call.generating and _returns_cache(self.layer.decoder, kwargs)

    def _continue(self, decoder: nn.Module, kwargs: dict, cache) -> None:
        part: PromptPart = cache.idp_part
        inputs = checked_inputs(kwargs)
        batch, tokens = inputs.shape[:2]
        if batch != len(part.prompt_ids):
            raise ValueError(f"the cache holds {len(part.prompt_ids)} rows, the input has {batch}")
        call = calls.current_call(self.layer)
        if call is not None and not call.seen:
            self._check_next_turn(call, part, batch)
            call.seen = True
        past = int(cache.get_seq_length())
        take_back(kwargs, call, cache, past)
        if call is not None and call.ready is not None:
            raise ValueError(
                "IDP cannot add tokens that see later ones (those of a picture) to a cache: give a model all its pictures in "
                "the first turn, and in one piece (without `prefill_chunk_size`)"
            )
        if part.read is not None:
            part.read = None if inputs.is_floating_point() else torch.cat([part.read, inputs], dim=1)
            if part.read is not None and self._must_read_again(decoder, part, past):
                return self._read_again(decoder, kwargs, cache, tokens)
        mask = checked_mask(kwargs, batch, past + tokens, "the cache and the input")
        if tokens > 1:  # further steps bring one token each, which is real
            refuse_right_padding_by_hosts_generate(self.layer, mask)
        check_room(decoder, past + tokens, part.positions, mask)
        refuse_scaled_padding(decoder, past + tokens + part.positions, mask)
        if kwargs.get("position_ids") is not None:
            positions = kwargs["position_ids"]
        elif mask is not None:
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]
        else:
            positions = torch.arange(past, past + tokens, device=inputs.device)[None]
        kwargs["attention_mask"] = _mask_with_prompt(decoder, cache, part, mask, batch, past + tokens)
        _set_positions(decoder, kwargs, positions + part.shift)
        _enter(decoder, kwargs, _Frame(cache=cache, view=decoder_view(cache)))

    def _must_read_again(self, decoder: nn.Module, part: PromptPart, past: int) -> bool:
        """Whether the base's own `generate` would read a text with these tokens in front again: it looks at the text alone,
        and so would come later by as many tokens as the prompt has."""
        before, now = (rotary_length(decoder, part.positions + tokens) for tokens in (past, part.read.shape[1]))
        if before == now:
            return False
        call = calls.current_call(self.layer)
        return (call is not None and call.generating) or bool(frames_of_generate(self.layer.model))

    def _read_again(self, decoder: nn.Module, kwargs: dict, cache, tokens: int) -> None:
        part: PromptPart = cache.idp_part
        cache.reset()
        if int(cache.get_seq_length()):  # transformers 5.0 fills it with zeros instead
            cache.layers = DynamicCache(config=decoder.config).layers
        kwargs |= {"input_ids": part.read, "position_ids": None}
        self._start(decoder, kwargs, cache, kept=part.prompt_ids)
        _frames.get().keep = tokens

    def _check_next_turn(self, call: calls.Call, part: PromptPart, batch: int) -> None:
        """A choice is kept for every turn: what a call asks for must be what its cache was started with."""
        layer = self.layer
        if part.started_by != layer.signature:
            raise ValueError(
                f"the cache was started by adapter {part.started_by[1]!r} of "
                f"{'this' if part.started_by[0] == layer.signature[0] else 'another'} model, adapter "
                f"{layer.active_name!r} is active: start a new cache, or switch back"
            )
        rows = call.batch if call.generating else batch
        kept = part.prompt_ids[:: batch // rows]
        if call.prompt_ids is not None:
            config = layer.active_config
            forced = check_prompt_ids(call.prompt_ids, rows, config.num_prompts, config.prompt_names).to(kept.device)
            forced = torch.where(forced == CHOOSES, kept, forced)
            if not torch.equal(forced, kept):
                raise ValueError(
                    f"`prompt_ids` {forced.tolist()} differ from those the cache was started with, "
                    f"{kept.tolist()}: a choice is kept for every turn; start a new cache to change it"
                )
        if call.selection_mask is not None:
            raise ValueError(
                "`selection_mask` cannot steer a choice that the cache was started with: start a new cache"
            )
        layer.remember(Selection(kept, prompt_names=layer.active_config.prompt_names))

    # ------------------------------------------------------------------ a fresh input

    def _start(self, decoder: nn.Module, kwargs: dict, cache, kept: torch.Tensor | None = None) -> None:
        """
        Args:
            kept (`torch.Tensor`, *optional*): int64 `[batch]`, prompts that were chosen before; a fresh input chooses.
        """
        layer, bank = self.layer, self.layer.active_bank
        bank.is_new = False
        call = calls.current_call(layer)
        if kept is None:
            refuse_without_own_generate(layer, kwargs)
        take_back(kwargs, call, cache, past=0)
        mask, real = self._checked(decoder, kwargs)
        tokens = real.shape[1]
        if call is not None:
            call.seen = True
        checkpointing = _is_checkpointing(decoder)
        returns_cache = _returns_cache(decoder, kwargs)
        padding_first = self._padding_must_stand_first(decoder, mask, tokens, returns_cache)
        by_layer = gathers_layers(decoder)
        # Behind a layer whose weights are dropped, nothing asks for them again to pass on the gradient of keys and values
        # that left it in a cache: the prompt must go through with its input. So it must where a cache would store it in
        # another way than the base stores the first tokens of a text.
        concatenate = checkpointing or padding_first or (by_layer and layer.trains) or not stores_exactly(cache)

        if by_layer and not layer.trains:
            layer.prompt_cache()  # every process must gather the layers for it, those too whose rows will not read it
        part = self._part((prompts_for(layer, kwargs, real) if kept is None else kept).to(real.device))
        if has_changing_rotary(decoder) and reads_again(layer.model):
            part.read = kwargs.get("input_ids")
        ready = None if call is None else call.ready
        if not part.positions and cache is None and not returns_cache:
            if ready is not None:
                kwargs["attention_mask"] = ready.masks
            return  # the base model, exactly
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = (real.long().cumsum(-1) - 1).clamp(min=0)
        positions = positions + part.shift  # [B or 1, n]
        keeps = returns_cache or shares_keys_in_cache(decoder)
        if (keeps and not checkpointing) or not concatenate or not part.positions:
            cache = DynamicCache(config=decoder.config) if cache is None else cache
            adopt(cache)
            cache.idp_part = part
        frame = _Frame(cache, None if cache is None else decoder_view(cache), returns_cache)

        prompt_slots, joined = part.mask, None
        if concatenate and part.positions:
            joined = self._concatenate(decoder, kwargs, part, real, positions, padding_first)
            frame.keep = tokens
        else:
            if part.positions:
                total = int(positions.max()) + 1 if has_changing_rotary(decoder) else 0
                length = total if keeps_rotary(decoder) else rotary_length(decoder, total)
                self._put_prompts(part.prompt_ids.clamp(min=0), frame.view, length)
            kwargs["attention_mask"] = _mask_with_prompt(decoder, cache, part, mask, len(real), tokens)
            _set_positions(decoder, kwargs, positions)
        if ready is not None:
            prompt_slots = real.new_ones(len(real), part.positions) if prompt_slots is None else prompt_slots
            kwargs["attention_mask"] = ready.with_prompt(decoder, prompt_slots, joined, frame.view)
        _enter(decoder, kwargs, frame)

    def _checked(self, decoder: nn.Module, kwargs: dict) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The caller's mask, and the real tokens it marks: bool `[batch, n]`."""
        inputs = checked_inputs(kwargs)
        batch, tokens = inputs.shape[:2]
        refuse_lost_cache(self.layer, kwargs, tokens)
        refuse_lengths_by_layer(decoder)
        mask = checked_mask(kwargs, batch, tokens, "the input")
        refuse_right_padding_by_hosts_generate(self.layer, mask)
        real = torch.ones(batch, tokens, dtype=torch.bool, device=inputs.device) if mask is None else mask.bool()
        refuse_packed(kwargs, real)
        check_room(decoder, tokens, self.layer.active_bank.max_length, mask)
        return mask, real

    def _padding_must_stand_first(self, decoder: nn.Module, mask, tokens: int, returns_cache: bool) -> bool:
        """Whether left padding between prompt and input would be counted as distance, now or later in this sequence."""
        if mask is None:
            return False
        call, slots = calls.current_call(self.layer), tokens
        if returns_cache:  # the sequence goes on: as far as `generate` says, or who knows how far
            slots = call.total if call is not None and call.generating else None
        slots = None if slots is None else slots + self.layer.active_bank.max_length
        refuse_scaled_padding(decoder, tokens + self.layer.active_bank.max_length if slots is None else slots, mask)
        return distances_from_slots(decoder, slots) and not bool(mask[:, 0].all())

    def _part(self, prompt_ids: torch.Tensor) -> PromptPart:
        """What the chosen prompts add at the front of each row.

        Args:
            prompt_ids (`torch.Tensor`): int64 `[batch]`.
        """
        bank = self.layer.active_bank
        part = PromptPart(prompt_ids, positions=0, shift=0, mask=None, started_by=self.layer.signature)
        has_prompt = prompt_ids >= 0
        every_row = bool(has_prompt.all())
        if every_row or bool(has_prompt.any()):
            part.positions = bank.max_length
            part.shift = bank.max_length if every_row else (has_prompt * bank.max_length)[:, None]  # [B, 1]
            if not every_row or len(set(bank.lengths)) > 1:
                real_slots = bank.real_slots(prompt_ids.device)[prompt_ids.clamp(min=0)]
                part.mask = real_slots & has_prompt[:, None]  # [B, K]
        return part

    def _put_prompts(self, prompt_ids: torch.Tensor, cache, rotary_length: int | None) -> None:
        """Write each row's prompt into an empty cache: a copy of what is known, or, in training, with its graph."""
        if not self.layer.trains:
            self.layer.prompt_cache(rotary_length).put_rows(prompt_ids, cache)
            return
        used, rows = prompt_ids.unique(return_inverse=True)
        self.layer.prompt_cache_with_graph(used, rotary_length).put_rows(rows, cache)

    def _concatenate(self, decoder, kwargs: dict, part: PromptPart, real, positions, padding_first) -> Concatenation:
        """Prepend embeddings; the decoder computes the prompt with the input."""
        bank = self.layer.active_bank
        embeds, ids = kwargs.pop("inputs_embeds", None), kwargs.pop("input_ids", None)
        embeds = self.layer.get_base_layer()(ids) if embeds is None else embeds
        tokens = bank.tokens()
        check_finite(bank, tokens, embeds.dtype)
        index = bank.token_index("right", tokens.device)[part.prompt_ids.clamp(min=0).to(tokens.device)]  # [B, K]
        prompts = tokens.to(embeds.dtype)[index].to(embeds.device)  # [B, K, d]
        slots = part.mask if part.mask is not None else real.new_ones(len(embeds), bank.max_length)
        positions = positions.expand(*positions.shape[:-2], len(embeds), -1)
        joined = Concatenation.build(prompts, slots, embeds, real, positions, padding_first)
        _arrange_others(decoder, kwargs, joined, prompts, ids, embeds)
        kwargs.update(inputs_embeds=joined.inputs_embeds, attention_mask=joined.attention_mask)
        _set_positions(decoder, kwargs, joined.position_ids)
        part.mask, part.covered = joined.attention_mask.bool(), embeds.shape[1]
        return joined


def _arrange_others(decoder: nn.Module, kwargs: dict, joined: Concatenation, prompts, ids, embeds) -> None:
    """Give a concatenated call what else the decoder takes for each token."""
    if has_per_layer_inputs(decoder):
        given = kwargs.pop(NAME, None)
        given = of_input(decoder, ids, embeds) if given is None else given  # [B, n, layers, width]
        if given is not None:
            kwargs[NAME] = joined.arrange(of_prompts_beside_input(decoder, prompts).to(given), given)
    others = set(forward_parameters(type(decoder))) - {NAME, "attention_mask", "position_ids"}
    for name in others & set(kwargs):
        value = kwargs[name]
        if isinstance(value, torch.Tensor) and value.shape[:2] == embeds.shape[:2]:
            if value.dtype != torch.bool:
                raise ValueError(
                    f"IDP cannot put a prompt in front of `{name}` {list(value.shape)} of {type(decoder).__name__}: turn off "
                    "gradient checkpointing, and pad on the right or not at all"
                )
            kwargs[name] = joined.arrange(value.new_zeros(prompts.shape[:2]), value)


def _enter(decoder: nn.Module, kwargs: dict, frame: _Frame) -> None:
    if frame.view is not None:
        kwargs[cache_name(type(decoder))] = frame.view
        kwargs["use_cache"] = True  # some decoders (Whisper) drop a cache that they are given without it
    _frames.set(frame)


def _returns_cache(decoder: nn.Module, kwargs: dict) -> bool:
    """Whether the caller gets a cache back, and so may go on from it."""
    use_cache = kwargs.get("use_cache")
    wanted = decoder.config.use_cache if use_cache is None else use_cache
    return bool(wanted) or given_cache(kwargs) is not None


def _is_checkpointing(decoder: nn.Module) -> bool:
    """Whether layers drop every cache they are given, to be recomputed: they do while they train, with or without
    gradients."""
    if not decoder.training:
        return False
    modules = (decoder, *find_blocks(decoder)[1])
    return any(
        getattr(module, "gradient_checkpointing", False) or unwrapped(module) is not module for module in modules
    )


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
