"""`--dataset self`: what the teacher writes, up to where it ends, and nothing else."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import GenerationConfig

from idp_peft.recover import run as run_module
from idp_peft.recover.self_text import sample_blocks
from idp_peft.recover.training import collate, training_examples
from tests.commands import run_recover
from tests.tiny import VOCAB, tiny
from tests.tokenizers_in_use import IN_USE, make

LENGTH, COUNT = 24, 16
TOKENS = set(range(VOCAB))


def teacher_of(**generation):
    teacher = tiny("llama", seed=1)
    teacher.generation_config = GenerationConfig(**{"pad_token_id": 0, **generation})
    return teacher


# name -> (the teacher's generation config, the tokenizer, the tokens that end a text)
ENDS = {
    "the tokenizer's alone": ({}, make, {2}),
    "the same in both": ({"eos_token_id": 2}, make, {2}),
    "a list": ({"eos_token_id": [2, 30, 31, 32, 33, 34]}, make, {2, 30, 31, 32, 33, 34}),
    "a list without the tokenizer's": ({"eos_token_id": [30, 31, 32, 33]}, make, {2, 30, 31, 32, 33}),
    "the model's alone": ({"eos_token_id": [30, 31, 32, 33]}, lambda: make(eos_token=None), {30, 31, 32, 33}),
    "padding is an end": ({"eos_token_id": [2, 30, 31, 32]}, lambda: make(pad_token="</s>"), {2, 30, 31, 32}),
    "no padding": ({"eos_token_id": [2, 30, 31, 32]}, lambda: make(pad_token=None), {2, 30, 31, 32}),
    "none": ({}, lambda: make(eos_token=None), set()),
}


def written_out(teacher, tokenizer, ends: set[int], seed: int) -> list[list[int]]:
    """By the definition: rows that nothing ends, from the same random numbers, up to the first end."""
    pad = tokenizer.pad_token_id
    forbidden = [] if pad is None or pad in ends else [pad]
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_length=LENGTH,
        suppress_tokens=forbidden or None,
        pad_token_id=0,
    )
    teacher.generation_config = GenerationConfig(pad_token_id=0)
    special = {*tokenizer.all_special_ids, *ends}
    ordinary = torch.tensor([token for token in range(VOCAB) if token not in special])
    rows = []
    for start in range(0, COUNT, 8):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + start)
        first = ordinary[torch.randint(len(ordinary), (8, 1), generator=generator)]
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            mask = torch.ones_like(first)
            rows += teacher.generate(first, attention_mask=mask, generation_config=settings).tolist()
    stops = [next((i for i, token in enumerate(row) if i and token in ends), len(row)) for row in rows]
    return [row[:stop] for row, stop in zip(rows, stops, strict=True)]


@pytest.mark.parametrize("name", ENDS)
def test_a_text_is_what_the_teacher_writes_up_to_the_first_of_its_ends(name, tmp_path):
    generation, build, ends = ENDS[name]
    teacher, tokenizer = teacher_of(**generation), build()
    before = teacher.generation_config.to_dict()
    found = sample_blocks(teacher, tokenizer, TOKENS, COUNT, LENGTH, 5, tmp_path / "text.jsonl")
    assert teacher.generation_config.to_dict() == before
    assert found == written_out(teacher, tokenizer, ends, 5)
    assert len({len(block) for block in found}) > 1 or len(ends) < 2, "some texts end early"
    assert 0 not in {token for block in found for token in block} or tokenizer.pad_token_id != 0


REWEIGHTED = [
    {"repetition_penalty": 5.0},
    {"no_repeat_ngram_size": 1},
    {"temperature": 0.01, "top_k": 1, "top_p": 0.1, "do_sample": True},
    {"min_p": 0.9, "do_sample": True},
    {"suppress_tokens": list(range(4, 50))},
    {"min_new_tokens": 20, "eos_token_id": 2},
    {"max_new_tokens": 2},
]


@pytest.mark.parametrize("generation", REWEIGHTED, ids=[next(iter(one)) for one in REWEIGHTED])
def test_what_a_teacher_prefers_in_a_chat_does_not_reweight_its_text(generation, tmp_path):
    plain = sample_blocks(teacher_of(), make(), TOKENS, COUNT, LENGTH, 0, tmp_path / "plain.jsonl")
    found = sample_blocks(teacher_of(**generation), make(), TOKENS, COUNT, LENGTH, 0, tmp_path / "found.jsonl")
    assert found == plain


def test_rows_of_the_teachers_table_that_are_no_token_are_never_drawn(tmp_path):
    teacher = teacher_of()
    teacher.resize_token_embeddings(VOCAB + 400, mean_resizing=False)
    with torch.no_grad():
        teacher.lm_head.weight[VOCAB:] = teacher.lm_head.weight[5]
    found = sample_blocks(teacher, make(), TOKENS, COUNT, LENGTH, 0, tmp_path / "text.jsonl")
    assert max(max(block) for block in found) < VOCAB


@pytest.mark.parametrize("name", IN_USE)
def test_padding_and_what_a_tokenizer_adds_are_never_labels(name, tmp_path, monkeypatch):
    """The whole way of the command: of a teacher with six ends, with every kind of tokenizer."""
    build, front, _ = IN_USE[name]
    monkeypatch.chdir(tmp_path)
    teacher = teacher_of(eos_token_id=[30, 31, 32, 33, 34, 35])
    for folder in ("model", "teacher"):
        teacher.save_pretrained(folder)
        build().save_pretrained(folder)
    made = []
    monkeypatch.setattr(run_module, "training_examples", lambda *a: made.append(training_examples(*a)) or made[-1])
    training = {"max_steps": 1, "block_tokens": LENGTH, "context_tokens": 2, "min_tokens": 4, "num_virtual_tokens": 3}
    flags = {"model": "model", "teacher": "teacher", "dataset": "self", "self_samples": 16, "output_dir": "run"}
    words = [word for flag, value in {**flags, **training}.items() for word in (f"--{flag}", str(value))]
    run_recover([*words, "--use_cpu", "--disable_tqdm", "True"], run_module.recover)
    tokenizer = build()
    batch = collate(made[0])
    labels, padded = batch["labels"], batch["attention_mask"] == 0
    assert padded.any()
    assert (labels[padded] == -100).all()
    scored = set(labels[labels != -100].tolist())
    ends = {30, 31, 32, 33, 34, 35} | ({tokenizer.eos_token_id} - {None})
    assert scored
    assert not scored & ends
    assert 0 not in scored
    lines = [json.loads(line) for line in (tmp_path / "run" / "self_text.jsonl").read_text().splitlines()]
    assert len(lines) == 16
    assert all(line[: len(front)] == front for line in lines)
    assert (labels[:, : max(1, len(front))] == -100).all()


def test_a_teacher_that_writes_nothing_long_enough_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("model", "teacher"):
        teacher_of(eos_token_id=list(range(2, 90))).save_pretrained(folder)
        make().save_pretrained(folder)
    flags = [
        "--model",
        "model",
        "--teacher",
        "teacher",
        "--dataset",
        "self",
        "--self_samples",
        "8",
        "--output_dir",
        "run",
    ]
    message = r"'self': of 8 texts that `teacher` 'teacher' wrote, 0 have `min_tokens`=32 tokens"
    with pytest.raises(ValueError, match=message):
        run_recover([*flags, "--use_cpu", "--disable_tqdm", "True"], run_module.recover)
