"""Token ids of the texts that prompts start from: the one place where an adapter's config makes a tokenizer load."""

from __future__ import annotations

import os


def text_token_ids(config) -> list[list[int]]:
    """Token ids of each `init_text`, without special tokens; for key/value prompts with the beginning-of-sequence token in
    front, where there is one: attention sinks on it.

    Args:
        config (`IDPConfig`): with `init="text"`, made by code: a config that is read from a file names no tokenizer.

    Raises:
        `ValueError`: where a text has no tokens.
    """
    from transformers import AutoTokenizer

    name, arguments = config.tokenizer_name_or_path, dict(config.tokenizer_kwargs or {})
    if str(name).endswith(".gguf") and not os.path.isdir(name):
        name, arguments["gguf_file"] = os.path.dirname(name) or ".", os.path.basename(name)
    tokenizer = AutoTokenizer.from_pretrained(name, **arguments)
    texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in config.init_text]
    for text, ids in zip(config.init_text, texts, strict=True):
        if not ids:
            raise ValueError(f"`init_text` must hold texts with at least one token, got {text!r}")
    begins = config.prompts == "key_values" and tokenizer.bos_token_id is not None
    return [[tokenizer.bos_token_id, *ids] for ids in texts] if begins else texts
