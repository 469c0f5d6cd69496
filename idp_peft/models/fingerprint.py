"""A digest of a model's base weights, to show that they did not change."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch


def fingerprint(model: torch.nn.Module) -> str:
    """sha256 of a model's base weights: names, types, shapes and bits, packed words included; adapters left out.

    Args:
        model: any model, with or without adapters. Its weights must have their final form: compressed-tensors models
            loaded packed unpack themselves at their first forward, which `load_model` sees to.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    prefixes = _adapter_prefixes(model)
    digest = hashlib.sha256()
    for name, tensor in sorted(base.state_dict().items()):
        if any(part.startswith(prefixes) for part in name.split(".")):
            continue
        # A layer that PEFT wrapped is the same layer one level deeper.
        name = name.replace(".base_layer.", ".")
        for part_name, part in _parts(name, tensor.detach()):
            digest.update(f"{part_name} {part.dtype} {tuple(part.shape)}".encode())
            digest.update(part.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _adapter_prefixes(model: torch.nn.Module) -> tuple[str, ...]:
    """How the names of the parameters begin that this model's adapters added."""
    configs = getattr(model, "peft_config", None)
    if not configs:
        return ()
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    found = (PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type) for config in configs.values())
    return tuple(prefix for prefix in found if prefix)


def _parts(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The plain tensors inside one that a quantisation library made, by name."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from _parts(f"{name}.{part}", getattr(tensor, part))
