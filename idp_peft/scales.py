"""Scales: factors of the rows of every linear layer of the decoder, shared by the prompts of a bank.

    y = s * (W x + b)              in place of        y = W x + b         one factor per output channel
    y = (S * W) x + b              in place of        y = W x + b         one factor per output channel and group of inputs

So f of the equation is the base with scaled rows. Hooks on the linear layers apply the factors; no weight changes.
A factor of a row of W, or of a part of it, can be folded into the row's own scales (`models/folding.py`).
Sources of the idea: IA3 (Liu et al., arXiv 2205.05638), and for groups PEQA (Kim et al., arXiv 2305.14152), which trains the
scales of quantised weights themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import linear

from idp_peft.hosting.call import Call, current_call, running, scaling_in_force

_NOT_CALLED = ("altup.correction_coefs",)  # Gemma 3n's, which it clamps in training


class LinearScaling:
    """What scales the linear layers of a decoder, call by call.

    Args:
        layer (`IDPLayer`): whose active adapter's factors are applied.
    """

    def __init__(self, layer) -> None:
        self.layer = layer
        self._handles: list = []
        self._of_graph: Scaling | None = None

    def hook(self, group_size: int | None = None) -> list[torch.Size]:
        """Make the linear layers ask for their factors. Returns the shapes of these.

        Raises:
            `ValueError`: for a group size that does not fit the layers.
        """
        shapes, layers = factor_shapes(self.layer.decoder, group_size), linear_layers(self.layer.decoder)
        if not self._handles:
            hooks = [_ScaleOutput(self, number, ".experts." in f".{name}") for number, name in enumerate(layers)]
            pairs = zip(layers.values(), hooks, strict=True)
            self._handles = [one.register_forward_hook(hook, with_kwargs=True) for one, hook in pairs]
        return list(shapes.values())

    def unhook(self) -> None:
        """Take the hooks off the linear layers."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def unhook_where_unused(self) -> None:
        """As [`unhook`], where no adapter has scales."""
        if not any(config.scales for config in self.layer.idp_config.values()):
            self.unhook()

    def of_rows(self, prompt_ids: torch.Tensor, tokens: int) -> Scaling | None:
        """What scales the running forward: the rows with a prompt. Every process must ask, also one whose rows have none:
        ZeRO-3 gathers.

        Args:
            prompt_ids (`torch.Tensor`): int64 `[batch]`, -1 for no prompt.
            tokens (`int`): how many tokens the decoder's rows have.
        """
        scaling = self.of_all()
        if scaling is not None:
            has_prompt = prompt_ids >= 0
            if not has_prompt.all():
                scaling = Scaling(scaling.factors, has_prompt, tokens) if has_prompt.any() else None
        return scaling

    def note_graph(self, scaling: Scaling | None, output) -> None:
        """Remember what scaled a forward until its backward, which runs layers again under gradient checkpointing: each forward
        has its own, however many come before the backward.

        Args:
            scaling (`Scaling`, *optional*): what did.
            output (`ModelOutput` or `tuple`): of the decoder. Its gradients arrive before any layer of that forward runs again.
        """
        if not self._handles or not torch.is_grad_enabled():
            return

        def begin(_gradient: torch.Tensor) -> None:
            self._of_graph = scaling
            torch.autograd.Variable._execution_engine.queue_callback(self._end_of_backward)

        for part in output.values() if isinstance(output, dict) else output:
            for tensor in part if isinstance(part, tuple) else (part,):
                if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                    tensor.register_hook(begin)

    def _end_of_backward(self) -> None:
        self._of_graph = None

    def of_all(self) -> Scaling | None:
        """What scales rows that all have a prompt; `None` where the active adapter has no scales.

        Raises:
            `ValueError`: where they hold NaN or infinity.
        """
        bank = self.layer.active_bank
        if bank.scales is None:
            return None
        factors = bank.factors()
        if not factors.detach().isfinite().all():
            raise ValueError("the adapter's scales hold NaN or infinity: reload the adapter or lower the learning rate")
        return Scaling(by_layer(factors, bank.factor_shapes))

    @property
    def in_force(self) -> Scaling | None:
        """What scales the linear layers in the calling thread now."""
        return scaling_in_force(self.layer, self._of_graph)

    @contextmanager
    def everywhere(self) -> Iterator[None]:
        """A context in which the linear layers are scaled as for rows that all have a prompt: a choice reads them so, and
        what is computed of prompts."""
        call, scaling = current_call(self.layer), self.of_all()
        if scaling is None:
            yield
        elif call is None:
            with running(Call(self.layer, scaling=scaling)):
                yield
        else:
            before, call.scaling = call.scaling, scaling
            try:
                yield
            finally:
                call.scaling = before


