"""Measures compressed weights: sparsity and number of levels, from the weights themselves."""

from __future__ import annotations

from pathlib import Path

import torch

from idp_peft.compression.recipes import Recipe

# So many groups of each layer are counted: levels are the same everywhere, and large layers have millions.
_GROUPS = 256


def compressed_weights(folder: Path, names: list[str]) -> dict[str, torch.Tensor]:
    """The dense values of these layers of a saved model, `[out, in]` each, loaded as any user would."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    return {name: _dense(model.get_submodule(name)) for name in names}


@torch.no_grad()
def _dense(layer: torch.nn.Module) -> torch.Tensor:
    if hasattr(layer, "dequantize_weight"):  # gptqmodel's layers, which have no `weight`
        return layer.dequantize_weight().T
    weight = layer.weight.detach()
    return weight.dequantize() if hasattr(weight, "__tensor_flatten__") else weight


def sparsity(weights: dict[str, torch.Tensor]) -> dict[str, float]:
    """Share of exact zeros, of all weights together and of the layer with the fewest."""
    zeros = {name: int((weight == 0).sum()) for name, weight in weights.items()}
    total = sum(weight.numel() for weight in weights.values())
    return {
        "sparsity": sum(zeros.values()) / total,
        "least_sparsity_of_a_layer": min(zeros[name] / weight.numel() for name, weight in weights.items()),
    }


def most_levels(weights: dict[str, torch.Tensor], group_size: int) -> int:
    """The largest number of different values in one group of `group_size` neighbours of a row."""
    most = 0
    for weight in weights.values():
        groups = weight.reshape(-1, group_size)[:_GROUPS].sort(dim=-1).values  # [groups, group_size]
        most = max(most, 1 + int((groups.diff(dim=-1) != 0).sum(-1).max()))
    return most


def check_result(weights: dict[str, torch.Tensor], recipe: Recipe, group_size: int) -> dict[str, float]:
    """Measure compressed weights, `[out, in]` each, and refuse those that are not what the recipe promised.

    Raises:
        `RuntimeError`: where a layer was not pruned, a 2:4 pattern is broken, or a group has more levels than its bits.
    """
    measured = sparsity(weights)
    if recipe.bits is not None:
        levels = most_levels(weights, group_size)
        if levels > 2**recipe.bits:
            raise RuntimeError(
                f"weights of {recipe.bits} bits have at most {2**recipe.bits} levels in a group of {group_size}, found {levels}"
            )
        return {"bits": recipe.bits, "most_levels_in_a_group": levels, **measured}
    # A layer of few weights cannot be cut at exactly one half.
    if measured["least_sparsity_of_a_layer"] < recipe.sparsity - 0.02:
        raise RuntimeError(
            f"the layer with the fewest zeros has a share of {measured['least_sparsity_of_a_layer']:.3f}, "
            f"wanted {recipe.sparsity}: the backend pruned nothing, or not everywhere"
        )
    if recipe.mask == "2:4":
        for name, weight in weights.items():
            if bool(((weight.reshape(-1, 4) == 0).sum(-1) < 2).any()):
                raise RuntimeError(f"{name} has four neighbours with fewer than two zeros: no 2:4 pattern")
    return measured
