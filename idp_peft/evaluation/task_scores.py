"""Zero-shot scores of a model, question by question."""

from __future__ import annotations

import logging
import math
import random

from idp_peft.evaluation.prompted import num_prompts
from idp_peft.evaluation.task_loading import load_tasks
from idp_peft.evaluation.tasks import PREFIX, SCORES, TaskScore

logger = logging.getLogger(__name__)

# The harness calls a word's log-likelihood by the name of what it is aggregated to.
_ITEM_NAMES = {"perplexity": "log_likelihood"}


def sample_indices(count: int, limit: int | None, seed: int, name: str) -> list[int] | None:
    """Which items to score: a sample drawn by `seed` and `name`, the same for every model; `None` for all of them.

    Raises:
        `ValueError`: for a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be at least 1 item, or left out for all, got {limit}")
    if limit is None or limit >= count:
        return None
    return sorted(random.Random(f"{seed}:{name}").sample(range(count), limit))


def score_tasks(
    model,
    tokenizer,
    tasks,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 4,
    each_prompt: bool = False,
    prompt_id: int | str | None = None,
) -> dict:
    """Scores of tasks, with every question's own.

    Args:
        model: any causal language model, with or without an adapter.
        tokenizer: its tokenizer.
        tasks (`list[str]` or `str`): local tasks, the harness's own, or `all_local`.
        limit (`int`, *optional*): questions of each task, drawn by `seed`.
        batch_size (`int`, defaults to `4`): rows per forward pass.
        each_prompt (`bool`): score with every prompt of an IDP model's bank forced as well (`score_by_prompt`).
        prompt_id (`int` or `str`, *optional*): force this prompt of an IDP model, by number or name (-1: none); by default
            it chooses.

    Returns:
        `dict`: for each task `metric`, `score` (mean over questions), `chance` and `items`: `id` (number of the question
        in its set), `score`, `scores` (every metric, and where one of several choices is right its `probability`: the
        softmax over the choices' log-likelihoods), `prompt` (`None` without a choice).

    Raises:
        `ValueError`: for an unknown task, or one without a score per question.
    """
    found = load_tasks(tasks)
    if found:
        from idp_peft.evaluation.harness import HarnessModel
    samples = {name: sample_indices(len(task.eval_docs), limit, seed, name) for name, task in found.items()}
    results = {}
    for name, task in found.items():
        logger.info("%s", name)
        items = run_task(HarnessModel(model, tokenizer, batch_size, prompt_id), task, name, samples[name])
        if each_prompt and (num_prompts(model) or 1) > 1:
            for forced in range(num_prompts(model)):
                again = run_task(HarnessModel(model, tokenizer, batch_size, forced), task, name, samples[name])
                for item, other in zip(items, again, strict=True):
                    item.setdefault("score_by_prompt", []).append(other["score"])
        score = score_of(name, items[0]["scores"])
        mean = sum(item["score"] for item in items) / len(items)
        results[name] = {"metric": score.metric, "score": mean, "chance": score.chance, "items": items}
    return results


def run_task(harness_model, task, name: str, sample: list[int] | None) -> list[dict]:
    """One item per question, in the order of the set.

    Args:
        harness_model (`HarnessModel`): what answers.
        task, name: one of `load_tasks`.
        sample (`list[int]`, *optional*): numbers of the questions; all by default.
    """
    from lm_eval.evaluator import evaluate

    samples = None if sample is None else {name: sample}
    output = evaluate(harness_model, {"tasks": {name: task}}, samples=samples, bootstrap_iters=0)
    logged = output["samples"][name]
    first_filter = logged[0]["filter"]
    items = []
    for entry in logged:
        if entry["filter"] != first_filter:
            continue
        scores = {_ITEM_NAMES.get(key, key): float(entry[key]) for key in entry["metrics"] if _is_number(entry[key])}
        if (probability := _probability(entry)) is not None:
            scores["probability"] = probability
        number = entry["doc_id"]
        # The harness counts questions from 0 again within a sample.
        within = number if sample is None else sample.index(number)
        items.append(
            {
                "id": str(number),
                "score": scores[score_of(name, scores).metric],
                "scores": scores,
                "prompt": harness_model.prompts.get((name, within)),
            }
        )
    return sorted(items, key=lambda item: int(item["id"]))


def score_of(name: str, scores: dict[str, float]) -> TaskScore:
    """The metric of record of a task: as the local task of that name, else the first that the harness gives."""
    known = SCORES.get(name.removeprefix(PREFIX).removesuffix("_openai"))
    if known is not None and known.metric in scores:
        return known
    if not scores:
        raise ValueError(f"`tasks`: {name!r} has no score per question, which paired comparisons need")
    return TaskScore("acc_norm" if "acc_norm" in scores else next(iter(scores)), None)


def _probability(entry: dict) -> float | None:
    """Of the right choice among the choices; `None` where the task is no choice among several, or several are right."""
    # Where the choices are contexts (WinoGrande), the harness's target is the text that follows them.
    gold, answers = entry["doc"].get("gold", entry.get("target")), entry["filtered_resps"]
    if not isinstance(gold, int | str) or not all(isinstance(answer, tuple | list) for answer in answers):
        return None
    if not str(gold).isdecimal() or not 0 <= int(gold) < len(answers) or len(answers) < 2:
        return None
    logits = [float(answer[0]) for answer in answers]
    most = max(logits)
    return math.exp(logits[int(gold)] - most) / sum(math.exp(logit - most) for logit in logits)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) or (hasattr(value, "item") and getattr(value, "ndim", 1) == 0)
