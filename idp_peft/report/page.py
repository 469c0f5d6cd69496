"""The report as one HTML page: no script, nothing loaded from elsewhere, and fit to be printed."""

from __future__ import annotations

import re

from idp_peft.report.comparisons import Comparison
from idp_peft.report.drawing import Figure
from idp_peft.report.formatting import NONE
from idp_peft.report.numbers import MEAN, Analysis
from idp_peft.report.provenance import provenance
from idp_peft.report.sentences import honesty_notes, sentence
from idp_peft.report.tables import Table, tables

_MOST_SENTENCES = 6  # of one text in the summary; with more models, groups are read more easily
_SECTIONS = (  # heading, kind of its tables, names of its figures
    ("Perplexity", "text", ("recovery", "gains")),
    ("Accuracy", "tasks", ("accuracy",)),
    ("Choosing a prompt", "choices", ("shares",)),
    ("Training", None, ("training",)),
)
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
    """The whole page, from the template beside this file. Every text that comes from a file is escaped.

    Args:
        analysis (`Analysis`): what to report.
        figures (`dict[str, Figure]`): from `figures`; those that are missing are left out.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(loader=PackageLoader(__package__, "."), autoescape=True, undefined=StrictUndefined)
    environment.filters["flowing"] = _flowing
    statistics = analysis.statistics
    made = tables(statistics)
    sections = [
        (heading, [table for table in made if table.kind == kind], [figures[name] for name in names if name in figures])
        for heading, kind, names in _SECTIONS
    ]
    return environment.get_template("page.html.jinja").render(
        title=f"Repair report: {analysis.label_of('compressed')}",
        summary=_summary(statistics),
        models=_models(statistics),
        sections=[section for section in sections if section[1] or section[2]],
        notes=honesty_notes(statistics),
        words=_WORDS,
        provenance=provenance(statistics),
    )


def _summary(statistics: dict) -> list[str]:
    """What the tests show about repair and about methods, in as few sentences as there are."""
    lines = []
    for name, text in statistics["texts"].items():
        lines += _key_sentences(name, text["comparisons"], is_text=True)
    if mean := statistics["mean_over_tasks"]:
        lines += _key_sentences(MEAN, mean["comparisons"], is_text=False)
    return lines


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


def _models(statistics: dict) -> Table:
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
    return Table("What was compared", columns, rows, kind="words")


def _flowing(text: str):
    """Escaped text in which no line breaks inside an interval or a p-value."""
    from markupsafe import Markup, escape

    whole = r"(\[[-+\d.,]+ [-+\d.,]+\]|p (?:=|&lt;) [\d.]*\d)"
    return Markup(re.sub(whole, r'<span class="whole">\1</span>', str(escape(text))))
