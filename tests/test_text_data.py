"""Where text comes from, and how it is cut."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma

import pytest

from idp_peft.offline import assets
from idp_peft.texts.data import load_kinds, load_texts, token_blocks
from tests.tiny_folder import tiny_tokenizer

datasets = pytest.importorskip("datasets")
TEXTS = ["w2 w3 w4", "w5 w6", "w7"]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines())
    return tmp_path


def lines() -> str:
    return "".join(json.dumps({"text": text, "id": number}) + "\n" for number, text in enumerate(TEXTS))


def table(texts=None) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": texts or TEXTS})


def with_splits() -> datasets.DatasetDict:
    return datasets.DatasetDict({"train": table(), "test": table(["w9"])})


def written(write, name: str):
    """A source of one file that `write(path)` writes."""

    def source(folder):
        write(folder / name)
        return folder / name

    return source


def parts(folder, *names: str):
    for number, name in enumerate(names):
        table([TEXTS[number]]).to_parquet(folder / name)
    return folder


# name -> a function that writes a source into a folder and says what a user gives, of which `TEXTS` come out. Settings of
# `load_texts` may follow.
SOURCES = {
    "JSON lines": [written(lambda path: path.write_text(lines()), "a.jsonl")],
    "JSON": [written(lambda path: path.write_text(json.dumps([{"text": text} for text in TEXTS])), "a.json")],
    "NDJSON": [written(lambda path: path.write_text(lines()), "a.ndjson")],
    "gzipped": [written(lambda path: path.write_bytes(gzip.compress(lines().encode())), "a.jsonl.gz")],
    "bz2": [written(lambda path: path.write_bytes(bz2.compress(lines().encode())), "a.jsonl.bz2")],
    "xz": [written(lambda path: path.write_bytes(lzma.compress(lines().encode())), "a.jsonl.xz")],
    "gzipped text": [written(lambda path: path.write_bytes(gzip.compress("\n".join(TEXTS).encode())), "a.txt.gz")],
    "text": [written(lambda path: path.write_text("\n".join(TEXTS) + "\n\n"), "a.txt")],
    "text by its long name": [written(lambda path: path.write_text("\n".join(TEXTS)), "a.text")],
    "capital letters": [written(lambda path: path.write_text(lines()), "a.JSONL")],
    "Parquet": [written(lambda path: table().to_parquet(path), "a.parquet")],
    "CSV": [written(lambda path: table().to_csv(path), "a.csv")],
    "tabs": [written(lambda path: table().to_csv(path, sep="\t"), "a.tsv")],
    "Arrow": [lambda folder: table().save_to_disk(folder / "a") or folder / "a" / "data-00000-of-00001.arrow"],
    "a name with brackets, dots and spaces": [written(lambda path: path.write_text(lines()), "a [1].v2 *.jsonl")],
    "another split, of a file": [written(lambda path: path.write_text(lines()), "a.jsonl"), {"split": "held_out"}],
    "a pattern": [lambda folder: parts(folder, "b-0.parquet", "b-1.parquet", "b-2.parquet") / "b-*.parquet"],
    "a folder": [lambda folder: parts(folder, "0.parquet", "1.parquet", "2.parquet")],
    "a folder with a split": [
        lambda folder: parts(folder, "test-0.parquet", "test-1.parquet", "test-2.parquet"),
        {"split": "test"},
    ],
    "a folder of folders": [
        lambda folder: written(lambda path: path.write_text(lines()), "a.jsonl")(_made(folder / "train")).parent.parent
    ],
    "save_to_disk": [lambda folder: table().save_to_disk(folder / "saved") or folder / "saved"],
    "save_to_disk, another split": [
        lambda folder: table().save_to_disk(folder / "saved") or folder / "saved",
        {"split": "held_out"},
    ],
    "save_to_disk with splits": [lambda folder: with_splits().save_to_disk(folder / "saved") or folder / "saved"],
    "a split of save_to_disk as a folder": [
        lambda folder: with_splits().save_to_disk(folder / "saved") or folder / "saved" / "train"
    ],
    "another column": [
        written(lambda path: table().rename_column("text", "content").to_parquet(path), "a.parquet"),
        {"column": "content"},
    ],
    "empty rows": [written(lambda path: path.write_text(lines() + '{"text": " "}\n{"text": null}\n'), "a.jsonl")],
}


def _made(folder):
    folder.mkdir()
    return folder


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_that_datasets_reads_gives_the_same_texts(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    make, *settings = SOURCES[name]
    source = str(make(tmp_path))
    assert load_texts(source, **(settings[0] if settings else {})) == TEXTS
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    relative = source.removeprefix(f"{tmp_path}/") if source != str(tmp_path) else "."
    assert load_texts(relative, **(settings[0] if settings else {})) == TEXTS
    assert load_texts("~" + source.removeprefix(str(tmp_path)), **(settings[0] if settings else {})) == TEXTS


def test_a_split_is_chosen_of_what_save_to_disk_wrote(tmp_path):
    with_splits().save_to_disk(tmp_path / "saved")
    assert load_texts(str(tmp_path / "saved"), split="test") == ["w9"]
    with pytest.raises(
        ValueError, match=r"`dataset_split` must be one of the splits of '.*', train, test; got 'held_out'"
    ):
        load_texts(str(tmp_path / "saved"), split="held_out")


# name -> what writes a source that cannot be read, and what the error must say of it
BROKEN = {
    "a line that is no JSON": (
        written(lambda path: path.write_text(lines() + '{"text": }\n'), "a.jsonl"),
        r"An error occurred while generating the dataset: JSON parse error: Invalid value",
    ),
    "another encoding": (
        written(lambda path: path.write_bytes(b"caf\xe9\n"), "a.txt"),
        r"'utf-8' codec can't decode byte 0xe9 in position 3",
    ),
    "rows of other lengths": (
        written(lambda path: path.write_text('text\n"w2\n'), "a.csv"),
        r"EOF inside string starting at row",
    ),
    "no Parquet": (
        written(lambda path: path.write_text("no parquet"), "a.parquet"),
        r"Parquet magic bytes not found|not a parquet file",
    ),
    "not compressed": (written(lambda path: path.write_text(lines()), "a.jsonl.gz"), r"Not a gzipped file"),
    "an empty file": (written(lambda path: path.write_text(""), "a.jsonl"), r"`dataset` '.*a\.jsonl' is empty"),
    "an empty folder": (lambda folder: _made(folder / "empty"), r"doesn't contain any data files"),
    "columns that differ": (
        lambda folder: (
            written(lambda path: path.write_text('{"text": "a"}\n'), "0.jsonl")(folder).parent
            if written(lambda path: path.write_text('{"other": 1}\n'), "1.jsonl")(folder)
            else None
        ),
        r"column names don't match|1 new columns|column",
    ),
    "a split that there is not": (
        lambda folder: parts(folder, "train-0.parquet", "test-0.parquet"),
        r"Unknown split \"held_out\"\. Should be one of \['train', 'test'\]",
    ),
    "no dataset of the Hub": (lambda folder: "nobody/nothing", r"(Hub|offline|reach)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_error_of_datasets_reaches_the_user_with_its_reason_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    make, reason = BROKEN[name]
    with pytest.raises(ValueError, match=reason) as error:
        load_texts(str(make(tmp_path)), split="held_out")
    assert str(error.value).startswith("`dataset` '")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["b.jsonl", "b.jsonl.gz", "./b", "/nowhere/b", "~/b", "a/b/c", "b/*.parquet"])
def test_a_path_that_does_not_exist_is_not_taken_for_an_id_of_the_hub(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"`dataset` '.*' does not exist"):
        load_texts(source)


def test_a_missing_file_and_a_missing_column_are_named(files):
    with pytest.raises(FileNotFoundError, match=r"`dataset` '.*b\.jsonl' does not exist"):
        load_texts(str(files / "b.jsonl"))
    with pytest.raises(ValueError, match=r"`text_column` must be one of the columns of '.*', text, id; got 'content'"):
        load_texts(str(files / "a.jsonl"), column="content")
    (files / "a.odt").write_text("x")
    with pytest.raises(ValueError, match=r"must end in one of \.jsonl, .* got '\.odt'"):
        load_texts(str(files / "a.odt"))


def test_a_column_without_text_is_refused(files):
    with pytest.raises(ValueError, match="holds no text in its column 'id'"):
        load_texts(str(files / "a.jsonl"), column="id")


def test_a_packaged_corpus_names_its_splits():
    with pytest.raises(ValueError, match=r"`dataset` 'c4' has the split\(s\) 'held_out', got 'train'"):
        load_texts("c4", "train")


def test_packaged_kinds_are_cut_at_lines_and_split_without_overlap(monkeypatch):
    lines = [f"line {number} " + "x" * 200 + "\n" for number in range(60)]
    pieces = assets._pieces(lines)
    assert "\n".join(pieces) == "".join(lines).rstrip("\n"), "nothing is lost"
    assert all(len(piece) >= 1500 - 1 for piece in pieces[:-1])
    assert assets._pieces([]) == []
    monkeypatch.setattr(assets, "kind_documents", lambda kind: [f"{kind} {number}" for number in range(10)])
    train, held_out = (load_kinds("kinds", split, kind_column="kind") for split in ("train", "held_out"))
    assert {kind for _, kind in train} == set(assets.KINDS) == {kind for _, kind in held_out}
    assert all(text.startswith(kind) for text, kind in train + held_out)
    assert not set(train) & set(held_out)
    assert load_texts("programs", "train") == [text for text, kind in train if kind == "programs"]
    with pytest.raises(ValueError, match=r"`kind_column` 'sort' is no column of 'kinds': 'kinds' has one, 'kind'"):
        load_kinds("kinds", kind_column="sort")
    with pytest.raises(ValueError, match=r"'stories' has the split\(s\) 'train', 'held_out', got 'validation'"):
        load_texts("stories", "validation")


def test_blocks_do_not_cross_documents_and_short_documents_stay_whole():
    tokenizer = tiny_tokenizer()
    documents = [" ".join(f"w{i}" for i in range(2, 13)), "w2 w3", "w20 w21 w22"]
    blocks = token_blocks(tokenizer, documents, 5, min_tokens=3)
    assert blocks == [[2, 3, 4, 5, 6], [7, 8, 9, 10, 11], [20, 21, 22]]
    assert token_blocks(tokenizer, documents, 5, min_tokens=3, per_document=1) == [blocks[0], blocks[2]]
