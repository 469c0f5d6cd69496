"""Random selection that is reproducible: the baseline that every claim about selection must beat."""

from __future__ import annotations

import torch


def choose_random(content: torch.Tensor, context: torch.Tensor, num_prompts: int, seed: int) -> torch.Tensor:
    """A reproducible random prompt per row: a hash of the row's context and the seed.

    Padding does not enter the hash, so a row gets the same prompt alone and in any batch.

    Args:
        content (`torch.Tensor`): int64 `[batch, n]`, token ids (or any integer code of the inputs).
        context (`torch.Tensor`): bool `[batch, n]`.

    Returns:
        `torch.Tensor`: int64 `[batch]`.
    """
    rank = context.long().cumsum(-1)  # 1, 2, ... over the context, whatever stands between
    terms = _mix(content.long() + _mix(rank + seed * 0x9E3779B1)) * context
    digest = _mix(terms.sum(-1) + seed)
    return (digest & (2**62 - 1)) % num_prompts


def _mix(value: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64 on int64 (arithmetic wraps around; shifts are made logical by masking)."""
    value = (value ^ ((value >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    value = (value ^ ((value >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    return value ^ ((value >> 31) & (2**33 - 1))
