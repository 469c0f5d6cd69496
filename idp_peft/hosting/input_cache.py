"""A transformers cache that counts input positions for the caller and all positions for the decoder.

`generate` slices inputs, crops drafts and sizes masks by the cache's length, and its inputs hold no prompt. So once a
prompt stands at the front of a cache, the cache answers `generate` and the caller in *input* positions, while the decoder
works on a plain view that shares its layers and counts the prompt. The class of the caller's own object is changed in
place, because the caller holds it for the next turn.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache

import torch
from transformers import Cache, DynamicCache, StaticCache, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

_CACHES = (Cache, DynamicCache, StaticCache)
_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)
if hasattr(cache_utils, "DummyLayer"):  # holds nothing: of layers that read another's keys and values
    _LAYERS += (cache_utils.DummyLayer,)


@dataclass
class Front:
    """The prompts in front of the rows of a text.

    Args:
        prompt_ids (`torch.Tensor`): int64 `[batch]`, the prompt of each row, -1 for none.
        positions (`int`): how many cache slots are not input slots (K; 0 where no row has a prompt).
        shift (`torch.Tensor` or `int`): what to add to the input's `position_ids`, one int or int64 `[batch, 1]`.
        mask (`torch.Tensor`, *optional*): bool `[batch, positions + covered]`, real slots at the front; `None` where
            all are real.
        started_by (`tuple`): which model and adapter the prompts are from.
        covered (`int`): how many input slots `mask` speaks for, besides the prompt's (those of a prefill whose padding
            stands before the prompt).
        read (`torch.Tensor`, *optional*): int64 `[batch, n]`, the tokens of the text so far, where it may be read again.
    """

    prompt_ids: torch.Tensor
    positions: int
    shift: torch.Tensor | int
    mask: torch.Tensor | None
    started_by: tuple[str, str] = ("", "")
    covered: int = 0
    read: torch.Tensor | None = None

    @classmethod
    def of(cls, prompt_ids: torch.Tensor, bank, started_by: tuple[str, str]) -> Front:
        """What the prompts of a bank add at the front of each row.

        Args:
            prompt_ids (`torch.Tensor`): int64 `[batch]`, -1 for none.
            bank (`PromptBank`): whose prompts they are.
        """
        front = cls(prompt_ids, positions=0, shift=0, mask=None, started_by=started_by)
        has_prompt = prompt_ids >= 0
        every_row = bool(has_prompt.all())
        if every_row or bool(has_prompt.any()):
            front.positions = bank.max_length
            front.shift = bank.max_length if every_row else (has_prompt * bank.max_length)[:, None]  # [B, 1]
            if not every_row or len(set(bank.lengths)) > 1:
                real_slots = bank.real_slots(prompt_ids.device)[prompt_ids.clamp(min=0)]
                front.mask = real_slots & has_prompt[:, None]  # [B, K]
        return front

    def extend_mask(
        self, attention_mask: torch.Tensor | None, batch: int, total: int, always: bool = False
    ) -> torch.Tensor | None:
        """The mask over all cache slots, int64 `[batch, positions + total]`, or `None` where everything is real.

        Args:
            attention_mask (`torch.Tensor`, *optional*): `[batch, total]`, the caller's mask over all input slots.
            always (`bool`): whether to return a mask of ones instead of `None`.
        """
        if attention_mask is None and self.mask is None and not always:
            return None
        device = self.prompt_ids.device if attention_mask is None else attention_mask.device
        if attention_mask is None:
            attention_mask = torch.ones(batch, total, dtype=torch.long, device=device)
        front = self.mask
        if front is None:
            front = attention_mask.new_ones(batch, self.positions)
        covered = min(self.covered, total)
        front = front[:, : self.positions + covered].to(attention_mask.device, attention_mask.dtype)
        return torch.cat([front, attention_mask[:, covered:]], dim=1)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Follow the cache when its rows are reordered, repeated or dropped."""
        rows = rows.to(self.prompt_ids.device)
        self.prompt_ids = self.prompt_ids[rows]
        if isinstance(self.shift, torch.Tensor):
            self.shift = self.shift[rows]
        if self.mask is not None:
            self.mask = self.mask[rows.to(self.mask.device)]
        if self.read is not None:
            self.read = self.read[rows.to(self.read.device)]


