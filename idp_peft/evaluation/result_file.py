"""`evaluate`: load a model, measure it, and write one result file."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

from idp_peft.evaluation.description import describe
from idp_peft.evaluation.environment import environment
from idp_peft.evaluation.model_scores import evaluate_model
from idp_peft.evaluation.task_loading import check_tasks
from idp_peft.evaluation.windows import check_window
from idp_peft.files.whole_file import write_whole
from idp_peft.texts.chats import assistant_only

logger = logging.getLogger(__name__)

FORMAT = 1
_SETTINGS = (
    "model",
    "adapter",
    "label",
    "role",
    "dataset",
    "dataset_split",
    "text_column",
    "dataset_config",
    "assistant_only_loss",
    "tasks",
    "limit",
    "seed",
    "window",
    "stride",
    "batch_size",
    "each_prompt",
)
# What a result of before they existed was measured with.
_NEW_SETTINGS = {"assistant_only_loss": False}


def evaluate(options) -> Path:
    """Measure one model and write the result, whole or not at all.

    A result that is there already, of the same settings, is kept: the call returns at once.

    Args:
        options (`EvaluateOptions`): `model`, `adapter`, `output` and the fields named in `settings` of the result.

    Returns:
        `Path`: the result file.

    Raises:
        `ValueError`: for a wrong option, or where the file holds the result of other settings or of an older model.
        `FileNotFoundError`: where the model or the dataset does not exist.
        `ImportError`: where a library that is needed is missing, naming what to install.
    """
    settings = settings_of(options)
    output = Path(options.output)
    if is_done(output, settings):
        logger.info("%s holds this result already", output)
        return output
    texts = None
    if settings["dataset"] != "none":
        from idp_peft.texts.data import load_texts

        texts = load_texts(
            settings["dataset"], settings["dataset_split"], settings["text_column"], settings["dataset_config"]
        )
        if settings["assistant_only_loss"]:
            texts = assistant_only(texts)
    started = time.time()
    model, tokenizer = load(settings["model"], settings["adapter"])
    result = {"format": FORMAT, **describe(model, settings), "settings": settings, "environment": environment()}
    scores = evaluate_model(
        model,
        tokenizer,
        texts=texts,
        dataset=f"{settings['dataset']}:{settings['dataset_split']}",
        **{
            name: settings[name] for name in ("tasks", "limit", "seed", "window", "stride", "batch_size", "each_prompt")
        },
    )
    write(output, {**result, "seconds": round(time.time() - started, 1), **scores})
    return output


def settings_of(options) -> dict:
    """The options that decide a result, checked.

    Raises:
        `ValueError`: for a wrong one.
    """
    settings = {name: getattr(options, name, _NEW_SETTINGS.get(name)) for name in _SETTINGS}
    for name in ("model", "adapter"):
        settings[name] = None if settings[name] is None else str(settings[name])
    settings["tasks"] = check_tasks(settings["tasks"])
    check_window(settings["window"], settings["stride"])
    for name in ("batch_size", "limit"):
        if settings[name] is not None and settings[name] < 1:
            raise ValueError(f"`{name}` must be at least 1, got {settings[name]}")
    if settings["role"] not in (None, "dense", "compressed", "recovered"):
        raise ValueError(f"`role` must be dense, compressed or recovered, got {settings['role']!r}")
    if settings["dataset"] == "none" and not settings["tasks"]:
        raise ValueError("nothing to measure: `dataset` is 'none' and `tasks` is empty; give one of them")
    return settings


def is_done(output: Path, settings: dict) -> bool:
    """Whether a result file of these settings is there.

    Raises:
        `ValueError`: where something else is.
    """
    if not output.exists():
        return False
    try:
        before = _NEW_SETTINGS | json.loads(output.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"`output` {output} exists and is no result file: choose another name") from error
    different = [name for name in settings if before.get(name) != settings[name]]
    if different:
        changes = "; ".join(f"{name} was {before.get(name)!r} and is {settings[name]!r}" for name in different)
        raise ValueError(
            f"`output` {output} holds a result of other settings ({changes}): choose another name or remove it"
        )
    for name in ("model", "adapter"):
        if settings[name] is not None and _changed_since(Path(settings[name]), output.stat().st_mtime):
            raise ValueError(f"`output` {output} is older than `{name}` {settings[name]}: remove it to measure again")
    return True


def _changed_since(place: Path, moment: float) -> bool:
    files = place.iterdir() if place.is_dir() else [place] if place.is_file() else []
    return any(path.stat().st_mtime > moment for path in files if path.suffix in (".safetensors", ".bin", ".gguf"))


def load(model: str, adapter: str | None):
    """The model with its adapter, in evaluation mode, and its tokenizer."""
    from idp_peft.models import loading

    if adapter is None:
        return loading.load_model(model), loading.load_tokenizer(model)
    return loading.load(adapter, base=model)


def write(output: Path, result: dict) -> None:
    """Write JSON, whole or not at all."""
    write_whole(output, json.dumps(result, indent=1) + "\n")
