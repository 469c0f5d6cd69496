"""From a contender's name to the model that is measured: trained, composed, or only put together."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.study.matrix import BOS_PREFIX, COMPOSED, OBJECTIVES, OWN_BOS_PREFIX, UNTRAINED, Contender, Matrix


class NotReady(RuntimeError):
    """A bank is to be composed of prompts that are not trained yet (another process may be at it)."""


def prepare(matrix: Matrix, one: Contender, runs: Path) -> Path | None:
    """Train what has to be trained; goes on with a run that was interrupted.

    Args:
        runs (`Path`): where adapters are kept, `runs/<name of the matrix>/...`.

    Returns:
        `Path`: the adapter's folder; `None` for a contender without one.

    Raises:
        `NotReady`: for a composed bank whose parts are not trained yet.
    """
    if one.method in UNTRAINED:
        return None
    options = dict(matrix.methods[one.method])
    if options["method"] == COMPOSED:
        return _compose(matrix, one, options["of"], runs)
    return _train(matrix, one, options, runs)


def load(matrix: Matrix, one: Contender, adapter: Path | None):
    """`(model, tokenizer)`, in float32 and evaluation mode."""
    import torch

    from idp_peft.models.loading import load as load_adapter
    from idp_peft.models.loading import load_model, load_tokenizer

    place = matrix.model_of(one.compression)
    dtype = getattr(torch, matrix.evaluation.get("dtype", "float32"))
    if adapter is not None:
        return load_adapter(adapter, base=place, dtype=dtype)
    model, tokenizer = load_model(place, dtype=dtype), load_tokenizer(place)
    if one.method in (BOS_PREFIX, OWN_BOS_PREFIX):
        from idp_peft.recover.intact_prefix import intact_prefix

        source = load_model(matrix.base, dtype=dtype) if one.method == BOS_PREFIX else model
        model = intact_prefix(model, source, [tokenizer.bos_token_id])
    return model, tokenizer


def describe(matrix: Matrix, one: Contender, model, adapter: Path | None) -> dict:
    """What a cell says of its model: numbers that its adapter holds, and how it was trained."""
    from peft import PeftModel

    from idp_peft.evaluation.description import adapter_parameters

    is_peft = isinstance(model, PeftModel)
    config = model.active_peft_config if is_peft else None
    record = None if adapter is None else adapter.parent / "run.json"
    training = json.loads(record.read_text()) if record is not None and record.is_file() else {}
    return {
        "extra_parameters": adapter_parameters(model) if is_peft else 0,
        "num_prompts": getattr(config, "num_prompts", None),
        "method_settings": matrix.methods.get(one.method),
        "training": training.get("training"),
        "training_environment": training.get("environment"),
    }


def _train(matrix: Matrix, one: Contender, options: dict, runs: Path) -> Path:
    import torch

    from idp_peft.recover import recover

    folder = runs / matrix.name / one.path
    arguments = dict(matrix.training)
    data = {name: arguments.pop(name) for name in ("dataset", "block_tokens", "context_tokens", "min_tokens")}
    learning_rate = options.pop("learning_rate", None)
    teacher = matrix.base if OBJECTIVES[one.objective] == "distillation" else None
    return recover(
        matrix.model_of(one.compression),
        str(folder),
        teacher=teacher,
        learning_rate=learning_rate,
        seed=one.seed,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        **data,
        **{"scales": False, **options},
        **arguments,
    )


def _compose(matrix: Matrix, one: Contender, parts: list[str], runs: Path) -> Path:
    """The paper's own way: prompts trained alone become a bank, and nothing is trained for it."""
    from idp_peft import compose

    folder = runs / matrix.name / one.path / "adapter"
    if not folder.is_dir():
        adapters = [
            runs / matrix.name / Contender(one.compression, name, one.objective, one.seed).path / "adapter"
            for name in parts
        ]
        if missing := [str(adapter) for adapter in adapters if not adapter.is_dir()]:
            raise NotReady(f"{one.path} is composed of {', '.join(missing)}, not trained yet: run again later")
        compose(adapters, str(folder), names=parts, base_model=matrix.model_of(one.compression))
    return folder
