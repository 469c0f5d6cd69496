"""The figures, readable in print: colours that colour-blind readers can tell apart, and hatches, markers and line styles
that survive greyscale. Each returns `None` when there is nothing to show.
"""

from __future__ import annotations

import numpy as np

from idp_peft.files.error_reason import missing
from idp_peft.report.drawing import STYLE, Figure, finish, legend, look_of, marker, panels, short
from idp_peft.report.numbers import MEAN, Analysis

_POINTS = 300  # most points of a curve: more are not visible, and make the page heavy
_WIDEST = (-150.0, 250.0)  # percent of recovery; wider intervals are cut off, and the caption says so


def figures(analysis: Analysis) -> dict[str, Figure]:
    """All figures that the results have data for, by name. Needs matplotlib.

    Raises:
        `ImportError`: without matplotlib, naming what to install.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise missing("the report's figures need matplotlib: pip install 'idp-peft[report]'", error) from error
    from matplotlib import style

    drawn = {}
    with matplotlib.rc_context(), style.context("default"):
        matplotlib.rcParams.update(STYLE)
        for draw in (recovery_bars, accuracy_forest, item_gains, prompt_shares, training_curves):
            figure = draw(analysis)
            if figure is not None:
                drawn[figure.name] = figure
    return drawn


def recovery_bars(analysis: Analysis) -> Figure | None:
    """How much of the damage each method repaired, one panel per text and one for the mean over tasks."""
    statistics = analysis.statistics
    places = {name: text["rows"] for name, text in statistics["texts"].items()}
    if statistics["mean_over_tasks"]:
        places[MEAN] = statistics["mean_over_tasks"]["rows"]
    places = {n: {k: r["recovery"] for k, r in rows.items() if r["recovery"]} for n, rows in places.items()}
    places = {n: rows for n, rows in places.items() if any(r["value"] is not None for r in rows.values())}
    if not places:
        return None
    figure, axes = panels([0.5 * len(rows) + 0.9 for rows in places.values()])
    for axis, (name, rows) in zip(axes, places.items(), strict=True):
        for place, (label, values) in enumerate(rows.items()):
            _recovery_bar(axis, place, values, look_of(analysis, label))
        axis.set_yticks(range(len(rows)), [short(label) for label in rows])
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.axvline(0, color="black", linewidth=1)
        axis.axvline(100, color="black", linewidth=1, linestyle="--")
        low, high = axis.get_xlim()
        axis.set_xlim(max(_WIDEST[0], min(low, -5)), min(_WIDEST[1], max(high, 112)))
        axis.set_title(short(name), loc="left", fontsize=11)
    axes[-1].set_xlabel("recovery, % of the damage (0: compressed, 100, dashed: dense)")
    words = [f"{n}: " + ", ".join(f"{k} {_percent(r)}" for k, r in rows.items()) for n, rows in places.items()]
    caption = (
        "Recovery: the part of what compression cost that came back. Lines are 95 % intervals, cut off at "
        f"{_WIDEST[0]:.0f} and {_WIDEST[1]:.0f} %."
    )
    return finish(figure, "recovery", caption, "Bars of recovery. " + "; ".join(words))


def _recovery_bar(axis, place: int, values: dict, look: dict) -> None:
    if values["value"] is None:
        axis.text(1, place, f"n/a, {values['reason']}", va="center", fontsize=9)
        return
    value = 100 * values["value"]
    axis.barh(place, value, height=0.6, color=look["color"], hatch=look["hatch"], edgecolor="black", linewidth=0.8)
    if values["interval"]:
        # A white line below the black one keeps the interval visible on dark bars and on hatches.
        low, high = (100 * end for end in values["interval"])
        for colour, width in (("white", 4.5), ("black", 1.6)):
            axis.plot([low, high], [place, place], color=colour, linewidth=width, solid_capstyle="butt")
        axis.plot([low, high], [place, place], color="black", linestyle="", marker="|", markersize=9)


def accuracy_forest(analysis: Analysis) -> Figure | None:
    """Accuracy of each model minus that of the compressed one, task by task."""
    statistics, compressed = analysis.statistics, analysis.label_of("compressed")
    places = {name: task["rows"] for name, task in statistics["tasks"].items()}
    if len(places) > 1 and statistics["mean_over_tasks"]:
        places[MEAN] = statistics["mean_over_tasks"]["rows"]
    labels = [
        r.label for r in analysis.results if r.label != compressed and any(r.label in rows for rows in places.values())
    ]
    if not places or not labels:
        return None
    figure, (axis,) = panels([0.26 * len(places) * (len(labels) + 1) + 1.0])
    for number, label in enumerate(labels):
        look, offset = look_of(analysis, label), (number + 1) / (len(labels) + 1) - 0.5
        for place, rows in enumerate(places.values()):
            change = rows.get(label, {}).get("to_compressed")
            if change is None:
                continue
            if change["interval"]:
                axis.plot(
                    [100 * end for end in change["interval"]], [place + offset] * 2, color=look["color"], linewidth=1.8
                )
            axis.plot(100 * change["value"], place + offset, **marker(look))
    for edge in range(1, len(places)):
        axis.axhline(edge - 0.5, color="0.8", linewidth=0.8)
    axis.axvline(0, color="black", linewidth=1)
    axis.set_yticks(range(len(places)), [short(name) for name in places])
    axis.set_ylim(len(places) - 0.5, -0.5)
    axis.set_xlabel("accuracy minus that of the compressed model, points")
    legend(axis, analysis, labels)
    means = places[list(places)[-1]]
    words = ", ".join(
        f"{label} {100 * means[label]['to_compressed']['value']:+.1f}" for label in labels if _has_change(means, label)
    )
    caption = "Accuracy on each task, as points above (right) or below (left) the compressed model, with 95 % bootstrap intervals."
    return finish(
        figure, "accuracy", caption, f"Accuracy differences to compressed. {list(places)[-1]}: {words} points."
    )


def _has_change(rows: dict, label: str) -> bool:
    return bool(rows.get(label, {}).get("to_compressed"))


def item_gains(analysis: Analysis) -> Figure | None:
    """What each document gained: is the mean made by many documents or by a few?"""
    compressed = analysis.label_of("compressed")
    texts = {name: paired for (kind, name), paired in analysis.paired.items() if kind == "text"}
    gains = {
        name: {
            r.label: (paired.values[compressed] - paired.values[r.label]) / paired.weights
            for r in analysis.results
            if r.role == "recovered" and r.label in paired.values
        }
        for name, paired in texts.items()
    }
    gains = {name: rows for name, rows in gains.items() if rows}
    if not gains:
        return None
    figure, axes = panels([0.6 * len(rows) + 0.9 for rows in gains.values()])
    for axis, (name, rows) in zip(axes, gains.items(), strict=True):
        boxes = axis.boxplot(
            list(rows.values()), positions=range(len(rows)), orientation="horizontal", widths=0.5, patch_artist=True,
            medianprops={"color": "black", "linewidth": 2}, flierprops={"markersize": 3, "markeredgecolor": "0.4"},
        )  # fmt: skip
        for box, label in zip(boxes["boxes"], rows, strict=True):
            look = look_of(analysis, label)
            box.set(facecolor=look["color"], hatch=look["hatch"], alpha=0.75)
        better = [f"{short(label)}\n({100 * (gain > 0).mean():.0f} % gain)" for label, gain in rows.items()]
        axis.set_yticks(range(len(rows)), better)
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.axvline(0, color="black", linewidth=1)
        axis.set_title(short(name), loc="left", fontsize=11)
    axes[-1].set_xlabel("gain over the compressed model, nats per token of a document")
    caption = "Gain of each document. Box: the middle half of the documents, thick line: the median, whiskers: within 1.5 boxes, circles: the rest."
    words = [
        f"{n}: " + ", ".join(f"{k} median {np.median(g):+.3f}" for k, g in rows.items()) for n, rows in gains.items()
    ]
    return finish(figure, "gains", caption, "Box plots of gains per document in nats per token. " + "; ".join(words))


def prompt_shares(analysis: Analysis) -> Figure | None:
    """How often each prompt is chosen: one heat map per model, a row for each text and task."""
    places = analysis.statistics["texts"] | analysis.statistics["tasks"]
    labels = dict.fromkeys(label for place in places.values() for label in place["choices"])
    if not labels:
        return None
    tables = {
        label: {n: 100 * np.array(p["choices"][label]["shares"]) for n, p in places.items() if label in p["choices"]}
        for label in labels
    }
    figure, axes = panels([0.42 * len(rows) + 0.9 for rows in tables.values()])
    for axis, (label, rows) in zip(axes, tables.items(), strict=True):
        width = max(len(row) for row in rows.values())
        table = np.array([np.pad(row, (0, width - len(row))) for row in rows.values()])  # [places, prompts]
        axis.imshow(table, cmap="Greys", vmin=0, vmax=100, aspect="auto")
        if width <= 16:
            for (i, j), share in np.ndenumerate(table):
                axis.text(
                    j,
                    i,
                    f"{share:.0f} %",
                    ha="center",
                    va="center",
                    color="white" if share > 55 else "black",
                    fontsize=9,
                )
        axis.set_xticks(range(width)[:: max(1, width // 16)])
        axis.set_yticks(range(len(rows)), [short(name) for name in rows])
        axis.set_xticks(np.arange(width + 1) - 0.5, minor=True)
        axis.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
        axis.grid(which="minor", color="0.6", linewidth=0.6)
        axis.tick_params(which="minor", length=0)
        axis.set_title(short(label), loc="left", fontsize=11)
    axes[-1].set_xlabel("prompt")
    words = [
        f"{label} on {n}: prompt {row.argmax()} most often, {row.max():.0f} %"
        for label, rows in tables.items()
        for n, row in rows.items()
    ]
    caption = "How often each prompt is chosen, in % of the items; darker is more often."
    return finish(figure, "shares", caption, "Heat map of choices. " + "; ".join(words))


def training_curves(analysis: Analysis) -> Figure | None:
    """Training loss of each method by optimizer step."""
    curves = {}
    for result in analysis.results:
        logged = [entry for entry in result.training.get("history") or [] if isinstance(entry, dict)]
        points = [(e["step"], e["loss"]) for e in logged if _is_number(e.get("step")) and _is_number(e.get("loss"))]
        if len(points) > 1:
            curves[result.label] = _thinned(np.array(points, dtype=np.float64))
    if not curves:
        return None
    figure, (axis,) = panels([3.6])
    for label, points in curves.items():
        look = look_of(analysis, label)
        every = max(1, len(points) // 8)
        line = marker(look) | {"linestyle": look["line"], "linewidth": 1.6, "markevery": every}
        axis.plot(points[:, 0], points[:, 1], **line)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("training loss")
    legend(axis, analysis, list(curves), lines=True)
    objectives = {str(r.training.get("objective")) for r in analysis.results if r.label in curves}
    caption = "Training loss as the trainer logged it."
    if len(objectives) > 1:
        caption += f" The objectives differ ({', '.join(sorted(objectives))}), so the heights do not compare."
    words = ", ".join(f"{label} from {p[0, 1]:.3f} to {p[-1, 1]:.3f}" for label, p in curves.items())
    return finish(figure, "training", caption, f"Training loss by step: {words}.")


def _thinned(points: np.ndarray) -> np.ndarray:
    """At most 300 points `[points, 2]`, each the mean of its neighbours, in the order of steps."""
    points = points[np.argsort(points[:, 0], kind="stable")]
    return np.array([part.mean(0) for part in np.array_split(points, min(len(points), _POINTS))])


def _percent(values: dict) -> str:
    return f"n/a, {values['reason']}" if values["value"] is None else f"{100 * values['value']:.0f} %"


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))
