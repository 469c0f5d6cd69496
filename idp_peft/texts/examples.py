"""Reads examples from a dataset, rows of token ids, texts, or a data loader."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader

from idp_peft.texts.chats import Chat, chat_columns, read_chat
from idp_peft.texts.tokens import encode, pad_right

IGNORED = -100
_COLUMNS = ("input_ids", "attention_mask", "labels", "selection_mask")
_PADDING = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED, "selection_mask": 0}


@dataclass(frozen=True)
class Example:
    """One example, unpadded or as the user padded it; every column is a list of n integers, or `None`.

    `prompt` is what the dataset says in its column `prompt_ids`: the number or name of the prompt that the example is for.
    """

    input_ids: list[int]
    attention_mask: list[int]
    labels: list[int] | None = None
    selection_mask: list[int] | None = None
    group: object = None
    prompt: int | str | None = None


def read_examples(
    dataset, tokenizer=None, group: str | Sequence | None = None, max_examples: int | None = None
) -> list[Example]:
    """The examples of a dataset, checked one by one.

    Args:
        dataset: a `datasets.Dataset`, rows (`dict` with `input_ids` or, with a `tokenizer`, `text`, `messages`, or `prompt`
            and `completion`), documents as `load_texts` returns them, or a `DataLoader` of batches.
        tokenizer (*optional*): for texts and chats.
        group (`str` or sequence, *optional*): the column that says which group an example belongs to, or one value per
            example.
        max_examples (`int`, *optional*): the first so many alone.

    Raises:
        `ValueError`: for no examples, or one that cannot be read, by its number.
    """
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"`max_examples` must be at least 1, or None for all, got {max_examples}")
    rows = list(itertools.islice(_rows(dataset), max_examples))
    if not rows:
        raise ValueError("`dataset` must hold at least one example, got none")
    if group is not None and not isinstance(group, str):
        values = list(itertools.islice(group, max_examples))
        if len(values) != len(rows):
            raise ValueError(f"`group` must have one value per example ({len(rows)}), got {len(values)}")
    else:
        values = [_group(row, number, group) for number, row in enumerate(rows)]
    return [_example(row, number, tokenizer, values[number]) for number, row in enumerate(rows)]


def collate(examples: list[Example]) -> dict[str, torch.Tensor]:
    """A batch padded on the right: int64 `[batch, n]` each, of the columns that the first example has."""
    columns = [name for name in _COLUMNS if getattr(examples[0], name) is not None]
    return {name: pad_right([getattr(example, name) for example in examples], _PADDING[name]) for name in columns}


def _rows(dataset) -> Iterable:
    if isinstance(dataset, Mapping) and "input_ids" in dataset:
        dataset = _rows_of_batch(dataset)  # what a tokenizer returns
    if isinstance(dataset, str | Mapping) or not isinstance(dataset, Iterable):
        raise ValueError(
            "`dataset` must be a datasets.Dataset, a list of rows or texts, or a DataLoader, got "
            f"{type(dataset).__name__}" + (": choose one of its splits" if isinstance(dataset, Mapping) else "")
        )
    if isinstance(dataset, DataLoader):
        return itertools.chain.from_iterable(map(_rows_of_batch, dataset))
    return dataset


def _rows_of_batch(batch: Mapping) -> Iterable[dict]:
    return ({name: values[row] for name, values in batch.items()} for row in range(len(batch["input_ids"])))


def _group(row, number: int, column: str | None):
    if column is None:
        return None
    if not isinstance(row, Mapping) or column not in row:
        has = sorted(row) if isinstance(row, Mapping) else "no columns"
        raise ValueError(f"`group` names the column {column!r}, which example {number} lacks: it has {has}")
    return row[column].item() if isinstance(row[column], torch.Tensor) else row[column]


def _example(row, number: int, tokenizer, group) -> Example:
    document = _document(row, number)
    if isinstance(row, Mapping) and "input_ids" in row:
        columns = {name: _integers(row[name], name, number) for name in _COLUMNS if row.get(name) is not None}
    elif document is not None:
        if tokenizer is None:
            kind = "texts" if isinstance(document, str) else "chats"
            raise ValueError(f"`tokenizer` must be given for {kind}, as example {number} is one")
        columns = _encoded(document, tokenizer)
    else:
        has = f"the columns {sorted(row)}" if isinstance(row, Mapping) else f"a {type(row).__name__}"
        raise ValueError(
            f"example {number} of `dataset` must have `input_ids`, be a text or a chat, or have `text`, `messages`, or `prompt` "
            f"and `completion`; it has {has}"
        )
    columns.setdefault("attention_mask", [1] * len(columns["input_ids"]))
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the columns of example {number} must be of one length, got {lengths}")
    steers = columns.get("selection_mask", columns["attention_mask"])
    if not any(real and may for real, may in zip(columns["attention_mask"], steers, strict=True)):
        raise ValueError(f"example {number} has no token to choose a prompt by: leave it out")
    return Example(**columns, group=group, prompt=_prompt(row))


def _prompt(row) -> int | str | None:
    prompt = row.get("prompt_ids") if isinstance(row, Mapping) else None
    return prompt.item() if hasattr(prompt, "item") else prompt


def _document(row, number: int) -> str | Chat | None:
    """The text or chat that a row is or holds."""
    if isinstance(row, str | Chat):
        return row
    if not isinstance(row, Mapping):
        return None
    if isinstance(row.get("text"), str):
        return row["text"]
    columns = chat_columns(row)
    return read_chat(row, columns, f"example {number} of `dataset`") if columns else None


def _encoded(document: str | Chat, tokenizer) -> dict[str, list[int]]:
    """Its tokens, and labels where it says what is to be predicted."""
    (encoded,) = encode(tokenizer, [document])
    ids = encoded.front + encoded.ids
    if encoded.labelled is None:
        return {"input_ids": ids}
    wanted = [False] * len(encoded.front) + encoded.labelled
    return {"input_ids": ids, "labels": [token if one else IGNORED for token, one in zip(ids, wanted, strict=True)]}


def _integers(values, name: str, number: int) -> list[int]:
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, list | tuple) or not all(isinstance(value, int) for value in values):
        raise ValueError(f"`{name}` of example {number} must be a list of integers, one per token, got {values!r:.60}")
    return [int(value) for value in values]
