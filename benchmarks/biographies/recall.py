"""Recall: does a model's likeliest next token, after a question about a person, name the right value?"""

from __future__ import annotations

from collections import defaultdict

from benchmarks.biographies.people import VALUES, Person
from benchmarks.biographies.text import PER_FACT, START, question

NAME_TOKENS = 3  # the start token and the two words of a name: what IDP's choice reads, in training as here
_BATCH = 512


def measure(model, tokenizer, everyone: list[Person]) -> dict:
    """Every fact of every person, asked in a template that text stated it in, and in the one kept back.

    Returns:
        `dict`: person's name -> `{"group", "seen", "kept_back"}`; the latter two hold, fact by fact in the order of
        `VALUES`:

        * `answer`: the likeliest word of the whole vocabulary, 1 where it is the value,
        * `among`: 1 where the value is the likeliest of the fact's 40 values: answers of another kind do not count,
        * `kind`: 1 where the likeliest word is one of the fact's values at all,
        * `rank`: of the value among the 40, from 1 (ties count against it),
        * `nats`: -log p(value).
    """
    asked = defaultdict(list)  # length of the question -> (person, fact, which template)
    for person in everyone:
        for fact in VALUES:
            for which, template in templates_asked(person, fact).items():
                ids = tokenizer(f"{START} {question(person, fact, template)}", add_special_tokens=False)["input_ids"]
                asked[len(ids)].append((ids, person, fact, which))
    found = {person.name: {"group": person.group, "seen": {}, "kept_back": {}} for person in everyone}
    values = {fact: tokenizer.convert_tokens_to_ids(words) for fact, words in VALUES.items()}
    for questions in asked.values():
        for start in range(0, len(questions), _BATCH):
            batch = questions[start : start + _BATCH]
            for (_, person, fact, which), scores in zip(batch, _last_scores(model, batch), strict=True):
                value = tokenizer.convert_tokens_to_ids(person.facts[fact])
                found[person.name][which][fact] = _score(scores, value, values[fact])
    return {name: {"group": entry["group"], **_columns(entry)} for name, entry in found.items()}


def templates_asked(person: Person, fact: str) -> dict[str, int]:
    """The template of each question: one of those seen, and the one kept back."""
    kept_back = person.kept_back[fact]
    return {"seen": (kept_back + 1) % PER_FACT, "kept_back": kept_back}


def _last_scores(model, batch: list[tuple]):
    """log p of the next token, float32 `[questions, vocabulary]`; questions are equally long."""
    import torch

    ids = torch.tensor([row[0] for row in batch])  # [questions, n]
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if _chooses(model):
        arguments["selection_mask"] = (torch.arange(ids.shape[1]) < NAME_TOKENS).expand(ids.shape)
    with torch.no_grad():
        return model(**arguments, use_cache=False).logits[:, -1].float().log_softmax(-1)


def _chooses(model) -> bool:
    from idp_peft import IDPConfig

    return any(isinstance(config, IDPConfig) for config in getattr(model, "peft_config", {}).values())


def _score(scores, value: int, values: list[int]) -> dict:
    among, best = scores[values], int(scores.argmax())
    better = int((among >= scores[value]).sum())  # itself included
    return {
        "answer": int(best == value),
        "among": int(better == 1),
        "kind": int(best in values),
        "rank": better,
        "nats": round(-float(scores[value]), 3),
    }


def _columns(entry: dict) -> dict:
    """Fact by fact lists instead of one dict per fact: a third of the file."""
    return {
        which: {
            name: [entry[which][fact][name] for fact in VALUES] for name in ("answer", "among", "kind", "rank", "nats")
        }
        for which in ("seen", "kept_back")
    }


def mean_recall(measured: dict, group: str, which: str = "seen", column: str = "answer") -> float:
    """Mean over the people of a group and their facts."""
    values = [value for entry in measured.values() if entry["group"] == group for value in entry[which][column]]
    return sum(values) / len(values)
