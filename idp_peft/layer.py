"""The child module that IDP adds to a decoder, and the hooks through which it works.

`before_model` reads IDP's own arguments off the model's call. `before_decoder` chooses a prompt for each row and puts it
in front of the input; `after_decoder` hands back what the caller would get from the base model.
"""

from __future__ import annotations

import sys
from contextvars import ContextVar
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import DynamicCache, StaticCache

from idp_peft import call as calls
from idp_peft.concatenation import Concatenation
from idp_peft.config import IDPConfig
from idp_peft.decoder import (
    distances_from_slots,
    embedding_dtype,
    find_blocks,
    forward_parameters,
    has_alibi,
    needs_full_mask,
    position_limit,
)
from idp_peft.probe import attention_at_layer
from idp_peft.prompt_bank import PromptBank, initial_tokens
from idp_peft.prompt_cache import PromptCache, RememberedCache, check_finite, compute_prompt_cache
from idp_peft.prompted_cache import PromptPart, adopt, decoder_view, is_prompted
from idp_peft.selection import (
    Selection,
    check_prompt_ids,
    choose_random,
    context_tokens,
    deal_evenly,
    needs_attention,
    scores_from_attention,
)


@dataclass
class _Frame:
    """What `before_decoder` leaves for `after_decoder` of the same forward."""

    cache: object = None  # the caller's cache, which counts input positions
    view: object = None  # what the decoder worked on
    returns_cache: bool = True
    concatenation: Concatenation | None = None


_frames: ContextVar[_Frame | None] = ContextVar("idp_frame", default=None)


