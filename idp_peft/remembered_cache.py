"""The prompt cache of one adapter, remembered until anything it depends on changes: computed once, never stale."""

from __future__ import annotations

import threading

import torch
from torch import nn

from idp_peft.prompt_bank import PromptBank
from idp_peft.prompt_cache import PromptCache, compute_prompt_cache

_lock = threading.RLock()


class RememberedCache:
    """The prompt cache of one adapter, kept until anything it depends on changes.

    It depends on the prompts (compared by value: no way of writing them escapes that), the base's tensors (compared by
    their version counters), the device, the dtype and autocast.
    """

    def __init__(self) -> None:
        self._cache: PromptCache | None = None
        self._prompts: torch.Tensor | None = None
        self._setting: tuple | None = None
        self._base: list[torch.Tensor] = []
        self._base_version = 0

    def get(
        self, decoder: nn.Module, bank: PromptBank, dtype: torch.dtype, rotary_length: int | None = None
    ) -> PromptCache:
        """The prompt cache, computed without gradients where it is missing or stale.

        Two threads that ask at once wait for one computation.
        """
        with _lock, torch.inference_mode(False), torch.no_grad():
            tokens = bank.tokens()
            device = tokens.device.type
            autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
            setting = (tokens.device, tokens.dtype, dtype, autocast, tuple(bank.lengths), rotary_length)
            if not self._is_fresh(tokens, setting):
                self.forget()
                base = list(_base_tensors(decoder))
                self._cache = compute_prompt_cache(decoder, bank, dtype, rotary_length)
                self._prompts, self._setting = tokens.clone(), setting
                self._base, self._base_version = base, _version(base)
            return self._cache

    def forget(self) -> None:
        """Drop the cache; the next request computes it again. Needed only by whoever replaces base weights by hand."""
        self.__init__()

    def _is_fresh(self, tokens: torch.Tensor, setting: tuple) -> bool:
        return (
            self._cache is not None
            and self._setting == setting
            and self._base_version == _version(self._base)
            and torch.equal(self._prompts, tokens)
        )


def _base_tensors(decoder: nn.Module):
    """The base's weights, packed ones included; not what its modules compute for themselves (rotary frequencies)."""
    for name, module in decoder.named_modules():
        if not name.startswith("idp"):
            yield from module.parameters(recurse=False)
            transient = module._non_persistent_buffers_set
            yield from (buffer for key, buffer in module.named_buffers(recurse=False) if key not in transient)


def _version(tensors: list[torch.Tensor]) -> int:
    return sum(0 if tensor.is_inference() else tensor._version for tensor in tensors)
