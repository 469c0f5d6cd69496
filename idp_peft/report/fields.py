"""Reading one field of a result file at a time, so that a wrong one is named with its place, its rule and its value."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

_MISSING = object()


class Fields:
    """A JSON object of a result file and where it stands in it.

    Args:
        values (`dict`): the object.
        place (`str`): the file, and the keys that led here; it begins every error.

    Raises:
        `ValueError`: where `values` is no object.
    """

    def __init__(self, values, place: str):
        if not isinstance(values, dict):
            raise ValueError(f"{place}: must be a JSON object, got {_short(values)}")
        self.values, self.place = values, place

    def get(self, key: str, rule: str, is_right: Callable, default=_MISSING):
        """The value of `key`, which `is_right` must accept; `rule` says in words what that is."""
        value = self.values.get(key, default)
        if value is _MISSING:
            raise ValueError(
                f"{self.place}: `{key}` is missing; it must be {rule}. Write the file with `evaluate` again"
            )
        if value is not default and not is_right(value):
            raise ValueError(f"{self.place}: `{key}` must be {rule}, got {_short(value)}")
        return value

    def text(self, key: str) -> str:
        return self.get(
            key, "a printable, non-empty string", lambda x: isinstance(x, str) and x.strip() and x.isprintable()
        )

    def number(self, key: str, default=_MISSING) -> float | None:
        return self.get(key, "a finite number", is_number, default)

    def count(self, key: str, least: int = 0, default=_MISSING) -> int | None:
        rule = f"an integer of at least {least}"
        return self.get(key, rule, lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= least, default)

    def optional_object(self, key: str) -> dict:
        value = self.get(key, "an object or null", lambda x: x is None or isinstance(x, dict), None)
        return value or {}

    def children(self, key: str) -> dict[str, Fields]:
        values = self.get(key, "an object", lambda x: isinstance(x, dict))
        return {name: Fields(value, f"{self.place}: {key}[{name!r}]") for name, value in values.items()}

    def items(self, key: str) -> list[Fields]:
        values = self.get(key, "a list with at least one item", lambda x: isinstance(x, list) and len(x) > 0)
        return [Fields(value, f"{self.place}: {key}[{number}]") for number, value in enumerate(values)]

    def numbers(self, key: str) -> np.ndarray | None:
        """A list of finite numbers, float64 `[count]`; `None` where it is null or absent."""
        rule = "null or a list of finite numbers"
        value = self.get(key, rule, lambda x: x is None or (isinstance(x, list) and x and all(map(is_number, x))), None)
        return None if value is None else np.array(value, dtype=np.float64)


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
