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
# What a result of before they existed was measured with.
_NEW_SETTINGS = {"assistant_only_loss": False}


def evaluate(
    model: str,
    output: str | Path,
    adapter: str | None = None,
    label: str | None = None,
    role: str | None = None,
    dataset: str = "wiki",
    dataset_split: str = "held_out",
    text_column: str = "text",
    dataset_config: str | None = None,
    assistant_only_loss: bool = False,
    tasks: list[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
    window: int = 256,
    stride: int = 192,
    batch_size: int = 4,
    each_prompt: bool = False,
) -> Path:
    """Measure one model and write the result, whole or not at all.

    A result of the same settings that is there already is kept: the call returns at once.

    Args:
        model (`str`): `"default"`, a folder, a `.gguf` file or a Hub id.
        output (`str`): the result's JSON file; scores of every item are in it.
        adapter (`str`, *optional*): a PEFT adapter on the model: a folder or a Hub id.
        label (`str`, *optional*): the name of the row in tables; by default what the model is.
        role (`str`, *optional*): `"dense"`, `"compressed"` or `"recovered"`; by default what adapter and config say.
        dataset (`str`, defaults to `"wiki"`): text for perplexity, as in [`load_texts`], or `"none"`.
        dataset_split (`str`), text_column (`str`), dataset_config (`str`, *optional*): as in [`load_texts`].
        assistant_only_loss (`bool`, defaults to `False`): score the assistant's turns of a chat alone.
        tasks (`list[str]`, *optional*): zero-shot tasks: `local_*` names, `"all_local"`, or the harness's own names.
        limit (`int`, *optional*): at most so many documents, and questions of each task, a seeded sample.
        seed (`int`, defaults to `0`): of that sample.
        window (`int`, defaults to `256`): tokens that the model sees at once when perplexity is measured.
        stride (`int`, defaults to `192`): tokens scored per window. Those before are the context, which chooses the prompt.
        batch_size (`int`, defaults to `4`): rows of a forward pass.
        each_prompt (`bool`, defaults to `False`): also force every prompt: best single, random and oracle choice.

    Returns:
        `Path`: `output`.

    Raises:
        `ValueError`: for a wrong setting, or where `output` holds a result of other settings or of an older model.
        `FileNotFoundError`: where the model or the dataset does not exist.
        `ImportError`: where a library that is needed is missing, naming what to install.
    """
    settings = {name: value for name, value in locals().items() if name != "output"}
    settings = _checked(settings)
    output = Path(output)
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


def _checked(settings: dict) -> dict:
    """The settings of a result, as they are written into it.

    Raises:
        `ValueError`: for a wrong one.
    """
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
