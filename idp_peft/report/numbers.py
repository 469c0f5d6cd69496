"""Every number of the report, computed once; tables, plots and the page only show them."""

from __future__ import annotations

import math
import zlib
from dataclasses import asdict, dataclass

from tqdm.auto import tqdm

from idp_peft.report import choices
from idp_peft.report.bootstrap import DRAWS, Averaged, Means, Resampled
from idp_peft.report.comparisons import MEASURED, compare, correct, pairs
from idp_peft.report.pairing import Paired, pair
from idp_peft.report.results import Result
from idp_peft.report.statistics import entropy_bits, is_binary, mcnemar, shares, wilson

MEAN = "mean over tasks"


@dataclass(frozen=True)
class Analysis:
    """What the report is written from.

    Args:
        results (`list[Result]`): the files, in the order of the rows.
        paired (`dict`): ("text" or "task", name) -> `Paired`, texts first.
        statistics (`dict`): what `statistics.json` holds.
    """

    results: list[Result]
    paired: dict[tuple[str, str], Paired]
    statistics: dict

    def label_of(self, role: str) -> str | None:
        return next((result.label for result in self.results if result.role == role), None)


def analyse(results: list[Result], seed: int = 0, draws: int = DRAWS) -> Analysis:
    """Compute all statistics of a report.

    Args:
        results (`list[Result]`): from `read_results`.
        seed (`int`, defaults to `0`): of the bootstrap and of the halvings. Each text and task has draws of its own.
        draws (`int`, defaults to `10000`): bootstrap draws.

    Raises:
        `ValueError`: for files that do not fit together (see `pair`), or that have no text and no task in common with the
            compressed model's.
    """
    compressed = next(result for result in results if result.role == "compressed")
    names = [("text", name) for name in compressed.texts] + [("task", name) for name in compressed.tasks]
    if not names:
        raise ValueError(
            f"{compressed.path}: must hold at least one text in `perplexity` or one task in `tasks`, got none"
        )
    paired = {key: pair(results, key[1], key[0] == "text") for key in names}
    means = {}
    for key in tqdm(names, desc="resampling", leave=False):
        means[key] = resample(paired[key], [seed, zlib.crc32(" ".join(key).encode())], draws)
    texts = {key[1]: _text(results, paired[key], means[key]) for key in names if key[0] == "text"}
    tasks = {key[1]: _task(results, paired[key], means[key]) for key in names if key[0] == "task"}
    all_tasks = [comparison for task in tasks.values() for comparison in task["comparisons"]]
    correct(all_tasks, higher_is_better=True)
    statistics = {
        "format": 1,
        "seed": seed,
        "draws": draws,
        "rows": [_row(result) for result in results],
        "texts": texts,
        "tasks": tasks,
        "mean_over_tasks": _mean_over_tasks(results, [means[key] for key in names if key[0] == "task"]),
    }
    return Analysis(results, paired, statistics)


def resample(paired: Paired, seed, draws: int = DRAWS) -> Means:
    """Means of every model, and of the other uses of its prompts, over the same resampled items."""
    columns = {(label, MEASURED): values for label, values in paired.values.items()}
    for label, by_prompt in paired.by_prompt.items():
        if by_prompt.shape[1] > 1:
            uses = choices.other_uses(by_prompt, paired.is_text, seed)
            columns |= {(label, use): values for use, values in uses.items()}
    return Resampled(columns, paired.weights, seed, draws)


def _row(result: Result) -> dict:
    return {
        "label": result.label,
        "role": result.role,
        "method": result.method,
        "model": result.model,
        "adapter": result.adapter,
        "extra_parameters": result.extra_parameters,
        "num_prompts": result.num_prompts,
        "training": {key: value for key, value in result.training.items() if key != "history"},
        "settings": result.settings,
        "environment": result.environment,
    }


