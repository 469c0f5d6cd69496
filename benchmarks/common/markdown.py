"""Markdown tables of the benchmarks' reports, as lines."""

from __future__ import annotations


def head(columns: list[str], numbers: bool = True) -> list[str]:
    """The heading of a table; all columns but the first stand to the right where they hold numbers."""
    named = "| " + " | ".join(columns) + " |"
    while "|  |" in named:  # an empty heading
        named = named.replace("|  |", "| |")
    return [named, "|---|" + ("---:|" if numbers else "---|") * (len(columns) - 1)]


def row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def marked(name: str, lines: list[str]) -> str:
    """A table between comments of this name, by which a page that copies it can be compared with it."""
    return "\n".join([f"<!-- {name}: begin -->", *lines, f"<!-- {name}: end -->", ""])
