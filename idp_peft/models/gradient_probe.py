"""Checks that a base model propagates gradients to its input, and that these gradients are right.

Some kernels of compressed layers cut the gradient without an error: the loss still falls, since the residual stream
carries a part of it around the layers, so only a look at the layers themselves can tell.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from idp_peft.files.error_reason import reason
from idp_peft.hosting.outer_model import marked_as_text
from idp_peft.models.layer_gradient import device_of, kind_of, layer_error, linear_layers

# Relative. In float32, rounding makes 1e-6 of difference. bfloat16 rounds by up to 0.4 %, in the output, the gradient and
# the effective weights once each, and much of it averages out over a layer: 0.2 to 0.3 % is measured. A kernel with a
# transposed block or a missing scale is off by tens of percent. 2 % stands clear of both.
TOLERANCE = 0.02
_TOKENS = 16


@dataclass(frozen=True)
class GradientProbe:
    """What `probe_gradients` found; `str()` of it is one line.

    Args:
        verdict (`str`): `"trainable"`, `"inference only"` or `"wrong gradients"`.
        reason (`str`): what was seen.
        relative_errors (`dict[str, float]`): of one layer of each kind, the norm of (its gradient minus the right one)
            over that of the right one, by `"Class INxOUT"`; empty where a layer cuts the gradient.
        severed (`tuple[str, ...]`): names of the layers that cut the gradient.
    """

    verdict: str
    reason: str
    relative_errors: dict[str, float] = field(default_factory=dict)
    severed: tuple[str, ...] = ()

    @property
    def trainable(self) -> bool:
        return self.verdict == "trainable"

    def __str__(self) -> str:
        link = {"trainable": ": ", "inference only": ", because ", "wrong gradients": " from "}[self.verdict]
        return self.verdict + link + self.reason


def probe_gradients(model: nn.Module, token_ids: list[int] | torch.Tensor | None = None) -> GradientProbe:
    """Check that prompts or adapters can be trained through a model's layers. Runs on the model's device.

    1. One forward in evaluation mode without gradients, since some kernels fix a mode at their first call and keep it.
    2. In training mode, every linear layer's output must want a gradient when its input does.
    3. For one layer of each kind (class and shape), the gradient that it returns is compared with the one that follows
       from its effective weights `W_eff = layer(I) - layer(0)`.

    Experts that an architecture keeps in one fused parameter are not layers, and are not looked at.

    Args:
        model (`torch.nn.Module`): a causal language model without adapters, in any format. Its mode, its parameters'
            `requires_grad` and `grad` are the same afterwards. So are its weights, unless their format rearranges them
            at a first forward, whoever makes it.
        token_ids (`list[int]`, *optional*): what to read; by default some ids of the vocabulary.

    Returns:
        [`GradientProbe`]
    """
    layers = linear_layers(model)
    if not layers:
        return GradientProbe("inference only", "no linear layer was found in the model to look at")
    ids = _token_ids(model, token_ids)
    with _restored(model):
        model.eval()
        with torch.no_grad():
            model(input_ids=ids)
        model.train()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        try:
            severed, dtypes = _severed(model, layers, ids)
        except Exception as error:
            return GradientProbe("inference only", f"a forward pass that records gradients fails: {_one_line(error)}")
        return _cut(layers, severed) if severed else _compare(layers, dtypes)


def _cut(layers: dict[str, nn.Module], severed: list[str]) -> GradientProbe:
    kinds = ", ".join(sorted({kind_of(layers[name])[0] for name in severed}))
    reason = f"{len(severed)} of {len(layers)} linear layers ({kinds}) cut the gradient, {severed[0]} first"
    return GradientProbe("inference only", reason, severed=tuple(severed))


def _compare(layers: dict[str, nn.Module], dtypes: dict[str, torch.dtype]) -> GradientProbe:
    """The third step: one layer of each kind against its effective weights."""
    errors: dict[tuple, float | None] = {}
    for name, layer in layers.items():
        if kind_of(layer) in errors:
            continue
        try:
            errors[kind_of(layer)] = layer_error(layer, dtypes[name])
        except Exception as error:
            reason = f"the backward pass of {kind_of(layer)[0]} ({name}) fails: {_one_line(error)}"
            return GradientProbe("inference only", reason, severed=(name,))
    # Some kernels' outputs claim to hand a gradient on and give none when asked.
    if severed := [name for name, layer in layers.items() if errors[kind_of(layer)] is None]:
        return _cut(layers, severed)
    named = {f"{kind} {reads}x{writes}": error for (kind, reads, writes), error in errors.items()}
    worst = max(named, key=lambda key: named[key] if named[key] == named[key] else float("inf"))  # NaN is the worst
    if named[worst] < TOLERANCE:
        reason = (
            f"{len(layers)} linear layers of {len(named)} kinds, largest relative error {named[worst]:.1e} ({worst})"
        )
        return GradientProbe("trainable", reason, named)
    reason = f"kernel {worst} (relative error {named[worst]:.2g}, where less than {TOLERANCE} is right)"
    return GradientProbe("wrong gradients", reason, named)


def _severed(model: nn.Module, layers: dict[str, nn.Module], ids: torch.Tensor):
    """Names of the layers that do not propagate gradients, and the type that each layer reads.

    Every layer's input is made to want one anew: behind a layer that cuts, the next would not be asked otherwise.
    """
    dtypes, severed = {}, []

    def ask(name):
        def hook(_module, args):
            if not args:  # called by keyword; asked directly below
                return None
            dtypes[name] = args[0].dtype
            return (args[0] if args[0].requires_grad else args[0].detach().requires_grad_(True), *args[1:])

        return hook

    def look(name):
        def hook(_module, _args, output):
            if name in dtypes and not output.requires_grad and name not in severed:
                severed.append(name)

        return hook

    handles = [layer.register_forward_pre_hook(ask(name)) for name, layer in layers.items()]
    handles += [layer.register_forward_hook(look(name)) for name, layer in layers.items()]
    try:
        with torch.enable_grad():
            model(**marked_as_text(model, {"input_ids": ids, "use_cache": False}))
            for name in [name for name in layers if name not in dtypes]:  # experts that no token was sent to
                layer = layers[name]
                layer(torch.zeros(1, 1, kind_of(layer)[1], device=device_of(layer), dtype=model.dtype))
    finally:
        for handle in handles:
            handle.remove()
    order = list(layers)
    return sorted(severed, key=order.index), dtypes


def _token_ids(model: nn.Module, token_ids) -> torch.Tensor:
    """int64 `[1, tokens]`"""
    if token_ids is None:
        vocabulary = model.config.get_text_config().vocab_size
        token_ids = torch.randint(vocabulary, (_TOKENS,), generator=torch.Generator().manual_seed(0))
    return torch.as_tensor(token_ids, dtype=torch.long).reshape(1, -1).to(model.device)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {reason(error)}"


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Modes of all modules and `requires_grad` of all parameters, as they were; and a random state of its own."""
    modes = {module: module.training for module in model.modules()}
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter in wanted:
            parameter.requires_grad_(True)
