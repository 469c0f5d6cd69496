"""What one call of a model asks of IDP, carried from the model's hooks to its decoder's.

It is held in the package's one `ContextVar`, so that threads and tasks that share a model never see each other's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import nn

from idp_peft.hosting.trainers import labels_of_step


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
        scaling (`Scaling`, *optional*): what scales the linear layers' outputs in that forward.
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
    selection: object = None
    input: object = field(default=None, repr=False)
    scaling: object = field(default=None, repr=False)
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
    begin(call)
    try:
        yield call
    finally:
        end(call)


def internal_run(scaling=None):
    """A context in which IDP itself runs the decoder: the decoder's hooks stand aside.

    Args:
        scaling (`Scaling`, *optional*): what scales the linear layers meanwhile.
    """
    return running(Call(None, scaling=scaling))


def scaling_in_force(owner: object, of_graph: object) -> object:
    """What scales the linear layers of an owner's decoder now.

    Args:
        of_graph: what does where a backward runs a layer again (gradient checkpointing), whose call has ended.
    """
    call = _call.get()
    if call is None:
        return of_graph if torch._C._current_graph_task_id() != -1 else None
    return call.scaling if call.owner in (owner, None) else None


@contextmanager
def undisturbed() -> Iterator[None]:
    """A context that leaves no call behind, even where an interrupt kept torch from running the hooks that end it."""
    before = _call.get()
    try:
        yield
    finally:
        _call.set(before)


def begin(call: Call) -> Call:
    """Make a call the innermost one; [`end`] goes back to the one around it."""
    call.outer = _call.get()
    _call.set(call)
    return call


def end(call: Call) -> None:
    """Go back to the call around this one."""
    _call.set(call.outer)


def enter(module: nn.Module, layer, given: dict) -> Call:
    """The running call of a layer; one that begins at this module where there is none.

    Args:
        module (`nn.Module`): whose forward begins.
        layer (`IDPLayer`): whose call it is.
        given (`dict`): the arguments of that forward, by name.
    """
    call = current_call(layer)
    if call is not None and call.began_at is module:
        end(call)  # an interrupt left it behind
        call = current_call(layer)
    return begin(Call(layer, labels=labels_of(given), began_at=module, given=given)) if call is None else call


def leave(module: nn.Module, layer) -> Call | None:
    """End the call that began at this module, and return it."""
    call = current_call(layer)
    if call is None or call.began_at is not module:
        return None
    end(call)
    return call


def labels_of(given: dict) -> torch.Tensor | None:
    """The labels of a call, or those that a trainer's loop took out of it.

    Args:
        given (`dict`): the call's arguments, by name.
    """
    labels = given.get("labels")
    return labels_of_step(given.get("input_ids")) if labels is None else labels
