"""Shallow copies of a decoder's first layers: they share every weight, and nothing stays on the model behind a run.

Other threads run the model undisturbed meanwhile.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import DynamicCache

from idp_peft.hosting.architectures import (
    cache_name,
    find_attention,
    find_blocks,
    forward_parameters,
    keeps_rotary,
    uses_interface,
)
from idp_peft.hosting.sharding import gather_around, gathers, plain_class, unwrapped

_HOOK_TABLES = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


@contextmanager
def evaluating(decoder: nn.Module) -> Iterator[None]:
    """A context in which no module drops out; each gets its own mode back."""
    modules = [module for module in decoder.modules() if module.training] if decoder.training else []
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module in modules:
            module.training = True


def run_unmasked(decoder: nn.Module, positions: torch.Tensor, **inputs) -> list:
    """Run the decoder on unmasked rows; returns the layers of its cache."""
    cache, run = DynamicCache(), decoder
    if gathers(decoder):  # without its own hooks: they would free weights that the forward around this run needs
        decoder.unshard()
        run = decoder.forward
    if "position_ids" in forward_parameters(type(decoder)):
        inputs["position_ids"] = positions
    run(**inputs, use_cache=True, **{cache_name(type(decoder)): cache})
    return cache.layers


class Reached(Exception):
    """Raised by an attention function to leave a copied decoder with a result."""

    def __init__(self, result: torch.Tensor) -> None:
        self.result = result


def run_until_reached(decoder: nn.Module, layer: int, implementation: str, reader, call: dict) -> torch.Tensor:
    """Run a copy of a decoder until one of its attention modules raises [`Reached`]; returns what that carries.

    Args:
        call (`dict`): the arguments of the decoder's forward. The others: as in [`copy_for_reading`].
    """
    copied = copy_for_reading(decoder, layer, implementation, reader)
    try:
        type(decoder).forward(copied, **call)
    except Reached as reached:
        return reached.result
    raise RuntimeError(f"the attention of layer {layer} of {type(decoder).__name__} was not reached")


def first_layers(decoder: nn.Module, layer: int) -> nn.Module:
    """A shallow copy of a decoder that ends behind `layer` and has no hooks of its own; its layers are the decoder's."""
    name, blocks = find_blocks(decoder)
    part = _copy_around_layers(decoder)
    part._modules[name] = nn.ModuleList(blocks[: layer + 1])
    return part


def copy_for_reading(decoder: nn.Module, layer: int, implementation: str, reader) -> nn.Module:
    """A shallow copy of a decoder that ends behind `layer`, and whose attention modules report to a reader.

    Args:
        decoder (`nn.Module`): the base model's decoder.
        layer (`int`): the last layer to run.
        implementation (`str`): name of the attention function in transformers' `AttentionInterface`, or `"eager"`.
        reader: what that function finds as `module.config.idp_reader`. Attention that does not use the interface raises
            [`Reached`] at `reader.layer`, with its weights `[batch, heads, n, S+n]`.
    """
    config = copy.copy(decoder.config)
    config._attn_implementation_internal = implementation
    config.output_hidden_states = False
    config._output_attentions = False
    config.idp_reader = reader
    name, blocks = find_blocks(decoder)
    probe = _copy_around_layers(decoder)
    probe.config = config
    for key, child in probe._modules.items():
        if isinstance(child, nn.Embedding):
            probe._modules[key] = without_noise(child)
    probe._modules[name] = nn.ModuleList(
        _copy_block(block, config, number) for number, block in enumerate(blocks[: layer + 1])
    )
    return probe


def without_noise(embeddings: nn.Module) -> nn.Module:
    """A shallow copy of an embedding module to which training adds no noise. Its hooks stay: they may fetch its weights."""
    copied = _shallow_copy(embeddings)
    copied.training = False
    return copied


def _copy_around_layers(decoder: nn.Module) -> nn.Module:
    copied = _bare_copy(decoder)
    if keeps_rotary(decoder):
        for name, child in copied._modules.items():
            if hasattr(child, "max_seq_len_cached"):
                copied._modules[name] = _at_original_frequencies(child)
    return copied


def _at_original_frequencies(rotary: nn.Module) -> nn.Module:
    """A copy of a rotary embedding that has run no input yet."""
    copied = _shallow_copy(rotary)
    copied._buffers = dict(rotary._buffers)
    for name in rotary._buffers:
        original = getattr(rotary, f"{name.removesuffix('inv_freq')}original_inv_freq", None)
        if original is not None:
            copied._buffers[name] = original.to(rotary._buffers[name].device)
    for name in list(vars(rotary)):
        if name.endswith("max_seq_len_cached"):
            setattr(copied, name, rotary.original_max_seq_len)
    return copied


def _copy_block(owner: nn.Module, config, layer: int) -> nn.Module:
    block = unwrapped(owner)
    name = find_attention(block)
    attention = _bare_copy(getattr(block, name))
    gather_around(attention, getattr(block, name))
    attention.config = config
    if not uses_interface(type(attention)):
        attention.forward = _ReportingForward(attention, layer, config.idp_reader)
    copied = _bare_copy(block)
    copied._modules[name] = attention
    gather_around(copied, owner)
    return copied


class _ReportingForward:
    """Calls an attention module that does not use the interface, and leaves with its weights at the reader's layer."""

    def __init__(self, attention: nn.Module, layer: int, reader) -> None:
        self.attention, self.layer, self.reader = attention, layer, reader
        # Classes for other implementations (`NemotronSdpaAttention`) are made of the eager one, which reports its weights.
        made_of = [kind for kind in type(attention).__mro__ if issubclass(kind, nn.Module) and "forward" in vars(kind)]
        self.eager = made_of[made_of.index(nn.Module) - 1]

    def __call__(self, *args, **kwargs):
        if "output_attentions" in forward_parameters(self.eager):
            kwargs["output_attentions"] = True
        outputs = self.eager.forward(self.attention, *args, **kwargs)
        if self.layer == self.reader.layer:
            weights = next((output for output in outputs[1:] if getattr(output, "ndim", 0) == 4), None)
            if weights is None:
                raise ValueError(
                    f"{type(self.attention).__name__} does not report its attention weights: load the base model with "
                    "attn_implementation='eager'"
                )
            raise Reached(weights)
        return outputs


def _bare_copy(module: nn.Module) -> nn.Module:
    """A shallow copy in evaluation mode that shares weights and children, without hooks or dropout of its own."""
    copied = _shallow_copy(module)
    copied._modules = {k: nn.Identity() if isinstance(v, nn.Dropout) else v for k, v in module._modules.items()}
    for table in _HOOK_TABLES:
        setattr(copied, table, OrderedDict())
    copied.__dict__.pop("forward", None)  # accelerate binds a device-moving forward to the original
    copied.training = False
    return copied


def _shallow_copy(module: nn.Module) -> nn.Module:
    """`copy.copy`, also of a module that FSDP2 shards, without the class it is given there, which answers for gathering.
    Weights that are gathered later show in the copy as well: both hold the same dict of them."""
    copied = object.__new__(plain_class(module))
    copied.__dict__.update(module.__dict__)
    return copied
