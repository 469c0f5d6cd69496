"""`python -m benchmarks.study.figure`: recovery against the cost of a request, from the study's and the latency's results."""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.latency.tables import by_case, ratio

_BENCHMARKS = Path(__file__).parent.parent
REPORT = _BENCHMARKS / "study/results/smollm2-135m/report.md"
LATENCY = _BENCHMARKS / "latency/results/dense.json"
FIGURE = _BENCHMARKS.parent / "docs/recovery-and-cost.png"
REQUEST = {"part": "requests", "batch": 1, "tokens_in": 128, "tokens_out": 32}
# A contender of the study -> what was timed for it, and where its label stands.
POINTS = {
    "compressed": ("base alone", (8, 6)),
    "IDP, 4 x 32": ("IDP", (8, -14)),
    "LoRA, budget-matched": ("LoRA, budget-matched", (8, -4)),
    "LoRA, rank 16": ("LoRA, rank 16", (-92, -4)),
    "one prompt, 128 tokens": ("prompt tuning", (8, -4)),
    "prefix tuning, intact start, distillation": ("prefix tuning", (6, 18)),
}
TITLE = "135M model, GPTQ 3 bit, 30 steps, held-out wiki; 128 tokens in, 32 out"


def points() -> dict[str, tuple[float, float, tuple[float, float]]]:
    """Contender -> (time of a request in that of the base, recovery in percent, its 95 % interval)."""
    table = REPORT.read_text(encoding="utf-8").split("<!-- headline gptq-3bit: begin -->")[1].split("<!--")[0]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.strip().splitlines()]
    recovered = {row[0].partition(" (")[0]: row[2] for row in rows}
    turns = next(each for case, each in by_case(json.loads(LATENCY.read_text())["turns"]) if case == REQUEST)
    found = {}
    for name, (timed, _place) in POINTS.items():
        value, low, high = [float(number) for number in re.findall(r"-?[\d.]+", recovered[name])] or [0.0] * 3
        cost = ratio(turns[timed], turns["base alone"], "whole")
        found[name] = (cost, value, (low, high))
    return found


def draw(path: Path = FIGURE) -> None:
    """Write the figure as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.4), dpi=110, layout="constrained")
    for name, (cost, recovery, (low, high)) in points().items():
        color = "tab:orange" if name.startswith("IDP") else "tab:gray" if name == "compressed" else "tab:blue"
        axes.errorbar(cost, recovery, [[recovery - low], [high - recovery]], fmt="o", color=color, capsize=3)
        label = (
            "compressed model" if name == "compressed" else name.replace(", intact start, distillation", " (distilled)")
        )
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