class _InputLengths:
    """Mixed into a cache class: lengths are counted in input positions."""

    # transformers builds 4-D masks outside the decoder for compileable caches, in sizes that know nothing of prompts.
    is_compileable = False

    def get_seq_length(self, layer_idx: int = 0):
        length = super().get_seq_length(layer_idx)
        return length - self.idp_front.positions if self.idp_front is not None else length

    def crop(self, *args, **kwargs) -> None:
        (size,) = (*args, *kwargs.values())
        if self.idp_front is not None:
            if size < 0 and self.get_seq_length() + size < 0:
                raise ValueError(
                    f"crop({size}) of a cache of {int(self.get_seq_length())} tokens would cut into its prompt"
                )
            if size >= 0 and _crops_to_a_length(type(self)):
                size += self.idp_front.positions
        super().crop(size)
        if self.idp_front is not None and self.idp_front.read is not None:
            self.idp_front.read = self.idp_front.read[:, : self.get_seq_length()]

    def reset(self) -> None:
        super().reset()
        self.idp_front = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        if self.idp_front is not None:
            self.idp_front.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.idp_front is not None:
            rows = torch.arange(len(self.idp_front.prompt_ids))
            self.idp_front.select_rows(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        if self.idp_front is not None:
            self.idp_front.select_rows(indices)

    def get_mask_sizes(self, *args, **kwargs):
        length, offset = super().get_mask_sizes(*args, **kwargs)
        end = offset + length - (0 if self.idp_front is None else self.idp_front.positions)
        first = max(end - length, 0)
        return end - first, first

    def update(self, *args, **kwargs):
        return super().update(*args, **kwargs) if self.idp_front is None else self.refuse()

    def refuse(self):
        raise RuntimeError(
            "this cache begins with an IDP prompt and can only be continued by a model with its IDP adapter enabled: "
            "start a new cache, or enable the adapter"
        )

    def __reduce__(self):
        return _rebuild, (_plain_class(type(self)), self.__dict__)


def _plain_class(prompted: type[Cache]) -> type[Cache]:
    """The class that a cache had before it counted input positions."""
    return prompted.__mro__[2]


@cache
def _prompted_class(plain: type[Cache]) -> type[Cache]:
    return type(f"Prompted{plain.__name__}", (_InputLengths, plain), {})


@cache
def _crops_to_a_length(prompted: type[Cache]) -> bool:
    """transformers 5.0 crops to an absolute length; later versions remove a number of tokens."""
    return "tokens_to_remove" not in inspect.signature(_plain_class(prompted).crop).parameters


def _rebuild(plain: type[Cache], state: dict) -> Cache:
    cache = plain.__new__(_prompted_class(plain))
    cache.__dict__.update(state)
    return cache


def is_prompted(cache) -> bool:
    """Whether a cache counts input positions."""
    return isinstance(cache, _InputLengths)


def count_input_positions(cache: Cache) -> None:
    """Make a cache answer in input positions from now on. Until a prompt stands in it, these are all its positions."""
    if not is_prompted(cache):
        cache.__class__ = _prompted_class(type(cache))
        cache.idp_front = None


def decoder_view(cache: Cache) -> Cache:
    """What the decoder works on: the same state, every position counted."""
    plain = _plain_class(type(cache))
    view = plain.__new__(plain)
    view.__dict__ = cache.__dict__  # not a copy: what a cache of the caller's own class notes down must stay
    return view


def stores_exactly(cache: Cache | None) -> bool:
    """Whether a cache gives back the keys and values that it was given, however they were divided into calls.

    Quantised caches do not: their first call sets the scale. Classes that are not transformers' own count as inexact.
    """
    if cache is None:
        return True
    plain = _plain_class(type(cache)) if is_prompted(cache) else type(cache)
    layers = {type(layer) for layer in cache.layers} or {cache.layer_class_to_replicate}
    return plain in _CACHES and layers <= set(_LAYERS)
