"""The dense model's keys and values of a text, in front of the compressed model: a repair before any training.

After IntactKV (Liu et al., arXiv 2403.01241): attention sinks on the first tokens, so compression hurts most where their keys and
values are wrong. As a prefix they are computed once by the full-precision model, and never pass the compressed weights.
"""

from __future__ import annotations

import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from torch import nn

from idp_peft.hosting.architectures import find_decoder
from idp_peft.key_values import key_value_layout, keys_and_values


def intact_prefix(model: nn.Module, dense: nn.Module, token_ids: list[int]) -> PeftModel:
    """The compressed model behind what the dense one makes of some tokens; nothing is trained.

        model, dense = load_model("small"), load_model("default")
        repaired = intact_prefix(model, dense, [tokenizer.bos_token_id])

    Args:
        model (`PreTrainedModel`): the compressed model. Its inputs begin at position k then. They are what they are
            without a prefix: where the tokenizer puts a beginning-of-sequence token in front of every text, it stays there.
        dense (`PreTrainedModel`): the model that it was; not needed afterwards.
        token_ids (`list[int]`): k tokens, at least 1. The beginning-of-sequence token alone is what IntactKV proposes.

    Returns:
        `PeftModel`: with a prefix tuning adapter of k virtual tokens, frozen, in evaluation mode; `save_pretrained` keeps it.

    Raises:
        `ValueError`: for no token, or a dense model of another shape.
    """
    if not token_ids:
        raise ValueError("`token_ids` must hold at least one token, got none")
    repaired = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(token_ids)))
    start_prefix(repaired, dense, token_ids)
    return repaired.requires_grad_(False).eval()


@torch.no_grad()
def start_prefix(model: PeftModel, dense: nn.Module, token_ids: list[int]) -> None:
    """Put the dense model's keys and values of k tokens into the prefix of k virtual tokens that is active, in place.

    Raises:
        `ValueError`: for a prefix of another shape.
    """
    start = keys_and_values(dense, torch.tensor([token_ids]))  # [k, P], laid out as PEFT's prefixes are
    weight = model.prompt_encoder[model.active_adapter].embedding.weight
    layout = set(key_value_layout(find_decoder(dense)))
    if weight.shape != start.shape or len(layout) > 1 or any(key != value for _, key, value in layout):
        raise ValueError(
            f"a prefix of shape {list(weight.shape)} cannot hold keys and values of shape {list(start.shape)}, per layer "
            f"{sorted(layout)}: `dense` must be the model that was compressed, with layers that are all alike"
        )
    weight.copy_(start.to(weight))
