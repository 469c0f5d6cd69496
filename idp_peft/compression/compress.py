"""One function that compresses a model, checks what came out, and leaves a folder or nothing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import time
from pathlib import Path
from types import ModuleType

import torch

from idp_peft.compression import gptqmodel_backend, llmcompressor_backend, torchao_backend
from idp_peft.compression.calibration import calibration_chunks
from idp_peft.compression.measure import check_result, compressed_weights
from idp_peft.compression.recipes import RECIPES, Recipe
from idp_peft.compression.targets import check_fit, target_layers
from idp_peft.files.whole_folder import check_free, whole_folder
from idp_peft.models.auto_class import built_from
from idp_peft.texts.chats import Chat

logger = logging.getLogger(__name__)

BACKENDS: dict[str, ModuleType] = {
    "llmcompressor": llmcompressor_backend,
    "gptqmodel": gptqmodel_backend,
    "torchao": torchao_backend,
}
NOTE = "compression.json"


def compress(
    model: str,
    recipe: str,
    output_dir: str | Path,
    texts: list[str | Chat] | None = None,
    calibration_samples: int = 64,
    calibration_tokens: int = 256,
    group_size: int = 64,
    symmetric: bool = False,
    backend: str = "llmcompressor",
    seed: int = 0,
) -> dict:
    """Compress a dense or sparse model into a folder that plain `AutoModelForCausalLM.from_pretrained` loads.

    Args:
        model (`str`): `"default"`, a folder, a GGUF file (unpacked first) or a hub id. A sparse model can be
            rounded, which keeps its zeros, but not put through GPTQ, which loses some; a quantised one is refused.
        recipe (`str`): a name in `RECIPES`.
        output_dir (`str`): a new or empty folder. It appears when all is done and checked.
        texts (`list[str | Chat]`, *optional*): calibration text; not read by the `rtn` recipes.
        calibration_samples (`int`, defaults to `64`): chunks that the model reads. Time is proportional to it.
        calibration_tokens (`int`, defaults to `256`): tokens of each chunk.
        group_size (`int`, defaults to `64`): neighbours in a row that share a scale; it must divide every layer's width.
            Not used by recipes that prune.
        symmetric (`bool`, defaults to `False`): no zero points. Measured on the default model at 3 bits, symmetric
            rounding loses 0.33 nats per token where asymmetric loses 0.25.
        backend (`str`, defaults to `"llmcompressor"`): `"llmcompressor"` (every recipe), `"gptqmodel"` (GPTQ) or
            `"torchao"` (rounding).
        seed (`int`, defaults to `0`): of the choice of calibration chunks.

    Returns:
        `dict`: the note of the recipe, also written to `compression.json` in the folder.

    Raises:
        `ValueError`: for an unknown or unfitting argument, too little text, or a model that is quantised already.
        `FileNotFoundError`: where there is no such model.
        `ImportError`: where the backend is missing, naming the extra to install.
        `RuntimeError`: where the weights that came out are not what the recipe promises.
    """
    from idp_peft.models.loading import load_tokenizer, unpacked

    chosen, tool = _check_names(recipe, backend)
    check_free(Path(output_dir).expanduser().absolute())
    _check_installed(backend, tool)
    source, earlier, layers = _check_model(model, chosen, group_size)
    started = time.perf_counter()
    chunks, calibration = [], None
    if chosen.calibrated:
        chunks = calibration_chunks(load_tokenizer(source), texts or [], calibration_samples, calibration_tokens, seed)
        calibration = {"texts": len(texts), "samples": len(chunks), "tokens_per_sample": calibration_tokens}
    note = {"format": 1, "model": str(model), "recipe": recipe, "backend": backend, "versions": _versions(tool)}
    if chosen.bits is not None:
        note |= {"group_size": group_size, "symmetric": symmetric}
    note |= {"calibration": calibration, "seed": seed}
    if earlier is not None:
        note["earlier"] = earlier
    with whole_folder(output_dir) as folder, unpacked(source, folder.parent) as dense, torch.random.fork_rng():
        torch.manual_seed(seed)  # llm-compressor shuffles the chunks once more
        tool.run(dense, chosen, folder, chunks, group_size, symmetric)
        _save_tokenizer(source, folder)
        note["measured"] = check_result(compressed_weights(folder, layers), chosen, group_size)
        note["seconds"] = round(time.perf_counter() - started, 1)
        (folder / NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    return note


def _check_names(recipe: str, backend: str) -> tuple[Recipe, ModuleType]:
    if recipe not in RECIPES:
        raise ValueError(f"`recipe` must be one of {', '.join(RECIPES)}, got {recipe!r}")
    if backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {', '.join(BACKENDS)}, got {backend!r}")
    chosen, tool = RECIPES[recipe], BACKENDS[backend]
    if chosen.algorithm not in tool.ALGORITHMS:
        able = [name for name, other in BACKENDS.items() if chosen.algorithm in other.ALGORITHMS]
        raise ValueError(f"`backend` for the recipe {recipe} must be one of {', '.join(able)}, got {backend!r}")
    return chosen, tool


def _check_installed(backend: str, tool: ModuleType) -> None:
    if importlib.util.find_spec(tool.MODULE) is None:
        raise ImportError(f'the backend {backend} is not installed: pip install "idp-peft[{tool.EXTRA}]"')


def _check_model(model: str, recipe: Recipe, group_size: int) -> tuple[str, dict | None, list[str]]:
    """The model's place, the note of an earlier compression and the layers, after every check that needs no weights."""
    from transformers import AutoConfig

    from idp_peft.models.loading import find_model, place_of, quantization_of

    where, gguf_file = find_model(model)
    if gguf_file is None and (quantization := quantization_of(where)):
        method = quantization.get("quant_method", "unknown method")
        raise ValueError(f"{model} is quantised already ({method}): compress the model that it was made from")
    config = AutoConfig.from_pretrained(where, gguf_file=gguf_file)
    with torch.device("meta"):
        layers = target_layers(built_from(config))
    check_fit(layers, recipe, group_size)
    note = Path(where) / NOTE
    # What lies beside a GGUF file is of another model.
    earlier = json.loads(note.read_text(encoding="utf-8")) if gguf_file is None and note.is_file() else None
    return place_of(model), earlier, list(layers)


def _save_tokenizer(source: str, folder: Path) -> None:
    from transformers import AutoTokenizer

    from idp_peft.models.loading import find_model

    where, gguf_file = find_model(source)
    try:
        AutoTokenizer.from_pretrained(where, gguf_file=gguf_file).save_pretrained(folder)  # as it is, its padding too
    except (OSError, ValueError) as error:  # a recipe without calibration needs none
        logger.warning("no tokenizer saved, since %s has none: %s", source, error)


def _versions(tool: ModuleType) -> dict[str, str]:
    names = (*tool.PACKAGES, "torch", "transformers")
    return {name: importlib.metadata.version(name) for name in names}
