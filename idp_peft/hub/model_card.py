"""The model card of IDP adapters: the README.md beside them, its metadata, and what others wrote in it.

Between two comment lines stands our part, renewed whenever the card is written; what others wrote around it stays.
"""

from __future__ import annotations

import logging
from pathlib import Path

import yaml
from huggingface_hub import RepoCard
from huggingface_hub.repocard_data import eval_results_to_model_index

from idp_peft.hub.base_model import is_hub_id
from idp_peft.hub.card_results import MEASURED_BY
from idp_peft.hub.card_text import CardFacts, body

logger = logging.getLogger(__name__)

BEGIN = "<!-- idp-peft: begin. This part is renewed on every save and push: write before or after it. -->"
END = "<!-- idp-peft: end -->"
_TAGS = ("idp", "soft-prompt")
# What the cards of Trainer and of TRL's trainers say where the base is a folder.
_NOT_TRUE = {
    "This model was trained from scratch on ": "These prompts were trained on ",
    "This model is a fine-tuned version of [None](https://huggingface.co/None)": "These prompts were trained",
}


def write_card(file: str | Path, facts: CardFacts) -> None:
    """Write a card, or renew our part of the one that is there.

    A card whose metadata cannot be read is left as it is, with a warning: no weights should stay unsaved for it.
    """
    file = Path(file)
    text = file.read_bytes().decode("utf-8-sig") if file.is_file() else ""
    try:
        card = RepoCard(text or "---\n{}\n---\n")
    except (ValueError, yaml.YAMLError) as error:
        logger.warning("%s is left as it is: its metadata cannot be read (%s)", file, " ".join(str(error).split()))
        return
    card.text = with_our_part(card.text, facts)
    set_metadata(card.data, facts)
    card.save(file)


def with_our_part(text: str, facts: CardFacts) -> str:
    """A card's text with our part in it: where it was, else below the first heading. The title is ours where others gave
    none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        for wrong, right in _NOT_TRUE.items():
            text = text.replace(wrong, right)
        split = _end_of_title(text)
        before, rest = f"{text[:split]}\n\n" if split else "\n", text[split:].lstrip("\n")
        after = f"\n\n{rest}" if rest else "\n"
    title = [] if _end_of_title(before + after) else [f"# {facts.place.rpartition('/')[2]}", ""]
    return before + "\n".join([BEGIN, *title, body(facts), END]) + after


def _end_of_title(text: str) -> int:
    """Where the first heading ends, 0 without one. A comment in a block of code is none."""
    at, in_code = 0, False
    for line in text.splitlines(keepends=True):
        in_code ^= line.lstrip().startswith("```")
        if line.startswith("# ") and not in_code:
            return at + len(line.rstrip())
        at += len(line)
    return 0


def set_metadata(data, facts: CardFacts) -> None:
    """What the Hub sorts and shows a model by, with what others put there kept.

    Args:
        data (`CardData`): the card's metadata; changed in place.
    """
    data["library_name"] = "peft"
    if facts.base.on_hub:
        data["base_model"] = facts.base.name
    elif data.get("base_model") == facts.base.name or not is_hub_id(data.get("base_model")):
        data.pop("base_model")  # the Hub refuses a card with a path; an id is where somebody published this base
    data["base_model_relation"] = "adapter"
    data["pipeline_tag"] = data.get("pipeline_tag") or "text-generation"
    tags = data.get("tags") or []
    tags = [tags] if isinstance(tags, str) else list(tags)
    data["tags"] = list(dict.fromkeys([*tags, *_TAGS, *facts.base.formats, *facts.tags]))
    index = _model_index(data.get("model-index"), facts)
    if index:
        data["model-index"] = index
    else:
        data.pop("model-index")


def _model_index(index, facts: CardFacts) -> list[dict]:
    """The entries of others, and ours in the model's."""
    kept = []
    for model in index if isinstance(index, list) else []:
        results = [result for result in model.get("results") or [] if not _is_ours(result)]
        kept.append({**model, "results": results})
    if facts.results is not None:
        name = kept[0]["name"] if kept and "name" in kept[0] else facts.place.rpartition("/")[2]
        (ours,) = eval_results_to_model_index(name, facts.results.entries())
        kept = [
            {
                **(kept[0] if kept else {}),
                "name": name,
                "results": [*(kept[0]["results"] if kept else []), *ours["results"]],
            },
            *kept[1:],
        ]
    return [model for model in kept if model["results"]]


def _is_ours(result: dict) -> bool:
    metrics = result.get("metrics") or []
    return bool(metrics) and all((metric.get("args") or {}).get("measured_by") == MEASURED_BY for metric in metrics)
