"""Perplexity counts real tokens only, in the same way for every model; fetched files are checked."""

from __future__ import annotations

import hashlib
import zipfile

import pytest
import torch

from idp_peft.evaluation import ChunkScores, chunk_documents, score_chunks
from idp_peft.offline import assets
from tests.test_adapters import word_tokenizer
from tests.tiny import tiny, token_batch


def chunks(count=5, length=12):
    return token_batch([length] * count)[0].tolist()


def test_scores_are_the_models_own_loss_over_the_tokens_after_the_context(make):
    for model, prompt_id in ((tiny("llama"), None), (make("llama"), None), (make("llama"), 2), (make("llama"), -1)):
        scores = score_chunks(model, chunks(), context_tokens=4, prompt_id=prompt_id, batch_size=2)
        assert scores.tokens.tolist() == [8] * 5
        for row, ids in enumerate(chunks()):
            ids = torch.tensor([ids])
            labels = ids.clone()
            labels[:, :4] = -100
            forced = {} if prompt_id is None else {"prompt_ids": torch.tensor([prompt_id])}
            with torch.no_grad():
                loss = model(input_ids=ids, labels=labels, **forced).loss
            assert abs(float(scores.nats[row]) / 8 - float(loss)) < 1e-4
        assert abs(scores.mean_nats - float(scores.nats.sum()) / 40) < 1e-12


def test_the_choice_behind_a_score_reads_the_context_alone(make):
    model = make("llama")
    other = [ids[:4] + [3] * 8 for ids in chunks()]
    first, second = (score_chunks(model, c, context_tokens=4).prompt_ids for c in (chunks(), other))
    assert torch.equal(first, second)
    contexts = torch.tensor(chunks())[:, :4]
    with torch.no_grad():
        model(input_ids=contexts)
    assert torch.equal(first, model.last_selection.prompt_ids)


def test_the_error_of_a_difference_is_the_paired_one():
    tokens = torch.full((400,), 10)
    generator = torch.Generator().manual_seed(0)
    common = 50 * torch.rand(400, generator=generator, dtype=torch.float64)
    left = ChunkScores(common + torch.randn(400, generator=generator, dtype=torch.float64), tokens)
    mean, error = left.difference(ChunkScores(common, tokens))
    assert abs(mean) < 3 * error
    assert abs(error - 1 / 10 / 20) < 0.001  # sd 1 nat per chunk, 10 tokens each, 400 chunks
    with pytest.raises(ValueError, match="needs scores of the same chunks"):
        left.difference(ChunkScores(common, tokens + 1))
    with pytest.raises(ValueError, match="at least two chunks for a standard error, got 1"):
        ChunkScores(common[:1], tokens[:1]).difference(ChunkScores(common[:1], tokens[:1]))


def test_chunks_do_not_cross_documents():
    tokenizer = word_tokenizer()
    documents = ["w2 w3 w4 w5 w6 w7 w8", "w9 w10", "w11 w12 w13"]
    assert chunk_documents(tokenizer, documents, 3) == [[2, 3, 4], [5, 6, 7], [11, 12, 13]]
    assert chunk_documents(tokenizer, documents, 3, per_document=1) == [[2, 3, 4], [11, 12, 13]]


def test_chunks_that_cannot_be_scored_are_refused(make):
    with pytest.raises(ValueError, match=r"all of one length, got lengths \[3, 4\]"):
        score_chunks(tiny("llama"), [[1, 2, 3], [1, 2, 3, 4]], context_tokens=1)
    for context in (0, 12):
        with pytest.raises(ValueError, match=f"`context_tokens` must be from 1 to 11, got {context}"):
            score_chunks(tiny("llama"), chunks(), context_tokens=context)


def test_documents_split_where_four_fifths_of_the_characters_are_reached():
    documents = ["a" * 60, "b" * 30, "c" * 5, "d" * 5]
    assert assets.split_documents(documents) == (documents[:2], documents[2:])


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A registry of one wheel: `pip download` copies it."""
    source = tmp_path / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr("thing/data.txt", "hello")
    calls = []

    def run(command, **_):
        calls.append(command)
        folder = command[command.index("--dest") + 1]
        (tmp_path / "copy").write_bytes(source.read_bytes())
        (tmp_path / "copy").rename(f"{folder}/{source.name}")

        class Done:
            returncode = 0

        return Done()

    monkeypatch.setenv("IDP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets.subprocess, "run", run)
    return hashlib.sha256(source.read_bytes()).hexdigest(), calls


def test_an_asset_is_fetched_once_and_checked(wheel, tmp_path):
    digest, calls = wheel
    asset = assets.Asset("thing", "1.0", digest[:16], "thing/data.txt")
    for _ in range(2):
        path = assets.fetch(asset)
        assert path.read_text() == "hello"
    assert len(calls) == 1
    assert [file.name for file in path.parent.iterdir()] == ["data.txt"]


def test_a_wheel_that_is_not_the_expected_one_is_refused_and_leaves_nothing(wheel, tmp_path):
    asset = assets.Asset("thing", "1.0", "0" * 16, "thing/data.txt")
    with pytest.raises(RuntimeError, match="must have a sha256 that begins with 0000000000000000, got"):
        assets.fetch(asset)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.name != "thing-1.0"] == []
