"""The tables of the report, as data: `markdown` and `page` write them."""

from __future__ import annotations

from dataclasses import dataclass, field

from idp_peft.report.choices import ORACLE, RANDOM, SAME_ITEMS, SINGLE
from idp_peft.report.comparisons import MEASURED, Comparison
from idp_peft.report.formatting import NONE, estimate, number, recovery
from idp_peft.report.sentences import CORRECTED, sentences


@dataclass
class Table:
    """A table and what is said under it.

    Args:
        title (`str`): its caption.
        columns (`list[str]`): headings; the first one is that of the row names.
        rows (`list[list[str]]`): cells as text.
        strong (`set[tuple[int, int]]`): (row, column) of cells to stress: a winner that the tests confirm.
        notes (`list[str]`): sentences under the table.
        kind (`str`): "text", "tasks" or "choices": the section it belongs to; "words" where cells are prose.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    strong: set[tuple[int, int]] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    kind: str = ""


def tables(statistics: dict) -> list[Table]:
    """All tables: one per text, the mean over tasks, every task, and the choices."""
    made = [_text_table(statistics, name, first=i == 0) for i, name in enumerate(statistics["texts"])]
    if statistics["tasks"]:
        made += [_mean_table(statistics), _task_table(statistics)]
    return made + _choice_tables(statistics)


def confirmed_winner(labels: list[str], recovered: list[str], comparisons: list[Comparison]) -> str | None:
    """The recovered model that is significantly better than the compressed one and than *every* other recovered one."""
    for label in recovered:
        beaten = {c.right for c in comparisons if c.left == label and c.verdict == "better" and c.kind != "choice"}
        beaten |= {c.left for c in comparisons if c.right == label and c.verdict == "worse" and c.kind != "choice"}
        if beaten >= set(labels) - {label}:
            return label
    return None


def _winner(statistics: dict, measured: dict, rows: list[dict]) -> int | None:
    labels = [row["label"] for row in rows if row["role"] != "dense" and row["label"] in measured["rows"]]
    recovered = [row["label"] for row in rows if row["role"] == "recovered"]
    winner = confirmed_winner(labels, recovered, measured["comparisons"])
    return next((i for i, row in enumerate(rows) if row["label"] == winner), None)


def _text_table(statistics: dict, name: str, first: bool) -> Table:
    text, rows, mean = statistics["texts"][name], statistics["rows"], statistics["mean_over_tasks"]
    has_dense = any(row["to_dense"] for row in text["rows"].values())
    columns = ["model", "perplexity", *(["nats above dense", "recovery"] if has_dense else ["nats above compressed"])]
    columns += ["extra parameters", *(["mean accuracy, %"] if mean and first else [])]
    cells = []
    for row in rows:
        values = text["rows"].get(row["label"])
        line = [row["label"], estimate(values and values["perplexity"], 2, interval=False)]
        if has_dense:
            line += [
                _no_interval_for(row, "dense", values and values["to_dense"]),
                recovery(values and values["recovery"]),
            ]
        else:
            line.append(_no_interval_for(row, "compressed", values and values["to_compressed"]))
        line.append(f"{row['extra_parameters']:,}")
        if mean and first:
            line.append(estimate(mean["rows"].get(row["label"], {}).get("mean"), 1, 100, interval=False))
        cells.append(line)
    winner = _winner(statistics, text, rows)
    title = f"Perplexity on {name}: {text['items']} documents, {text['tokens']:,} tokens, window {text['window']}, stride {text['stride']}"
    notes = [*sentences(text["comparisons"], is_text=True), *([CORRECTED] if text["comparisons"] else [])]
    return Table(title, columns, cells, set() if winner is None else {(winner, 1), (winner, 2)}, notes, "text")


def _no_interval_for(row: dict, role: str, values: dict | None) -> str:
    """A difference with its interval, and a plain 0 for the model that is the reference."""
    return "0" if row["role"] == role else estimate(values, 4, signed=True)


def _mean_table(statistics: dict) -> Table:
    mean, rows = statistics["mean_over_tasks"], statistics["rows"]
    cells = []
    for row in rows:
        values = mean["rows"].get(row["label"], {})
        change = _points(row, values.get("to_compressed"))
        cells.append([row["label"], estimate(values.get("mean"), 1, 100), change, recovery(values.get("recovery"))])
    winner = _winner(statistics, mean, rows)
    columns = ["model", "mean accuracy, %", "points to compressed", "recovery"]
    if not any(row["role"] == "dense" for row in rows):
        columns, cells = columns[:-1], [line[:-1] for line in cells]
    notes = [*sentences(mean["comparisons"], is_text=False), *([CORRECTED] if mean["comparisons"] else [])]
    title = f"Mean accuracy over {mean['tasks']} task{'s' if mean['tasks'] > 1 else ''}, every task counting the same"
    return Table(title, columns, cells, set() if winner is None else {(winner, 1)}, notes, "tasks")


def _points(row: dict, values: dict | None) -> str:
    return "0" if row["role"] == "compressed" else estimate(values, 1, 100, signed=True)


def _task_table(statistics: dict) -> Table:
    """One row per task: there are often more tasks than a printed line is wide."""
    rows, cells, strong = statistics["rows"], [], set()
    tasks = statistics["tasks"]
    for i, (name, task) in enumerate(tasks.items()):
        chance = NONE if task["chance"] is None else number(100 * task["chance"], 1)
        accuracies = [estimate(task["rows"].get(row["label"], {}).get("mean"), 1, 100) for row in rows]
        cells.append([f"{name} ({task['metric']}, {task['items']} items)", chance, *accuracies])
        if (winner := _winner(statistics, task, rows)) is not None:
            strong.add((i, winner + 2))
    columns = ["task", "chance", *(row["label"] for row in rows)]
    shown = [c for task in tasks.values() for c in task["comparisons"] if c.verdict != "no difference seen"]
    total = sum(len(task["comparisons"]) for task in tasks.values())
    notes = sentences(shown, is_text=False, with_place=True)
    if total:
        notes += [
            f"No difference seen in {total - len(shown)} of {total} comparisons (all are in statistics.json). {CORRECTED}"
        ]
    return Table("Accuracy on each task, % [Wilson's 95 % interval]", columns, cells, strong, notes, "tasks")


def _choice_tables(statistics: dict) -> list[Table]:
    """For each model that chooses: how often it took each prompt, and what other uses of the prompts would score."""
    places = [(n, t, True) for n, t in statistics["texts"].items()] + [
        (n, t, False) for n, t in statistics["tasks"].items()
    ]
    labels = dict.fromkeys(label for _, place, _ in places for label in place["choices"])
    return [_choice_table(label, places) for label in labels]


def _choice_table(label: str, places: list[tuple[str, dict, bool]]) -> Table:
    names = {
        MEASURED: "free choice",
        SINGLE: "best single prompt, cross-fitted",
        SAME_ITEMS: "best single prompt, same items",
    }
    names |= {RANDOM: "random choice", ORACLE: "oracle (bound)"}
    cells, missing = [], []
    for name, place, is_text in places:
        if (choice := place["choices"].get(label)) is None:
            continue
        if not choice["uses"]:
            missing.append(name)
        share = " / ".join(number(100 * part, 0) for part in choice["shares"])
        bits = f"{choice['entropy_bits']:.2f} of {choice['most_bits']:.2f}"
        digits, scale = (4, 1) if is_text else (1, 100)
        uses = [estimate(choice["uses"].get(use), digits, scale, interval=False) for use in names]
        cells.append([f"{name}, {'nats per token' if is_text else 'accuracy, %'}", share, bits, *uses])
    notes = [
        "Entropy: 0 bits when one prompt is always chosen, the most when all are chosen equally often. Cross-fitted: the "
        "prompt is picked on one half of the items and scored on the other, both ways, over 100 halvings. Picked on the "
        "same items it looks better than it is. The oracle takes each item's best prompt by its own score: a bound."
    ]
    if missing:
        notes.append(f"Not measured under each prompt (`evaluate --each_prompt`): {', '.join(missing)}.")
    columns = ["where, and unit", "share of prompts 0, 1, … in %", "entropy, bits", *names.values()]
    return Table(f"How {label} chooses", columns, cells, set(), notes, "choices")
