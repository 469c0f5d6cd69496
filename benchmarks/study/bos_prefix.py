"""The dense model's keys and values of the first token, in front of the compressed one: a repair without training.

After IntactKV (Liu et al., arXiv 2403.01241): attention sinks on the first token, so quantisation hurts most where that
token's keys and values are wrong. Here they are the full-precision model's, as a prefix of one position. The control is the
same prefix with the compressed model's own keys and values: what a first token brings that the tokenizer does not add.
"""

from __future__ import annotations

import torch


def bos_prefix(model, dense, bos_token_id: int):
    """The compressed model behind the dense one's keys and values of one token.

    Args:
        model (`PreTrainedModel`): the compressed model. Its inputs begin at position 1 then, without this token.
        dense (`PreTrainedModel`): the model that it was.
        bos_token_id (`int`): the token that texts begin with.

    Returns:
        `PeftModel`: a prefix tuning adapter of one virtual token, with nothing left to train.
    """
    from peft import PrefixTuningConfig, get_peft_model

    with torch.no_grad():
        cache = dense(torch.tensor([[bos_token_id]], device=dense.device), use_cache=True)
        layers = (cache.past_key_values if "past_key_values" in cache else cache.cache).layers
        pairs = [part for layer in layers for part in (layer.keys[0, :, 0], layer.values[0, :, 0])]
        flat = torch.stack(pairs).reshape(1, -1)  # [1, layers * 2 * kv_heads * head_dim]
        repaired = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=1))
        weight = repaired.prompt_encoder["default"].embedding.weight
        weight.copy_(flat.to(weight))
    return repaired.requires_grad_(False).eval()
