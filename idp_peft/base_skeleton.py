"""A base model without its weights: enough to know where a prompt goes in, how wide it is and what its positions mean."""

from __future__ import annotations

import copy
import os

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from idp_peft.decoder import embedding_width, find_decoder, has_changing_rotary, has_learned_positions


def skeleton(base_model: str | os.PathLike | nn.Module) -> PreTrainedModel:
    """The base model on the meta device, from its config alone.

    Args:
        base_model (`str` or `PreTrainedModel`): a folder, a GGUF file, a Hub id or `"default"`; or the loaded model, which is not touched.

    Raises:
        `ValueError`: where the config cannot be had, or the model is no decoder-only causal language model.
    """
    from transformers import AutoModelForCausalLM

    if isinstance(base_model, nn.Module):
        config, name = copy.deepcopy(base_model.config), base_model.name_or_path
        with torch.device("meta"):
            model = type(base_model)(config)
    else:
        config, name = _config(os.fspath(base_model))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    model.name_or_path = name
    find_decoder(model)
    return model


def prompt_width(model: PreTrainedModel) -> int:
    """d, the width of what stands in front of the input."""
    return embedding_width(model.get_input_embeddings())


def position_counts_bank(model: PreTrainedModel) -> bool:
    """Whether the longest prompt of a bank matters to all inputs behind it: where positions are learned, every input
    starts at position K, and rotary frequencies that follow the length follow K."""
    decoder = find_decoder(model)
    return has_learned_positions(decoder) or has_changing_rotary(decoder)


def _config(name: str) -> tuple[PreTrainedConfig, str]:
    """The config of a base, and where it lies."""
    from transformers import AutoConfig

    from idp_peft.loading import find_model

    try:
        where, gguf_file = find_model(name)
        return AutoConfig.from_pretrained(where, **({"gguf_file": gguf_file} if gguf_file else {})), where
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"the base model {name!r} cannot be asked what it is ({reason}): pass `base_model=`, the loaded model or where "
            "it lies now"
        ) from error
