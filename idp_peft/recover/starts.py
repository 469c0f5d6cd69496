"""Key/value prompts that start at real text: at the keys and values that a model makes of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from idp_peft.key_values import key_value_layout, keys_and_values
from idp_peft.layer import active_layer


def start_at(model, teacher: nn.Module, texts: Sequence[str | list[int]], tokenizer=None) -> None:
    """Set the active adapter's key/value prompts to what a teacher makes of texts.

        model = get_peft_model(small, IDPConfig(task_type="CAUSAL_LM", prompts="key_values", init_weights=False))
        idp_peft.start_at(model, dense, texts)

    The dense model is the best teacher: its keys and values never passed the compressed weights. Untrained they repair part of
    the damage already (IntactKV, Liu et al., arXiv 2403.01241).

    Args:
        model: a model with an active IDP adapter of `prompts="key_values"`.
        teacher (`PreTrainedModel`): the dense model; or the base itself.
        texts (`Sequence[str | list[int]]`): one per prompt, or token ids; repeated or cut to the prompts' length. A text begins
            with the beginning-of-sequence token, where the tokenizer has one.
        tokenizer (*optional*): for texts; by default that of the base's name.

    Raises:
        `ValueError`: for another kind of prompts, another number of texts, an empty text, or a teacher of another shape.
    """
    layer = active_layer(model)
    config, bank = layer.active_config, layer.active_bank
    if not bank.holds_keys:
        raise ValueError(f"`start_at` needs an adapter with prompts='key_values', got {config.prompts!r}")
    texts = list(texts)
    if len(texts) != config.num_prompts:
        raise ValueError(f"`texts` must be one per prompt ({config.num_prompts}), got {len(texts)}")
    if tokenizer is None and any(isinstance(text, str) for text in texts):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(layer.model.name_or_path)
    rows = [_ids(text, tokenizer) for text in texts]
    if empty := [number for number, row in enumerate(rows) if not row]:
        raise ValueError(f"`texts` {empty} have no token")
    length = bank.max_length
    token_ids = torch.tensor([[row[j % len(row)] for j in range(length)] for row in rows])
    start = keys_and_values(teacher, token_ids)
    expected = sum(heads * (key + value) for heads, key, value in key_value_layout(layer.decoder))
    if start.shape[1] != expected:
        raise ValueError(
            f"`teacher` makes {start.shape[1]} numbers of a token's keys and values, this model {expected}: it must be the model "
            "that was compressed"
        )
    bank.start(start.to(bank.weight.device))


def _ids(text: str | list[int], tokenizer) -> list[int]:
    if not isinstance(text, str):
        return list(text)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids if tokenizer.bos_token_id is None or not ids else [tokenizer.bos_token_id, *ids]
