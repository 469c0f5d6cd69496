"""One call of a decoder: what the caller gave, checked, and what the decoder gets once a prompt stands in front."""

from __future__ import annotations

import torch
from torch import nn
from transformers import DynamicCache, StaticCache

from idp_peft.hosting.architectures import (
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
    padding_must_stand_first,
    prompts_of_earlier_turn,
    refuse_cache_under_checkpointing,
    refuse_foreign_cache,
    refuse_key_values,
    refuse_later_tokens_in_a_turn,
    refuse_lengths_by_layer,
    refuse_lost_cache,
    refuse_packed,
    refuse_right_padding_by_hosts_generate,
    refuse_scaled_padding,
    refuse_shared_keys_without_cache,
    refuse_tokens_without_prompt,
    refuse_without_own_generate,
)
from idp_peft.hosting.concatenation import Concatenation, keep_last
from idp_peft.hosting.input_cache import Front, count_input_positions, decoder_view, is_prompted, stores_exactly
from idp_peft.hosting.introspection import variables_of_generate
from idp_peft.hosting.outer_model import is_made_by_model, take_back
from idp_peft.hosting.sharding import unwrapped


class DecoderInput:
    """The caller's arguments for a decoder: read, given a prompt, and passed on. [`read`] sets what stands under Attributes.

    Args:
        decoder (`nn.Module`): the base model's decoder.
        kwargs (`dict`): its arguments by name, the caller's; changed in place.
        call (`Call`): the call of the model that this one is a part of.

    Attributes:
        mask (`torch.Tensor`, *optional*): `[batch, past + n]`, the caller's; `None` where all tokens are real.
        tokens (`int`): n, the caller's new tokens.
        past (`int`): the caller's tokens that the cache holds already.
        positions (`torch.Tensor`): `[batch or 1, n]` or `[axes, batch, n]`, as if no prompt stood in front.
        front (`Front`, *optional*): the prompts in front, once there are any.
        kept_ids (`torch.Tensor`, *optional*): int64 `[batch]`, the prompts of a text that must be read again from its start.
        next_turn_ids (`torch.Tensor`, *optional*): int64, the prompts that an earlier call chose, where this is the first
            input of another call.
        cache: the caller's cache, which counts input positions; `view`: the same, as the decoder sees it.
    """

    def __init__(self, decoder: nn.Module, kwargs: dict, call) -> None:
        self.decoder, self.kwargs, self.call = decoder, kwargs, call
        self.cache = given_cache(kwargs)
        self.front: Front | None = self.cache.idp_front if is_prompted(self.cache) else None
        self.kept_ids: torch.Tensor | None = None
        self.next_turn_ids: torch.Tensor | None = None
        self.view = self.mask = self.joined = None
        self.past = self.tokens = self.keep = 0
        self.returns_cache, self.concatenates = True, False

    # ------------------------------------------------------------------ what the caller gave

    def without_adapter(self) -> dict:
        """The arguments while no adapter is active: those of the base, which cannot go on from a prompt."""
        if self.front is not None and self.front.positions:
            self.cache.refuse()
        return self._with_view() if is_prompted(self.cache) else self.kwargs

    def read(self, layer) -> DecoderInput:
        """Check the call and find its tokens, mask and positions.

        Args:
            layer (`IDPLayer`): whose active adapter is applied.

        Raises:
            `ValueError`: for what would not be right with a prompt in front.
        """
        refuse_foreign_cache(self.cache)
        if _is_checkpointing(self.decoder):
            if is_made_by_model(self.cache, self.call):
                self.kwargs, self.cache = with_cache(self.kwargs, None, cache_name(type(self.decoder))), None
            if self.cache is not None or (self.call.generating and _returns_cache(self.decoder, self.kwargs)):
                refuse_cache_under_checkpointing()
            refuse_shared_keys_without_cache(self.decoder)
        if self.front is not None:
            self._read_next(layer)
        else:
            refuse_tokens_without_prompt(self.cache, layer.active_name)
            refuse_without_own_generate(layer.model, layer.active_config.chooses, self.call, self.kwargs)
            self._read_first(layer)
        return self

    def _read_first(self, layer) -> None:
        """The beginning of a text."""
        kwargs, decoder, call = self.kwargs, self.decoder, self.call
        longest = layer.active_bank.max_length
        take_back(kwargs, call, self.cache, past=0)
        inputs = checked_inputs(kwargs)
        batch, self.tokens = inputs.shape[:2]
        refuse_lost_cache(layer.model, call, kwargs, self.tokens)
        refuse_lengths_by_layer(decoder)
        self.mask = checked_mask(kwargs, batch, self.tokens, "the input")
        refuse_right_padding_by_hosts_generate(layer.model, call, self.mask)
        ones = torch.ones(batch, self.tokens, dtype=torch.bool, device=inputs.device)
        self.real_tokens = ones if self.mask is None else self.mask.bool()
        refuse_packed(kwargs, self.real_tokens)
        check_room(decoder, self.tokens, longest, self.mask)
        call.checked = True
        self.returns_cache = _returns_cache(decoder, kwargs)
        self.padding_first = padding_must_stand_first(
            decoder, self.mask, self.tokens, longest, call, goes_on=self.returns_cache
        )
        given = kwargs.get("position_ids")
        self.positions = (self.real_tokens.long().cumsum(-1) - 1).clamp(min=0) if given is None else given

    def _read_next(self, layer) -> None:
        """The next tokens of a text whose cache holds its prompt."""
        kwargs, decoder, call, front = self.kwargs, self.decoder, self.call, self.front
        inputs = checked_inputs(kwargs)
        batch, self.tokens = inputs.shape[:2]
        if batch != len(front.prompt_ids):
            raise ValueError(f"the cache holds {len(front.prompt_ids)} rows, the input has {batch}")
        if not call.checked:
            rows = call.batch if call.generating else batch
            self.next_turn_ids = prompts_of_earlier_turn(layer, call, front, rows)
            call.checked = True
        self.past = int(self.cache.get_seq_length())
        take_back(kwargs, call, self.cache, self.past)
        refuse_later_tokens_in_a_turn(call)
        if front.read is not None:
            front.read = None if inputs.is_floating_point() else torch.cat([front.read, inputs], dim=1)
            if front.read is not None and self._must_read_again(layer.model):
                return self._read_again(layer)
        total = self.past + self.tokens
        self.mask = checked_mask(kwargs, batch, total, "the cache and the input")
        if self.tokens > 1:  # further steps bring one token each, which is real
            refuse_right_padding_by_hosts_generate(layer.model, call, self.mask)
        check_room(decoder, total, front.positions, self.mask)
        refuse_scaled_padding(decoder, total + front.positions, self.mask)
        if kwargs.get("position_ids") is not None:
            self.positions = kwargs["position_ids"]
        elif self.mask is not None:
            self.positions = (self.mask.long().cumsum(-1) - 1).clamp(min=0)[:, -self.tokens :]
        else:
            self.positions = torch.arange(self.past, total, device=inputs.device)[None]

    def _must_read_again(self, model: nn.Module) -> bool:
        """Whether the base's own `generate` would read a text with these tokens in front again: it looks at the text alone,
        and so would do it later, by as many tokens as the prompt has."""
        lengths = (self.front.positions + tokens for tokens in (self.past, self.front.read.shape[1]))
        before, now = (rotary_length(self.decoder, length) for length in lengths)
        return before != now and (self.call.generating or bool(variables_of_generate(model)))

    def _read_again(self, layer) -> None:
        front, self.front, self.keep, self.past = self.front, None, self.tokens, 0
        self.cache.reset()
        if int(self.cache.get_seq_length()):  # transformers 5.0 fills it with zeros instead
            self.cache.layers = DynamicCache(config=self.decoder.config).layers
        self.kwargs |= {"input_ids": front.read, "position_ids": None}
        self.kept_ids = front.prompt_ids
        self._read_first(layer)

    # ------------------------------------------------------------------ a prompt in front

    @property
    def is_base_alone(self) -> bool:
        """Whether nothing of IDP is in this call: no row has a prompt, and no cache comes back."""
        return not self.front.positions and self.cache is None and not self.returns_cache

    def begin(self, front: Front, layer) -> None:
        """Begin a text with the prompts of `front`: decide how they get in front, and open the cache that keeps them.

        Args:
            front (`Front`): the prompt of each row.
            layer (`IDPLayer`): the adapter's.
        """
        decoder, self.front = self.decoder, front
        if has_changing_rotary(decoder) and reads_again(layer.model):
            front.read = self.kwargs.get("input_ids")
        if self.is_base_alone:
            return
        checkpointing = _is_checkpointing(decoder)
        # FSDP2 does not gather a layer's weights again for gradients that arrive through cached keys and values. And some
        # caches would not store a prompt as they store the first tokens of a text.
        inexact = not stores_exactly(self.cache)
        holds_keys = layer.active_bank.holds_keys
        by_embeddings = checkpointing or self.padding_first or inexact
        by_embeddings = by_embeddings or (layer.trains and gathers_layers(decoder) and not holds_keys)
        self.concatenates = by_embeddings and bool(front.positions)
        if self.concatenates and holds_keys:
            refuse_key_values(checkpointing, self.padding_first)
        keeps = self.returns_cache or shares_keys_in_cache(decoder)
        if (keeps and not checkpointing) or not self.concatenates:
            self.cache = DynamicCache(config=decoder.config) if self.cache is None else self.cache
            count_input_positions(self.cache)
            self.cache.idp_front = front
            self.view = decoder_view(self.cache)

    @property
    def all_tokens(self) -> int:
        """How many tokens the decoder's rows have: the caller's, and the prompt's where it is computed with them."""
        return self.tokens if self.joined is None else self.joined.inputs_embeds.shape[1]

    @property
    def rotary_length(self) -> int | None:
        """The length that decides the rotary frequencies of the prompt's keys; `None` where they are fixed."""
        if not has_changing_rotary(self.decoder):
            return None
        total = int((self.positions + self.front.shift).max()) + 1
        return total if keeps_rotary(self.decoder) else rotary_length(self.decoder, total)

    def put_embeddings(self, layer) -> None:
        """Prepend each row's prompt: the decoder computes it with the input.

        Args:
            layer (`IDPLayer`): whose prompts they are.
        """
        kwargs, front, bank, embeddings = self.kwargs, self.front, layer.active_bank, layer.get_base_layer()
        embeds, ids = kwargs.pop("inputs_embeds", None), kwargs.pop("input_ids", None)
        embeds = embeddings(ids) if embeds is None else embeds  # [B, n, d]
        prompts = bank.rows(front.prompt_ids.clamp(min=0), embeds.dtype).to(embeds.device)  # [B, K, d]
        slots = self.real_tokens.new_ones(prompts.shape[:2]) if front.mask is None else front.mask
        positions = self.positions + front.shift
        positions = positions.expand(*positions.shape[:-2], len(embeds), -1)
        self.joined = Concatenation.build(prompts, slots, embeds, self.real_tokens, positions, self.padding_first)
        with layer.scaling.everywhere():  # Gemma 3n projects prompts beforehand
            self.joined.arrange_others(self.decoder, kwargs, prompts, ids, embeds)
        front.mask, front.covered = self.joined.attention_mask.bool(), self.tokens
        self.prompt_slots, self.keep = slots, self.keep or self.tokens

    # ------------------------------------------------------------------ to the decoder, and back

    def arguments(self) -> dict:
        """What the decoder is called with: mask and positions count the prompt."""
        kwargs, front, ready = self.kwargs, self.front, self.call.ready
        if self.is_base_alone:
            if ready is not None:
                kwargs["attention_mask"] = ready.masks
            return kwargs
        if self.joined is not None:
            kwargs |= {"inputs_embeds": self.joined.inputs_embeds, "attention_mask": self.joined.attention_mask}
            self._set_positions(self.joined.position_ids)
        else:
            kwargs["attention_mask"] = self._mask_with_prompt()
            self._set_positions(self.positions + front.shift)
        if ready is not None:
            slots = self.prompt_slots if self.joined is not None else front.mask
            slots = self.real_tokens.new_ones(len(self.real_tokens), front.positions) if slots is None else slots
            kwargs["attention_mask"] = ready.with_prompt(self.decoder, slots, self.joined, self.view)
        return self._with_view()

    def _with_view(self) -> dict:
        if self.view is None and is_prompted(self.cache):
            self.view = decoder_view(self.cache)
        if self.view is not None:
            self.kwargs[cache_name(type(self.decoder))] = self.view
            self.kwargs["use_cache"] = True  # some decoders (Whisper) drop a cache that they are given without it
        return self.kwargs

    def _mask_with_prompt(self) -> torch.Tensor | None:
        """The `attention_mask` over prompt and text, `[batch, positions + past + n]`, or `None`."""
        rows, total = len(self.front.prompt_ids), self.past + self.tokens
        whole = self.front.extend_mask(self.mask, rows, total, always=needs_full_mask(self.decoder))
        if whole is not None and isinstance(self.cache, StaticCache) and has_alibi(self.decoder):
            # The bias is built from the mask and must be as long as the keys: all slots of a static cache.
            whole = nn.functional.pad(whole, (0, self.cache.layers[0].max_cache_len - whole.shape[1]))
        return whole

    def _set_positions(self, positions: torch.Tensor) -> None:
        """Give the decoder explicit positions; transformers 5.0's cache positions then follow from the cache."""
        self.kwargs.pop("cache_position", None)
        if "position_ids" in forward_parameters(type(self.decoder)):
            self.kwargs["position_ids"] = positions

    def hand_back(self, output):
        """The decoder's output as the caller expects it: the caller's cache, and the caller's n positions.

        Args:
            output (`ModelOutput` or `tuple`): what the decoder returned.
        """
        if self.front is not None and self.is_base_alone:
            return output
        cache = self.cache if self.returns_cache else None
        if isinstance(output, tuple):
            if self.keep:
                output = (output[0][:, -self.keep :], *output[1:])
            return tuple(cache if part is self.view and part is not None else part for part in output)
        if self.keep:
            keep_last(output, self.keep)
        replace_cache(output, cache)
        return output


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
