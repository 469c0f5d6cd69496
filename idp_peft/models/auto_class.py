"""Which of transformers' auto classes builds a generating model: the causal one, or a multimodal one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_OTHERS = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM")  # not every version has both


def auto_class_of(model_type: str | None) -> type:
    """`AutoModelForCausalLM` where it knows the type, as it does Gemma 3's multimodal class; else the first that does.

    Args:
        model_type (`str`, *optional*): as in a model's config.json. `AutoModelForCausalLM` for an unknown one: its error is
            the one that people know, and it can load code that lies beside a model.
    """
    import transformers

    names = ["AutoModelForCausalLM", *(name for name in _OTHERS if hasattr(transformers, name))]
    known = []
    if model_type in transformers.CONFIG_MAPPING:
        config_class = transformers.CONFIG_MAPPING[model_type]
        known = [name for name in names if config_class in getattr(transformers, name)._model_mapping]
    return getattr(transformers, known[0] if known else names[0])


def built_from(config: PreTrainedConfig):
    """A model with its head, by its config alone."""
    return auto_class_of(config.model_type).from_config(config)
