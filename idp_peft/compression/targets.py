"""Which layers of a model are compressed, and whether a recipe fits them."""

from __future__ import annotations

import torch

from idp_peft.compression.recipes import Recipe

# Dense weights that were once rounded to 3 bits have up to a quarter of exact zeros; pruned ones have half.
_SPARSE = 0.4
_GROUP_SIZES = (128, 64, 32, 16, 8)


def target_layers(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Every linear layer by its name, without the output embeddings: those read off the vocabulary in full precision."""
    head = model.get_output_embeddings()
    return {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}


def ignored_layers(model: torch.nn.Module) -> list[str]:
    """The names of the linear layers that stay as they are."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if module is head]


def check_fit(layers: dict[str, torch.nn.Linear], recipe: Recipe, group_size: int) -> None:
    """Refuse a model whose layers the recipe cannot divide evenly.

    Raises:
        `ValueError`: naming the layer and its width, and where there is one, a group size that fits all layers.
    """
    if not layers:
        raise ValueError("the model has no `torch.nn.Linear` layer to compress besides its output embeddings")
    widths = {name: layer.in_features for name, layer in layers.items()}
    if recipe.bits is None:
        odd = next((name for name, width in widths.items() if recipe.mask == "2:4" and width % 4), None)
        if odd is not None:
            raise ValueError(f"a 2:4 pattern needs layer widths that 4 divides, but {odd} reads {widths[odd]} values")
        return
    if group_size < 1:
        raise ValueError(f"`group_size` must be at least 1, got {group_size}")
    misfit = next((name for name, width in widths.items() if width % group_size), None)
    if misfit is None:
        return
    fitting = [size for size in _GROUP_SIZES if all(width % size == 0 for width in widths.values())]
    advice = f"; {fitting[0]} does" if fitting else ""
    raise ValueError(
        f"`group_size` must divide the width of every layer, but {group_size} does not divide the {widths[misfit]} "
        f"values that {misfit} reads{advice}"
    )


def check_zeros(layers: dict[str, torch.nn.Linear], recipe: Recipe) -> None:
    """Refuse GPTQ on a sparse model: it corrects later weights for the errors of earlier ones, zeros included.

    Measured with llm-compressor 0.14.0.1 on a 2:4 model: up to one zero in sixteen is lost, and the pattern with it.

    Raises:
        `ValueError`: where 40 % of the weights are zeros and the recipe would not keep them.
    """
    zeros = sum(int((layer.weight == 0).sum()) for layer in layers.values())
    share = zeros / sum(layer.weight.numel() for layer in layers.values())
    if recipe.algorithm == "gptq" and share > _SPARSE:
        raise ValueError(
            f"{share:.0%} of the model's weights are zeros, which GPTQ does not keep: compress the dense model, or take "
            f"the recipe rtn-{recipe.bits}bit, which keeps them"
        )