@dataclass(frozen=True)
class Scaling:
    """The factors of one forward.

    Args:
        factors (`list[torch.Tensor]`): of each linear layer, float32 `[channels]` or `[channels, groups]`.
        has_prompt (`torch.Tensor`, *optional*): bool `[batch]`: the rows to scale; `None`: all of them.
        tokens (`int`): how many tokens the decoder's rows have.
    """

    factors: list[torch.Tensor]
    has_prompt: torch.Tensor | None = None
    tokens: int = 1

    def apply(
        self, output: torch.Tensor, number: int, is_routed: bool = False, given: torch.Tensor | None = None, layer=None
    ) -> torch.Tensor:
        """The scaled output of linear layer `number`: multiplied in float32, in the output's own type.

        Args:
            output (`torch.Tensor`): `[batch, n, channels]` or `[batch * n, channels]`.
            is_routed (`bool`): whether it is some of the tokens, in whatever order a router of experts has them.
            given (`torch.Tensor`), layer (`nn.Module`): the input and the layer itself, whose weight factors of groups read.
        """
        factor = self.factors[number].to(output.device)
        if factor.ndim == 2:
            weight = dense_weight(layer)
            if weight.is_meta or len(weight) != len(factor):
                raise ValueError(
                    "factors of groups read the weights, and a layer's are not here (offloaded, or in parts under ZeRO-3): keep "
                    "the base on its device, or set scale_group_size=None"
                )
            scaled = output + _OfGroups.apply(given.to(output.dtype), weight, factor)
        elif torch.is_grad_enabled():
            scaled = (output * factor).to(output.dtype)
        else:
            scaled = torch.mul(output, factor, out=torch.empty_like(output))
        return scaled if self.has_prompt is None else torch.where(self._rows(output, is_routed), scaled, output)

    def _rows(self, output: torch.Tensor, is_routed: bool) -> torch.Tensor:
        """`has_prompt`, in a shape that goes with the output's."""
        has_prompt = self.has_prompt.to(output.device)
        if not is_routed and output.ndim == 2 and len(output) == len(has_prompt) * self.tokens:
            has_prompt = has_prompt.repeat_interleave(self.tokens)
        elif is_routed or output.ndim == 2 or len(output) != len(has_prompt):
            raise ValueError(
                "rows without a prompt (`prompt_ids` of -1) cannot stand beside others here: the adapter has scales, and a "
                f"linear layer's output of shape {list(output.shape)} does not say which of its {len(has_prompt)} rows is which. "
                "Put rows without a prompt into a batch of their own"
            )
        return has_prompt.view(-1, *[1] * (output.ndim - 1))


class _ScaleOutput:
    """Forward hook of a linear layer: scales its output while a call of the adapter's layer runs."""

    def __init__(self, scaling: LinearScaling, number: int, is_routed: bool) -> None:
        self.scaling, self.number, self.is_routed = scaling, number, is_routed

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor | None:
        scaling = self.scaling.in_force
        if scaling is None:
            return None
        return scaling.apply(output, self.number, self.is_routed, (*args, *kwargs.values())[0], module)


