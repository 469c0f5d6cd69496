"""Writes an adapter's scales into the weights: a factor is one of a row, or of a part of it, whatever the format.

Packed words keep every bit, and zeros stay zero: of a quantised row only its scales change, rounded to their own type.
No LoRA can be written into packed weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from idp_peft.layer import active_layer
from idp_peft.scales import by_layer, is_conv, linear_layers, output_channels

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Rows:
    """A tensor whose numbers belong to output channels.

    Args:
        tensor (`torch.Tensor`): what is multiplied.
        blocks (`int`, *optional*): how many numbers it has for a row, each of as many neighbouring inputs; `None` for a bias, which
            factors of groups leave as it is.
        arrange (`Callable`): numbers `[channels, blocks]` in a shape that goes with the tensor's.
    """

    tensor: torch.Tensor
    blocks: int | None
    arrange: Callable[[torch.Tensor], torch.Tensor]

    def scaled(self, factors: torch.Tensor) -> torch.Tensor:
        """The tensor times its factors `[channels]` or `[channels, groups]`, multiplied in float32 (or float64), in its own type."""
        if factors.ndim == 2 and self.blocks is None:
            return self.tensor
        factors, blocks = factors.to(self.tensor.device), self.blocks or 1
        by_row = factors if factors.ndim == 2 else factors[:, None]
        groups = by_row.shape[1]
        spread = by_row.expand(-1, blocks) if groups == 1 else by_row.repeat_interleave(blocks // groups, 1)
        factors = self.arrange(spread)
        wide = torch.float64 if self.tensor.dtype == torch.float64 else torch.float32
        return (self.tensor.to(wide) * factors).to(self.tensor.dtype)

    def write(self, factors: torch.Tensor) -> None:
        """Put the product in the tensor's place."""
        self.tensor.copy_(self.scaled(factors))


@dataclass(frozen=True)
class _NestedRows(Rows):
    """Scales that bitsandbytes quantised themselves: `tensor` is what they stand for, and takes their place once it is scaled."""

    state: object

    def write(self, factors: torch.Tensor) -> None:
        self.state.absmax = self.scaled(factors)
        self.state.nested, self.state.state2, self.state.offset = False, None, None


@torch.no_grad()
def fold_scales(model) -> None:
    """Write the active adapter's scales into the base's weights, and take them off the adapter.

        idp_peft.fold_scales(model)      # or model.fold_scales()

    The model gives the same, up to the rounding of the weights' (or their scales') type, and costs what it costs without
    scales. It changes the base: rows without a prompt, and `disable_adapter()`, see the scaled weights afterwards. So save the
    adapter before. A whole checkpoint is made by `idp-peft export --fold_scales`.

    Formats: dense weights; compressed-tensors; GPTQ and AWQ; HQQ with groups within rows; bitsandbytes 4-bit with blocks within
    rows, and 8-bit; torchao with groups within rows.

    Args:
        model: a model with an active IDP adapter that has scales.

    Raises:
        `ValueError`: without scales, beside other adapters (whose base it would change), or for a layer whose format cannot take
            a factor per row. Nothing is changed then.
    """
    layer = active_layer(model)
    bank, name = layer.active_bank, layer.active_name
    if bank.scales is None:
        raise ValueError(
            f"adapter {name!r} has no scales to fold: it was made with scales=False, or they are folded already"
        )
    if others := [other for other in layer.idp_prompts if other != name]:
        raise ValueError(
            f"folding the scales of {name!r} would change the base of the adapters {others}: delete these first"
        )
    layers = linear_layers(layer.decoder)
    _refuse_shared(layer.model, layers)
    todo = []
    for (place, module), factors in zip(layers.items(), by_layer(bank.factors(), bank.factor_shapes), strict=True):
        found = rows_of(module, f"layer {place!r}")
        check_groups(factors, [rows.blocks for rows in found], group_order(module), f"layer {place!r}")
        todo += [(rows, factors) for rows in found]
    for rows, factors in todo:
        rows.write(factors)
    layer.drop_scales(name)


