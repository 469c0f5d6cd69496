"""`generate` with a prompt: the choice is made once and kept, and static caches have room for it.

The base's own `generate` does the work, in input positions; see `prompted_cache.py` for why it never notices the prompt.
"""

from __future__ import annotations

import copy

import torch
from transformers import GenerationConfig, StaticCache
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS

from idp_peft.call import Call, running
from idp_peft.choice import choose
from idp_peft.hosting.architectures import cache_name, given_cache, with_cache
from idp_peft.hosting.checks import refuse_foreign_cache, refuse_right_padding
from idp_peft.hosting.input_cache import PromptPart, adopt, is_prompted
from idp_peft.hosting.prompt_ids import CHOOSES, check_prompt_ids
from idp_peft.selection import Selection


def generate(layer, args: tuple, kwargs: dict, prompt_ids, selection_mask: torch.Tensor | None):
    """The base model's `generate(*args, **kwargs)`, with one prompt per row.

    Args:
        layer (`IDPLayer`): whose active adapter is applied.
        args (`tuple`), kwargs (`dict`): arguments of transformers' `generate`.
        prompt_ids (*optional*): forced prompts: int64 `[batch]`, or whatever [`check_prompt_ids`] accepts.
        selection_mask (`torch.Tensor`, *optional*): bool `[batch, n]`.
    """
    inputs, config, *_ = (*args, None, None)
    given = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    source = next((tensor for tensor in reversed(given) if tensor is not None), None)
    if source is None or layer.active_name is None:
        if prompt_ids is not None or selection_mask is not None:
            raise ValueError("`prompt_ids` and `selection_mask` need an active IDP adapter and an input")
        return layer.model.generate(*args, **kwargs)
    if config is not None:
        args, kwargs = args[:1], {**kwargs, "generation_config": config}
    batch, tokens = source.shape[:2]
    with running(Call(layer, prompt_ids, selection_mask, generating=True, batch=batch, tokens=tokens)) as call:
        return layer.model.generate(*args, **_prepared(call, source, kwargs))


def _prepared(call: Call, source: torch.Tensor, kwargs: dict) -> dict:
    """The arguments for the base's `generate`: with room for the prompt, the choice made where the base would not see it all."""
    layer, some_choose = call.owner, call.prompt_ids is None
    if call.prompt_ids is not None:
        names = layer.active_config.prompt_names
        forced = check_prompt_ids(call.prompt_ids, len(source), layer.active_bank.num_prompts, names)
        some_choose = bool((forced == CHOOSES).any())
    if (cache := given_cache(kwargs)) is not None:
        kwargs = with_cache(kwargs, cache, cache_name(type(layer.decoder)))
    settings = _Settings(kwargs.get("generation_config") or layer.model.generation_config, kwargs)
    refuse_right_padding(_mask(layer.model, source, settings))
    kwargs = _make_room(layer, source, settings, cache, kwargs)
    goes_on = cache is not None or settings.get("return_dict_in_generate")
    call.total = None if goes_on else settings.total_tokens(source.shape[1])
    if call.prompt_ids is None and is_prompted(cache) and cache.idp_part is not None:
        call.chosen = _kept(layer, cache.idp_part, len(source))
    chooses = some_choose and layer.active_config.chooses and call.chosen is None
    if chooses and settings.get("prefill_chunk_size") is not None:
        kwargs = _choose_before_chunks(call, source, kwargs, settings)
    return kwargs


def _kept(layer, part: PromptPart, rows: int) -> Selection | None:
    """What an earlier turn chose: some models drop its cache on the way to the decoder (Phi-3, when a text grows long)."""
    if part.started_by != layer.signature or len(part.prompt_ids) % rows:
        return None  # an error on the way in says so
    names = layer.active_config.prompt_names
    return Selection(part.prompt_ids[:: len(part.prompt_ids) // rows], prompt_names=names)


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


def _choose_before_chunks(call: Call, source: torch.Tensor, kwargs: dict, settings: _Settings) -> dict:
    """The choice reads the whole input, so it is made before `prefill_chunk_size` cuts the input."""
    media = [name for name, value in kwargs.items() if name != "inputs_embeds" and _is_media(value)]
    if media:
        raise ValueError(
            f"generate(prefill_chunk_size=...) chooses a prompt before the model has read `{media[0]}`: force `prompt_ids`, or "
            "leave `prefill_chunk_size` out"
        )
    mask = kwargs.get("attention_mask")
    if mask is None:
        padding = settings.get("pad_token_id")
        if padding is not None and not source.is_floating_point() and bool((source == padding).any()):
            raise ValueError("generate(prefill_chunk_size=...) needs `attention_mask` for an input with padding tokens")
        mask = torch.ones(source.shape[:2], dtype=torch.long, device=source.device)
    name = "inputs_embeds" if source.is_floating_point() else "input_ids"
    call.chosen = choose(call, {name: source}, mask.bool())
    call.owner.remember(call.chosen)
    return {**kwargs, "attention_mask": mask}


def _is_media(value) -> bool:
    """Whether an argument is a picture or a sound."""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1


def _make_room(layer, source: torch.Tensor, settings: _Settings, cache, kwargs: dict) -> dict:
    """Give static caches K more positions.

    A static cache is adopted before transformers sees it: to a compileable cache it would give 4-D masks that know
    nothing of the prompt.
    """
    longest = layer.active_bank.max_length
    refuse_foreign_cache(cache)
    if cache is not None and cache.is_compileable and not is_prompted(cache):
        # Sliding layers hold their window alone, layers that share another's keys and values hold nothing.
        room = max(getattr(cache_layer, "max_cache_len", 0) for cache_layer in cache.layers)
        if room <= longest:
            raise ValueError(
                f"the static cache holds {room} positions, the prompts alone take {longest}: make it longer by {longest}"
            )
        adopt(cache)
    kind = settings.get("cache_implementation")
    if cache is not None or kind not in ALL_STATIC_CACHE_IMPLEMENTATIONS or settings.get("use_cache") is False:
        return kwargs
    if "cache_implementation" not in kwargs and "generation_config" not in kwargs:
        raise ValueError(
            f"the model's own generation_config asks for cache_implementation={kind!r}, which leaves no room for the prompt: "
            "set it to None there, and pass cache_implementation to `generate`"
        )
    cache = StaticCache(
        config=layer.model.config.get_text_config(decoder=True),
        max_cache_len=settings.total_tokens(source.shape[1]) + longest,
        offloading="offloaded" in kind,
    )
    adopt(cache)
    kwargs = with_cache(kwargs, cache, cache_name(type(layer.decoder)))
    kwargs.pop("cache_implementation", None)
    if settings.config.cache_implementation is not None:
        kwargs["generation_config"] = copy.deepcopy(settings.config)
        kwargs["generation_config"].cache_implementation = None
    return kwargs
