"""The report as one HTML page: no script, nothing loaded from elsewhere, and fit to be printed."""

from __future__ import annotations

import re
from html import escape

from idp_peft.report.analysis import MEAN, Analysis
from idp_peft.report.comparisons import Comparison
from idp_peft.report.drawing import Figure
from idp_peft.report.formatting import NONE
from idp_peft.report.provenance import provenance
from idp_peft.report.sentences import honesty_notes, sentence
from idp_peft.report.tables import Table, tables

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: #1a1a1a; background: #fff;
  max-width: 62rem; margin: 0 auto; padding: 1.5rem; overflow-wrap: break-word; }
h1 { margin: 0 0 .25rem; font-size: 1.9rem; line-height: 1.2; }
h2 { margin: 2.25rem 0 .5rem; padding-top: .75rem; border-top: 2px solid #1a1a1a; font-size: 1.35rem; line-height: 1.3; }
.summary { border-left: 4px solid #0072b2; padding: .25rem 0 .25rem 1rem; margin: 1rem 0; }
.scroll { overflow-x: auto; margin: 1rem 0 .5rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .4rem; }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid #ccc; vertical-align: top; }
thead th { border-bottom: 2px solid #1a1a1a; vertical-align: bottom; }
th:first-child { text-align: left; max-width: 16rem; }
tbody th { font-weight: 400; }
.words th, .words td { text-align: left; } .words th:last-child, .words td:last-child { text-align: right; }
.whole { white-space: nowrap; }
.choices td { white-space: nowrap; }
ul { padding-left: 1.25rem; margin: .5rem 0; } li { margin: .2rem 0; }
.small { font-size: .85rem; color: #333; }
figure { margin: 1.25rem 0; break-inside: avoid; } img { max-width: 100%; height: auto; }
figcaption { font-size: .9rem; color: #333; }
dt { font-weight: 600; margin-top: .5rem; } dd { margin: 0 0 0 1.25rem; }
@page { margin: 15mm; }
@media print { body { font-size: 10pt; max-width: none; padding: 0; } .scroll { overflow: visible; }
  table { font-size: 8pt; } .tasks .whole { white-space: normal; } th, td { padding: .2rem .35rem; } tr, li { break-inside: avoid; }
  thead { display: table-header-group; } h1, h2, caption { break-after: avoid; } }
"""

_MOST_SENTENCES = 6  # of one text in the summary; with more models, groups are read more easily
_WORDS = (
    ("dense, compressed, recovered", "the original model; the compressed one; the compressed one with an adapter."),
    (
        "nats per token",
        "how surprised a model is by the next token, on average: lower is better. Perplexity is e to that power.",
    ),
    ("nats above dense", "what is still lost against the dense model."),
    (
        "recovery",
        "(recovered - compressed) / (dense - compressed): 0 % is no repair, 100 % is all of it, below 0 is further harm.",
    ),
    (
        "[low, high]",
        "a 95 % interval. Documents or questions are drawn again, the same for every model; Wilson's for one task's accuracy.",
    ),
    (
        "p",
        "how often a difference at least this large would come up if there were none; corrected for the number of comparisons.",
    ),
    ("McNemar, exact", "a test on the questions that only one of two models gets right."),
    (
        "bold",
        "better than the compressed model and than every other recovered one, each after correction. Often nothing is.",
    ),
    ("prompt bank, selection", "the soft prompts of one adapter; choosing one of them for an input."),
    (
        "random choice, oracle",
        "the mean over prompts; each item's best prompt by its own score, which no honest choice reaches.",
    ),
)


def page(analysis: Analysis, figures: dict[str, Figure]) -> str:
    """The whole page. Every text that comes from a file is escaped.

    Args:
        analysis (`Analysis`): what to report.
        figures (`dict[str, Figure]`): from `figures`; those that are missing are left out.
    """
    statistics = analysis.statistics
    made = tables(statistics)
    title = f"Repair report: {analysis.label_of('compressed')}"
    parts = [f"<h1>{escape(title)}</h1>", _summary(analysis), _models(statistics)]
    parts += _section("Perplexity", [t for t in made if t.kind == "text"], figures, "recovery", "gains")
    parts += _section("Accuracy", [t for t in made if t.kind == "tasks"], figures, "accuracy")
    parts += _section("Choosing a prompt", [t for t in made if t.kind == "choices"], figures, "shares")
    parts += _section("Training", [], figures, "training")
    parts += ["<h2>Before believing it</h2>", _list(honesty_notes(statistics))]
    words = "".join(f"<dt>{escape(word)}</dt><dd>{escape(meaning)}</dd>" for word, meaning in _WORDS)
    parts += ["<h2>How to read the numbers</h2>", f"<dl>{words}</dl>"]
    parts += ["<h2>Made with</h2>", _list(provenance(statistics), "small")]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style>"
    )
    body = "\n".join(part for part in parts if part)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body><main>\n{body}\n</main></body></html>\n'


def _summary(analysis: Analysis) -> str:
    """What the tests show about repair and about methods, in as few sentences as there are."""
    statistics = analysis.statistics
    lines = []
    for name, text in statistics["texts"].items():
        lines += _key_sentences(name, text["comparisons"], is_text=True)
    if mean := statistics["mean_over_tasks"]:
        lines += _key_sentences(MEAN, mean["comparisons"], is_text=False)
    if not lines:
        return "<p>There is no recovered model among the result files: this page shows what compression cost.</p>"
    lead = "What was lost in compression, what came back, and how sure that is. Less nats and more points are better."
    return f'<p>{lead}</p><div class="summary">{_list(lines)}</div>'


def _key_sentences(place: str, comparisons: list[Comparison], is_text: bool) -> list[str]:
    """A sentence for each difference that was seen, and one for all the others; choices have their own section."""
    compared = [comparison for comparison in comparisons if comparison.kind != "choice"]
    if len(compared) > _MOST_SENTENCES:
        return [f"{place}: {line}" for line in _grouped(compared)]
    seen = [comparison for comparison in compared if comparison.verdict != "no difference seen"]
    lines = [f"{place}: {sentence(comparison, is_text)}" for comparison in seen]
    others = [f"{c.left} and {c.right}" for c in compared if c not in seen]
    return lines + ([f"{place}: no difference seen between {', '.join(others)}."] if others else [])


def _grouped(comparisons: list[Comparison]) -> list[str]:
    """One line per model, without the numbers, which stand under the tables."""
    lines: dict[str, dict[str, list[str]]] = {}
    for comparison in comparisons:
        lines.setdefault(comparison.left, {}).setdefault(comparison.verdict, []).append(comparison.right)
    words = {"better": "is better than", "worse": "is worse than", "no difference seen": "shows no difference to"}
    return [
        f"{left} " + "; ".join(f"{words[verdict]} {', '.join(rights)}" for verdict, rights in groups.items()) + "."
        for left, groups in lines.items()
    ]


def _models(statistics: dict) -> str:
    rows = [
        [
            row["label"],
            row["role"],
            row["method"] or NONE,
            row["model"] + (f" + {row['adapter']}" if row["adapter"] else ""),
            f"{row['extra_parameters']:,}",
        ]
        for row in statistics["rows"]
    ]
    columns = ["name in this report", "role", "method", "model and adapter", "extra parameters"]
    return "<h2>Models</h2>" + _table(Table("What was compared", columns, rows, kind="words"))


def _section(title: str, made: list[Table], figures: dict[str, Figure], *names: str) -> list[str]:
    shown = [_table(table) for table in made] + [_figure(figures[name]) for name in names if name in figures]
    return [f"<h2>{title}</h2>", *shown] if shown else []


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    rows = []
    for i, row in enumerate(table.rows):
        cells = [_flowing(cell) for cell in row]
        cells = [f"<strong>{cell}</strong>" if (i, j) in table.strong else cell for j, cell in enumerate(cells)]
        rows.append(
            f'<tr><th scope="row">{cells[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in cells[1:]) + "</tr>"
        )
    body = f"<caption>{escape(table.title)}</caption><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll"><table class="{table.kind}">{body}</table></div>' + (
        _list(table.notes) if table.notes else ""
    )


def _figure(figure: Figure) -> str:
    caption = f"<figcaption>{escape(figure.caption)}</figcaption>"
    return f'<figure><img src="{figure.source}" alt="{escape(figure.alt)}">{caption}</figure>'


def _list(lines: list[str], css_class: str = "") -> str:
    attribute = f' class="{css_class}"' if css_class else ""
    return f"<ul{attribute}>" + "".join(f"<li>{_flowing(line)}</li>" for line in lines) + "</ul>"


def _flowing(text: str) -> str:
    """Escaped text in which no line breaks inside an interval or a p-value."""
    whole = r"(\[[-+\d.,]+ [-+\d.,]+\]|p (?:=|&lt;) [\d.]*\d)"
    return re.sub(whole, r'<span class="whole">\1</span>', escape(text))
