"""Scales: one factor per output channel of every linear layer of the decoder, shared by the prompts of a bank.

    y = s * (W x + b)        in place of        y = W x + b

So f of the equation is the base with scaled rows. Hooks on the linear layers apply the factors; no weight changes.
A factor of an output channel is a factor of a row of W: it can be folded into the row's own scale (`models/folding.py`).
Source of the idea: IA3 (Liu et al., arXiv 2205.05638).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

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

    def hook(self) -> list[int]:
        """Make the linear layers ask for their factors. Returns the output channels of each."""
        layers = linear_layers(self.layer.decoder)
        if not self._handles:
            hooks = [_ScaleOutput(self, number, ".experts." in f".{name}") for number, name in enumerate(layers)]
            self._handles = [one.register_forward_hook(hook) for one, hook in zip(layers.values(), hooks, strict=True)]
        return [output_channels(one) for one in layers.values()]

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
        return Scaling(factors.split(bank.channels))

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
        factors (`tuple[torch.Tensor]`): float32 `[channels]` of each linear layer.
        has_prompt (`torch.Tensor`, *optional*): bool `[batch]`: the rows to scale; `None`: all of them.
        tokens (`int`): how many tokens the decoder's rows have.
    """

    factors: tuple[torch.Tensor, ...]
    has_prompt: torch.Tensor | None = None
    tokens: int = 1

    def apply(self, output: torch.Tensor, number: int, is_routed: bool = False) -> torch.Tensor:
        """The scaled output of linear layer `number`: multiplied in float32, in the output's own type.

        Args:
            output (`torch.Tensor`): `[batch, n, channels]` or `[batch * n, channels]`.
            is_routed (`bool`): whether it is some of the tokens, in whatever order a router of experts has them.
        """
        factor = self.factors[number].to(output.device)
        if torch.is_grad_enabled():
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
    def __call__(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        scaling = self.scaling.in_force
        return None if scaling is None else scaling.apply(output, self.number, self.is_routed)


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
