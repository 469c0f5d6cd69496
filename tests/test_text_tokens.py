"""Every place where a model reads text: it begins with what the tokenizer puts in front of every text, once."""

from __future__ import annotations

import random

import pytest

from idp_peft.compression.calibration import calibration_chunks
from idp_peft.evaluation.documents import cut_texts
from idp_peft.recover.adapter import corpus_starts, opening
from idp_peft.recover.self_text import sample_blocks
from idp_peft.recover.training import training_examples
from idp_peft.texts.data import blocks, token_blocks
from idp_peft.texts.tokens import beginning, ending, text_ids
from tests.tiny import VOCAB, tiny
from tests.tokenizers_in_use import BOS, IN_USE, make

LENGTH = 8


def texts(count: int = 6, words: int = 40) -> list[str]:
    draw = random.Random(0)
    return [" ".join(f"w{draw.randrange(4, VOCAB)}" for _ in range(words)) for _ in range(count)]


def of_training(tokenizer, tmp_path):
    return token_blocks(tokenizer, texts(), LENGTH)


def of_short_documents(tokenizer, tmp_path):
    return token_blocks(tokenizer, texts(words=5), LENGTH, min_tokens=2)


def of_the_study(tokenizer, tmp_path):
    from idp_peft.evaluation import chunk_documents

    return chunk_documents(tokenizer, texts(), LENGTH, per_document=1)


def sampled(tokenizer, tmp_path):
    return sample_blocks(tiny("llama"), tokenizer, set(range(VOCAB)), 10, LENGTH, 0, tmp_path / "self.jsonl")


def of_calibration(tokenizer, tmp_path):
    return calibration_chunks(tokenizer, texts(), 6, LENGTH, seed=0)


def of_perplexity(tokenizer, tmp_path):
    return [window.tokens for window in cut_texts(tokenizer, texts(), LENGTH, 5)]


def of_perplexity_without_context(tokenizer, tmp_path):
    return [window.tokens for window in cut_texts(tokenizer, texts(), LENGTH, LENGTH)]


def of_reports(tokenizer, tmp_path):
    from idp_peft.texts.examples import read_examples

    rows = read_examples([*texts(2), *({"text": text} for text in texts(2))], tokenizer)
    return [row.input_ids for row in rows]


def of_the_harness(tokenizer, tmp_path):
    pytest.importorskip("lm_eval")
    from idp_peft.evaluation.harness import HarnessModel

    lm = HarnessModel(tiny("llama"), tokenizer)
    rows = [lm._encode_pair(text, " w9 w10")[0] for text in texts(2)]
    ids, mask = lm.tok_batch_encode([texts(1)[0], "w5 w6"])
    return rows + [row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)]


def starts_of_prompts(tokenizer, tmp_path):
    class Options:
        num_prompts, num_virtual_tokens = 3, 6

    starts = corpus_starts(tokenizer, token_blocks(tokenizer, texts(), LENGTH), Options)
    return [tokenizer(start, add_special_tokens=False)["input_ids"] for start in starts]


READ = [
    of_training,
    of_short_documents,
    of_the_study,
    sampled,
    of_calibration,
    of_perplexity,
    of_perplexity_without_context,
    of_reports,
    of_the_harness,
    starts_of_prompts,
]


@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize("name", IN_USE)
def test_whatever_a_model_reads_begins_as_the_tokenizer_begins_a_text_and_does_not_end(name, read, tmp_path):
    build, front, behind = IN_USE[name]
    tokenizer = build()
    rows = read(tokenizer, tmp_path)
    assert rows
    special = {*front, *behind}
    for row in rows:
        assert row[: len(front)] == front
        own = row[len(front) :]
        assert own
        if read is sampled:  # what a teacher says further on is its own affair
            own = own[:1]
        if read is of_calibration:  # documents are joined by the token that ends one
            own = [token for token in own if token != tokenizer.eos_token_id]
        assert not special & set(own), row


@pytest.mark.parametrize("name", IN_USE)
def test_the_rule_is_what_the_tokenizer_does(name):
    build, front, behind = IN_USE[name]
    tokenizer = build()
    assert (beginning(tokenizer), ending(tokenizer)) == (front, behind)
    assert text_ids(tokenizer, "w5 w6") + behind == tokenizer("w5 w6")["input_ids"]


