"""Weights that FSDP2 or ZeRO-3 shard over processes, and which part of a batch this process has.

FSDP2 gathers a module's weights in hooks on that module and drops them again behind it. Whatever IDP runs besides the
model's own forward must see to that itself, and must do it on every process or on none: a gathering waits for all.
"""

from __future__ import annotations

import sys

import torch
from torch import nn


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is sharded over processes (a `DTensor`)."""
    module = sys.modules.get("torch.distributed.tensor")  # nobody has made one where that was never imported
    return module is not None and isinstance(tensor, module.DTensor)


def whole_shape(weight: torch.Tensor) -> torch.Size:
    """The shape of a weight; of a weight that ZeRO-3 shards, its gathered shape."""
    return getattr(weight, "ds_shape", weight.shape)


def gathers(module: nn.Module) -> bool:
    """Whether a module's weights are gathered for its forward, and freed afterwards (`fully_shard`)."""
    return bool(_units(module))


def is_spread(model: nn.Module) -> bool:
    """Whether a model's weights are sharded, by FSDP2 or ZeRO-3."""
    return any(gathers(module) for module in model.modules()) or is_parted(model)


def is_parted(model: nn.Module) -> bool:
    """Whether this process holds a part of each weight, which nothing but ZeRO-3's own hooks gathers."""
    return any(weight.shape != whole_shape(weight) for weight in model.parameters())


def unwrapped(layer: nn.Module) -> nn.Module:
    """A layer without torch's wrapper for activation checkpointing, which FSDP can put around it."""
    return getattr(layer, "_checkpoint_wrapped_module", layer)


def _units(module: nn.Module) -> list[nn.Module]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return []
    return [one for one in dict.fromkeys((module, unwrapped(module))) if isinstance(one, fsdp.FSDPModule)]


def plain_class(module: nn.Module) -> type[nn.Module]:
    """A module's class before FSDP2 sharded it: it follows `FSDPModule` in the new class's bases."""
    return type(module).__mro__[2] if module in _units(module) else type(module)


def gather_around(runs: nn.Module, owner: nn.Module) -> None:
    """Gather `owner`'s weights while `runs`, a copy that shares them, runs. They are freed after errors too."""
    for unit in _units(owner):
        runs.register_forward_pre_hook(lambda *_, unit=unit: unit.unshard())
        runs.register_forward_hook(lambda *_, unit=unit: unit.reshard(), always_call=True)


def place_in_batch() -> tuple[int, int]:
    """`(rank, processes)` among those that work on different examples of the same step; `(0, 1)` in a single process.

    Processes that share an example (tensor or context parallel) have the same rank.
    """
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    share = 1
    accelerate = sys.modules.get("accelerate.state")
    state = accelerate.AcceleratorState._shared_state if accelerate is not None else {}
    if state.get("parallelism_config") is not None:
        share = state["parallelism_config"].non_data_parallel_size
    return distributed.get_rank() // share, distributed.get_world_size() // share


def from_all_processes(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows that processes have of one step, `[rows, ...]` each, put together in the order of the processes. All of them must
    ask. Without several processes: the tensors themselves."""
    _, processes = place_in_batch()
    if processes == 1:
        return tensors
    world = torch.distributed.get_world_size()
    parts = [None] * world
    torch.distributed.all_gather_object(parts, [tensor.cpu() for tensor in tensors])
    parts = parts[:: world // processes]  # those that share examples have the same
    return tuple(
        torch.cat(part).to(tensor.device) for part, tensor in zip(zip(*parts, strict=True), tensors, strict=True)
    )
