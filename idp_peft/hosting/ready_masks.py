"""4-D masks that a model has built for its decoder, extended by the prompt."""

from __future__ import annotations

import torch

from idp_peft.hosting.concatenation import Concatenation


class ReadyMasks:
    """The 4-D masks of a fresh input, `[batch, 1, n, n]`: one for all layers, or a dict with one per kind of layer.

    Args:
        masks (`dict` or `torch.Tensor`): bool, or float with 0 where a token is seen. `None` in a dict is a causal one.
    """

    def __init__(self, masks) -> None:
        self.masks = masks
        self.by_kind = masks if isinstance(masks, dict) else {None: masks}

    @property
    def are_tensors(self) -> bool:
        return all(mask is None or isinstance(mask, torch.Tensor) for mask in self.by_kind.values())

    def show_later_tokens(self, attention_mask: torch.Tensor | None, first: int | None = None) -> bool:
        """Whether one of the last real tokens sees a later token, as within a picture.

        Args:
            attention_mask (`torch.Tensor`, *optional*): `[batch, past + n]`, the caller's.
            first (`int`, *optional*): the column of the first of these tokens; by default they are the last columns.
        """
        for mask in self.by_kind.values():
            if mask is None or mask.ndim != 4 or mask.shape[2] == 1:
                continue
            tokens = mask.shape[2]
            seen = _visible(mask).triu(1 + (mask.shape[3] - tokens if first is None else first))
            if attention_mask is not None:
                seen = seen & attention_mask[:, None, -tokens:, None].bool()
            if seen.any():
                return True
        return False

    def stack(self) -> torch.Tensor:
        """bool `[batch, n, kinds, n]`: what each token sees in each kind of layer, the kinds in order of their names."""
        return torch.stack([self._between_tokens(kind)[:, 0] for kind in sorted(self.by_kind, key=str)], dim=2)

    def with_prompt(self, decoder, prompt_slots: torch.Tensor, joined: Concatenation | None, cache):
        """The same masks over the prompt and the input.

        Args:
            decoder (`nn.Module`): whose layers they are for.
            prompt_slots (`torch.Tensor`): bool `[batch, K]`, where a prompt has a token.
            joined (`Concatenation`, *optional*): where the prompt goes through the decoder with its input.
            cache (`transformers.Cache`): which holds it otherwise.

        Returns:
            As `masks`: `[batch, 1, K+n, K+n]`; with the prompt in the cache `[batch, 1, n, K+n]`, or less of it in layers
            that keep a window.
        """
        batch, front = prompt_slots.shape
        if not front:
            return self.masks
        result = {}
        for kind, mask in self.by_kind.items():
            own = self._between_tokens(kind)  # [B, 1, n, n]
            total = front + own.shape[-1]
            whole = own.new_zeros(batch, 1, total, total)
            whole[..., front:, front:] = own
            whole[..., :front] = _sees_prompt(decoder, kind, prompt_slots, total, joined)[:, None]
            if joined is not None:
                rows = joined.order[:, None, :, None].expand_as(whole)
                whole = whole.gather(2, rows).gather(3, rows.transpose(2, 3))
            else:
                whole = whole[:, :, front:, front - _held(decoder, kind, cache) :]
            if mask is not None and mask.dtype != torch.bool:
                whole = torch.where(whole, 0, torch.finfo(mask.dtype).min).to(mask.dtype)
            result[kind] = whole
        return result if isinstance(self.masks, dict) else result[None]

    def _between_tokens(self, kind) -> torch.Tensor:
        """bool `[batch, 1, n, n]`: which tokens each token sees in one kind of layer."""
        mask = self.by_kind[kind]
        if mask is None:
            like = next(each for each in self.by_kind.values() if each is not None)
            return torch.ones_like(like, dtype=torch.bool).tril()
        return _visible(mask)


def masks_for_decoder(stacked: torch.Tensor, decoder) -> dict | torch.Tensor:
    """What [`ReadyMasks.stack`] made, as a decoder takes it: `[batch, 1, n, n]`, or a dict with one for each kind."""
    masks = [each[:, None] for each in stacked[..., : stacked.shape[1]].unbind(2)]
    return masks[0] if len(masks) == 1 else dict(zip(sorted(set(decoder.config.layer_types)), masks, strict=True))


def is_ready_made(mask) -> bool:
    """Whether a mask is more than one value per token."""
    return mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2)


def _sees_prompt(decoder, kind, prompt_slots: torch.Tensor, total: int, joined: Concatenation | None) -> torch.Tensor:
    """bool `[batch, K+n, K]`: which prompt tokens each one of `[prompt ; input]` sees."""
    batch, front = prompt_slots.shape
    slot_of = torch.arange(total, device=prompt_slots.device).expand(batch, -1)
    if joined is not None:
        slot_of = joined.order.argsort(1)
    behind = slot_of[:, :, None] - slot_of[:, None, :front]
    seen = (behind >= 0) & (prompt_slots[:, None] | (behind == 0))  # an empty slot sees itself
    slides = kind is None or "sliding" in kind
    window = getattr(decoder.config, "sliding_window", None) if slides else None
    return seen if window is None else seen & (behind < window)


def _held(decoder, kind: str | None, cache) -> int:
    """How many slots of the prompt the layers of one kind keep."""
    layer = 0 if kind is None else decoder.config.layer_types.index(kind)
    return cache.layers[layer].keys.shape[-2]


def _visible(mask: torch.Tensor) -> torch.Tensor:
    return mask if mask.dtype == torch.bool else mask >= 0
