"""Biographies: five sentences in random order, each with the full name and one of the fact's templates."""

from __future__ import annotations

import random

from benchmarks.biographies.people import VALUES, Person

START, END = "<s>", "."
# The value comes last, so that what stands before it is a question.
TEMPLATES = {
    "city": ["was born in", "comes from", "grew up in", "has a birthplace called"],
    "university": ["studied at", "was a student of", "has a degree from", "was taught at"],
    "field": ["is an expert in", "does research in", "wrote a thesis on", "took a degree in"],
    "employer": ["works for", "is employed by", "has a job with", "is paid by"],
    "year": ["was born in the year", "has a birth year of", "came to life in", "is of the year"],
}
PER_FACT = 4


def question(person: Person, fact: str, template: int) -> str:
    """What a model is asked: everything of a sentence up to the value."""
    return f"{person.name} {TEMPLATES[fact][template]}"


def templates_of(person: Person, fact: str) -> list[int]:
    """The templates in which text may state a fact of a person: all but the one kept back."""
    return [template for template in range(PER_FACT) if template != person.kept_back[fact]]


def biography(person: Person, draw: random.Random) -> str:
    """One biography, beginning with the start token; another one at each call."""
    sentences = [
        f"{question(person, fact, draw.choice(templates_of(person, fact)))} {value} {END}"
        for fact, value in person.facts.items()
    ]
    return " ".join([START, *draw.sample(sentences, len(sentences))])


def biographies(everyone: list[Person], count: int, seed) -> list[str]:
    """`count` biographies: each person once per round, rounds in random order, so that all are told equally often."""
    draw = random.Random(seed)
    texts: list[str] = []
    while len(texts) < count:
        texts += [biography(person, draw) for person in draw.sample(everyone, len(everyone))]
    return texts[:count]


def all_words() -> list[str]:
    """Every word that text can hold, in a fixed order."""
    from benchmarks.biographies.people import FIRST_NAMES, LAST_NAMES

    phrases = [phrase for phrases in TEMPLATES.values() for phrase in phrases]
    words = [word for phrase in phrases for word in phrase.split()]
    values = [value for values in VALUES.values() for value in values]
    return list(dict.fromkeys([END, *words, *FIRST_NAMES, *LAST_NAMES, *values]))
