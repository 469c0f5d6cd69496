"""What all figures share: one look per model, panels, legends, and the way into the page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from idp_peft.report.numbers import Analysis

# Okabe and Ito's palette, without its yellow, which white paper swallows.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
_HATCHES = ("", "///", "...", "xxx", "\\\\\\", "+++", "ooo")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LINES = ("-", "--", "-.", ":")
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.6,
    "svg.hashsalt": "idp-peft",  # with no date in the file, the same results give the same bytes
    "text.parse_math": False,  # a label with dollar signs is a label, not a formula
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.12,  # inches, so that a title does not touch the axis above it
}
_WIDTH = 8.0  # inches


@dataclass(frozen=True)
class Figure:
    """A picture for the page: `source` is a data URI, `alt` says in words what it shows."""

    name: str
    caption: str
    alt: str
    source: str


def panels(heights: list[float]):
    """A figure with one axis below the other, their heights in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    # Without pyplot: no window system is asked for, and the caller's own figures and backend are left alone.
    figure = Canvas(figsize=(_WIDTH, sum(heights) + 0.3))
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(heights), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    return figure, list(axes[:, 0])


def look_of(analysis: Analysis, label: str) -> dict:
    """One colour, hatch, marker and line for a model in all figures; the dense one is hollow."""
    recovered = [result.label for result in analysis.results if result.role == "recovered"]
    if label not in recovered:
        return {"color": "0.35", "hatch": "", "marker": "o", "line": ":", "hollow": True}
    i = recovered.index(label)
    cycles = (("color", _COLOURS), ("hatch", _HATCHES), ("marker", _MARKERS), ("line", _LINES))
    return {name: cycle[i % len(cycle)] for name, cycle in cycles} | {"hollow": False}


def marker(look: dict) -> dict:
    face = "white" if look["hollow"] else look["color"]
    return {
        "color": look["color"],
        "marker": look["marker"],
        "markersize": 7,
        "markerfacecolor": face,
        "markeredgecolor": "black",
    }


def legend(axis, analysis: Analysis, labels: list[str], lines: bool = False) -> None:
    from matplotlib.lines import Line2D

    looks = [look_of(analysis, label) for label in labels]
    handles = [
        Line2D([], [], linestyle=look["line"] if lines else "-", linewidth=1.6, **marker(look)) for look in looks
    ]
    names = [short(label) for label in labels]
    columns = max(1, min(4, len(names), 90 // (max(map(len, names)) + 9)))  # characters of a line, and of a handle
    axis.legend(
        handles, names, loc="lower left", bbox_to_anchor=(0, 1.01), ncols=columns, frameon=False, handlelength=3.2, borderaxespad=0,
    )  # fmt: skip


def short(text: str) -> str:
    """A label that fits beside an axis. matplotlib leaves names with a leading underscore out of legends."""
    text = text if len(text) <= 28 else f"{text[:27]}…"
    return f" {text}" if text.startswith("_") else text


def finish(figure, name: str, caption: str, alt: str) -> Figure:
    picture = io.BytesIO()
    figure.savefig(picture, format="svg", metadata={"Date": None, "Creator": None})
    encoded = base64.b64encode(picture.getvalue()).decode("ascii")
    return Figure(name, caption, alt, f"data:image/svg+xml;base64,{encoded}")
