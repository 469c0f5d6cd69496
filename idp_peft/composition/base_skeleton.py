"""A base model without its weights: enough to know where a prompt goes in, how wide it is and what its positions mean."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from idp_peft.composition.prompt_sources import PromptSource
from idp_peft.files.error_reason import reason
from idp_peft.hosting.architectures import adds_positions, embedding_width, find_decoder, has_changing_rotary
from idp_peft.hosting.promptable import check_promptable
from idp_peft.key_values import key_value_layout, layout_width
from idp_peft.models.auto_class import built_from


class BaseNotFound(ValueError):
    """The base is not named, or it is not there."""


def skeleton(base_model: str | os.PathLike | nn.Module) -> PreTrainedModel:
    """The base model on the meta device, from its config alone.

    Args:
        base_model (`str`, `PreTrainedModel` or `PeftModel`): a folder, a GGUF file, a Hub id or `"default"`; or the loaded
            model, which is not touched.

    Raises:
        `BaseNotFound`: where its config cannot be read.
        `ValueError`: where the model is no decoder-only causal language model.
    """
    if isinstance(base_model, PeftModel):
        base_model = base_model.get_base_model()
    if isinstance(base_model, nn.Module):
        config, name = copy.deepcopy(base_model.config), base_model.name_or_path
        with torch.device("meta"):
            model = type(base_model)(config)
    else:
        config, name = _config(os.fspath(base_model))
        with torch.device("meta"):
            model = built_from(config)
    model.name_or_path = name
    check_promptable(model)
    return model


def shared_base(sources: list[PromptSource], base_model=None) -> PreTrainedModel:
    """The base of several adapters, without weights: the given one, or the one that they name.

    Raises:
        `BaseNotFound`: where it is not named, or not there.
        `ValueError`: where it is no decoder-only causal language model, or its embeddings have another width.
    """
    named = [source for source in sources if source.base_name]
    settled = base_model is not None
    if not settled:
        for source in named:
            if not is_same_place(source.base_name, named[0].base_name):
                warnings.warn(
                    f"{named[0].label} was made for the base model {named[0].base_name!r}, {source.label} for "
                    f"{source.base_name!r}: the new adapter names the first. Pass `base_model=` if they are one model",
                    stacklevel=3,
                )
        live = next((source.model for source in sources if source.model is not None), None)
        base_model = live if live is not None else named[0].base_name if named else None
    if base_model is None:
        raise BaseNotFound(f"{sources[0].label} does not name its base model: pass `base_model=`")
    base = skeleton(base_model)
    if named and not (settled and base.name_or_path):
        base.name_or_path = named[0].base_name
    holds_keys = sources[0].holds_keys
    decoder = find_decoder(base)
    width = layout_width(key_value_layout(decoder)) if holds_keys else embedding_width(base.get_input_embeddings())
    if width != sources[0].width:
        what = "keys and values of one token" if holds_keys else "embeddings"
        raise ValueError(
            f"the prompts of {sources[0].label} have width {sources[0].width}, the {what} of the base model "
            f"{base.name_or_path or type(base).__name__!r} {width}"
        )
    return base


def position_counts_bank(model: PreTrainedModel) -> bool:
    """Whether the longest prompt of a bank matters to all inputs behind it: where positions are added, every input
    starts at position K, and rotary frequencies that follow the length follow K."""
    decoder = find_decoder(model)
    return adds_positions(decoder) or has_changing_rotary(decoder)


def _config(name: str) -> tuple[PreTrainedConfig, str]:
    """The config of a base, and where it lies."""
    from transformers import AutoConfig

    from idp_peft.models.loading import find_model, place_of

    try:
        where, gguf_file = find_model(name)
        config = AutoConfig.from_pretrained(where, **({"gguf_file": gguf_file} if gguf_file else {}))
        return config, place_of(name)
    except (OSError, ValueError) as error:
        raise BaseNotFound(
            f"the base model {name!r} cannot be asked what it is ({reason(error)}): pass `base_model=`, the loaded model or "
            "where it lies now"
        ) from error


def is_same_place(one: str, other: str) -> bool:
    return one == other or Path(one).expanduser().resolve() == Path(other).expanduser().resolve()
