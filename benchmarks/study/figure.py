"""`python -m benchmarks.study.figure`: recovery against the cost of a request, from the repair's and the latency's results."""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.latency.tables import by_case, ratio

_BENCHMARKS = Path(__file__).parent.parent
REPAIR = _BENCHMARKS / "repair/results/tables.md"
LATENCY = _BENCHMARKS / "latency/results/dense.json"
FIGURE = _BENCHMARKS.parent / "docs/recovery-and-cost.png"
REQUEST = {"part": "requests", "batch": 1, "tokens_in": 128, "tokens_out": 32}
# A contender of the repair benchmark -> what was timed for it, and where its label stands. Scales are folded: alone they are the base.
POINTS = {
    "compressed": ("base alone", (8, 6)),
    "scales alone (IA3)": ("base alone", (8, -14)),
    "token prompt of 32 + scales": ("IDP by centroid", (8, -12)),
    "key/value prompt of 32 + scales": ("IDP, key/values by centroid, scales folded", (8, 4)),
    "token prompt of 32": ("IDP by centroid", (8, -4)),
    "LoRA of rank 16": ("LoRA, rank 16", (-92, -4)),
}
TITLE = "135M model, GPTQ 3 bit, 300 steps, held-out wiki; scales folded; 128 tokens in, 32 out"


def points() -> dict[str, tuple[float, float, tuple[float, float]]]:
    """Contender -> (time of a request in that of the base, damage repaired in percent, its range over seeds)."""
    table = REPAIR.read_text(encoding="utf-8").split("\n\n")[1]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()]
    column = rows[0].index("300")
    repaired = {row[0]: [float(number) for number in re.findall(r"-?[\d.]+", row[column])] for row in rows[2:]}
    turns = next(each for case, each in by_case(json.loads(LATENCY.read_text())["turns"]) if case == REQUEST)
    found = {}
    for name, (timed, _place) in POINTS.items():
        value, *over_seeds = repaired.get(name, [0.0])
        low, high = over_seeds or (value, value)
        found[name] = (ratio(turns[timed], turns["base alone"], "whole"), value, (low, high))
    return found


def draw(path: Path = FIGURE) -> None:
    """Write the figure as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.4), dpi=110, layout="constrained")
    for name, (cost, recovery, (low, high)) in points().items():
        color = "tab:blue" if name.startswith("LoRA") else "tab:gray" if name == "compressed" else "tab:orange"
        axes.errorbar(cost, recovery, [[recovery - low], [high - recovery]], fmt="o", color=color, capsize=3)
        label = {"compressed": "compressed model", "scales alone (IA3)": "scales alone"}.get(name, name)
        axes.annotate(label, (cost, recovery), xytext=POINTS[name][1], textcoords="offset points", fontsize=9)
    axes.set_xlabel("time of a request, in that of the compressed model")
    axes.set_ylabel("damage gone, %")
    axes.set_title(TITLE, fontsize=9)
    axes.set_xlim(0.97, 1.24)
    axes.set_ylim(bottom=-4)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    draw()
    print(FIGURE)
