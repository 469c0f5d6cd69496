"""The selection report as one figure: shares, margins, and where measured the oracle's choices and the groups."""

from __future__ import annotations

import io

import numpy as np

from idp_peft.files.error_reason import missing

try:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise missing("the report's figure needs matplotlib: pip install 'idp-peft[analysis]'", error) from error

from idp_peft.report.drawing import STYLE

_BLUE, _ORANGE = "#0072B2", "#E69F00"  # Okabe and Ito's, which every eye tells apart
_FEW = 12  # prompts that are labelled one by one
_GROUPS = 24  # groups that are drawn
_NAME, _LINE = 14, 40  # characters of a name beside an axis, and of all names below one
_WIDTH, _HEIGHT = 4.8, 3.3  # inches of a panel


class ReportFigure(Figure):
    """A figure that a notebook shows by itself, in few enough bytes to be stored with it."""

    def _repr_png_(self) -> bytes:
        from PIL import Image

        drawn, small = io.BytesIO(), io.BytesIO()
        self.savefig(drawn, format="png", dpi=60)
        picture = Image.open(drawn).convert("RGB")
        picture = picture.quantize(48, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        picture.save(small, "png", optimize=True)
        return small.getvalue()


def draw(report) -> ReportFigure:
    """See [`SelectionReport.plot`]."""
    panels = [_shares]
    if report.scores is not None:
        panels.append(_margins)
    if report.nats is not None:
        panels.append(_confusion)
    if report.groups is not None:
        panels.append(_groups)
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    heights = [_HEIGHT + (1 if _names_stand_upright(report) else 0)] * rows
    heights[-1] += 0 if report.groups is None else 0.1 * max(0, min(_GROUPS, len(report.group_names)) - _FEW)
    with matplotlib.rc_context(STYLE):
        figure = ReportFigure(figsize=(_WIDTH * columns, sum(heights)))
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(rows, columns, height_ratios=heights)
        for index, panel in enumerate(panels):
            last_and_alone = index == len(panels) - 1 and index % columns == 0 and index > 0
            panel(
                figure.add_subplot(grid[index // columns, :] if last_and_alone else grid[divmod(index, columns)]),
                report,
            )
    return figure


def _shares(axis, report) -> None:
    counts, shares = report.counts, 100 * report.shares
    bars = axis.bar(range(report.num_prompts), shares, color=_BLUE, width=0.75)
    axis.axhline(100 / report.num_prompts, color="black", linestyle="--", linewidth=1)
    if report.num_prompts <= _FEW:
        above_line = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
        axis.bar_label(bars, [str(count) for count in counts], padding=3, fontsize=9, bbox=above_line)
    axis.set_ylim(0, min(115, max(1.15 * shares.max(), 130 / report.num_prompts)))
    axis.set_xlim(-0.6, report.num_prompts - 0.4)
    axis.set_ylabel("share of the examples, %")
    missing = len(report.never_chosen)
    never = f", {missing} never chosen" if missing else ""
    axis.set_title(f"Chosen, of {len(report.prompt_ids)} examples{never}\n(dashed: all alike)", loc="left", fontsize=11)
    _prompt_ticks(axis.xaxis, report)


def _margins(axis, report) -> None:
    margins = report.margins
    if report.num_prompts <= _FEW:
        chosen = [margins[report.prompt_ids == prompt] for prompt in range(report.num_prompts)]
        boxes = axis.boxplot(
            chosen, positions=range(report.num_prompts), widths=0.55, patch_artist=True, manage_ticks=False,
            medianprops={"color": "black", "linewidth": 1.5}, flierprops={"markersize": 3, "markeredgecolor": "0.4"},
        )  # fmt: skip
        for box in boxes["boxes"]:
            box.set(facecolor=_ORANGE, edgecolor="black", alpha=0.8)
        axis.set_xlim(-0.6, report.num_prompts - 0.4)
        axis.set_ylabel("winner's score - runner-up's")
        _prompt_ticks(axis.xaxis, report, "chosen prompt")
    else:
        axis.hist(margins, bins=30, color=_ORANGE, edgecolor="black", linewidth=0.4)
        axis.axvline(float(np.median(margins)), color="black", linestyle="--", linewidth=1)
        axis.set_xlabel("winner's score - runner-up's")
        axis.set_ylabel("examples")
    axis.ticklabel_format(axis="y" if report.num_prompts <= _FEW else "x", style="sci", scilimits=(-2, 3))
    median = "thick line: median" if report.num_prompts <= _FEW else "dashed: median"
    axis.set_title(f"How clearly: margin of the choice\n({median})", loc="left", fontsize=11)


def _confusion(axis, report) -> None:
    _heat_map(axis, report.confusion, report.confusion.max())
    agreement, chance = 100 * report.oracle_agreement, 100 * report.chance_agreement
    axis.set_title(f"Chosen and best: {agreement:.0f} % agree\n(by chance {chance:.0f} %)", loc="left", fontsize=11)
    _prompt_ticks(axis.xaxis, report, "best prompt (lowest loss)")
    _prompt_ticks(axis.yaxis, report, "chosen prompt")


def _groups(axis, report) -> None:
    names, table = report.group_names[:_GROUPS], report.group_counts[:_GROUPS]
    shares = 100 * table / table.sum(1, keepdims=True)
    _heat_map(axis, shares, 100 if report.num_prompts <= _FEW else shares.max())
    axis.set_yticks(range(len(names)), [_cut(str(name)) for name in names], fontsize=9 if len(names) <= _FEW else 7)
    information, shuffled = report.group_information, report.chance_group_information
    more = len(report.group_names) - len(names)
    axis.set_title(
        f"Chosen by group, {f'% ({more} more groups)' if more else '% of its examples'}\n"
        f"({information:.2f} nats of information, {shuffled:.2f} if shuffled)", loc="left", fontsize=11, pad=9,
    )  # fmt: skip
    _prompt_ticks(axis.xaxis, report)


def _heat_map(axis, table: np.ndarray, top: float) -> None:
    """Darker is more; every cell says its number where there is room."""
    picture = axis.imshow(table, cmap="Blues", vmin=0, vmax=max(top, 1), aspect="auto")
    if max(table.shape) <= _FEW:
        for (i, j), value in np.ndenumerate(table):
            colour = "white" if value > 0.55 * top else "black"
            axis.text(j, i, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=9)
    else:
        axis.figure.colorbar(picture, ax=axis, ticks=MaxNLocator(nbins=6, integer=True))
    axis.spines[["top", "right"]].set_visible(True)


def _prompt_ticks(axis, report, label: str = "prompt") -> None:
    """Tick labels: names where there is room for them (upright where there are many), else numbers."""
    axis.set_label_text(label)
    if report.num_prompts > _FEW:
        axis.set_ticks(range(0, report.num_prompts, -(-report.num_prompts // 8)))
        return
    upright = axis.axis_name == "x" and _names_stand_upright(report)
    room = _LINE // report.num_prompts if axis.axis_name == "x" and not upright else _NAME
    names = [_cut(report.label(prompt), room) for prompt in range(report.num_prompts)]
    axis.set_ticks(range(report.num_prompts), names, fontsize=9, **({"rotation": 90} if upright else {}))


def _names_stand_upright(report) -> bool:
    longest = max(len(report.label(prompt)) for prompt in range(report.num_prompts))
    return report.num_prompts <= _FEW and report.num_prompts * longest > _LINE and _LINE // report.num_prompts < 9


def _cut(text: str, room: int = _NAME) -> str:
    """A long name without its middle: names that begin alike mostly differ at their end."""
    end = (room - 1) // 3
    return text if len(text) <= room else f"{text[: room - 1 - end]}…{text[len(text) - end :]}"
