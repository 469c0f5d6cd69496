"""GPTQ through gptqmodel, into its own packed files, which transformers loads with gptqmodel's kernels."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from idp_peft.compression.recipes import Recipe
from idp_peft.compression.targets import check_zeros, target_layers

EXTRA = "gptqmodel"
MODULE = "gptqmodel"
PACKAGES = ("gptqmodel", "optimum")
ALGORITHMS = ("gptq",)


def run(source: str, recipe: Recipe, folder: Path, chunks: list[list[int]], group_size: int, symmetric: bool) -> None:
    """Compress the model at `source` and write it into `folder`."""
    # It splits its workers over all cores it sees and refuses two cores with its own default.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(min(2, os.cpu_count() or 1)))
    from gptqmodel import GPTQModel, QuantizeConfig

    from idp_peft.models.loading import load_model

    rule = QuantizeConfig(bits=recipe.bits, group_size=group_size, sym=symmetric, desc_act=False)
    # Its own model has no weights until they are needed.
    check_zeros(target_layers(load_model(source, device_map=None)), recipe)
    model = GPTQModel.load(source, rule)
    samples = [{"input_ids": chunk, "attention_mask": [1] * len(chunk)} for chunk in chunks]
    with _logs_in(folder / "logs"):
        model.quantize(samples, batch_size=1)
    model.save(str(folder))


@contextlib.contextmanager
def _logs_in(folder: Path) -> Iterator[None]:
    """It writes `logs/` into the working directory, and has no setting for another place."""
    from gptqmodel.looper import loop_processor

    name = "_PROJECT_LOG_DIR"
    before = getattr(loop_processor, name, None)
    setattr(loop_processor, name, folder)
    try:
        yield
    finally:
        setattr(loop_processor, name, before)
