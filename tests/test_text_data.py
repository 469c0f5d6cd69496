"""Where text comes from, and how it is cut."""

from __future__ import annotations

import json

import pytest

from idp_peft.text_data import load_texts, token_blocks
from tests.tiny_folder import tiny_tokenizer

datasets = pytest.importorskip("datasets")
TEXTS = ["w2 w3 w4", "w5 w6", "w7"]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS))
    )
    (tmp_path / "a.txt").write_text("\n".join(TEXTS) + "\n\n")
    datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(tmp_path / "a.parquet")
    datasets.Dataset.from_dict({"text": TEXTS}).to_csv(tmp_path / "a.csv")
    return tmp_path


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet", "a.csv"])
def test_every_kind_of_file_gives_the_same_texts(files, name):
    assert load_texts(str(files / name)) == TEXTS


def test_a_missing_file_and_a_missing_column_are_named(files):
    with pytest.raises(FileNotFoundError, match=r"`dataset` '.*b\.jsonl' does not exist"):
        load_texts(str(files / "b.jsonl"))
    with pytest.raises(ValueError, match=r"`text_column` must be one of the columns of '.*', text, id; got 'content'"):
        load_texts(str(files / "a.jsonl"), column="content")
    (files / "a.odt").write_text("x")
    with pytest.raises(ValueError, match=r"must end in one of \.jsonl, .* got '\.odt'"):
        load_texts(str(files / "a.odt"))


def test_a_file_that_is_not_what_its_name_says_is_one_line(files):
    (files / "bad.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="cannot be loaded") as error:
        load_texts(str(files / "bad.parquet"))
    assert "\n" not in str(error.value)


def test_a_column_without_text_is_refused(files):
    with pytest.raises(ValueError, match="holds no text in its column 'id'"):
        load_texts(str(files / "a.jsonl"), column="id")


def test_a_file_is_read_whole_whatever_the_split(files):
    assert load_texts(str(files / "a.jsonl"), split="held_out") == TEXTS


def test_a_packaged_corpus_names_its_splits():
    with pytest.raises(ValueError, match=r"`dataset` 'c4' has the split\(s\) 'held_out', got 'train'"):
        load_texts("c4", "train")


def test_blocks_do_not_cross_documents_and_short_documents_stay_whole():
    tokenizer = tiny_tokenizer()
    documents = [" ".join(f"w{i}" for i in range(2, 13)), "w2 w3", "w20 w21 w22"]
    blocks = token_blocks(tokenizer, documents, 5, min_tokens=3)
    assert blocks == [[2, 3, 4, 5, 6], [7, 8, 9, 10, 11], [20, 21, 22]]
    assert token_blocks(tokenizer, documents, 5, min_tokens=3, per_document=1) == [blocks[0], blocks[2]]
