"""No text may speak of a person it should not: the check that "held out" means held out."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from benchmarks.biographies.people import FIRST_NAMES, LAST_NAMES, Person
from benchmarks.biographies.text import END, START

_FIRST, _LAST = frozenset(FIRST_NAMES), frozenset(LAST_NAMES)


def names_in(text: str) -> set[str]:
    """Every full name in a text: a first name with a last name right behind it."""
    words = text.split()
    return {f"{one} {two}" for one, two in pairwise(words) if one in _FIRST and two in _LAST}


def check_only(texts: Iterable[str], allowed: Iterable[Person]) -> None:
    """Refuse texts that state a fact of anybody but the people allowed.

    Every sentence must begin with the name of one of them and hold no other name: so it states facts of theirs alone.

    Raises:
        `ValueError`: naming the person and the sentence.
    """
    names = {person.name for person in allowed}
    for text in texts:
        for sentence in text.replace(START, " ").split(f" {END}"):
            sentence = sentence.strip()
            if not sentence:
                continue
            found = names_in(sentence)
            if strangers := sorted(found - names):
                raise ValueError(f"the text speaks of {', '.join(strangers)}, who must not be in it: {sentence!r}")
            subject = " ".join(sentence.split()[:2])
            if subject not in names:
                raise ValueError(f"a sentence must begin with the name of a person allowed, got {sentence!r}")
