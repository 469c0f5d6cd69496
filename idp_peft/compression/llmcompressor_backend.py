"""Recipes through llm-compressor: GPTQ and rounding into packed words, SparseGPT into dense weights with zeros."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from idp_peft.compression.recipes import Recipe
from idp_peft.compression.targets import check_zeros, ignored_layers, target_layers

EXTRA = "llmcompressor"
MODULE = "llmcompressor"
PACKAGES = ("llmcompressor", "compressed-tensors")
ALGORITHMS = ("gptq", "sparsegpt", "rtn")


def run(source: str, recipe: Recipe, folder: Path, chunks: list[list[int]], group_size: int, symmetric: bool) -> None:
    """Compress the model at `source` and write it into `folder`."""
    from idp_peft.models.loading import load_model

    # llm-compressor moves one layer at a time to the GPU itself.
    dtype = "auto" if torch.cuda.is_available() else torch.float32
    model = load_model(source, device_map=None, dtype=dtype)
    check_zeros(target_layers(model), recipe)
    with _quiet(folder / "compression.log"):
        from llmcompressor import oneshot, reset_session

        data = {}
        if recipe.calibrated:
            from datasets import Dataset

            masks = [[1] * len(chunk) for chunk in chunks]
            data["dataset"] = Dataset.from_dict({"input_ids": chunks, "attention_mask": masks})
            data |= {"max_seq_length": len(chunks[0]), "num_calibration_samples": len(chunks)}
        try:
            modifier = _modifier(recipe, ignored_layers(model), group_size, symmetric)
            oneshot(model=model, recipe=[modifier], **data)
            with warnings.catch_warnings():
                # It wraps every model in its own offloading before it saves one, and is warned of that.
                warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
                model.save_pretrained(folder, save_compressed=True)
        finally:
            reset_session()
    if recipe.bits is not None:
        _unpack_on_loading(folder / "config.json")


def _modifier(recipe: Recipe, ignored: list[str], group_size: int, symmetric: bool):
    if recipe.algorithm == "sparsegpt":
        from llmcompressor.modifiers.pruning import SparseGPTModifier

        # With a string instead of a list as `targets`, nothing is pruned and no error is raised.
        return SparseGPTModifier(
            sparsity=recipe.sparsity, mask_structure=recipe.mask, targets=["Linear"], ignore=ignored
        )
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

    weights = {
        "num_bits": recipe.bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group",
        "group_size": group_size,
        "observer": "mse",
    }
    kind = QuantizationModifier
    if recipe.algorithm == "gptq":
        kind, weights["actorder"] = GPTQModifier, "static"
    return kind(ignore=ignored, config_groups={"group_0": {"targets": ["Linear"], "weights": weights}})


def _unpack_on_loading(config_file: Path) -> None:
    """Write into the config that transformers shall unpack the weights when it loads them.

    Newer versions cannot load packed zero points otherwise (5.17 can, 5.23 cannot), and all unpack at the first forward
    anyway. Other readers of the format do not know the key and pass over it.
    """
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["quantization_config"]["dequantize"] = True
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _quiet(log_file: Path) -> Iterator[None]:
    """Several lines per layer go into a file; the console keeps the progress bars and errors."""
    # The first speaks up while it is imported; the second is set by llm-compressor for good, with a warning.
    with _environment(LLM_COMPRESSOR_LOG_LEVEL="ERROR", TOKENIZERS_PARALLELISM="false"):
        from llmcompressor.logger import LoggerConfig, configure_logger, logger

        configure_logger(LoggerConfig())
        sink = logger.add(log_file, level="INFO", format="{time:YYYY-MM-DD HH:mm:ss} {level} {function}: {message}")
        try:
            yield
        finally:
            logger.remove(sink)
    configure_logger(LoggerConfig())


@contextlib.contextmanager
def _environment(**defaults: str) -> Iterator[None]:
    """Environment variables that are not set yet, for a while."""
    added = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
