"""The arguments of `generate` with a prompt: static caches have room for it, and what cannot be right is refused.

The base's own `generate` does the work, in input positions; `input_cache.py` says why it never notices the prompt.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import GenerationConfig, StaticCache
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS

from idp_peft.hosting.architectures import cache_name, given_cache, with_cache
from idp_peft.hosting.checks import refuse_foreign_cache, refuse_right_padding
from idp_peft.hosting.input_cache import Front, count_input_positions, is_prompted


class GenerateRequest:
    """The arguments of one `generate`, which the caller wrote for a model without a prompt.

    Args:
        model (`PreTrainedModel`): the base model.
        args (`tuple`), kwargs (`dict`): arguments of transformers' `generate`.

    Attributes:
        source (`torch.Tensor`, *optional*): the input, int64 `[batch, n]` or float `[batch, n, d]`.
    """

    def __init__(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs, config, *_ = (*args, None, None)
        self.model = model
        self.args = args if config is None else args[:1]
        self.kwargs = kwargs if config is None else {**kwargs, "generation_config": config}
        given = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        self.source = next((tensor for tensor in reversed(given) if tensor is not None), None)
        self.cache = given_cache(kwargs)

    def prepare(self, decoder: nn.Module, longest: int) -> None:
        """Check the padding, and make room for a prompt.

        Args:
            decoder (`nn.Module`): the model's decoder.
            longest (`int`): K, the length of the longest prompt.

        Raises:
            `ValueError`: for padding on the right, a foreign cache, or a static cache that is too small.
        """
        self._cache_name = cache_name(type(decoder))
        if self.cache is not None:
            self.kwargs = with_cache(self.kwargs, self.cache, self._cache_name)
        self.settings = _Settings(self.kwargs.get("generation_config") or self.model.generation_config, self.kwargs)
        refuse_right_padding(_mask(self.model, self.source, self.settings))
        self._make_room(longest)

    @property
    def total_tokens(self) -> int | None:
        """How many tokens a row will have at most, where nobody can go on from the cache; else `None`."""
        if self.cache is not None or self.settings.get("return_dict_in_generate"):
            return None
        return self.settings.total_tokens(self.source.shape[1])

    def kept_prompts(self, started_by: tuple[str, str]) -> torch.Tensor | None:
        """What an earlier turn chose, int64 `[batch]`; `None` where this is the first turn, or where it is not ours to go on
        with (an error on the way in says so). Some models drop the cache on the way to the decoder (Phi-3, when a text
        grows long)."""
        front: Front | None = self.cache.idp_front if is_prompted(self.cache) else None
        rows = len(self.source)
        if front is None or front.started_by != started_by or len(front.prompt_ids) % rows:
            return None
        return front.prompt_ids[:: len(front.prompt_ids) // rows]

    @property
    def in_chunks(self) -> bool:
        """Whether `prefill_chunk_size` cuts the input."""
        return self.settings.get("prefill_chunk_size") is not None

    def read_before_chunks(self) -> tuple[dict, torch.Tensor]:
        """What a choice reads that must be made before the input is cut: the input by name, and its mask.

        Raises:
            `ValueError`: where the input is not all that the choice would read.
        """
        kwargs, source = self.kwargs, self.source
        media = [name for name, value in kwargs.items() if name != "inputs_embeds" and _is_media(value)]
        if media:
            raise ValueError(
                f"generate(prefill_chunk_size=...) chooses a prompt before the model has read `{media[0]}`: force "
                "`prompt_ids`, or leave `prefill_chunk_size` out"
            )
        mask = kwargs.get("attention_mask")
        if mask is None:
            padding = self.settings.get("pad_token_id")
            if padding is not None and not source.is_floating_point() and bool((source == padding).any()):
                raise ValueError(
                    "generate(prefill_chunk_size=...) needs `attention_mask` for an input with padding tokens"
                )
            mask = torch.ones(source.shape[:2], dtype=torch.long, device=source.device)
        self.kwargs = {**kwargs, "attention_mask": mask}
        return {"inputs_embeds" if source.is_floating_point() else "input_ids": source}, mask.bool()

    def _make_room(self, longest: int) -> None:
        """Give static caches K more positions.

        A static cache counts input positions before transformers sees it: to a compileable cache transformers would give
        4-D masks that know nothing of the prompt.
        """
        cache, settings = self.cache, self.settings
        refuse_foreign_cache(cache)
        if cache is not None and cache.is_compileable and not is_prompted(cache):
            # Sliding layers hold their window alone, layers that share another's keys and values hold nothing.
            room = max(getattr(cache_layer, "max_cache_len", 0) for cache_layer in cache.layers)
            if room <= longest:
                raise ValueError(
                    f"the static cache holds {room} positions, the prompts alone take {longest}: make it longer by {longest}"
                )
            count_input_positions(cache)
        kind = settings.get("cache_implementation")
        if cache is not None or kind not in ALL_STATIC_CACHE_IMPLEMENTATIONS or settings.get("use_cache") is False:
            return
        if "cache_implementation" not in self.kwargs and "generation_config" not in self.kwargs:
            raise ValueError(
                f"the model's own generation_config asks for cache_implementation={kind!r}, which leaves no room for the "
                "prompt: set it to None there, and pass cache_implementation to `generate`"
            )
        cache = StaticCache(
            config=self.model.config.get_text_config(decoder=True),
            max_cache_len=settings.total_tokens(self.source.shape[1]) + longest,
            offloading="offloaded" in kind,
        )
        count_input_positions(cache)
        self.kwargs = with_cache(self.kwargs, cache, self._cache_name)
        self.kwargs.pop("cache_implementation", None)
        if settings.config.cache_implementation is not None:
            self.kwargs["generation_config"] = copy.deepcopy(settings.config)
            self.kwargs["generation_config"].cache_implementation = None


class _Settings:
    """What a `generate` call says of one of its settings: the argument, else the config."""

    def __init__(self, config: GenerationConfig, kwargs: dict) -> None:
        self.config, self.kwargs = config, kwargs

    def get(self, name: str):
        return self.kwargs[name] if name in self.kwargs else getattr(self.config, name, None)

    def total_tokens(self, tokens: int) -> int:
        """How many tokens an input of `tokens` can become; at least that many, in doubt more."""
        new_tokens = self.get("max_new_tokens")
        return tokens + new_tokens if new_tokens else max(self.get("max_length") or 0, tokens + 20)


def _mask(model, source: torch.Tensor, settings: _Settings) -> torch.Tensor | None:
    """The mask that the base's `generate` works with: the caller's, or, as transformers makes it, of what is no padding
    token; `None` where all is real."""
    if (mask := settings.get("attention_mask")) is not None or source.is_floating_point():
        return mask
    padding, end = (
        getattr(model.generation_config, name) if (value := settings.get(name)) is None else value
        for name in ("pad_token_id", "eos_token_id")
    )
    ends = [] if end is None else torch.as_tensor(end).flatten().tolist()
    return None if padding is None or int(padding) in ends else source != padding


def _is_media(value) -> bool:
    """Whether an argument is a picture or a sound."""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1