class _OfGroups(torch.autograd.Function):
    """What factors of groups add to a linear layer's output, `((S - 1) * W) x`. It keeps no scaled weight for the backward."""

    @staticmethod
    def forward(ctx, given: torch.Tensor, weight: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """
        Args:
            given (`torch.Tensor`): `[..., in]`, in the output's type.
            weight (`torch.Tensor`): `[out, in]`, frozen.
            factors (`torch.Tensor`): float32 `[out, groups]`.
        """
        ctx.save_for_backward(given, weight, factors)
        return linear(given, _OfGroups.change(weight, factors, given.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        given, weight, factors = ctx.saved_tensors
        of_given = gradient @ _OfGroups.change(weight, factors, gradient.dtype) if ctx.needs_input_grad[0] else None
        of_weight = gradient.flatten(0, -2).T @ given.flatten(0, -2)  # [out, in]
        of_factors = (of_weight.float() * weight).unflatten(1, (factors.shape[1], -1)).sum(-1)
        return of_given, None, of_factors

    @staticmethod
    def change(weight: torch.Tensor, factors: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """By how much the weight changes: multiplied in float32."""
        return (weight.unflatten(1, (factors.shape[1], -1)) * (factors - 1)[..., None]).flatten(1).to(dtype)


def linear_layers(decoder: nn.Module) -> dict[str, nn.Module]:
    """The decoder's linear layers, packed ones included, by name and in its order.

    Experts that are kept in one tensor for all (Mixtral's in transformers 5) are no layers of their own: they have no factors.
    Neither has a layer that a decoder does not call in training, but reads the weight of.
    """
    return {
        name: module
        for name, module in decoder.named_modules()
        if not name.startswith("idp")
        and not name.endswith(_NOT_CALLED)
        and output_channels(module) is not None
        and not _holds_layers(module)
    }


def factor_shapes(decoder: nn.Module, group_size: int | None = None) -> dict[str, torch.Size]:
    """The shape of the factors of each of a decoder's linear layers, by name: `[channels]`, or `[channels, groups]`.

    Args:
        group_size (`int`, *optional*): how many neighbouring inputs share a factor; `None`: all of them. Of a layer whose inputs it
            does not divide, all share one.

    Raises:
        `ValueError`: where it divides no layer's inputs, or a layer's weight is packed in memory.
    """
    shapes = {}
    for name, module in linear_layers(decoder).items():
        shapes[name] = torch.Size([output_channels(module)])
        if group_size is not None:
            inputs = module.nx if is_conv(module) else module.in_features
            dense_weight(module, name)
            shapes[name] = torch.Size([*shapes[name], 1 if inputs % group_size else inputs // group_size])
    if group_size is not None and not any(groups > 1 for _, groups in shapes.values()):
        raise ValueError(f"`scale_group_size` must divide the inputs of linear layers, got {group_size}")
    return shapes


def by_layer(scales: torch.Tensor, shapes: Iterable[torch.Size]) -> list[torch.Tensor]:
    """The scales of an adapter, `[C]`, as parts of the given shapes."""
    shapes = list(shapes)
    parts = scales.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def dense_weight(module: nn.Module, name: str = "a linear layer") -> torch.Tensor:
    """A linear layer's weight, `[out, in]`.

    Raises:
        `ValueError`: where it is packed, or elsewhere.
    """
    weight = getattr(module, "weight", None)
    if type(weight) not in (torch.Tensor, nn.Parameter) or not weight.is_floating_point() or weight.element_size() < 2:
        raise ValueError(
            f"factors of groups read the weights, and those of {name} are packed ({type(module).__name__}): load the base unpacked, "
            "or set scale_group_size=None"
        )
    return weight.T if is_conv(module) else weight


def is_conv(module: nn.Module) -> bool:
    """Whether a layer keeps its weight as `[in, out]` (GPT-2's `Conv1D`)."""
    return type(module).__name__ == "Conv1D"


def output_channels(module: nn.Module) -> int | None:
    """How many output channels a linear layer has; `None` for another module."""
    if is_conv(module):
        return module.nf
    channels = getattr(module, "out_features", None)
    return channels if isinstance(channels, int) and hasattr(module, "in_features") else None


def _holds_layers(module: nn.Module) -> bool:
    return any(output_channels(child) is not None for child in module.children())
