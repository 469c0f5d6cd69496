"""What one call asks of IDP: arguments that the base model's forward does not know, carried to the decoder's hook.

Held in a `ContextVar`, so that threads and tasks that share a model never see each other's.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field

import torch

from idp_peft.selection import Selection


@dataclass
class Call:
    """One `forward` of the model, or one `generate`, which holds many.

    Args:
        owner (`IDPLayer`): the layer this call speaks to; others ignore it.
        prompt_ids (*optional*): forced prompts, as the caller wrote them (see `prompt_ids.py`).
        selection_mask (`torch.Tensor`, *optional*): `[batch, n]`, tokens that may steer the choice.
        labels (`torch.Tensor`, *optional*): `[batch, n]`; the choice reads what stands before the first label.
        generating (`bool`): whether this is a `generate`, whose choice is made once and kept.
        batch (`int`, *optional*): rows that the caller gave, before `generate` multiplies them for beams.
        tokens (`int`, *optional*): input tokens that the caller gave `generate`; drafted ones behind them never steer.
        total (`int`, *optional*): tokens that `generate` will reach at most, where nobody can go on from its cache.
        given (`dict`): the arguments of the model's running forward, by name: what its decoder gets may be the model's own.
        of_backbone (`bool`): whether only the model without its head was called.
        ready (`ReadyMasks`, *optional*): masks that the model built for its decoder, where they say more than `given`.
        seen (`bool`): whether the decoder was reached once, so that the call's arguments are checked already.
        chosen (`Selection`, *optional*): the choice, once made.
        adapter (`str`, *optional*): the adapter that was active when the call began. It is the call's until its end, whatever
            other threads set meanwhile.
    """

    owner: object
    prompt_ids: object = None
    selection_mask: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    generating: bool = False
    batch: int | None = None
    tokens: int | None = None
    total: int | None = None
    given: dict = field(default_factory=dict, repr=False)
    of_backbone: bool = False
    ready: object = field(default=None, repr=False)
    seen: bool = False
    chosen: Selection | None = None
    token: Token | None = field(default=None, repr=False)
    adapter: str | None = field(init=False)

    def __post_init__(self) -> None:
        self.adapter = self.owner.active_name


_call: ContextVar[Call | None] = ContextVar("idp_call", default=None)
_internal: ContextVar[bool] = ContextVar("idp_internal", default=False)


def current_call(owner: object) -> Call | None:
    """The innermost call that speaks to `owner`, or `None`."""
    call = _call.get()
    return call if call is not None and call.owner is owner else None


def begin(call: Call) -> None:
    call.token = _call.set(call)


def end(call: Call) -> None:
    _call.reset(call.token)


@contextmanager
def running(call: Call):
    begin(call)
    try:
        yield call
    finally:
        end(call)


@contextmanager
def undisturbed():
    """Leaves no call behind, even where an interrupt kept torch from running the hooks that end it."""
    before = _call.get()
    try:
        yield
    finally:
        _call.set(before)


def forget(call: Call) -> None:
    """Drop a call that an interrupt left behind."""
    if _call.get() is call:
        _call.set(None)


@contextmanager
def internal_run():
    """While IDP itself runs the decoder (for the prompt cache), its hooks stand aside."""
    token = _internal.set(True)
    try:
        yield
    finally:
        _internal.reset(token)


def is_internal_run() -> bool:
    return _internal.get()
