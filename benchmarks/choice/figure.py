"""The figure: what the score of each layer says (two correlations) and brings (nats), one column a bank."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.choice.analysis import Analysis, analyse
from benchmarks.choice.records import Bank
from idp_peft.report.choices import ORACLE, RANDOM, SINGLE
from idp_peft.report.drawing import STYLE

_LOOKS = {"mean": ("#0072B2", "-"), "sum": ("#D55E00", "--")}
_ROWS = (
    ("within", "rank correlation\nwithin items"),
    ("two_way", "two-way centred\ncorrelation"),
    ("over_random", "nats per token gained\nover a random choice"),
)


def draw(groups: dict[str, list[Bank]], analyses: dict[str, dict[str, Analysis]], path: Path) -> None:
    """Write the figure as a PNG."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.2 + 4.6 * len(groups), 8.4))
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(_ROWS), len(groups), sharex="col", squeeze=False)
        for column, (name, banks) in enumerate(groups.items()):
            axes[0, column].set_title(_title(name, banks))
            for reduction, analysis in analyses[name].items():
                seeds = [analyse([bank], reduction) for bank in banks] if len(banks) > 1 else []
                for axis, (field, _) in zip(axes[:, column], _ROWS, strict=True):
                    _draw_rows(
                        axis, field, analysis, seeds, _LOOKS[reduction], f"attention, {reduction}, 95 % interval"
                    )
            _draw_uses(axes[-1, column], next(iter(analyses[name].values())))
            axes[-1, column].set_xlabel("selection layer")
        for axis, (_, label) in zip(axes[:, 0], _ROWS, strict=True):
            axis.set_ylabel(label)
        for axis in axes[:2].flat:
            axis.set_ylim(-1.05, 1.05)
        handles = {}
        for axis in axes[-1]:
            handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
        figure.savefig(path, dpi=110, metadata={"Software": None})


def _title(name: str, banks: list[Bank]) -> str:
    seeds = f", {len(banks)} seeds" if len(banks) > 1 else ""
    return f"{name}\nprompts of {' + '.join(map(str, banks[0].lengths))} tokens{seeds}"


def _draw_rows(axis, field: str, analysis: Analysis, seeds: list[Analysis], look: tuple, label: str) -> None:
    (colour, line), sign = look, -1 if field == "over_random" else 1
    layers = np.arange(len(analysis.layers))
    for one in seeds:
        values = [sign * getattr(row, field).value for row in one.layers]
        axis.plot(layers, values, color=colour, linestyle=line, linewidth=0.7, alpha=0.6)
    estimates = [getattr(row, field) for row in analysis.layers]
    ends = np.array([estimate.interval for estimate in estimates]) * sign
    axis.fill_between(layers, ends.min(1), ends.max(1), color=colour, alpha=0.13, linewidth=0)
    axis.plot(
        layers,
        [sign * estimate.value for estimate in estimates],
        color=colour,
        linestyle=line,
        linewidth=2,
        label=label,
    )
    axis.axhline(0, color="0.4", linewidth=0.8)


def _draw_uses(axis, analysis: Analysis) -> None:
    """Lines at what other choices gain over a random one."""
    lines = ((ORACLE, "oracle", ":"), (SINGLE, "best single prompt", "--"))
    for use, label, style in lines:
        axis.axhline(
            -analysis.uses.difference(use, RANDOM).value, color="black", linewidth=1, linestyle=style, label=label
        )
    gain = -analysis.context.over_random.value
    axis.axhline(gain, color="#009E73", linewidth=1.2, linestyle="-.", label="by the context's loss")