class IDPLayer(nn.Module, BaseTunerLayer):
    """Owns the prompt banks of a model and applies the active one.

    Args:
        model (`PreTrainedModel`): the causal language model.
        decoder (`nn.Module`): its decoder, of which this becomes the child `idp`.
    """

    adapter_layer_names = ("idp_prompts",)
    other_param_names = ("idp_remembered", "idp_config")

    def __init__(self, model: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.idp_prompts = nn.ModuleDict({})
        self.idp_remembered: dict[str, RememberedCache] = {}
        self.idp_config: dict[str, IDPConfig] = {}
        self._base = (model, decoder)  # in a tuple: as attributes they would become children of their own child
        self._trainable_before = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._handles = [
            model.register_forward_pre_hook(self.before_model, with_kwargs=True),
            model.register_forward_hook(self.after_model, with_kwargs=True, always_call=True),
            decoder.register_forward_pre_hook(self.before_decoder, with_kwargs=True),
            decoder.register_forward_hook(self.after_decoder, with_kwargs=True, always_call=True),
        ]
        self._last_selection: Selection | None = None

    # ------------------------------------------------------------------ adapters

    @property
    def model(self) -> nn.Module:
        return self._base[0]

    @property
    def decoder(self) -> nn.Module:
        return self._base[1]

    def get_base_layer(self) -> nn.Module:
        """The decoder's input embedding: what PEFT asks for device, dtype and `weight`."""
        return self.model.get_input_embeddings()

    def add_bank(self, name: str, config: IDPConfig, texts: list[list[int]] | None) -> None:
        """Add a prompt bank, started by `config.init` (on the meta device: left empty, for weights that follow)."""
        embeddings = self.get_base_layer()
        width = embeddings.weight.shape[-1] if embeddings.weight.is_floating_point() else embeddings.embedding_dim
        bank = PromptBank(config.prompt_lengths, width)
        if not bank.weight.is_meta:
            if config.init_weights and not embeddings.weight.is_meta:
                with torch.no_grad():
                    bank.weight.copy_(initial_tokens(config, embeddings, texts))
            bank.to(embeddings.weight.device if not embeddings.weight.is_meta else "cpu")
        self.idp_prompts[name] = bank
        self.idp_remembered[name] = RememberedCache()
        self.idp_config[name] = config

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's version also casts to the base's dtype; prompts stay float32.
        bank = self.idp_prompts[adapter_name]
        if not bank.weight.is_meta:
            bank.to(device or self.get_base_layer().weight.device)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1 and len(set(names) & set(self.idp_prompts)) > 1:
            raise ValueError(
                f"one IDP adapter can be active at a time, got {names}: merge their banks into one instead"
            )
        super().set_adapter(names, inference_mode=inference_mode)

    @property
    def active_bank(self) -> str | None:
        """Name of the adapter in force, `None` while adapters are disabled or there is none."""
        if self.disable_adapters:
            return None
        return next((name for name in self.active_adapters if name in self.idp_prompts), None)

    def detach(self) -> None:
        """Take the hooks and this module off the model, and give parameters back the `requires_grad` they came with."""
        for handle in self._handles:
            handle.remove()
        del self.decoder._modules["idp"]
        for parameter in self._trainable_before:
            parameter.requires_grad_(True)

    @property
    def last_selection(self) -> Selection | None:
        """The latest choice made by the calling thread, or by any thread where that one made none."""
        return _by_thread().get(self, self._last_selection)

    def _remember(self, selection: Selection) -> None:
        self._last_selection = selection
        _by_thread()[self] = selection

    # ------------------------------------------------------------------ the model's call

    def before_model(self, model: nn.Module, args: tuple, kwargs: dict):
        """Forward pre-hook of the causal language model: take IDP's arguments out of the call."""
        own = {name: kwargs[name] for name in ("prompt_ids", "selection_mask") if kwargs.get(name) is not None}
        kwargs = {name: value for name, value in kwargs.items() if name not in ("prompt_ids", "selection_mask")}
        name = self.active_bank
        if name is None:
            if own:
                raise ValueError(f"{' and '.join(f'`{n}`' for n in own)} given, but no IDP adapter is active")
            return args, kwargs
        outer = calls.current_call(self)
        if outer is not None and outer.generating and not own:
            return None
        call = calls.Call(self, labels=kwargs.get("labels"), **own)
        if self.training and self.idp_config[name].assignment == "all" and not own.get("prompt_ids") is not None:
            args, kwargs = self._on_every_prompt(call, model, args, kwargs)
        calls.begin(call)
        return args, kwargs

    def after_model(self, model: nn.Module, args: tuple, kwargs: dict, output):
        """Forward post-hook of the causal language model; runs after errors too."""
        call = calls.current_call(self)
        if call is None or call.generating:
            return None
        calls.end(call)
        if output is not None and call.batch is not None:  # assignment="all": back to one set of logits per example
            logits = output["logits"] if hasattr(output, "keys") else output[1]
            mean = logits.view(-1, call.batch, *logits.shape[1:]).mean(0)
            if hasattr(output, "keys"):
                output["logits"] = mean
            else:
                output = (output[0], mean, *output[2:])
            return output
        return None

    def _on_every_prompt(self, call: calls.Call, model: nn.Module, args: tuple, kwargs: dict):
        """`assignment="all"`: repeat the batch once per prompt, so that the model's own loss is the mean over prompts."""
        kwargs = _by_name(model, args, kwargs)
        if kwargs.get("labels") is None:
            raise ValueError("assignment='all' needs `labels` in the model's call: its loss is the mean over prompts")
        prompts = self.idp_prompts[self.active_bank].num_prompts
        call.batch = len(kwargs["labels"])
        call.prompt_ids = torch.arange(prompts).repeat_interleave(call.batch)
        for name, value in kwargs.items():
            if isinstance(value, torch.Tensor) and value.ndim and len(value) == call.batch:
                kwargs[name] = value.repeat(prompts, *[1] * (value.ndim - 1))
        if kwargs.get("num_items_in_batch") is not None:
            kwargs["num_items_in_batch"] = kwargs["num_items_in_batch"] * prompts
        call.labels = call.selection_mask = None
        return (), kwargs

    # ------------------------------------------------------------------ the decoder's call

    def before_decoder(self, decoder: nn.Module, args: tuple, kwargs: dict):
        """Forward pre-hook of the decoder: put a prompt in front, or recognise the one that is there."""
        if calls.is_internal_run():
            return None
        kwargs = _by_name(decoder, args, kwargs)
        cache = kwargs.get("past_key_values")
        started = is_prompted(cache) and cache.idp_part is not None
        name = self.active_bank
        if name is None:
            if started and cache.idp_part.positions:
                cache._refuse()
            if is_prompted(cache):
                self._enter(kwargs, _Frame(cache=cache, view=decoder_view(cache)))
            return (), kwargs
        if started:
            self._continue(decoder, kwargs, cache)
        else:
            if cache is not None and int(cache.get_seq_length()):
                raise ValueError(
                    f"`past_key_values` already holds {int(cache.get_seq_length())} tokens that no prompt of adapter {name!r} "
                    "stands in front of: start from an empty cache"
                )
            self._start(decoder, kwargs, cache, name)
        return (), kwargs

    def after_decoder(self, decoder: nn.Module, args: tuple, kwargs: dict, output):
        """Forward post-hook of the decoder: the caller's cache and the caller's n positions; runs after errors too."""
        frame = _frames.get()
        if calls.is_internal_run() or frame is None:
            return None
        _frames.set(None)
        if output is None:
            return None
        if isinstance(output, tuple):
            return self._after_tuple(frame, output)
        if frame.concatenation is not None:
            frame.concatenation.drop_front(output)
        if getattr(output, "past_key_values", None) is not None:
            output["past_key_values"] = frame.cache if frame.returns_cache else None
        return output

    @staticmethod
    def _after_tuple(frame: _Frame, output: tuple) -> tuple:
        if frame.concatenation is not None:
            front = frame.concatenation.front
            output = (output[0][:, front:], *output[1:])
        cache = frame.cache if frame.returns_cache else None
        return tuple(cache if part is frame.view and part is not None else part for part in output)

    @staticmethod
    def _enter(kwargs: dict, frame: _Frame) -> None:
        if frame.view is not None:
            kwargs["past_key_values"] = frame.view
        _frames.set(frame)

    @staticmethod
    def _mask_with_prompt(decoder, cache, part: PromptPart, mask, batch: int, total: int) -> torch.Tensor | None:
        """What the decoder gets as `attention_mask`: `[batch, positions + total]`, or `None`."""
        whole = part.extend_mask(mask, batch, total, always=needs_full_mask(decoder))
        if whole is not None and isinstance(cache, StaticCache) and has_alibi(decoder):
            # The bias is built from the mask and must be as long as the keys: all slots of a static cache.
            whole = nn.functional.pad(whole, (0, cache.layers[0].max_cache_len - whole.shape[1]))
        return whole

    # ------------------------------------------------------------------ a cache that holds its prompt already

    def _continue(self, decoder: nn.Module, kwargs: dict, cache) -> None:
        part: PromptPart = cache.idp_part
        inputs = _inputs(kwargs)
        batch, tokens = inputs.shape[:2]
        if batch != len(part.prompt_ids):
            raise ValueError(f"`past_key_values` holds {len(part.prompt_ids)} rows, the input has {batch}")
        call = calls.current_call(self)
        if call is not None and call.prompt_ids is not None:
            forced = check_prompt_ids(call.prompt_ids, batch, self._bank.num_prompts).to(part.prompt_ids.device)
            if not torch.equal(forced, part.prompt_ids):
                raise ValueError(
                    f"`prompt_ids` {forced.tolist()} differ from those `past_key_values` was started with, "
                    f"{part.prompt_ids.tolist()}: a choice is kept for every turn; start a new cache to change it"
                )
        past = int(cache.get_seq_length())
        mask = _checked_mask(kwargs, batch, past + tokens, "past_key_values and the input")
        self._check_room(decoder, past + tokens, part.positions)
        if kwargs.get("position_ids") is not None:
            positions = kwargs["position_ids"]
        elif mask is not None:
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]
        else:
            positions = torch.arange(past, past + tokens, device=inputs.device)[None]
        kwargs["attention_mask"] = self._mask_with_prompt(decoder, cache, part, mask, batch, past + tokens)
        _set_positions(decoder, kwargs, positions + part.shift)
        self._enter(kwargs, _Frame(cache=cache, view=decoder_view(cache)))

    # ------------------------------------------------------------------ a fresh input

    @property
    def _bank(self) -> PromptBank:
        return self.idp_prompts[self.active_bank]

    def _start(self, decoder: nn.Module, kwargs: dict, cache, name: str) -> None:
        bank, config = self.idp_prompts[name], self.idp_config[name]
        inputs = _inputs(kwargs)
        batch, tokens = inputs.shape[:2]
        if not batch or not tokens:
            raise ValueError(f"the input is empty: got {batch} rows of {tokens} tokens")
        self._refuse_what_generate_needs_peft_for(config, kwargs)
        mask = _checked_mask(kwargs, batch, tokens, "the input")
        real = torch.ones(batch, tokens, dtype=torch.bool, device=inputs.device) if mask is None else mask.bool()
        _refuse_packed(kwargs, real)
        self._check_room(decoder, tokens if mask is None else _most_tokens(decoder, real), bank.max_length)

        with_graph = torch.is_grad_enabled() and (bank.weight.requires_grad or decoder.training)
        checkpointing = decoder.training and with_graph and getattr(decoder, "gradient_checkpointing", False)
        returns_cache = self._returns_cache(decoder, kwargs)
        padded_between = (
            mask is not None
            and distances_from_slots(decoder, None if returns_cache else bank.max_length + tokens)
            and not bool(real[:, 0].all())
        )
        prompt_cache = None
        if with_graph and not (checkpointing or padded_between):
            with calls.internal_run():
                prompt_cache = compute_prompt_cache(decoder, bank, self._dtype)

        selection = self._select(decoder, kwargs, real, prompt_cache)
        prompt_ids = selection.prompt_ids.to(inputs.device)
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
                prompt_cache = self.prompt_cache(name)
            prompt_cache.put_rows(prompt_ids.clamp(min=0), view)
        kwargs["attention_mask"] = self._mask_with_prompt(decoder, cache, part, mask, batch, tokens)
        _set_positions(decoder, kwargs, positions)
        cache.idp_part = part
        self._enter(kwargs, _Frame(cache=cache, view=view, returns_cache=returns_cache))

    def _start_concatenated(self, decoder, kwargs, cache, part, real, positions, returns_cache, padding_first) -> None:
        """Prepend embeddings; the decoder computes the prompt with the input."""
        bank = self._bank
        embeds = kwargs.pop("inputs_embeds", None)
        ids = kwargs.pop("input_ids", None)
        embeds = self.get_base_layer()(ids) if embeds is None else embeds
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
        self._enter(kwargs, frame)

    # ------------------------------------------------------------------ choosing

    def _select(self, decoder, kwargs: dict, real: torch.Tensor, prompt_cache: PromptCache | None) -> Selection:
        """The prompt of each row: forced, kept from earlier in this `generate`, assigned (training) or selected."""
        config, batch = self.idp_config[self.active_bank], len(real)
        call = calls.current_call(self)
        rows = batch if call is None or not call.generating else call.batch
        if call is not None and call.chosen is None and call.prompt_ids is not None:
            call.chosen = Selection(check_prompt_ids(call.prompt_ids, rows, config.num_prompts))
        if call is not None and call.chosen is not None:
            selection = call.chosen
        elif decoder.training and config.assignment == "uniform":
            selection = Selection(deal_evenly(batch, config.num_prompts))
        elif decoder.training and config.assignment == "all":
            raise ValueError(
                "assignment='all' works through the model's own forward with `labels`, not by calling its decoder"
            )
        else:
            every = batch // rows if rows else 1  # `generate` repeats each row for its beams
            tokens = None if call is None else call.tokens  # and may draft tokens behind the input
            inputs = {
                n: kwargs[n][::every, :tokens] for n in ("input_ids", "inputs_embeds") if kwargs.get(n) is not None
            }
            selection = self.choose(
                inputs,
                real[::every, :tokens],
                None if call is None else call.selection_mask,
                None if call is None else call.labels,
                prompt_cache,
            )
            if call is not None and call.generating:
                call.chosen = selection
        self._remember(selection)
        if rows and batch != len(selection.prompt_ids):
            selection = Selection(selection.prompt_ids.repeat_interleave(batch // rows))
        return selection

    def choose(
        self,
        inputs: dict,
        real: torch.Tensor,
        selection_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        prompt_cache: PromptCache | None = None,
    ) -> Selection:
        """Choose a prompt for each row by the active adapter's rule.

        Args:
            inputs (`dict`): `input_ids` `[batch, n]` or `inputs_embeds` `[batch, n, d]`.
            real (`torch.Tensor`): bool `[batch, n]`, the attention mask.
            selection_mask (`torch.Tensor`, *optional*): `[batch, n]`.
            labels (`torch.Tensor`, *optional*): `[batch, n]`.
            prompt_cache (`PromptCache`, *optional*): one computed in this step, to be read instead of the remembered one.
        """
        config = self.idp_config[self.active_bank]
        if config.selection == "fixed" or config.num_prompts == 1:
            return Selection(torch.full((len(real),), config.fixed_prompt, device=real.device))
        context = context_tokens(real, selection_mask, labels)
        if config.selection == "random":
            content = inputs.get("input_ids")
            if content is None:
                content = inputs["inputs_embeds"].detach().float().contiguous().view(torch.int32).long().sum(-1)
            return Selection(choose_random(content, context, config.num_prompts, config.selection_seed))
        assert needs_attention(config)
        if prompt_cache is None:
            prompt_cache = self.prompt_cache(self.active_bank)
        layer = self.selection_layer
        on_prompts = attention_at_layer(self.decoder, layer, prompt_cache, inputs, real)  # [B, n, M]
        scores = scores_from_attention(on_prompts, context, prompt_cache.lengths, config.selection_reduction)
        return Selection(scores.argmax(-1), scores)

    @property
    def selection_layer(self) -> int:
        """The active adapter's selection layer, counted from the front."""
        layers = len(find_blocks(self.decoder)[1])
        return self.idp_config[self.active_bank].selection_layer % layers

    def prompt_cache(self, name: str) -> PromptCache:
        """The prompt cache of an adapter, computed where it is missing or stale."""
        with calls.internal_run(), _evaluating(self.decoder):
            return self.idp_remembered[name].get(self.decoder, self.idp_prompts[name], self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        return embedding_dtype(self.get_base_layer(), self.decoder)

    # ------------------------------------------------------------------ checks

    @staticmethod
    def _check_room(decoder: nn.Module, tokens: int, positions: int) -> None:
        limit = position_limit(decoder)
        if limit is not None and tokens + positions > limit:
            raise ValueError(
                f"{tokens} input tokens and {positions} prompt positions need {tokens + positions} positions, but the "
                f"model has {limit}: shorten the input to {max(limit - positions, 0)} tokens"
            )

    def _refuse_what_generate_needs_peft_for(self, config: IDPConfig, kwargs: dict) -> None:
        """Raise for a `generate` that did not come through [`IDPModel.generate`] and needs it."""
        cache = kwargs.get("past_key_values")
        call = calls.current_call(self)
        if call is not None and (call.generating or call.prompt_ids is not None):
            return
        without_cache = kwargs.get("use_cache") is False and cache is None and config.num_prompts > 1
        static = isinstance(cache, StaticCache) and not is_prompted(cache)
        if not (without_cache or static) or self.training or not _called_by_generate():
            return
        why = (
            "sizes a static cache without room for the prompt"
            if static
            else "would choose a prompt again at every step"
        )
        with_what = "cache_implementation='static'" if static else "use_cache=False"
        raise ValueError(
            f"generate({with_what}) {why} when the adapter was added by transformers' own adapter methods: wrap the model "
            "with peft (`PeftModel.from_pretrained`, `get_peft_model`), or use the default cache"
        )

    @staticmethod
    def _returns_cache(decoder: nn.Module, kwargs: dict) -> bool:
        use_cache = kwargs.get("use_cache")
        return (
            bool(decoder.config.use_cache if use_cache is None else use_cache)
            or kwargs.get("past_key_values") is not None
        )


# ---------------------------------------------------------------------- small parts


class _Local:
    """Latest selections of one thread."""

    def __init__(self) -> None:
        import threading

        self.local = threading.local()


_local = _Local()


def _by_thread() -> WeakKeyDictionary:
    if not hasattr(_local.local, "selections"):
        _local.local.selections = WeakKeyDictionary()
    return _local.local.selections


class _evaluating:
    """Context in which no module drops out; restores every module's own mode."""

    def __init__(self, decoder: nn.Module) -> None:
        self.modules = [m for m in decoder.modules() if m.training] if decoder.training else []

    def __enter__(self) -> None:
        for module in self.modules:
            module.training = False

    def __exit__(self, *_) -> None:
        for module in self.modules:
            module.training = True


def _by_name(module: nn.Module, args: tuple, kwargs: dict) -> dict:
    """A call's arguments by name, as a new dict."""
    return {**dict(zip(forward_parameters(type(module)), args, strict=False)), **kwargs}


def _inputs(kwargs: dict) -> torch.Tensor:
    inputs = kwargs.get("input_ids")
    inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
    if inputs is None:
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    return inputs


def _set_positions(decoder: nn.Module, kwargs: dict, positions: torch.Tensor) -> None:
    """Give the decoder explicit positions; transformers 5.0's cache positions then follow from the cache."""
    kwargs.pop("cache_position", None)
    if "position_ids" in forward_parameters(type(decoder)):
        kwargs["position_ids"] = positions


def _checked_mask(kwargs: dict, batch: int, slots: int, of: str) -> torch.Tensor | None:
    """The caller's `attention_mask`, 2-D `[batch, slots]` or `None`."""
    mask = kwargs.get("attention_mask")
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        kind = f"a {mask.ndim}-D tensor" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(
            f"IDP needs a 2-D `attention_mask` [batch, tokens], got {kind}: ready-made masks have no room for the "
            "prompt (transformers builds one for static caches; through peft's `generate` they work)"
        )
    if isinstance(kwargs.get("past_key_values"), StaticCache) and mask.shape[1] > slots:
        mask = mask[:, :slots]  # BLOOM pads its mask to the static cache's length
    if tuple(mask.shape) != (batch, slots):
        raise ValueError(f"`attention_mask` must cover {of}, [{batch}, {slots}], got {list(mask.shape)}")
    return mask


def _refuse_packed(kwargs: dict, real: torch.Tensor) -> None:
    """Raise where a row holds several documents: each would need a prompt of its own."""
    packed = any(kwargs.get(name) is not None for name in ("cu_seq_lens_q", "seq_idx", "cu_seqlens"))
    positions = kwargs.get("position_ids")
    if not packed and positions is not None and positions.ndim == 2 and positions.shape[-1] == real.shape[-1] > 1:
        both_real = real[:, 1:] & real[:, :-1]
        packed = bool(((positions[:, 1:] <= positions[:, :-1]) & both_real).any())
    if packed:
        raise ValueError(
            "IDP cannot run packed rows (several documents in one row, `position_ids` that start again): each document "
            "would need its own prompt; turn packing off"
        )


def _most_tokens(decoder: nn.Module, real: torch.Tensor) -> int:
    """Tokens of the longest row, where the decoder's positions are limited; else the row length, which costs nothing."""
    return real.shape[1] if position_limit(decoder) is None else int(real.sum(-1).max()) if real.numel() else 0


def _called_by_generate() -> bool:
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_globals.get("__name__") == "transformers.generation.utils":
            return True
        frame = frame.f_back
    return False
