"""What the cells say: learning rates, tables of damage repaired, and the curves."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from benchmarks.common.cells import all_cells
from benchmarks.common.markdown import head, row
from benchmarks.repair.contenders import STUDIES
from idp_peft.files.whole_file import write_whole

RESULTS = Path(__file__).parent / "results"


def repaired(cell: dict, text: str) -> float:
    """The share of the damage that is gone: (compressed - repaired) / (compressed - dense), of mean nats on a text, or on
    `"all"` of them."""

    def mean(nats: dict[str, list[float]]) -> float:
        return np.mean(np.concatenate(list(nats.values())) if text == "all" else nats[text])

    dense, compressed = (mean(cell["unrepaired"][role]) for role in ("dense", "compressed"))
    return float((compressed - mean(cell["nats"])) / (compressed - dense))


def best_rates(results: Path) -> dict[str, list[float | None]]:
    """The learning rates with the fewest nats on validation text, by contender; written to `rates.json`."""
    names = {slug(name): name for name in STUDIES["wiki"]}
    tried = defaultdict(list)
    for contender, name, cell in all_cells(results, "tuning/*.jsonl"):
        tried[names[contender.name]].append((float(np.mean(cell["nats"]["wiki"])), name, cell))
    lines = [
        "Damage repaired on validation text, by learning rate (of what has scales: the prompts', the scales'):",
        "",
    ]
    lines += head(["contender", "cell", "damage repaired"])
    best = {}
    for contender, cells in tried.items():
        for _, name, cell in cells:
            lines.append(row([contender, name, f"{100 * repaired(cell, 'wiki'):.1f} %"]))
        rates = min(cells, key=lambda one: one[0])[2]["rates"]
        best[contender] = rates if "scales" in contender and "alone" not in contender else [rates[0], None]
    write_whole(results / "rates.json", json.dumps(best, indent=1) + "\n")
    write_whole(results / "tuning.md", "\n".join([*lines, ""]))
    return best


def slug(contender: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in contender)


def gathered(results: Path, study: str) -> dict[str, dict[int, list[dict]]]:
    """The cells of a study: contender -> steps -> one per seed, in the order of the contenders."""
    names = {slug(name): name for name in STUDIES[study]}
    found = {name: defaultdict(list) for name in STUDIES[study]}
    for contender, _, cell in all_cells(results, f"{study}/*.jsonl"):
        found[names[contender.name]][cell["steps"]].append(cell)
    return {name: dict(by_steps) for name, by_steps in found.items() if by_steps}


def write(results: Path) -> str:
    """All tables and the figure, beside the cells."""
    parts = []
    for study in STUDIES:
        cells = gathered(results, study)
        if cells:
            parts += _tables(study, cells)
            if len({steps for by_steps in cells.values() for steps in by_steps}) > 1:
                _figure(study, cells, results / f"{study}.png")
    if cells := gathered(results, "kinds"):
        parts += _choices(cells)
    text = "\n".join([*parts, ""])
    write_whole(results / "tables.md", text)
    return text


# The rows of the README's table, in its order.
SHORT = (
    "scales alone (IA3)",
    "token prompt of 32",
    "token prompt of 32 + scales",
    "key/value prompt of 32",
    "key/value prompt of 32 + scales",
    "LoRA of the size",
    "LoRA of rank 16",
)


def short_table(results: Path, steps: int = 300) -> str:
    """The README's table: damage repaired on two held-out texts after so many steps."""
    cells = gathered(results, "wiki")
    lines = head(["trained beside the frozen model", "parameters", "wiki", "c4"])
    for name in SHORT:
        found = cells[name][steps]
        shares = [f"{100 * np.mean([repaired(cell, text) for cell in found]):.1f} %" for text in ("wiki", "c4")]
        lines.append(row([name, f"{found[0]['parameters']:,}", *shares]))
    return "\n".join(lines)


def _tables(study: str, cells: dict) -> list[str]:
    every = sorted({steps for by_steps in cells.values() for steps in by_steps})
    texts = (
        ["all"] if study == "kinds" else sorted({text for cell in _flat(cells) for text in cell["nats"]}, reverse=True)
    )
    lines = []
    for text in texts:
        on = "the held-out blocks of all six kinds" if text == "all" else f"held-out {text}"
        lines += [f"Trained on {study}, damage repaired on {on}, by steps (mean over seeds; lowest to highest):", ""]
        lines += head(["contender", "parameters", *map(str, every)])
        for name, by_steps in cells.items():
            entries = [_entry([repaired(cell, text) for cell in by_steps.get(steps, [])]) for steps in every]
            parameters = next(cell["parameters"] for of_steps in by_steps.values() for cell in of_steps)
            lines.append(row([name, f"{parameters:,}", *entries]))
        lines.append("")
    return lines


def _choices(cells: dict) -> list[str]:
    """Of banks: what each use of their prompts repairs."""
    lines = [
        "What the banks' own choice repairs, beside other uses of the same prompts (most steps, mean over seeds):",
        "",
    ]
    lines += head(["bank", "its choice", "best prompt of each block (oracle)", "best single prompt", "a random prompt"])
    for name, by_steps in cells.items():
        of_most = by_steps[max(by_steps)]
        if STUDIES["kinds"][name].get("num_prompts", 1) > 1 and "method" not in STUDIES["kinds"][name]:
            uses = np.array([_uses(cell) for cell in of_most]).mean(0)
            lines.append(row([name, *(f"{100 * share:.1f} %" for share in uses)]))
    return [*lines, ""]


def _uses(cell: dict) -> list[float]:
    dense, compressed = (np.concatenate(list(cell["unrepaired"][role].values())) for role in ("dense", "compressed"))
    by_prompt = np.concatenate(
        [np.array(of_text) for of_text in cell["by_prompt"].values()], axis=1
    )  # [prompts, blocks]
    own = np.concatenate(list(cell["nats"].values()))
    uses = (own, by_prompt.min(0), by_prompt[by_prompt.mean(1).argmin()], by_prompt.mean(0))
    return [float((compressed - use).mean() / (compressed - dense).mean()) for use in uses]


def _entry(shares: list[float]) -> str:
    if not shares:
        return ""
    mean = f"{100 * np.mean(shares):.1f} %"
    return mean if len(shares) == 1 else f"{mean} ({100 * min(shares):.1f} to {100 * max(shares):.1f})"


def _flat(cells: dict):
    return (cell for by_steps in cells.values() for of_steps in by_steps.values() for cell in of_steps)


def _figure(study: str, cells: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    text = "all" if study == "kinds" else study
    for name, by_steps in cells.items():
        steps = sorted(by_steps)
        shares = [100 * np.mean([repaired(cell, text) for cell in by_steps[step]]) for step in steps]
        axes.plot(steps, shares, marker="o", label=name, linestyle="--" if "LoRA" in name else "-")
    axes.set_xscale("log")
    every = sorted({steps for by_steps in cells.values() for steps in by_steps})
    axes.set_xticks(every, list(map(str, every)))
    axes.minorticks_off()
    axes.set_xlabel("training steps of 4 x 256 tokens")
    axes.set_ylabel("damage repaired, %")
    axes.set_title(f"Trained on {study}, held-out {'blocks of six kinds' if text == 'all' else text}")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    figure.savefig(path, dpi=110)
