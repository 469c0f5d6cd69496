"""A comparison of patterns as one figure: a panel per measure, layers from left to right."""

from __future__ import annotations

import numpy as np

from idp_peft.files.error_reason import missing

try:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
except ImportError as error:
    raise missing("the comparison's figure needs matplotlib: pip install 'idp-peft[analysis]'", error) from error

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


def draw(comparison, measures=None) -> ReportFigure:
    """See [`PatternComparison.plot`]."""
    known = (*_ACTIVATIONS, *_ATTENTION)
    if measures is not None and not (measures and set(measures) <= set(known)):
        raise ValueError(f"`measures` must be some of {', '.join(map(repr, known))}, got {measures}")
    panels = [panel for panel in _panels(comparison) if measures is None or panel[1] in measures]
    if not panels:
        raise ValueError(f"`measures` {measures} are not in this comparison: its `parts` or `start` do not give them")
    columns = len(comparison.activations) if len(comparison.activations) > 1 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE):
        figure = ReportFigure(figsize=(_WIDTH * columns, _HEIGHT * rows + 0.4))
        FigureCanvasAgg(figure)
        axes = [figure.add_subplot(rows, columns, number) for number in range(1, len(panels) + 1)]
        for axis, panel in zip(axes, panels, strict=True):
            _draw_panel(axis, panel, comparison)
        for axis in axes[-columns:]:
            axis.set_xlabel("layer")
        lines = {line.get_label(): line for axis in axes for line in axis.get_lines() if line.get_label()[0] != "_"}
        figure.legend(lines.values(), lines, loc="outside lower center", ncols=min(4, len(lines)), frameon=False)
    return figure


def _panels(comparison) -> list[tuple]:
    """Panels `(title, measure, model -> [layers])`: a row per measure of activations, then attention."""
    panels = [
        (f"{_PARTS[part]}:\n{title}", measure, measures[measure])
        for measure, title in _ACTIVATIONS.items()
        for part, measures in comparison.activations.items()
        if measures.get(measure)
    ]
    attention = comparison.attention
    return panels + [(title, name, attention[name]) for name, title in _ATTENTION.items() if name in attention]


def _draw_panel(axis, panel: tuple, comparison) -> None:
    title, measure, values = panel
    for model, layers in values.items():
        axis.plot(np.arange(len(layers)), layers, label=model, linewidth=1.6, **_look(model, comparison))
    if measure in ("closed", "aside"):
        axis.axhline(0, color="black", linewidth=0.8)
        _leave_out_first_layer(axis, list(values.values()))
    axis.set_title(title, loc="left", fontsize=10)
    axis.margins(x=0.02)


def _leave_out_first_layer(axis, values: list) -> None:
    """Compression hardly changes layer 0, and multiples of a gap of almost nothing would flatten all other layers."""
    later = np.concatenate([layers[1:] for layers in values])
    later = later[~np.isnan(later)]
    if len(later):
        low, high = min(0, later.min()), max(0, later.max())
        axis.set_ylim(low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1))


def _look(model: str, comparison) -> dict:
    if model not in comparison.models:
        return {"color": "black", "linestyle": ":"}
    if model == comparison.start:
        return {"color": _GREY, "linestyle": "-"}
    number = [name for name in comparison.models if name != comparison.start].index(model)
    return {"color": _COLOURS[number % len(_COLOURS)], "linestyle": _LINES[number % len(_LINES)]}
