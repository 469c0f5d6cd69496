"""The model card of IDP adapters: what the README.md beside them says, and its metadata.

Between two comment lines stands our part, renewed whenever the card is written; what others wrote around it stays.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from huggingface_hub import RepoCard
from huggingface_hub.repocard_data import eval_results_to_model_index

from idp_peft.base_model import Base, describe_quantization, is_hub_id
from idp_peft.card_results import MEASURED_BY, Results
from idp_peft.config import IDPConfig
from idp_peft.loading import READERS

logger = logging.getLogger(__name__)

BEGIN = "<!-- idp-peft: begin. This part is renewed on every save and push: write before or after it. -->"
END = "<!-- idp-peft: end -->"
IMPORT = "import idp_peft  # pip install {packages}; without this import PEFT raises KeyError: 'IDP'"
_TAGS = ("idp", "soft-prompt")
# Trainer's card says so of every base that is a folder.
_NOT_TRUE = ("This model was trained from scratch on ", "These prompts were trained on ")


@dataclass(frozen=True)
class CardFacts:
    """What a card tells.

    Args:
        place (`str`): what `idp_peft.load` is given: the repository's id, or the folder's name.
        base (`Base`): what the adapters stand on.
        adapters (`dict[str, IDPConfig]`): sub-folder (`""` for the root) -> config, in the model's order.
        parameters (`int`): numbers in the first adapter's file.
        results (`Results`, *optional*): what was measured of the first adapter.
        training (`dict`, *optional*): how it was trained, as a run's `run.json` has it.
        tags (`list[str]`): further tags.
    """

    place: str
    base: Base
    adapters: dict[str, IDPConfig]
    parameters: int
    results: Results | None = None
    training: dict | None = None
    tags: list[str] = field(default_factory=list)


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
        text = text.replace(*_NOT_TRUE)
        split = _end_of_title(text)
        before, after = (f"{text[:split]}\n\n", f"\n{text[split:]}") if split else ("\n", f"\n{text}")
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
    elif not is_hub_id(data.get("base_model")):
        data.pop("base_model")  # the Hub refuses a card with a path
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


# ------------------------------------------------------------------ the text


def body(facts: CardFacts) -> str:
    """Our part, without the lines around it."""
    parts = [_INTRODUCTION, _use(facts), _base(facts), _prompts(facts), _results(facts)]
    return "\n\n".join(part for part in parts if part)


_INTRODUCTION = (
    "Soft prompts that repair a compressed language model, one of which each input picks for itself: *Inference-time Dynamic "
    "Prompting* ([arXiv 2310.00867](https://arxiv.org/abs/2310.00867)), a PEFT method of the package `idp-peft`. No weight of "
    "the base is changed."
)
_SNIPPET = """```python
{first}

model, tokenizer = idp_peft.load({arguments})
inputs = tokenizer("The capital of France is", return_tensors="pt", return_token_type_ids=False).to(model.device)
output = model.generate(**inputs, max_new_tokens=20)
print(tokenizer.decode(output[0], skip_special_tokens=True))
print(model.last_selection)  # which prompt the input picked, and the scores of all
```"""


def _use(facts: CardFacts) -> str:
    root = next(iter(facts.adapters))
    arguments = [f'"{facts.place}"', *([f'subfolder="{root}"'] if root else [])]
    base = facts.base
    if not base.on_hub:
        arguments.append(f'base="{"default" if base.is_packaged else base.folder}"')
    snippet = _SNIPPET.format(first=IMPORT.format(packages=_packages(base)), arguments=", ".join(arguments))
    lines = ["## Use", "", snippet]
    if base.on_hub:
        lines += [
            "",
            f'With PEFT itself, after the same import: `AutoPeftModelForCausalLM.from_pretrained("{facts.place}")`.',
        ]
    elif not base.is_packaged:
        lines += ["", f"`base` is the folder of the base model ([below](#the-base)), here `{base.folder}`."]
    others = list(facts.adapters)[1:]
    if others:
        named = ", ".join(f'`subfolder="{name}"`' if name else "the root" for name in others)
        lines += ["", f"Further adapters: {named}."]
    return "\n".join(lines)


def _packages(base: Base) -> str:
    """What to install for the snippet."""
    reader = READERS.get("gguf" if base.is_packaged else base.quantization.get("quant_method"))
    both = ["idp-peft"] if reader is None or reader.startswith("idp-peft") else ["idp-peft", reader]
    return " ".join(both if reader is None or len(both) == 2 else [f'"{reader}"'])


def _base(facts: CardFacts) -> str:
    base, lines = facts.base, ["## The base", ""]
    if base.on_hub:
        lines.append(f"[{base.name}](https://huggingface.co/{base.name})")
    elif base.is_packaged:
        lines.append('SmolLM2-135M-Instruct, the package\'s default model: `base="default"` fetches it.')
    elif base.name:
        lines.append(f"A local folder, `{base.folder}`, which is not part of this repository.")
    else:
        lines.append("Where the base comes from is not recorded.")
    if base.quantization:
        lines[-1] = f"{lines[-1].rstrip('.')}: {describe_quantization(base.quantization)}."
    if base.commands:
        install = sorted({note.get("backend", "llmcompressor") for note in base.notes})
        install += ["demo"] if base.notes[0]["model"] == "default" else []
        lines += ["", "It was made by, and can be made again with:", "", "```bash"]
        lines += [f'pip install "idp-peft[{",".join(install)}]"', *base.commands, "```"]
        lines += ["", _made_with(base.notes[-1])]
    elif base.notes:
        last = base.notes[-1]
        lines += [
            "",
            f"It was made with the recipe {last['recipe']} from a model that is a local folder as well. {_made_with(last)}",
        ]
    return "\n".join(lines)


def _made_with(note: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in (note.get("versions") or {}).items())
    texts = (note.get("calibration") or {}).get("texts")
    text = f" The calibration text had {texts:,} documents (`--dataset`, by default `wiki`)." if texts else ""
    return f"Made with {versions}; other versions may give slightly other weights.{text}" if versions else text.strip()


def _prompts(facts: CardFacts) -> str:
    lines = ["## The prompts", ""]
    for place, config in facts.adapters.items():
        settings = {
            "prompts": config.num_prompts,
            "tokens of each": config.num_virtual_tokens,
            "picked by": config.selection,
        }
        if config.selection == "attention":
            settings |= {
                "layer that picks": config.selection_layer,
                "score": f"{config.selection_reduction} of attention",
            }
        elif config.selection == "fixed":
            settings["prompt"] = config.fixed_prompt
        settings |= {"trained by assignment": config.assignment, "start": config.init}
        named = [f"`{place}`: "] if place else [""] if len(facts.adapters) == 1 else ["Root: "]
        lines.append("* " + named[0] + ", ".join(f"{name} {value}" for name, value in settings.items()) + ".")
    lines.append(f"* {facts.parameters:,} numbers in all, in one safetensors file.")
    if facts.training:
        told = {name: facts.training.get(name) for name in ("objective", "steps", "learning_rate", "seed", "dataset")}
        trained = ", ".join(
            f"{name.replace('_', ' ')} {_plain(value)}" for name, value in told.items() if value is not None
        )
        lines.append(f"* Training: {trained}.")
    return "\n".join(lines)


def _plain(value) -> str:
    return Path(value).name if isinstance(value, str) and value.startswith(("/", ".", "~")) else str(value)


def _results(facts: CardFacts) -> str:
    if facts.results is None:
        return ""
    settings = facts.results.ours.get("settings", {})
    limited = f", at most {settings['limit']} documents and questions each" if settings.get("limit") else ""
    how = f"Measured by `idp-peft evaluate` (perplexity over real tokens only{limited})."
    return "\n".join(["## Results", "", *facts.results.table(), "", how])
