"""A table from wherever `datasets` can read one: files, folders, what `save_to_disk` wrote, or the Hub."""

from __future__ import annotations

import glob
from pathlib import Path

from idp_peft.files.error_reason import missing, reason

_COMMON = ".jsonl, .json, .parquet, .csv, .tsv, .txt, .arrow"
_OWN_FORMATS = {".text": "text"}  # what `datasets` does not know by its name


def load_table(source: str, split: str, config_name: str | None = None):
    """One table of a data source.

    Args:
        source (`str`): a file, a pattern of files (`"data/*.parquet"`), a URL of a file, a folder of files, a folder that
            `save_to_disk` wrote, or a dataset id on the Hub.
        split (`str`): of a folder or a Hub dataset. Files, and a single dataset that `save_to_disk` wrote, have none: they
            are read whole.
        config_name (`str`, *optional*): configuration of a folder or a Hub dataset.

    Returns:
        `datasets.Dataset`

    Raises:
        `FileNotFoundError`: for a path that does not exist.
        `ValueError`: for an unknown format or split, and for whatever goes wrong in `datasets`, in one line that has its
            own reason.
        `ImportError`: where `datasets` is missing.
    """
    datasets = _datasets()
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / datasets.config.DATASET_STATE_JSON_FILENAME).is_file():
            return _loaded(source, datasets.load_from_disk, str(path))
        if (path / datasets.config.DATASETDICT_JSON_FILENAME).is_file():
            return _split(source, _loaded(source, datasets.load_from_disk, str(path)), split)
        return _loaded(source, datasets.load_dataset, str(path.resolve()), name=config_name, split=split)
    if files := _files(source, path):
        name, arguments = _format(source, files)
        return _loaded(source, datasets.load_dataset, name, data_files=files, split="train", **arguments)
    return _loaded(source, datasets.load_dataset, source, name=config_name, split=split)


def _loaded(source: str, load, *args, **kwargs):
    try:
        return load(*args, **kwargs)
    except StopIteration as error:  # of a builder that found nothing to tell the columns by
        raise ValueError(f"`dataset` {source!r} is empty") from error
    except Exception as error:
        raise ValueError(f"`dataset` {source!r} cannot be loaded: {reason(error)}") from error


def _split(source: str, splits, split: str):
    if split not in splits:
        raise ValueError(f"`dataset_split` must be one of the splits of {source!r}, {', '.join(splits)}; got {split!r}")
    return splits[split]


def _files(source: str, path: Path) -> list[str]:
    """The files that a source names, as patterns that match nothing else; none where it is an id on the Hub."""
    if "://" in source:
        return [source]
    names = [str(path)] if path.is_file() else sorted(glob.glob(str(path), recursive=True))
    if files := [glob.escape(name) for name in names if Path(name).is_file()]:
        return files
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or _known_format([source]) is not None:
        raise FileNotFoundError(f"`dataset` {source!r} does not exist")
    return []


def _format(source: str, files: list[str]) -> tuple[str, dict]:
    """The name and arguments of what `datasets` reads these files with."""
    if (known := _known_format(files)) is not None:
        return known
    raise ValueError(
        f"`dataset` {source!r} must end in one of {_COMMON} (compressed or not) or in another format that `datasets` reads, "
        f"got {Path(source).suffix!r}"
    )


def _known_format(files: list[str]) -> tuple[str, dict] | None:
    from datasets.load import infer_module_for_data_files

    if (own := _OWN_FORMATS.get(Path(files[0]).suffix.lower())) is not None:
        return own, {}
    try:
        return infer_module_for_data_files({"train": files})
    except FileNotFoundError:  # what `datasets` raises where it knows none, too
        return None


def _datasets():
    try:
        import datasets
    except ImportError as error:
        raise missing(
            'reading datasets needs the `datasets` package: pip install "idp-peft[recover]"', error
        ) from error
    datasets.disable_progress_bars()
    return datasets
