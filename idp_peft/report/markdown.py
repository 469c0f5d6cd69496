"""The tables as Markdown, for a README or a model card."""

from __future__ import annotations

import re

from idp_peft.report.provenance import provenance
from idp_peft.report.sentences import honesty_notes
from idp_peft.report.tables import tables


def markdown(statistics: dict) -> str:
    """The tables in Markdown, with the sentences under them and what they were made with."""
    parts = ["# Repair report"]
    for table in tables(statistics):
        lines = [f"**{escape_markdown(table.title)}**", "", _markdown_row(table.columns)]
        lines.append("|" + "---|" + "---:|" * (len(table.columns) - 1))
        for i, row in enumerate(table.rows):
            cells = [escape_markdown(cell) for cell in row]
            lines.append(
                "| " + " | ".join(f"**{c}**" if (i, j) in table.strong else c for j, c in enumerate(cells)) + " |"
            )
        parts += ["\n".join(lines), "\n".join(f"* {escape_markdown(note)}" for note in table.notes)]
    parts.append(
        "**Before believing it**\n\n" + "\n".join(f"* {escape_markdown(n)}" for n in honesty_notes(statistics))
    )
    parts.append("**Made with**\n\n" + "\n".join(f"* {escape_markdown(line)}" for line in provenance(statistics)))
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(escape_markdown(cell) for cell in cells) + " |"


def escape_markdown(text: str) -> str:
    """Labels are a user's words: nothing in them may become a cell, a tag or emphasis."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\|*`]|(?<!\w)_|_(?!\w)|(?<=\])\()", r"\\\1", text)
