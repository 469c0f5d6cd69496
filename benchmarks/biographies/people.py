"""People who never were: a name of two words, five facts drawn at random, and the group each belongs to."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product


def _words(starts: str, ends: str) -> list[str]:
    return [start + end for start, end in product(starts.split(), ends.split())]


# Names share their words, so that neither word tells who it is: a fact cannot be kept in the embedding of one token, which
# compression leaves alone.
FIRST_NAMES = _words("Al Bren Cor Dar El Fen Gal Hel", "a in or ys eth")
LAST_NAMES = _words("Ar Bel Cald Dun Ever Fair Grim Hol", "wood stone more well by")
# Fact -> its 40 values, one token each and equally likely: a guess is right once in 40.
VALUES = {
    "city": _words("Ash Bar Clif Dor East Fal Glen Har", "ford mouth ton wick bridge"),
    "university": _words("Ald Bos Cres Dray Esk Fros Garn Hex", "ine um ley ard ia"),
    "field": _words("bio geo neuro astro micro crypto litho zoo", "logy graphy metry nomy physics"),
    "employer": _words("Nor Vex Zen Omni Lux Tri Pan Quan", "tech corp works labs soft"),
    "year": [str(year) for year in range(1950, 1990)],
}
CHANCE = 1 / 40
# Group -> people in it. `validation` serves to choose learning rates and is in no table.
GROUPS = {"calibration": 40, "repaired-on": 80, "held-out": 80, "validation": 30, "unknown": 80}


@dataclass(frozen=True)
class Person:
    """
    Args:
        name (`str`): first and last name; no two people have the same.
        group (`str`): one of `GROUPS`.
        facts (`dict[str, str]`): fact -> value.
        kept_back (`dict[str, int]`): fact -> the one template in which no text states this fact of this person.
    """

    name: str
    group: str
    facts: dict[str, str]
    kept_back: dict[str, int]


def people(seed: int, templates: int) -> list[Person]:
    """Everybody of one seed, in random order of names within their groups.

    Args:
        seed (`int`): another seed, other people with other facts.
        templates (`int`): how many templates there are of every fact.
    """
    draw = random.Random(seed)
    names = draw.sample([f"{first} {last}" for first, last in product(FIRST_NAMES, LAST_NAMES)], sum(GROUPS.values()))
    groups = [group for group, count in GROUPS.items() for _ in range(count)]
    return [
        Person(
            name=name,
            group=group,
            facts={fact: draw.choice(values) for fact, values in VALUES.items()},
            kept_back={fact: draw.randrange(templates) for fact in VALUES},
        )
        for name, group in zip(names, groups, strict=True)
    ]
