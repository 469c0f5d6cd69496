"""GPTQ through gptqmodel, into its own packed files, which transformers loads with gptqmodel's kernels."""

from __future__ import annotations

import os
from pathlib import Path

from idp_peft.compression.recipes import Recipe

EXTRA = "gptqmodel"
MODULE = "gptqmodel"
PACKAGES = ("gptqmodel", "optimum")
ALGORITHMS = ("gptq",)


def run(source: str, recipe: Recipe, folder: Path, chunks: list[list[int]], group_size: int, symmetric: bool) -> None:
    """Compress the model at `source` and write it into `folder`."""
    # It splits its workers over all cores it sees and refuses two cores with its own default.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(min(2, os.cpu_count() or 1)))
    from gptqmodel import GPTQModel, QuantizeConfig

    rule = QuantizeConfig(bits=recipe.bits, group_size=group_size, sym=symmetric, desc_act=False)
    model = GPTQModel.load(source, rule)
    samples = [{"input_ids": chunk, "attention_mask": [1] * len(chunk)} for chunk in chunks]
    model.quantize(samples, batch_size=1)
    model.save(str(folder))
