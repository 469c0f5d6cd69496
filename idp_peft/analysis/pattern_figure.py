"""A comparison of patterns as one figure: a panel per measure, layers from left to right."""

from __future__ import annotations

import numpy as np

try:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
except ImportError as error:
    raise ImportError("the comparison's figure needs matplotlib: pip install 'idp-peft[analysis]'") from error

from idp_peft.analysis.figure import ReportFigure
from idp_peft.report.drawing import STYLE

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito's
_LINES = ("-", "--", "-.", ":")
_GREY = "0.35"  # the start, or the reference
_PARTS = {"hidden": "residual stream", "attention_output": "attention output", "mlp_output": "MLP output"}
_ACTIVATIONS = {
    "cosine": "cosine to the reference",
    "cka_debiased": "CKA to the reference",
    "closed": "share of the gap closed",
    "aside": "moved aside / gap",
}
_ATTENTION = {
    "distance": "attention: distance to\nthe reference",
    "prompt_share": "attention on the prompt",
    "first_token_share": "attention on the first token",
}
_WIDTH, _HEIGHT = 3.7, 2.5  # inches of a panel


def draw(comparison) -> ReportFigure:
    """See [`PatternComparison.plot`]."""
    rows = _rows(comparison)
    columns = max(len(row) for row in rows)
    with matplotlib.rc_context(STYLE):
        figure = ReportFigure(figsize=(_WIDTH * columns, _HEIGHT * len(rows) + 0.4))
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(len(rows), columns)
        axes = [figure.add_subplot(grid[i, j]) for i, row in enumerate(rows) for j in range(len(row))]
        for axis, panel in zip(axes, (panel for row in rows for panel in row), strict=True):
            _draw_panel(axis, panel, comparison)
        for axis in axes[-len(rows[-1]) :]:
            axis.set_xlabel("layer")
        lines = {line.get_label(): line for axis in axes for line in axis.get_lines() if line.get_label()[0] != "_"}
        figure.legend(lines.values(), lines, loc="outside lower center", ncols=min(4, len(lines)), frameon=False)
    return figure


def _rows(comparison) -> list[list[tuple]]:
    """Panels `(title, measure, model -> [layers])`, rows of measures by columns of parts."""
    rows = []
    for measure, title in _ACTIVATIONS.items():
        row = [
            (
                f"{_PARTS[part]}: {title}" if len(comparison.activations) == 1 else f"{_PARTS[part]}:\n{title}",
                measure,
                values,
            )
            for part, measures in comparison.activations.items()
            if (values := measures.get(measure))
        ]
        rows += [row] if row else []
    row = [
        (title, name, comparison.attention[name]) for name, title in _ATTENTION.items() if name in comparison.attention
    ]
    return rows + ([row] if row else [])


def _draw_panel(axis, panel: tuple, comparison) -> None:
    title, measure, values = panel
    for model, layers in values.items():
        axis.plot(np.arange(len(layers)), layers, label=model, linewidth=1.6, **_look(model, comparison))
    if measure in ("closed", "aside"):
        axis.axhline(0, color="black", linewidth=0.8)
    axis.set_title(title, loc="left", fontsize=10)
    axis.margins(x=0.02)


def _look(model: str, comparison) -> dict:
    if model not in comparison.models:
        return {"color": "black", "linestyle": ":"}
    if model == comparison.start:
        return {"color": _GREY, "linestyle": "-"}
    number = [name for name in comparison.models if name != comparison.start].index(model)
    return {"color": _COLOURS[number % len(_COLOURS)], "linestyle": _LINES[number % len(_LINES)]}
