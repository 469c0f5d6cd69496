"""The prompt cache: every layer's keys and values of all prompts, computed once.

Causal attention means that what a prompt contributes to a layer never depends on the input behind it. So each prompt is
run through the base model once, alone; a request copies the rows of its chosen prompt and computes its own tokens only.

Of key/value prompts the cache *is* the parameters (`key_values.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import DynamicCache

from idp_peft.hosting.architectures import of_prompts_alone
from idp_peft.hosting.decoder_copy import run_unmasked
from idp_peft.key_values import key_value_layout, unpack
from idp_peft.prompt_bank import PromptBank

_lock = threading.RLock()


@dataclass(frozen=True)
class PromptCache:
    """Keys and values of a prompt bank.

    Prompt i occupies slots K-k_i .. K-1, which are also its positions; the slots before a shorter prompt repeat its
    first token and must be masked.

    Args:
        keys (`list[torch.Tensor]`): per layer that keeps any `[M, kv_heads, K, head_dim]`. (While training: of fewer layers, or of the
            prompts that a batch uses; K stays the bank's.)
        values (`list[torch.Tensor]`): per layer `[M, kv_heads, K, head_dim]`.
        lengths (`list[int]`): k_i.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    lengths: list[int]

    @property
    def nbytes(self) -> int:
        """Memory in bytes: 2 x layers x M x K x kv_heads x head_dim x bytes per element."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def put_rows(self, prompt_ids: torch.Tensor, cache) -> None:
        """Write the chosen prompts into an empty transformers cache.

        Args:
            prompt_ids (`torch.Tensor`): int64 `[batch]`, from 0 to M-1.
            cache (`transformers.Cache`): receives `[batch, kv_heads, K, head_dim]` per layer.
        """
        slots = torch.arange(self.keys[0].shape[-2], device=prompt_ids.device)
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            rows = prompt_ids.to(keys.device)
            # `cache_position` is what static caches of transformers 5.0 write by; later versions ignore it.
            cache.update(keys.index_select(0, rows), values.index_select(0, rows), layer, {"cache_position": slots})

    def side_by_side(self, batch: int, num_layers: int) -> DynamicCache:
        """A cache in which all prompts stand one after the other: `[batch, kv_heads, sum_i k_i, head_dim]` per layer."""
        prompts = range(len(self.lengths))
        return self._cache(num_layers, batch, lambda tensor: torch.cat([self._real(tensor, i) for i in prompts], -2))

    def alone(self, prompt: int, batch: int, num_layers: int) -> DynamicCache:
        """A cache that holds one prompt: `[batch, kv_heads, k_i, head_dim]` per layer."""
        return self._cache(num_layers, batch, lambda tensor: self._real(tensor, prompt))

    def _real(self, tensor: torch.Tensor, prompt: int) -> torch.Tensor:
        return tensor[prompt, :, tensor.shape[-2] - self.lengths[prompt] :]  # [kv_heads, k_i, head_dim]

    def _cache(self, num_layers: int, batch: int, pick: Callable[[torch.Tensor], torch.Tensor]) -> DynamicCache:
        cache = DynamicCache()
        for layer in range(min(num_layers, len(self.keys))):  # the last layers of Gemma 3n and 4 have none of their own
            keys, values = (
                pick(tensors[layer])[None].expand(batch, -1, -1, -1) for tensors in (self.keys, self.values)
            )
            cache.update(keys, values, layer)
        return cache


def compute_prompt_cache(
    decoder: nn.Module,
    bank: PromptBank,
    dtype: torch.dtype,
    rotary_length: int | None = None,
    prompts: torch.Tensor | None = None,
) -> PromptCache:
    """The keys and values of prompts: each run alone through the decoder, or unpacked from the bank. Gradients flow where they
    are enabled.

    Shorter prompts are padded at their end, where causal attention hides the padding, and moved to their slots
    afterwards: no row is ever masked, so no kernel sees an empty row.

    Args:
        decoder (`nn.Module`): the base model's decoder.
        bank (`PromptBank`): the prompts.
        dtype (`torch.dtype`): what they are cast to.
        rotary_length (`int`, *optional*): where rotary frequencies depend on the length of the sequence, that length. An extra
            last token at that position sets them; no prompt sees it.
        prompts (`torch.Tensor`, *optional*): int64 `[m]`, the prompts to run; all by default. Row j of the result is
            prompt `prompts[j]`.

    Raises:
        `ValueError`: where a prompt, or what the base makes of it, holds NaN or infinity.
    """
    if bank.holds_keys and torch.is_autocast_enabled(bank.weight.device.type):
        dtype = torch.get_autocast_dtype(bank.weight.device.type)
    embeddings = bank.embeddings_as(dtype)  # [sum_i k_i, d]
    device, longest = embeddings.device, bank.max_length
    prompts = torch.arange(bank.num_prompts, device=device) if prompts is None else prompts.to(device)
    if bank.holds_keys:
        tokens = embeddings.view(bank.num_prompts, longest, -1)[prompts]  # [m, K, P]
        return PromptCache(*unpack(tokens, key_value_layout(decoder)), [longest] * len(prompts))
    lengths = torch.tensor(bank.lengths, device=device)[prompts]
    slots = torch.arange(longest, device=device)
    positions = (longest - lengths[:, None] + slots).clamp(max=longest - 1)  # [m, K]
    index = bank.token_index("left", device)[prompts]  # [m, K]
    if rotary_length is not None:
        index = torch.cat([index, index[:, -1:]], dim=1)
        positions = nn.functional.pad(positions, (0, 1), value=rotary_length - 1)
    embeds = embeddings[index]  # [m, K (+ 1), d]
    layers = run_unmasked(decoder, positions, inputs_embeds=embeds, **of_prompts_alone(decoder, embeds))
    source = bank.token_in_slot(device)[prompts]  # [m, K], the row that belongs into each slot
    equal = len(set(bank.lengths)) == 1

    def place(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor[:, :, :longest]
        if equal:
            return tensor
        index = source.to(tensor.device)[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
        return tensor.gather(2, index)

    keys, values = [place(layer.keys) for layer in layers], [place(layer.values) for layer in layers]
    if not all(tensor.detach().isfinite().all() for tensor in (*keys, *values)):
        raise ValueError(
            f"the base model makes NaN or infinity of this adapter's prompts in {dtype}: load it in bfloat16 or float32, or "
            "lower the learning rate"
        )
    return PromptCache(keys, values, [bank.lengths[prompt] for prompt in prompts.tolist()])


class RememberedCache:
    """The prompt cache of one adapter, kept until anything it depends on changes.

    It depends on the prompts and scales (compared by value: no way of writing them escapes that), the base's tensors (compared
    by their version counters), the device, the dtype and autocast.
    """

    def __init__(self) -> None:
        self._cache: PromptCache | None = None
        self._bank: list[torch.Tensor] = []
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
            now = bank.stored()
            device = now[0].device.type
            autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
            setting = (now[0].device, now[0].dtype, dtype, autocast, tuple(bank.lengths), rotary_length)
            if not self._is_fresh(now, setting):
                self.forget()
                base = list(_base_tensors(decoder))
                self._cache = compute_prompt_cache(decoder, bank, dtype, rotary_length)
                self._bank, self._setting = [tensor.clone() for tensor in now], setting
                self._base, self._base_version = base, _version(base)
            return self._cache

    def forget(self) -> None:
        """Drop the cache; the next request computes it again. Call it after writing base weights through `.data`."""
        self.__init__()

    def _is_fresh(self, bank: list[torch.Tensor], setting: tuple) -> bool:
        return (
            self._cache is not None
            and self._setting == setting
            and self._base_version == _version(self._base)
            and all(map(torch.equal, self._bank, bank))
        )


def _base_tensors(decoder: nn.Module) -> Iterator[torch.Tensor]:
    """The base's weights, packed ones included; not what its modules compute for themselves (rotary frequencies).

    `state_dict(keep_vars=True)` would list the same tensors, and make FSDP2 shard them in the middle of a forward.
    """
    for name, module in decoder.named_modules():
        if not name.startswith("idp"):
            yield from module.parameters(recurse=False)
            transient = module._non_persistent_buffers_set
            yield from (buffer for key, buffer in module.named_buffers(recurse=False) if key not in transient)


def _version(tensors: list[torch.Tensor]) -> int:
    return sum(0 if tensor.is_inference() else tensor._version for tensor in tensors)
