"""Synthetic result files for the report's tests: plausible numbers, built from a seed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

ENVIRONMENT = {
    "idp_peft": "0.1.0",
    "torch": "2.13.0",
    "commit": "abc123",
    "processor": "Some CPU",
    "threads": 2,
    "gpu": None,
}
ROLES = {"dense": "dense", "compressed": "compressed"}
# Nats per token above the dense model, chance of a right answer, method, extra parameters.
MODELS = {
    "dense": (0.0, 0.62, None, 0),
    "compressed": (0.25, 0.50, None, 0),
    "IDP": (0.16, 0.56, "idp", 73_728),
    "LoRA": (0.18, 0.55, "lora", 73_728),
    "Prompt tuning": (0.19, 0.54, "prompt_tuning", 73_728),
}


def result(
    label: str, /, documents: int = 60, questions: int = 80, task_count: int = 3, num_prompts: int = 4, **changes
) -> dict:
    """One result file's content. Documents and questions are the same for every label; models differ as in `MODELS`."""
    above, right, method, extra = MODELS[label]
    shared, own = np.random.default_rng(0), np.random.default_rng(sum(map(ord, label)))
    tokens = shared.integers(120, 400, documents)
    nats = tokens * (3.0 + 0.3 * shared.standard_normal(documents) + above + 0.05 * own.standard_normal(documents))
    chooses = method == "idp"
    by_prompt = nats[:, None] + 0.02 * tokens[:, None] * own.standard_normal((documents, num_prompts))
    prompts = (by_prompt + 4 * own.standard_normal(by_prompt.shape)).argmin(1)  # a choice that is good, not perfect
    if chooses:
        nats = by_prompt[np.arange(documents), prompts]
    items = [
        {"id": str(i), "nats": float(nats[i]), "tokens": int(tokens[i])}
        | ({"prompt": int(prompts[i]), "nats_by_prompt": by_prompt[i].tolist()} if chooses else {})
        for i in range(documents)
    ]
    made = {
        "format": 1,
        "label": label,
        "role": ROLES.get(label, "recovered"),
        "model": "gptq3",
        "adapter": None if method is None else f"runs/{label}/adapter",
        "method": method,
        "extra_parameters": extra,
        "num_prompts": num_prompts if chooses else None,
        "settings": {"seed": 0, "limit": questions},
        "environment": ENVIRONMENT,
        "seconds": 12.3,
        "perplexity": {"wiki:held_out": {"window": 256, "stride": 192, "selection_reads": "context", "items": items}},
        "tasks": {name: _task(shared, own, questions, right, chooses, num_prompts) for name in _names(task_count)},
        "training": None if method is None else _training(own, method, above),
    }
    return made | changes


def _names(tasks: int) -> list[str]:
    return ["local_arc_easy", "local_sciq", "local_piqa", *(f"local_task_{i}" for i in range(3, tasks))][:tasks]


def _task(shared, own, questions: int, right: float, chooses: bool, num_prompts: int) -> dict:
    difficulty = shared.random(questions)
    score = (difficulty + 0.15 * own.standard_normal(questions) < right).astype(float)
    prompts = own.choice(num_prompts, questions, p=np.arange(1, num_prompts + 1) / sum(range(num_prompts + 1)))
    by_prompt = (difficulty[:, None] + 0.15 * own.standard_normal((questions, num_prompts)) < right).astype(float)
    if chooses:
        score = by_prompt[np.arange(questions), prompts]
    items = [
        {"id": str(i), "score": score[i], "scores": {"acc": score[i]}}
        | ({"prompt": int(prompts[i]), "score_by_prompt": by_prompt[i].tolist()} if chooses else {})
        for i in range(questions)
    ]
    return {"metric": "acc_norm", "score": float(score.mean()), "chance": 0.25, "items": items}


def _training(own, method: str, above: float) -> dict:
    steps = np.arange(5, 301, 5)
    losses = 3.0 + above + 0.4 * np.exp(-steps / 60) + 0.03 * own.standard_normal(len(steps))
    history = [{"step": int(s), "loss": float(x), "learning_rate": 0.01} for s, x in zip(steps, losses, strict=True)]
    return {"method": method, "steps": 300, "seed": 0, "objective": "lm", "learning_rate": 0.01, "history": history}


def write(folder: Path, *results: dict) -> list[Path]:
    """Write contents as files named after their place; returns the paths."""
    paths = []
    for number, content in enumerate(results):
        paths.append(folder / f"{number}.json")
        paths[-1].write_text(json.dumps(content), encoding="utf-8")
    return paths


def five(folder: Path, **sizes) -> list[Path]:
    """Dense, compressed, IDP, LoRA and prompt tuning."""
    return write(folder, *(result(label, **sizes) for label in MODELS))
