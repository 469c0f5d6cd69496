"""What the model card of IDP adapters says."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from idp_peft.config import IDPConfig
from idp_peft.hub.base_model import Base, describe_quantization
from idp_peft.hub.card_results import Results
from idp_peft.models.loading import READERS

IMPORT = "import idp_peft  # pip install {packages}; without this import PEFT raises KeyError: 'IDP'"


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
    arguments = [json.dumps(facts.place), *([f"subfolder={json.dumps(root)}"] if root else [])]
    base = facts.base
    if not base.on_hub:
        arguments.append(f"base={json.dumps('default' if base.is_packaged else base.folder)}")
    snippet = _SNIPPET.format(first=IMPORT.format(packages=_packages(base)), arguments=", ".join(arguments))
    lines = ["## Use", "", snippet]
    if base.on_hub:
        lines += [
            "",
            f'With PEFT itself, after the same import: `AutoPeftModelForCausalLM.from_pretrained("{facts.place}")`.',
        ]
    elif not base.is_packaged:
        what = "GGUF file" if base.is_file else "folder"
        lines += ["", f"`base` is the {what} of the base model ([below](#the-base)), here `{base.folder}`."]
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
        what = "GGUF file" if base.is_file else "folder"
        lines.append(f"A local {what}, `{base.folder}`, which is not part of this repository.")
    else:
        lines.append("Where the base comes from is not recorded.")
    if base.quantization and not base.is_file:
        lines[-1] = f"{lines[-1].rstrip('.')}: {describe_quantization(base.quantization)}."
    if base.commands:
        install = sorted({note.get("backend", "llmcompressor") for note in base.notes})
        install += ["demo"] if base.notes[0]["model"] == "default" else []  # it is a GGUF file to begin with
        lines += ["", "It was made by, and can be made again with:", "", "```bash"]
        lines += [f'pip install "idp-peft[{",".join(install)}]"', *base.commands, "```"]
        lines += ["", _made_with(base.notes[-1])]
    elif base.notes:
        last, origin = base.notes[-1], base.notes[0].get("model")
        what = "GGUF file" if str(origin).endswith(".gguf") else "folder"
        lines += [
            "",
            f"It was made with the recipe {last['recipe']} from a model that is a local {what} as well. {_made_with(last)}",
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
        named = f"`{place}`: " if place else "" if len(facts.adapters) == 1 else "Root: "
        lengths = config.num_virtual_tokens
        lengths = " + ".join(map(str, lengths)) if isinstance(lengths, list) else lengths
        lines.append(f"* {named}{config.num_prompts} prompts of {lengths} tokens, picked by {_picked_by(config)}.")
        lines.append(f"  Trained with `assignment={config.assignment!r}`, started with `init={config.init!r}`.")
    lines.append(f"* {facts.parameters:,} numbers in all, in one safetensors file.")
    if facts.training:
        told = {name: facts.training.get(name) for name in ("objective", "steps", "learning_rate", "seed", "dataset")}
        trained = ", ".join(
            f"{name.replace('_', ' ')} {_plain(value)}" for name, value in told.items() if value is not None
        )
        lines.append(f"* Training: {trained}.")
    return "\n".join(lines)


def _picked_by(config: IDPConfig) -> str:
    if config.selection == "attention":
        over = "mean over a prompt's tokens" if config.selection_reduction == "mean" else "sum over a prompt's tokens"
        return f"the input's attention in layer {config.selection_layer} ({over})"
    if config.selection == "fixed":
        return f"nobody: always prompt {config.fixed_prompt}"
    return "a hash of the input (`selection='random'`)"


def _plain(value) -> str:
    return Path(value).name if isinstance(value, str) and value.startswith(("/", ".", "~")) else str(value)


def _results(facts: CardFacts) -> str:
    if facts.results is None:
        return ""
    settings = facts.results.ours.get("settings", {})
    limited = f", at most {settings['limit']} documents and questions each" if settings.get("limit") else ""
    how = f"Measured by `idp-peft evaluate` (perplexity over real tokens only{limited})."
    return "\n".join(["## Results", "", *facts.results.table(), "", how])
