"""Compares the gradient of one linear layer with the one that its effective weights give."""

from __future__ import annotations

import torch
from torch import nn

# Rows of W_eff that are compared. A wrong kernel is wrong on more than a few inputs, and large layers have many.
_ROWS = 1024
_BLOCK = 128
_TOKENS = 4


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer that multiplies by a weight matrix, whatever its class, by name; wrappers around one are left out."""
    found = {name: module for name, module in model.named_modules() if looks_linear(module)}
    inner = tuple(found)
    return {name: module for name, module in found.items() if not any(_is_inside(other, name) for other in inner)}


def _is_inside(name: str, other: str) -> bool:
    return name != other and name.startswith(f"{other}." if other else "")


def looks_linear(module: nn.Module) -> bool:
    """`torch.nn.Linear`, transformers' `Conv1D`, and the classes that quantisation libraries put in their place."""
    return isinstance(module, nn.Linear) or _sizes(module) is not None


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """`(values read, values written)` per token, or `None`."""
    for reads, writes in (("in_features", "out_features"), ("infeatures", "outfeatures"), ("nx", "nf")):
        pair = getattr(module, reads, None), getattr(module, writes, None)
        if all(isinstance(size, int) and size > 0 for size in pair):
            return pair
    return None


def kind_of(layer: nn.Module) -> tuple[str, int, int]:
    """`(class, values read, values written)`; a plain layer with a special weight goes by the weight's class."""
    weight = getattr(layer, "weight", None)
    special = isinstance(weight, torch.Tensor) and type(weight) not in (torch.Tensor, nn.Parameter)
    same = type(layer) is nn.Linear and special
    return (type(weight).__name__ if same else type(layer).__name__, *_sizes(layer))


def device_of(layer: nn.Module) -> torch.device:
    return next((tensor.device for tensor in (*layer.parameters(), *layer.buffers())), torch.device("cpu"))


def layer_error(layer: nn.Module, dtype: torch.dtype) -> float | None:
    """Relative difference of the gradient of a random projection of the output with respect to the input.

    The right gradient is `W_eff @ projection`, with `W_eff = layer(I) - layer(0)` `[in, out]` from forward passes alone, in
    evaluation mode and without gradients: what the model computes when it is used. At most 1,024 rows of it are looked
    at, and a few at a time, so that no dense copy of a large layer is ever made.

    Args:
        layer (`torch.nn.Module`): any layer of `linear_layers`.
        dtype (`torch.dtype`): the type of its inputs in the model.

    Returns:
        `float`: the norm of the difference over the norm of the right gradient; `None` where no gradient came back.
    """
    _, reads, writes = kind_of(layer)
    device = device_of(layer)
    inputs = torch.randn(1, _TOKENS, reads, device=device, dtype=dtype, requires_grad=True)
    projection = torch.randn(1, _TOKENS, writes, device=device).to(dtype)
    layer.train()
    with torch.enable_grad():
        output = layer(inputs)
        (gradient,) = torch.autograd.grad(output, inputs, projection.to(output.dtype), allow_unused=True)
    if gradient is None:
        return None
    rows = torch.randperm(reads)[:_ROWS].to(device)
    right = _projected_rows(layer, rows, reads, dtype, projection[0].float())  # [tokens, rows]
    found = gradient[0].float()[:, rows]
    difference = float((found - right).norm())
    return difference / float(right.norm()) if difference else 0.0


@torch.no_grad()
def _projected_rows(layer, rows: torch.Tensor, reads: int, dtype: torch.dtype, projection: torch.Tensor):
    """`projection @ W_eff[rows].T`, float32 `[tokens, rows]`."""
    layer.eval()
    # In half precision a large bias would round the weight away that it is added to; a power of two scales exactly.
    scale = 1.0 if dtype == torch.float32 else 64.0
    nothing = layer(torch.zeros(1, 1, reads, device=rows.device, dtype=dtype)).float()  # [1, 1, out]
    parts = []
    for block in rows.split(_BLOCK):
        identity = torch.zeros(1, len(block), reads, device=rows.device, dtype=dtype)  # [1, block, in]
        identity[0, torch.arange(len(block), device=rows.device), block] = scale
        weights = (layer(identity).float() - nothing)[0] / scale  # [block, out]
        parts.append(projection @ weights.T)
    return torch.cat(parts, dim=1)
