"""An adapter's scales in a checkpoint's files: which tensors change, and the adapter that is left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn

from idp_peft.composition.prompt_sources import PromptSource
from idp_peft.hosting.architectures import find_decoder
from idp_peft.hosting.checkpoint import SCALES_END, find_file
from idp_peft.models.folding import along, blocks_of, check_groups, row_dimensions
from idp_peft.scales import is_conv, linear_layers
from idp_peft.serving.tensor_files import DTYPES, StoredTensor, WeightFiles, read_header, write_tensors

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def folded(model: nn.Module, files: WeightFiles, source: PromptSource) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint that an adapter's scales change: rows of dense weights, or the scales of packed rows.

    Raises:
        `ValueError`: where a layer's tensors are not found, or its format cannot take a factor per row.
    """
    stored, changed = _by_layer(files), {}
    for layer, module, factors in factors_by_layer(model, source):
        own = _tensors_of(layer, stored, files)
        types = {name: (_type(tensor.dtype), tensor.shape) for name, (_, tensor) in own.items()}
        found = row_dimensions(types, len(factors), f"layer {layer!r}", is_conv(module))
        order = next((files.read(own[name][0]) for name in ("g_idx", "weight_g_idx") if name in own), None)
        blocks = [blocks_of(name, own[name][1].shape, dim) for name, dim in found.items()]
        check_groups(factors, blocks, order, f"layer {layer!r}")
        for name, dim in found.items():
            key, tensor = own[name]
            changed[key] = tensor.made_by(partial(_times, files, key, name, factors, dim))
    return changed


def factors_by_layer(model: nn.Module, source: PromptSource) -> Iterator[tuple[str, nn.Module, torch.Tensor]]:
    """The name in the model, the linear layer, and its factors, of each layer that an adapter scales.

    Raises:
        `ValueError`: for an adapter with scales of other layers than those of the model.
    """
    decoder, where = find_decoder(model), {module: name for name, module in model.named_modules()}
    for module, scales in zip(linear_layers(decoder).values(), source.scales_by_layer(decoder), strict=True):
        yield where[module], module, 1 + scales


def _times(files: WeightFiles, key: str, name: str, factors: torch.Tensor, dim: int) -> torch.Tensor:
    return along(name, files.read(key), dim).scaled(factors)


def _type(name: str) -> torch.dtype:
    """torch's type for one of safetensors'; int8 for any that is no plain floating point type."""
    return DTYPES.get(name, torch.int8)


def _by_layer(files: WeightFiles) -> dict[str, dict[str, tuple[str, StoredTensor]]]:
    """Tensors of a checkpoint by the layer that they belong to, and their name in it: `(whole name, tensor)`."""
    found: dict[str, dict] = {}
    for file in files.files:
        for name, tensor in files.tensors(file).items():
            layer, _, own = name.rpartition(".")
            found.setdefault(layer, {})[own] = (name, tensor)
    return found


def _tensors_of(layer: str, stored: dict[str, dict], files: WeightFiles) -> dict[str, tuple[str, StoredTensor]]:
    """A linear layer's tensors, where a prefix of its name may be missing, or be one more."""
    places = (
        [layer]
        if layer in stored
        else [p for p in stored if p.endswith(f".{layer}") or (p and layer.endswith(f".{p}"))]
    )
    if len(places) != 1:
        raise ValueError(
            f"layer {layer!r} of the base is not among the tensors in {files.folder}, which may keep several layers in one tensor: "
            "load the model, call `idp_peft.fold_scales(model)`, and save it"
        )
    return stored[places[0]]


def check_scales(source: PromptSource, fold_scales: bool) -> None:
    if source.scales is not None and not fold_scales:
        raise ValueError(
            f"{source.label} has scales, which no engine applies: add --fold_scales (`fold_scales=True`), which writes them into the "
            "exported weights"
        )
    if source.scales is None and fold_scales:
        raise ValueError(f"{source.label} has no scales to fold: leave out --fold_scales")
    if fold_scales and not source.scales.isfinite().all():
        raise ValueError(f"the scales of {source.label} hold NaN or infinity")


def write_adapter(adapter: str, target: Path, folded: bool, base: str | None = None) -> None:
    """The adapter as it was; without its scales where they are folded, on another base where one is named."""
    target.mkdir()
    for file in _ADAPTER_FILES:
        shutil.copyfile(find_file(adapter, None, {}, file), target / file)
    if not folded:
        return
    config, weights = (target / file for file in _ADAPTER_FILES)
    content = json.loads(config.read_text(encoding="utf-8")) | {"scales": False, "scale_group_size": None}
    content |= {} if base is None else {"base_model_name_or_path": base, "revision": None}
    config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tensors, metadata = read_header(weights)
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(SCALES_END)}
    write_tensors(whole := target / "kept.safetensors", kept, metadata)
    whole.replace(weights)
