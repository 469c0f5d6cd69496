"""Comparisons as sentences: what differs is said with its size, its interval and its p-value, and nothing else is claimed."""

from __future__ import annotations

from idp_peft.report.comparisons import Comparison
from idp_peft.report.formatting import estimate, p_value

SINGLE_SEED = (
    "The intervals and tests are over items (documents, questions). They do not cover the training: another training "
    "seed gives another adapter. Call nothing better on fewer than three training seeds."
)
NOT_ALL_REPAIR = (
    "Not all recovery is repair. An adapter trained on text like that it is measured on also learns that kind of text, "
    "which would help the dense model too. To tell the two apart, train the same adapter on the dense model."
)
NO_PROOF = "“No difference seen” means that these items cannot tell; it does not say that the two are equal."
CORRECTED = (
    "p-values are corrected by Holm's method over all comparisons of the table; the 95 % intervals are not corrected, so "
    "an interval may leave out 0 where no difference is claimed."
)


def sentence(comparison: Comparison, is_text: bool) -> str:
    """One comparison in words, with the difference `left` minus `right`."""
    left = comparison.left + (" (free choice)" if comparison.kind == "choice" else "")
    unit = "nats per token" if is_text else "points"
    values = {"value": comparison.difference.value, "interval": comparison.difference.interval}
    size = f"{estimate(values, 4 if is_text else 1, 1 if is_text else 100, signed=True)} {unit}"
    if comparison.p_holm is None:
        return f"{left} and {comparison.right}: {size}; too few items to test."
    test = f"{p_value(comparison.p_holm)} ({comparison.test})"
    if comparison.verdict == "no difference seen":
        return f"No difference seen between {left} and {comparison.right}: {size}, {test}."
    return f"{left} is {comparison.verdict} than {comparison.right}: {size}, {test}."


def sentences(comparisons: list[Comparison], is_text: bool, with_place: bool = False) -> list[str]:
    """One sentence for each comparison; `with_place` puts the name of the task before it."""
    return [(f"{c.place}: " if with_place else "") + sentence(c, is_text) for c in comparisons]


def honesty_notes(statistics: dict) -> list[str]:
    """What a reader must know before believing the tables."""
    seeds = {repr(row["training"]["seed"]) for row in statistics["rows"] if "seed" in row["training"]}
    trained = f"Training seeds in these files: {', '.join(sorted(seeds))}. " if seeds else ""
    notes = [trained + SINGLE_SEED, NOT_ALL_REPAIR, *_selection(statistics), NO_PROOF]
    if not any(row["role"] == "dense" for row in statistics["rows"]):
        notes.append("There is no dense row, so no recovery: what was lost is not known. Evaluate the dense model too.")
    return notes + _missing(statistics)


def _selection(statistics: dict) -> list[str]:
    """What the choice of a prompt has read."""
    notes = []
    for name, text in statistics["texts"].items():
        others = {label: what for label, what in text["selection_reads"].items() if what != "context"}
        notes += [
            f"On {name}, the choice of {label} read “{what}”, not only the context: its perplexity is not a fair one."
            for label, what in others.items()
        ]
    if any(row["method"] == "idp" for row in statistics["rows"]):
        notes.append(
            "Selection reads the context only: never the tokens that are scored, the answer choices or the label"
            + (", except where said above." if notes else ".")
        )
    return notes


def _missing(statistics: dict) -> list[str]:
    """Models measured on other items than their neighbours."""
    notes, labels = [], [row["label"] for row in statistics["rows"]]
    for name, measured in [*statistics["texts"].items(), *statistics["tasks"].items()]:
        absent = [label for label in labels if label not in measured["measured"]]
        if absent:
            notes.append(f"{name} was not measured for {', '.join(absent)}.")
        if measured["items"] < 20:
            notes.append(
                f"{name} has only {measured['items']} items: its bootstrap intervals are narrower than they should be."
            )
        counts = measured["measured"]
        if any(count != measured["items"] for count in counts.values()):
            each = ", ".join(f"{label}: {count}" for label, count in counts.items())
            notes.append(
                f"{name}: models were measured on different samples ({each}); the {measured['items']} shared items count."
            )
    return notes
