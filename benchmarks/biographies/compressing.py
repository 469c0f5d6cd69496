"""The compressed models: the project's own recipes, at strengths from hardly any loss to nearly all of it."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.biographies.leaks import check_only
from benchmarks.biographies.people import Person
from benchmarks.biographies.text import biographies
from idp_peft.compression.recipes import Recipe

# What the pilot measured; `REPAIRED` is what it chose (README.md).
STRENGTHS = {
    "sparsegpt-50": Recipe("sparsegpt", sparsity=0.5),
    "sparsegpt-60": Recipe("sparsegpt", sparsity=0.6),
    "sparsegpt-65": Recipe("sparsegpt", sparsity=0.65),
    "sparsegpt-70": Recipe("sparsegpt", sparsity=0.7),
    "sparsegpt-80": Recipe("sparsegpt", sparsity=0.8),
    "gptq-3bit": Recipe("gptq", bits=3),
    "gptq-2bit": Recipe("gptq", bits=2),
}
REPAIRED = tuple(name for name in STRENGTHS if name.startswith("sparsegpt") and name != "sparsegpt-65")
CALIBRATION = {"samples": 64, "tokens": 128, "biographies": 800}
GROUP_SIZE = 64


def calibration_texts(everyone: list[Person], seed: int) -> list[str]:
    """What the algorithm watches the model read, after the check that nobody else is in it."""
    chosen = [person for person in everyone if person.group == "calibration"]
    texts = biographies(chosen, CALIBRATION["biographies"], f"calibration {seed}")
    check_only(texts, chosen)
    return texts


def compress(source: Path, strength: str, folder: Path, texts: list[str], seed: int) -> dict:
    """Compress the model at `source` into `folder`, calibrated on these texts.

    Returns:
        `dict`: what was measured of the weights, and the seconds it took.
    """
    import torch

    from idp_peft.compression import llmcompressor_backend
    from idp_peft.compression.calibration import calibration_chunks
    from idp_peft.compression.measure import check_result, compressed_weights
    from idp_peft.compression.targets import target_layers
    from idp_peft.files.whole_folder import whole_folder
    from idp_peft.models.loading import load_model, load_tokenizer

    recipe, began = STRENGTHS[strength], time.perf_counter()
    tokenizer = load_tokenizer(str(source))
    chunks = calibration_chunks(tokenizer, texts, CALIBRATION["samples"], CALIBRATION["tokens"], seed)
    layers = list(target_layers(load_model(str(source))))
    with whole_folder(folder) as unfinished, torch.random.fork_rng():
        torch.manual_seed(seed)
        llmcompressor_backend.run(str(source), recipe, unfinished, chunks, GROUP_SIZE, False)
        tokenizer.save_pretrained(unfinished)
        measured = check_result(compressed_weights(unfinished, layers), recipe, GROUP_SIZE)
    return {"strength": strength, **measured, "seconds": round(time.perf_counter() - began, 1)}
