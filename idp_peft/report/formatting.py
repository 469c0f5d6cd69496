"""How numbers are written, the same in Markdown and on the page."""

from __future__ import annotations

NONE = "-"


def number(value: float, digits: int, signed: bool = False) -> str:
    """`value` with so many decimals; a negative that rounds to 0 is written as 0."""
    text = f"{value:{'+' if signed else ''},.{digits}f}"
    if float(text.replace(",", "")) == 0:
        text = text.replace("-", "+" if signed else "")
    return text


def estimate(values: dict | None, digits: int, scale: float = 1.0, signed: bool = False, interval: bool = True) -> str:
    """`value [low, high]` of an estimate in `statistics`, or a dash."""
    if values is None or values["value"] is None:
        return NONE
    text = number(scale * values["value"], digits, signed)
    if interval and values["interval"] is not None:
        low, high = (number(scale * end, digits, signed) for end in values["interval"])
        text += f" [{low}, {high}]"
    return text


def recovery(values: dict | None) -> str:
    """Percent of the damage, or why there is no percentage."""
    if values is None:
        return NONE
    if values["value"] is None:
        return f"n/a, {values['reason']}"
    text = f"{number(100 * values['value'], 1)} %"
    if values["interval"] is not None:
        low, high = (number(100 * end, 1) for end in values["interval"])
        text += f" [{low}, {high}]"
    return text


def p_value(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"
