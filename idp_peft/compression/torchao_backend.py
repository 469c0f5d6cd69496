"""Rounding to nearest through torchao: no calibration, seconds."""

from __future__ import annotations

from pathlib import Path

import torch

from idp_peft.compression.recipes import Recipe

EXTRA = "torchao"
MODULE = "torchao"
PACKAGES = ("torchao",)
ALGORITHMS = ("rtn",)


def run(source: str, recipe: Recipe, folder: Path, chunks: list[list[int]], group_size: int, symmetric: bool) -> None:
    """Compress the model at `source` and write it into `folder`; there are no `chunks`."""
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup
    from transformers import TorchAoConfig

    from idp_peft.models.loading import load_model

    mapping = MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC
    dtype = getattr(torch, f"int{recipe.bits}")
    rule = IntxWeightOnlyConfig(weight_dtype=dtype, granularity=PerGroup(group_size), mapping_type=mapping)
    load_model(source, quantization_config=TorchAoConfig(rule)).save_pretrained(folder)
