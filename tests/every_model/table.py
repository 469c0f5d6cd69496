"""docs/models.md out of the committed results: `python -m tests.every_model.table` writes it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.every_model.sweep import RESULTS, Outcome, read_results

PAGE = Path(__file__).parents[2] / "docs" / "models.md"

_HEAD = """\
# Models

What IDP does with every class that transformers names for causal language models, alone or with pictures and sound beside
the text, at the oldest and the newest transformers that it is tested with. `make test-models` and `make test-models-oldest`
run the rows again; `python -m tests.every_model.sweep` measures rows that are missing here, and
`python -m tests.every_model.table` writes this page.

Each row is a tiny random model of the class, made from its config, in float32 on a CPU. **Works** means that all of these
hold, with text alone:

* A forced prompt gives the logits of the plain base on `[prompt ; input]` to 1e-4: by ids and by embeddings, with and
  without a cache.
* A row of a batch that is padded on the left or on the right gets the scores and the logits that it gets alone.
* `generate` gives what a slow loop over the concatenation gives, with and without a cache; a padded row, greedy or with
  beams, gets what it gets alone.
* The choice is the one that the base's own eager attention weights make, where it reports them; the last layer's scores of
  a padded row are those of the row alone, or that layer is refused as `selection_layer`.
* The prompt's gradient is the concatenation's to 1e-4, with and without gradient checkpointing; a step lowers the loss; the
  base's weights stay bit-identical.
* `disable_adapter()` is the base exactly, and an adapter that was saved and loaded gives the same logits.

**Refused** means that `get_peft_model` raises, with the numbered reason. No row may be anything else than one of the words
in the table. Below a class, indented, are settings of its config that change its attention, its positions or its cache.
"""
_WORDS = {
    "works": "works",
    "refused": "refused",
    "not built": "not built",
    "fails by itself": "needs more than text",
    "wrong": "**wrong**",
}


def versions() -> list[str]:
    """The versions of transformers that were measured, oldest first."""
    return sorted((file.stem for file in RESULTS.glob("*.json")), key=lambda name: [int(p) for p in name.split(".")])


def render() -> str:
    """The page."""
    measured = {version: read_results(version) for version in versions()}
    reasons: dict[str, int] = {}
    lines = [_HEAD, _counts(measured), "", _line("class", *(f"transformers {version}" for version in measured))]
    lines.append("|---" * (len(measured) + 1) + "|")
    for row in _rows(measured):
        name, _, variant = row.partition(": ")
        label = f"&emsp;{variant}" if variant else f"`{name}`"
        lines.append(_line(label, *(_cell(results.get(row), name, reasons) for results in measured.values())))
    lines += ["", "## Reasons", ""]
    lines += [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join(lines) + "\n"


def _rows(measured: dict[str, dict[str, Outcome]]) -> list[str]:
    """Every row of any version, classes by name, each with its variants."""
    found = {row for results in measured.values() for row in results}
    return sorted(found, key=lambda row: (row.partition(":")[0].lower(), row.lower()))


def _cell(found: Outcome | None, name: str, reasons: dict[str, int]) -> str:
    if found is None:
        return "no such class"
    if not found.reason:
        return _WORDS[found.status]
    reason = found.reason.replace(name, "the model")
    return f"{_WORDS[found.status]} ({reasons.setdefault(reason, len(reasons) + 1)})"


def _counts(measured: dict[str, dict[str, Outcome]]) -> str:
    lines = []
    for version, results in measured.items():
        made = json.loads((RESULTS / f"{version}.json").read_text())
        of_class = [found.status for row, found in results.items() if ":" not in row]
        parts = [f"{of_class.count(status)} {word}" for status, word in _WORDS.items() if status in of_class]
        lines.append(
            f"* transformers {version} (peft {made['peft']}, torch {made['torch']}): {len(of_class)} classes, "
            f"{', '.join(parts)}"
        )
    return "\n".join(lines)


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    PAGE.write_text(render())
