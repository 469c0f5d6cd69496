"""A loaded model's card: what its adapters, its base and its result files say."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel

from idp_peft.config import IDPConfig
from idp_peft.hub.base_model import base_of
from idp_peft.hub.card_results import Results, read_results
from idp_peft.hub.card_text import CardFacts
from idp_peft.hub.model_card import write_card


def results_of(model: PeftModel, sources) -> Results | None:
    """The result files that a caller names, of this model's first adapter; `None` where none are named."""
    config = next(iter(_configs(model).values()))
    return read_results(sources, config.num_prompts, _number_of_parameters(model))


def _configs(model: PeftModel) -> dict[str, IDPConfig]:
    """Sub-folder -> config, as `save_pretrained` lays adapters out, the root first."""
    places = {"" if name == "default" else name: config for name, config in model.peft_config.items()}
    return dict(sorted(places.items(), key=lambda item: item[0] != ""))


def _number_of_parameters(model: PeftModel) -> int:
    first = next(iter(_configs(model))) or "default"
    return model.base_model.layer.idp_prompts[first].num_parameters


def write_card_of(model: PeftModel, file: Path, place: str, results: Results | None, tags: list[str]) -> None:
    """Write the model's card into `file`, for a repository or folder called `place`."""
    configs, base = _configs(model), model.get_base_model()
    name = next(iter(configs.values())).base_model_name_or_path or getattr(base, "name_or_path", None)
    facts = CardFacts(
        place=place,
        base=base_of(name, getattr(base, "config", None)),
        adapters=configs,
        parameters=_number_of_parameters(model),
        results=results,
        training=None if results is None else results.ours.get("training"),
        tags=[*model.model_tags, *tags],
    )
    write_card(file, facts)
