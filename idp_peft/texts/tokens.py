"""What a model reads of a text: the one rule for training, sampling, calibration, evaluation and reports.

    beginning(tokenizer) + the text's own tokens

The beginning is what the tokenizer puts in front of every text by default, as a rule the beginning-of-sequence token, or
nothing. Models are pretrained with it and engines send it, so every stretch of tokens that a model reads begins with it,
also one that was cut out of the middle of a document. A text that writes it itself gets no second one. What a tokenizer
puts *behind* a text is left out: a text that was cut has not ended, and a prompt for generation must not.

A chat is read as its template renders it. Templates write the beginning themselves, or mean that there is none.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Encoded:
    """One document as a model reads it.

    Args:
        front (`list[int]`): what every stretch of it begins with.
        ids (`list[int]`): its own tokens, without the front.
        labelled (`list[bool]`, *optional*): which of `ids` are to be predicted; `None` for all of them.
        is_whole (`bool`, defaults to `False`): whether it is one example, cut off where it is too long, rather than a text
            that can be cut into several.
    """

    front: list[int]
    ids: list[int]
    labelled: list[bool] | None = None
    is_whole: bool = False


def beginning(tokenizer) -> list[int]:
    """The tokens that a tokenizer puts in front of every text when it is called with its defaults; often none."""
    return _around(tokenizer)[0]


def ending(tokenizer) -> list[int]:
    """The tokens that it puts behind every text then; as a rule none."""
    return _around(tokenizer)[1]


def _around(tokenizer) -> tuple[list[int], list[int]]:
    whole = tokenizer("a")["input_ids"]
    own = tokenizer("a", add_special_tokens=False)["input_ids"]
    if not own:  # a vocabulary that cannot spell the text
        start = int(whole[:1] == [tokenizer.bos_token_id])
        return whole[:start], whole[start:]
    for start in range(len(whole) - len(own), -1, -1):
        if whole[start : start + len(own)] == own:
            return whole[:start], whole[start + len(own) :]
    return [], []


def encode(tokenizer, documents: Iterable) -> list[Encoded]:
    """Documents as a model reads them, in order.

    Args:
        tokenizer: any transformers tokenizer.
        documents: texts, chats and prompts with completions, as `load_texts` returns them.
    """
    documents = list(documents)
    texts = [document for document in documents if isinstance(document, str)]
    front = beginning(tokenizer) if texts else []
    rows = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else ())
    return [
        Encoded(front, without(front, next(rows))) if isinstance(document, str) else document.encode(tokenizer)
        for document in documents
    ]


def text_ids(tokenizer, text: str) -> list[int]:
    """All tokens that a model reads of one text, the beginning included."""
    (encoded,) = encode(tokenizer, [text])
    return encoded.front + encoded.ids


def common_length(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows have in common at their beginning."""
    return sum(1 for _ in itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rows, strict=False)))


def without(front: list[int], ids: list[int]) -> list[int]:
    """Tokens without the beginning, where a text wrote it itself."""
    return ids[len(front) :] if front and ids[: len(front)] == front else ids


def pad_right(rows: Sequence[Sequence[int]], value: int = 0) -> torch.Tensor:
    """Rows of integers, filled up on the right: int64 `[rows, n]`."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.long)


def padded_batch(rows: Sequence[Sequence[int]], device=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of rows of any lengths: int64 `[rows, n]` each."""
    return pad_right(rows).to(device), pad_right([[1] * len(row) for row in rows]).to(device)
