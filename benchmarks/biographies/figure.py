"""Recall against the strength of compression: one panel per group, one line per repair."""

from __future__ import annotations

from pathlib import Path

from benchmarks.biographies.people import CHANCE

# Told apart by marker and dash as well as by colour (Okabe and Ito's, for colour-blind readers).
STYLES = {
    None: ("#000000", "o", "-"),
    "idp": ("#D55E00", "s", "-"),
    "one-prompt": ("#E69F00", "D", "--"),
    "lora-same-size": ("#0072B2", "^", "-"),
    "lora-rank-16": ("#56B4E9", "v", "--"),
}
PANELS = ("held-out", "repaired-on", "unknown")
TITLES = {
    "held-out": "held out: in no repair text",
    "repaired-on": "repaired on: in the repair text",
    "unknown": "unknown: never in any text",
}


def draw(report, path: Path) -> None:
    """One figure: rows are objectives, columns groups.

    Args:
        report (`Report`): of `tables.py`.
        path (`Path`): the PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = len(report.objectives)
    figure, axes = plt.subplots(rows, 3, figsize=(13, 4.2 * rows + 0.6), sharex=True, sharey=True, squeeze=False)
    for row, objective in enumerate(report.objectives):
        for axis, group in zip(axes[row], PANELS, strict=True):
            _panel(axis, report, group, objective)
            axis.set_title(TITLES[group] + (f" ({objective})" if rows > 1 else ""), fontsize=11)
        axes[row][0].set_ylabel("recall, %")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=len(labels), frameon=False, fontsize=10)
    figure.tight_layout(rect=(0, 0.09 / rows, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axis, report, group: str, objective: str) -> None:
    from benchmarks.biographies.summary import DENSE, NAMES

    means = report.summary(group).all
    places = range(1 + len(report.strengths))
    lines = [None, *report.repairs_of(objective)]
    for number, repair in enumerate(lines):
        colour, marker, dash = STYLES[repair and repair[0]]
        found = [means.mean((strength, repair)) for strength in (DENSE, *report.strengths)]
        values = [100 * one.value for one in found]
        errors = [
            [100 * (one.value - one.interval[0]) for one in found],
            [100 * (one.interval[1] - one.value) for one in found],
        ]
        shifted = [place + 0.06 * (number - (len(lines) - 1) / 2) for place in places]
        label = NAMES[repair and repair[0]]
        axis.errorbar(
            shifted, values, errors, color=colour, marker=marker, linestyle=dash, markersize=5, label=label, capsize=2
        )
    axis.axhline(100 * CHANCE, color="#888888", linewidth=1, linestyle=":")
    axis.annotate("chance", (-0.3, 100 * CHANCE), (0, 13), textcoords="offset points", fontsize=8, color="#666666")
    axis.set_xticks(list(places), [_tick(name) for name in (DENSE, *report.strengths)], fontsize=9)
    axis.set_xlabel("zeros among the weights of the linear layers (SparseGPT)", fontsize=9)
    axis.set_ylim(-3, 105)
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _tick(strength: str) -> str:
    return strength.replace("sparsegpt-", "") + (" %" if strength.startswith("sparsegpt-") else "")
