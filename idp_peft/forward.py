"""The path of a call: choose a prompt, put it in front of the input, hand back the caller's shapes.

    IDP(x) = f([P_{i*(x)} ; E(x)])

Hooks do it. Those on the decoder are the method ([`Forward.before_decoder`]). Those on the model, and on its part without
the head, only note what the decoder is not told: IDP's own arguments, the labels, what the caller wrote. They leave it in a
[`Call`], which threads and tasks that share a model never see of each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import nn

from idp_peft.hosting.architectures import by_name, gathers_layers
from idp_peft.hosting.decoder_input import DecoderInput
from idp_peft.hosting.generation import GenerateRequest
from idp_peft.hosting.input_cache import Front
from idp_peft.hosting.outer_model import marked_as_text, read_by_choice
from idp_peft.hosting.prompt_ids import CHOOSES, check_prompt_ids
from idp_peft.hosting.repeated_batch import repeat_batch, with_mean_logits
from idp_peft.hosting.trainers import compares_answers, in_training, labels_of_step
from idp_peft.selection import Selection, select

_OWN = ("prompt_ids", "selection_mask")


@dataclass
class Call:
    """One `forward` of the model, or one `generate`, which holds many.

    Args:
        owner (`IDPLayer`, *optional*): the layer this call speaks to; others ignore it. `None`: IDP itself runs the decoder.
        prompt_ids (*optional*): forced prompts, as the caller wrote them.
        selection_mask (`torch.Tensor`, *optional*): `[batch, n]`, tokens that may steer the choice.
        labels (`torch.Tensor`, *optional*): `[batch, n]`; the choice reads what stands before the first label.
        began_at (`nn.Module`, *optional*): the module whose hooks began the call, and end it.
        given (`dict`): the arguments of the running forward, by name: the decoder may get others.
        generating (`bool`): whether this is a `generate`, whose choice is made once and kept.
        batch (`int`, *optional*): rows that the caller gave, before `generate` repeats them for beams, or training for
            every prompt.
        tokens (`int`, *optional*): input tokens that the caller gave `generate`; drafted ones behind them never steer.
        total (`int`, *optional*): tokens that `generate` will reach at most, where nobody can go on from its cache.
        ready (`ReadyMasks`, *optional*): masks that the model built for its decoder, where they say more than `given`.
        checked (`bool`): whether the decoder was reached once, so that the call's arguments are checked.
        selection (`Selection`, *optional*): the choice of a `generate`, once made.
        input (`DecoderInput`, *optional*): of the decoder's running forward.
        outer (`Call`, *optional*): the call that goes on behind this one.
        adapter (`str`, *optional*): the adapter that was active when the call began. The call keeps it, whatever other
            threads set meanwhile.
    """

    owner: object
    prompt_ids: object = None
    selection_mask: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    began_at: nn.Module | None = field(default=None, repr=False)
    given: dict = field(default_factory=dict, repr=False)
    generating: bool = False
    batch: int | None = None
    tokens: int | None = None
    total: int | None = None
    ready: object = field(default=None, repr=False)
    checked: bool = False
    selection: Selection | None = None
    input: DecoderInput | None = field(default=None, repr=False)
    outer: Call | None = field(default=None, repr=False)
    adapter: str | None = field(init=False)

    def __post_init__(self) -> None:
        self.adapter = None if self.owner is None else self.owner.active_name


_call: ContextVar[Call | None] = ContextVar("idp_call", default=None)


def current_call(owner: object) -> Call | None:
    """The innermost call, where it speaks to `owner`; else `None`."""
    call = _call.get()
    return call if call is not None and call.owner is owner else None


def is_internal_run() -> bool:
    """Whether IDP itself runs the decoder, for the prompt cache."""
    return (call := _call.get()) is not None and call.owner is None


@contextmanager
def running(call: Call) -> Iterator[Call]:
    """A call for as long as the context lasts."""
    _begin(call)
    try:
        yield call
    finally:
        _call.set(call.outer)


def internal_run():
    """A context in which IDP itself runs the decoder: the hooks stand aside."""
    return running(Call(None))


@contextmanager
def undisturbed() -> Iterator[None]:
    """A context that leaves no call behind, even where an interrupt kept torch from running the hooks that end it."""
    before = _call.get()
    try:
        yield
    finally:
        _call.set(before)


def _begin(call: Call) -> Call:
    call.outer = _call.get()
    _call.set(call)
    return call


class Forward:
    """The hooks through which every call of a model goes.

    Args:
        layer (`IDPLayer`): whose prompts are applied.
    """

    def __init__(self, layer) -> None:
        self.layer = layer

    def hook(self, model: nn.Module, decoder: nn.Module) -> list:
        """Install the hooks; returns their handles."""
        pairs = [(model, self.before_model, self.after_model), (decoder, self.before_decoder, self.after_decoder)]
        backbone = getattr(model, "base_model", model)
        if backbone not in (model, decoder):
            pairs.append((backbone, self.before_backbone, self.after_backbone))
        handles = []
        for module, before, after in pairs:
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True, always_call=True))
        return handles

    # ------------------------------------------------------------------ the decoder: the method

    @torch.compiler.disable
    def before_decoder(self, decoder: nn.Module, args: tuple, kwargs: dict):
        """Forward pre-hook of the decoder: f(E(x)) becomes f([P_{i*(x)} ; E(x)])."""
        if is_internal_run():
            return None
        call = self._enter(decoder, by_name(decoder, args, kwargs))
        x = DecoderInput(decoder, by_name(decoder, args, kwargs), call)
        if self.layer.active_name is None:
            kwargs = x.without_adapter()
            call.input = None if x.view is None else x
            return (), kwargs
        call.input = x.read(self.layer)
        if x.next_turn_ids is not None:
            self.layer.remember(Selection(x.next_turn_ids, prompt_names=self.layer.active_config.prompt_names))
        if x.front is None:  # the beginning of a text
            self.layer.active_bank.is_new = False
            prompt_ids = self._select(call, x) if x.kept_ids is None else x.kept_ids  # i*(x)
            front = Front.of(prompt_ids.to(x.real_tokens.device), self.layer.active_bank, self.layer.signature)
            x.begin(front, self.layer)
            self._put_in_front(x)  # P_{i*(x)}
        return (), x.arguments()  # E(x) behind it: mask and positions count the prompt

    def _select(self, call: Call, x: DecoderInput) -> torch.Tensor:
        """i*(x): the prompt of each row of the decoder's input, int64 `[batch]`. A `generate` chooses once."""
        layer, batch = self.layer, len(x.real_tokens)
        if gathers_layers(x.decoder) and not layer.trains:
            layer.prompt_cache()  # every process gathers the layers for it, those too whose rows do not read it
        rows = call.batch if call.generating else batch  # `generate` repeats each row for its beams
        selection = call.selection
        if selection is None:
            given = (slice(None, None, batch // rows), slice(call.tokens))  # without beams and drafted tokens
            inputs = {name: value[given] for name, value in read_by_choice(x.kwargs, call).items()}
            trains = not call.generating and in_training(layer.model, layer)
            asked = (call.selection_mask, call.labels, call.prompt_ids)
            selection = select(layer, inputs, x.real_tokens[given], *asked, training=trains)
        if call.generating:
            call.selection = selection
        layer.remember(selection)
        return selection.prompt_ids.repeat_interleave(batch // rows)

    def _put_in_front(self, x: DecoderInput) -> None:
        """P_{i*(x)}: its keys and values, computed once; where no cache can hold them, its embeddings."""
        layer, rows = self.layer, x.front.prompt_ids.clamp(min=0)
        if x.concatenates:
            x.put_embeddings(layer.active_bank, layer.get_base_layer())
        elif x.front.positions and layer.trains:
            used, rows = rows.unique(return_inverse=True)
            layer.prompt_cache_with_graph(used, x.rotary_length).put_rows(rows, x.view)
        elif x.front.positions:
            layer.prompt_cache(x.rotary_length).put_rows(rows, x.view)

    @torch.compiler.disable
    def after_decoder(self, decoder: nn.Module, args: tuple, kwargs: dict, output):
        """Forward post-hook of the decoder: the caller's cache and the caller's n positions; runs after errors too."""
        call = None if is_internal_run() else current_call(self.layer)
        if call is None:
            return None
        x, call.input = call.input, None
        self._leave(decoder)
        return None if x is None or output is None else x.hand_back(output)

    # ------------------------------------------------------------------ the model around it

    @torch.compiler.disable
    def before_model(self, model: nn.Module, args: tuple, kwargs: dict):
        """Forward pre-hook of the model: takes IDP's own arguments out of its call before the base sees them."""
        own = {name: kwargs[name] for name in _OWN if kwargs.get(name) is not None}
        kwargs = {name: value for name, value in kwargs.items() if name not in _OWN}
        if self.layer.active_name is None:
            if own:
                raise ValueError(f"{' and '.join(f'`{n}`' for n in own)} given, but no IDP adapter is active")
            return args, kwargs
        outer = current_call(self.layer)
        if outer is not None and outer.generating and not own:
            outer.given = by_name(model, args, kwargs)
            return None
        if outer is not None and not outer.generating:
            _call.set(outer.outer)  # an interrupt left it behind
        if model.training:
            args, kwargs = (), marked_as_text(model, by_name(model, args, kwargs))
        call = Call(self.layer, **own, labels=self._labels(by_name(model, args, kwargs)), began_at=model)
        config = self.layer.active_config
        if config.num_prompts > 1 and "prompt_ids" not in own and in_training(model, self.layer):
            if config.assignment == "all":
                args, kwargs = (), self._on_every_prompt(call, by_name(model, args, kwargs))
            elif config.assignment == "uniform" and compares_answers():
                raise ValueError(
                    "assignment='uniform' deals a prompt to each row of every forward, and this trainer needs one prompt for one "
                    "context in all of them (answers that it compares, text that the model sampled, a reference): use "
                    "assignment='selected'"
                )
        call.given = by_name(model, args, kwargs)
        _begin(call)
        return args, kwargs

    @torch.compiler.disable
    def after_model(self, model: nn.Module, args: tuple, kwargs: dict, output):
        """Forward post-hook of the model; runs after errors too, then without an output."""
        call = self._leave(model)
        repeated = call is not None and output is not None and call.batch is not None
        return with_mean_logits(call.batch, output) if repeated else None

    @torch.compiler.disable
    def before_backbone(self, backbone: nn.Module, args: tuple, kwargs: dict):
        """Forward pre-hook of the model without its head, where that is not the decoder itself: of a multimodal model. Trainers
        with a head of their own call it directly (TRL)."""
        if self.layer.active_name is None:
            return None
        kwargs = by_name(backbone, args, kwargs)
        if backbone.training:
            kwargs = marked_as_text(backbone, kwargs)
        self._enter(backbone, kwargs).given = kwargs
        return (), kwargs

    @torch.compiler.disable
    def after_backbone(self, backbone: nn.Module, args: tuple, kwargs: dict, output) -> None:
        """Forward post-hook; runs after errors too."""
        self._leave(backbone)

    def _enter(self, module: nn.Module, given: dict) -> Call:
        """The running call; one that begins at this module where there is none."""
        call = current_call(self.layer)
        if call is not None and call.began_at is module:
            _call.set(call.outer)  # an interrupt left it behind
            call = current_call(self.layer)
        if call is None:
            call = _begin(Call(self.layer, labels=self._labels(given), began_at=module, given=given))
        return call

    def _leave(self, module: nn.Module) -> Call | None:
        """End the call that began at this module, and return it."""
        call = current_call(self.layer)
        if call is None or call.began_at is not module:
            return None
        _call.set(call.outer)
        return call

    @staticmethod
    def _labels(given: dict) -> torch.Tensor | None:
        """The labels of a call, or those that a trainer's loop took out of it."""
        labels = given.get("labels")
        return labels_of_step(given.get("input_ids")) if labels is None else labels

    def _on_every_prompt(self, call: Call, kwargs: dict) -> dict:
        """`assignment="all"`: the batch once per prompt."""
        prompts = self.layer.active_bank.num_prompts
        repeated = repeat_batch(kwargs, prompts)
        call.batch = len(kwargs["labels"])
        call.prompt_ids = torch.arange(prompts).repeat_interleave(call.batch)
        call.labels = call.selection_mask = None
        return repeated


def generate(layer, args: tuple, kwargs: dict, prompt_ids, selection_mask: torch.Tensor | None):
    """The base model's `generate(*args, **kwargs)`, with one prompt per row, chosen once and kept.

    Args:
        layer (`IDPLayer`): whose active adapter is applied.
        args (`tuple`), kwargs (`dict`): arguments of transformers' `generate`.
        prompt_ids (*optional*): forced prompts: int64 `[batch]`, or whatever [`check_prompt_ids`] accepts.
        selection_mask (`torch.Tensor`, *optional*): bool `[batch, n]`.
    """
    request = GenerateRequest(layer.model, args, kwargs)
    if request.source is None or layer.active_name is None:
        if prompt_ids is not None or selection_mask is not None:
            raise ValueError("`prompt_ids` and `selection_mask` need an active IDP adapter and an input")
        return layer.model.generate(*args, **kwargs)
    batch, tokens = request.source.shape[:2]
    with running(Call(layer, prompt_ids, selection_mask, generating=True, batch=batch, tokens=tokens)) as call:
        config, bank = layer.active_config, layer.active_bank
        some_choose = prompt_ids is None
        if prompt_ids is not None:
            forced = check_prompt_ids(prompt_ids, batch, bank.num_prompts, config.prompt_names)
            some_choose = bool((forced == CHOOSES).any())
        request.prepare(layer.decoder, bank.max_length)
        call.total = request.total_tokens
        kept = request.kept_prompts(layer.signature) if prompt_ids is None else None
        if kept is not None:
            call.selection = Selection(kept, prompt_names=config.prompt_names)
        elif some_choose and config.chooses and request.in_chunks:  # the choice reads the whole input
            inputs, mask = request.read_before_chunks()
            call.selection = select(layer, inputs, mask, selection_mask, prompt_ids=prompt_ids)
            layer.remember(call.selection)
        return layer.model.generate(*request.args, **request.kwargs)