def _refuse_shared(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    uses = Counter(id(tensor) for _, tensor in model.named_parameters(remove_duplicate=False))
    for place, module in layers.items():
        if any(uses[id(tensor)] > 1 for tensor in module.parameters(recurse=False)):
            raise ValueError(
                f"layer {place!r} shares its weight with another module, which scaling its rows would change"
            )


def rows_of(module: nn.Module, place: str) -> list[Rows]:
    """What of a linear layer is multiplied by factors of its output channels.

    Raises:
        `ValueError`: where a factor per row cannot be written.
    """
    channels, weight = output_channels(module), getattr(module, "weight", None)
    own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    bias = [along("bias", own["bias"].data, 0)] if own.get("bias") is not None else []
    if hasattr(weight, "quant_state") or hasattr(weight, "SCB"):
        return [*_bitsandbytes(module, channels, place), *bias]
    if hasattr(module, "W_q") and isinstance(getattr(module, "meta", None), dict):
        return [*_hqq(module, channels, place), *bias]
    if hasattr(weight, "__tensor_flatten__"):
        return [*_subclass(weight, channels, place), *bias]
    names = row_dimensions(
        {name: (t.dtype, tuple(t.shape)) for name, t in own.items()}, channels, place, is_conv(module)
    )
    return [along(name, own[name].data, dim) for name, dim in names.items()]


def row_dimensions(
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]], channels: int, place: str, transposed: bool = False
) -> dict[str, int]:
    """Which of a layer's tensors are multiplied, and along which dimension the output channels run.

    Args:
        tensors (`dict`): type and shape of each, by their names in the layer, in a module as in a file.
        channels (`int`): the layer's output channels.
        place (`str`): what an error calls the layer.
        transposed (`bool`): whether a dense weight is `[in, out]`.

    Raises:
        `ValueError`: where a factor per row cannot be written: the text says why.
    """
    found = {}
    if "qweight" in tensors and "scales" in tensors:  # GPTQ, AWQ: [groups, out]
        found["scales"] = -1
    elif "weight_scale" in tensors:  # compressed-tensors, fp8: [out, groups]
        found["weight_scale"] = 0
        if tensors.get("weight", (None,))[0] in _FLOATS:  # not packed yet: the integers are their quotient
            found["weight"] = 0
    elif "weight_scale_inv" in tensors:
        raise ValueError(f"{place} has scales of blocks that cross rows: a factor per row cannot be written into them")
    elif tensors.get("weight", (None,))[0] in _FLOATS:
        found["weight"] = 1 if transposed else 0
    else:
        raise ValueError(
            f"{place} is in a format whose rows cannot be scaled here (its tensors are {', '.join(sorted(tensors))}): keep the "
            "scales unfolded"
        )
    for name, dim in found.items():
        dtype, shape = tensors[name]
        if not shape or shape[dim] != channels:
            raise ValueError(
                f"{place} has '{name}' of shape {list(shape)} for {channels} rows, one number for several of them: a factor per "
                "row cannot be written into it"
            )
        if dtype not in _FLOATS:
            raise ValueError(f"{place} has scales of type {dtype}, too coarse to take a factor per row")
    if tensors.get("bias", (None,))[0] in _FLOATS:
        found["bias"] = 0
    return found


def along(name: str, tensor: torch.Tensor, dim: int) -> Rows:
    """A layer's tensor of this name, along whose dimension `dim` the output channels run."""
    arrange = torch.flatten if tensor.ndim == 1 else _as_it_is if dim == 0 else torch.t
    return Rows(tensor, blocks_of(name, tensor.shape, dim), arrange)


def _as_it_is(numbers: torch.Tensor) -> torch.Tensor:
    return numbers


def blocks_of(name: str, shape: tuple[int, ...], dim: int) -> int | None:
    """How many numbers a layer's tensor of one or two dimensions has for an output channel; `None` for a bias."""
    return None if name == "bias" else 1 if len(shape) == 1 else shape[1 - dim % 2]


