"""The dense model's keys and values of a text, in front of the compressed model: a repair before any training.

After IntactKV (Liu et al., arXiv 2403.01241): attention sinks on the first tokens, so compression hurts most where their keys and
values are wrong. As a prefix they are computed once by the full-precision model, and never pass the compressed weights.
"""

from __future__ import annotations

import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from torch import nn

from idp_peft.hosting.architectures import given_cache


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
    cache = given_cache(dense(torch.tensor([token_ids], device=dense.device), use_cache=True))
    parts = [part[0] for layer in cache.layers for part in (layer.keys, layer.values)]  # 2L of [kv_heads, k, head_dim]
    shapes = {tuple(part.shape) for part in parts}
    weight = model.prompt_encoder[model.active_adapter].embedding.weight  # [k, 2L * kv_heads * head_dim]
    if len(shapes) > 1 or weight.numel() != sum(part.numel() for part in parts):
        raise ValueError(
            f"a prefix of shape {list(weight.shape)} cannot hold keys and values of the shapes {sorted(shapes)} in "
            f"{len(cache.layers)} layers: `dense` must be the model that was compressed, with layers that are all alike"
        )
    flat = torch.stack(parts).permute(2, 0, 1, 3).reshape(len(token_ids), -1)  # [k, 2L * kv_heads * head_dim]
    weight.copy_(flat.to(weight))