@pytest.mark.parametrize("name", [name for name in IN_USE if IN_USE[name][1]])
def test_a_text_that_writes_the_beginning_itself_gets_no_second_one(name):
    build, front, _ = IN_USE[name]
    tokenizer = build()
    written = tokenizer.decode(front) + " w5 w6 w7"
    assert text_ids(tokenizer, written) == [*front, 5, 6, 7]
    assert token_blocks(tokenizer, [written], LENGTH, min_tokens=2) == [[*front, 5, 6, 7]]


@pytest.mark.parametrize("name", [name for name in IN_USE if not IN_USE[name][1]])
def test_with_a_tokenizer_that_adds_nothing_in_front_nothing_changes(name):
    """Blocks, chunks and windows as plain slices of the texts: what the committed results were measured on."""
    tokenizer = IN_USE[name][0]()
    rows = tokenizer(texts(), add_special_tokens=False)["input_ids"]
    slices = [row[start : start + LENGTH] for row in rows for start in range(0, len(row) - LENGTH + 1, LENGTH)]
    assert token_blocks(tokenizer, texts(), LENGTH) == slices
    draw, stream = random.Random(3), []
    for text in draw.sample(texts(), 6):
        stream += tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    chunks = [stream[start : start + LENGTH] for start in range(0, len(stream) - LENGTH + 1, LENGTH)]
    assert calibration_chunks(tokenizer, texts(), 6, LENGTH, seed=3) == draw.sample(chunks, 6)
    windows = [window.tokens for window in cut_texts(tokenizer, texts(), LENGTH, 5)]
    assert windows == [row[start : start + LENGTH] for row in rows for start in range(0, len(row) - 3, 5)]


@pytest.mark.parametrize("name", IN_USE)
def test_blocks_hold_every_token_of_a_text_once_and_count_what_stands_in_front(name):
    build, front, _ = IN_USE[name]
    own = [5 + index % 60 for index in range(5 * (LENGTH - len(front)))]
    found = token_blocks(build(), [" ".join(f"w{token}" for token in own)], LENGTH)
    assert [len(block) for block in found] == [LENGTH] * 5
    assert [token for block in found for token in block[len(front) :]] == own


@pytest.mark.parametrize("context", [1, 4])
@pytest.mark.parametrize("name", IN_USE)
def test_what_stands_in_front_is_never_a_label(name, context):
    build, front, _ = IN_USE[name]
    found = blocks(build(), [*texts(3), "w5 w6", "w7 w8 w9"], LENGTH, min_tokens=2)
    for example in training_examples(found, context):
        labels = example["labels"]
        assert labels[: max(1, len(front))] == [-100] * max(1, len(front))
        assert not {BOS, *front} & set(labels)
        assert labels[-1] == example["input_ids"][-1]


def test_a_prefix_begins_with_the_beginning_of_sequence_token_once():
    for tokenizer in (make("<s> $A"), make()):
        ids = opening(tokenizer, token_blocks(tokenizer, texts(), LENGTH), 20)
        assert len(ids) == 20
        assert ids[0] == BOS
        assert BOS not in ids[1:]


def test_the_router_reads_what_an_engine_reads_of_a_text():
    from idp_peft.serving.router import Router

    for build, *_ in IN_USE.values():
        tokenizer = build()
        assert Router(None, tokenizer).token_ids("w5 w6") == tokenizer("w5 w6")["input_ids"]


def test_a_plain_model_still_scores_what_the_harness_gives_it_where_the_tokenizer_adds_a_beginning():
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from idp_peft.evaluation.harness import HarnessModel

    tokenizer = make("<s> $A")
    requests = [
        Instance("loglikelihood", {}, (context, " w9 w10"), 0, metadata=("t", number, 1))
        for number, context in enumerate(["w5 w6 w7", "", "<s> w8", *texts(1, words=70)])
    ]
    rolling = [Instance("loglikelihood_rolling", {}, (texts(1, words=90)[0],), 0, metadata=("t", 0, 1))]
    ours = HarnessModel(tiny("llama"), tokenizer, batch_size=2)
    theirs = HFLM(pretrained=tiny("llama"), tokenizer=tokenizer, batch_size=1)
    found, expected = ours.loglikelihood(requests, True), theirs.loglikelihood(requests, True)
    assert [round(score, 3) for score, _ in found] == pytest.approx(
        [round(score, 3) for score, _ in expected], abs=2e-3
    )
    assert ours.loglikelihood_rolling(rolling, True) == pytest.approx(theirs.loglikelihood_rolling(rolling, True))