def _common(results: list[Result], means: Means, higher_is_better: bool) -> dict[str, dict]:
    """label -> what texts, tasks and their mean have in common: differences to dense and compressed, recovery."""
    by_role = {result.role: (result.label, MEASURED) for result in results if result.role != "recovered"}
    dense, compressed = by_role.get("dense"), by_role["compressed"]
    rows = {}
    for result in results:
        if (name := (result.label, MEASURED)) not in means.points:
            continue
        row = {"mean": asdict(means.mean(name)), "to_dense": None, "to_compressed": None, "recovery": None}
        if dense in means.points:
            row["to_dense"] = asdict(means.difference(name, dense))
            if result.role == "recovered" and compressed in means.points:
                row["recovery"] = asdict(means.recovery(name, compressed, dense, higher_is_better))
        if compressed in means.points:
            row["to_compressed"] = asdict(means.difference(name, compressed))
        rows[result.label] = row
    return rows


def _choices(results: list[Result], paired: Paired, means: Means) -> dict[str, dict]:
    """label -> how often each prompt was chosen, and what other uses of the prompts would have scored."""
    made = {}
    for result in results:
        prompts = paired.prompts.get(result.label)
        if prompts is None or result.method != "idp" or (prompts < 0).all():
            continue
        count = result.num_prompts or int(prompts.max()) + 1
        share = shares(prompts, count)
        uses = {use: asdict(means.mean((label, use))) for label, use in means.points if label == result.label}
        made[result.label] = {
            "shares": share.tolist(),
            "entropy_bits": entropy_bits(share),
            "most_bits": math.log2(count),
            "uses": uses if len(uses) > 1 else {},
        }
    return made


def _measured(results: list[Result], paired: Paired, means: Means, comparisons: list) -> dict:
    return {
        **paired.facts,
        "items": len(paired.ids),
        "measured": paired.measured,
        "selection_reads": paired.selection_reads,
        "rows": _common(results, means, higher_is_better=not paired.is_text),
        "comparisons": comparisons,
        "choices": _choices(results, paired, means),
    }


def _text(results: list[Result], paired: Paired, means: Means) -> dict:
    family = correct(compare(paired.name, results, means), higher_is_better=False)
    text = _measured(results, paired, means, family) | {"tokens": int(paired.weights.sum())}
    for row in text["rows"].values():
        nats = row["mean"]
        ends = nats["interval"] and [math.exp(end) for end in nats["interval"]]
        row["perplexity"] = {"value": math.exp(nats["value"]), "interval": ends}
    return text


def _task(results: list[Result], paired: Paired, means: Means) -> dict:
    binary = {(label, MEASURED): values for label, values in paired.values.items() if is_binary(values)}
    exact = {
        (left, right): mcnemar(binary[left], binary[right])
        for _, left, right in pairs(results, means)
        if left in binary and right in binary
    }
    task = _measured(results, paired, means, compare(paired.name, results, means, exact))
    for label, row in task["rows"].items():
        if (label, MEASURED) in binary:
            row["mean"]["interval"] = wilson(int(paired.values[label].sum()), len(paired.ids))
    return task


def _mean_over_tasks(results: list[Result], parts: list[Means]) -> dict | None:
    """The plain mean over the tasks; models that lack a task have none, so that all means are over the same tasks."""
    if not parts:
        return None
    means = Averaged(parts)
    family = correct(compare(MEAN, results, means), higher_is_better=True)
    return {"tasks": len(parts), "rows": _common(results, means, higher_is_better=True), "comparisons": family}


def as_json(statistics: dict) -> dict:
    """`statistics` with plain values only: what `statistics.json` holds."""
    plain = dict(statistics)
    for name in ("texts", "tasks"):
        plain[name] = {key: _plain(value) for key, value in statistics[name].items()}
    plain["mean_over_tasks"] = statistics["mean_over_tasks"] and _plain(statistics["mean_over_tasks"])
    return plain


def _plain(measured: dict) -> dict:
    return measured | {"comparisons": [comparison.as_dict() for comparison in measured["comparisons"]]}
