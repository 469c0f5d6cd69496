"""What the model card of IDP adapters says: facts for the template `card.md.jinja` beside this file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from idp_peft.config import IDPConfig
from idp_peft.hub.base_model import Base, describe_quantization
from idp_peft.hub.card_results import Results
from idp_peft.models.loading import READERS


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


def body(facts: CardFacts) -> str:
    """Our part of the card, without the lines around it."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(loader=PackageLoader(__package__, "."), undefined=StrictUndefined)
    environment.filters["repr"] = repr
    base, notes = facts.base, facts.base.notes
    text = environment.get_template("card.md.jinja").render(
        vars(facts)
        | {
            "arguments": _arguments(facts),
            "packages": _packages(base),
            "what": "GGUF file" if base.is_file else "folder",
            "others": list(facts.adapters)[1:],
            "quantization": describe_quantization(base.quantization),
            "extras": _extras(base) if base.commands else [],
            "origin": "GGUF file" if notes and str(notes[0].get("model")).endswith(".gguf") else "folder",
            "made_with": _made_with,
            "lengths": _lengths,
            "chosen_by": _chosen_by,
            "training": _training(facts.training),
            "limited": _limited(facts.results),
        }
    )
    return text.strip()


def _arguments(facts: CardFacts) -> str:
    """Those of `idp_peft.load`."""
    root, base = next(iter(facts.adapters)), facts.base
    arguments = [json.dumps(facts.place), *([f"subfolder={json.dumps(root)}"] if root else [])]
    if not base.on_hub:
        arguments.append(f"base={json.dumps('default' if base.is_packaged else base.folder)}")
    return ", ".join(arguments)


def _packages(base: Base) -> str:
    """What to install for the snippet."""
    reader = READERS.get("gguf" if base.is_packaged else base.quantization.get("quant_method"))
    both = ["idp-peft"] if reader is None or reader.startswith("idp-peft") else ["idp-peft", reader]
    return " ".join(both if reader is None or len(both) == 2 else [f'"{reader}"'])


def _extras(base: Base) -> list[str]:
    """What to install to make the base again; the default model is a GGUF file to begin with."""
    backends = sorted({note.get("backend", "llmcompressor") for note in base.notes})
    return backends + (["demo"] if base.notes[0]["model"] == "default" else [])


def _made_with(note: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in (note.get("versions") or {}).items())
    texts = (note.get("calibration") or {}).get("texts")
    text = f" The calibration text had {texts:,} documents (`--dataset`, by default `wiki`)." if texts else ""
    return f"Made with {versions}; other versions may give slightly other weights.{text}" if versions else text.strip()


def _lengths(config: IDPConfig) -> str:
    lengths = config.num_virtual_tokens
    said = " + ".join(map(str, lengths)) if isinstance(lengths, list) else str(lengths)
    return f"the keys and values of {said}" if config.prompts == "key_values" else said


def _chosen_by(config: IDPConfig) -> str:
    if config.selection == "attention":
        return f"the input's attention in layer {config.selection_layer} ({config.selection_reduction} over a prompt's tokens)"
    if config.selection == "centroid":
        return "the input's mean embedding: the prompt whose training contexts it is most like"
    if config.selection == "fixed":
        return f"nobody: always prompt {config.fixed_prompt}"
    return "a hash of the input (`selection='random'`)"


def _training(record: dict | None) -> str:
    names = ("objective", "steps", "learning_rate", "seed", "dataset")
    told = {name.replace("_", " "): record[name] for name in names if (record or {}).get(name) is not None}
    return ", ".join(f"{name} {_plain(value)}" for name, value in told.items())


def _plain(value) -> str:
    return Path(value).name if isinstance(value, str) and value.startswith(("/", ".", "~")) else str(value)


def _limited(results: Results | None) -> str:
    settings = {} if results is None else results.ours.get("settings", {})
    return f", at most {settings['limit']} documents and questions each" if settings.get("limit") else ""