def group_order(module: nn.Module) -> torch.Tensor | None:
    """The group of each input, of formats that say it (GPTQ, which may order the inputs by their activations)."""
    order = getattr(module, "g_idx", None)
    return getattr(module, "weight_g_idx", None) if order is None else order


def check_groups(factors: torch.Tensor, blocks: list[int | None], order: torch.Tensor | None, place: str) -> None:
    """Raise where factors of groups of neighbouring inputs cannot be written into so many numbers of a row.

    Args:
        factors (`torch.Tensor`): `[channels]` or `[channels, groups]`.
        order (`torch.Tensor`, *optional*): see [`group_order`].
        place (`str`): what an error calls the layer.
    """
    if factors.ndim == 1:
        return
    if order is not None and (order.diff() < 0).any():
        raise ValueError(
            f"{place} has inputs in groups that are no neighbours (`desc_act`), and the adapter's factors are of neighbours"
        )
    if coarse := [count for count in blocks if count is not None and count % factors.shape[1]]:
        raise ValueError(
            f"{place} has {coarse[0]} scale(s) in a row, and {factors.shape[1]} factors go in there: train with a "
            "`scale_group_size` that is a multiple of the quantisation's group size"
        )


def _bitsandbytes(module: nn.Module, channels: int, place: str) -> list[Rows]:
    weight = module.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        # It moves from one to the other at the first call.
        held = [getattr(weight, "SCB", None), getattr(getattr(module, "state", None), "SCB", None)]
        rows = {id(one): along("SCB", one, 0) for one in held if one is not None}
        if not rows:
            raise ValueError(f"{place} is not quantised yet: move the model to its device first")
        return list(rows.values())
    columns, size = state.shape[-1], state.blocksize
    if columns % size:
        raise ValueError(f"{place} has blocks of {size} weights, rows of {columns}: some blocks cross rows")

    blocks = columns // size
    if getattr(state, "nested", False):
        from bitsandbytes.functional import dequantize_blockwise

        absmax = (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()
        return [_NestedRows(absmax, blocks, torch.flatten, state)]
    return [Rows(state.absmax, blocks, torch.flatten)]


def _hqq(module: nn.Module, channels: int, place: str) -> list[Rows]:
    meta = module.meta
    rows, columns = meta["shape"]
    size = meta.get("group_size") or columns
    if meta.get("axis", 1) != 1 or columns % size or rows != channels:
        raise ValueError(f"{place} has groups that cross rows (axis {meta.get('axis')}, {size} of {columns} columns)")
    scale = meta["scale"]
    if not torch.is_tensor(scale) or scale.dtype not in _FLOATS or scale.numel() != channels * (columns // size):
        raise ValueError(
            f"{place} has scales that are quantised themselves: a factor per row cannot be written into them"
        )
    return [Rows(scale, columns // size, lambda factors: factors.reshape(scale.shape))]


def _subclass(weight: torch.Tensor, channels: int, place: str) -> list[Rows]:
    """Tensors of torchao: integers, a scale and a zero point per block."""
    kind, size = type(weight).__name__, getattr(weight, "block_size", None)
    inner = getattr(weight, "tensor_impl", weight)  # of the tensors that torchao made first
    scale, zero = (getattr(inner, name, None) for name in ("scale", "zero_point"))
    if not torch.is_tensor(scale) or size is None:
        raise ValueError(f"{place} is a {kind}, whose scales are not known here: keep the scales unfolded")
    domain = getattr(getattr(weight, "zero_point_domain", None), "name", "INT")
    if domain not in ("INT", "NONE") or (torch.is_tensor(zero) and zero.is_floating_point() and domain != "NONE"):
        raise ValueError(f"{place} is a {kind} with zero points that are no integers: keep the scales unfolded")
    if size[0] != 1 or scale.ndim > 2 or not scale.ndim or scale.shape[0] != channels or scale.dtype not in _FLOATS:
        raise ValueError(
            f"{place} is a {kind} with blocks of {list(size)}, which cross rows, or scales of type {scale.dtype}"
        )
    return [along("scale", scale, 0)]
