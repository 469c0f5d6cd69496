"""A teacher that is kept in files: what it says is what the dense model says, and a repair from it is nearly the same."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from idp_peft.models.loading import load_model, load_tokenizer
from idp_peft.recover import recover, teach
from idp_peft.recover.distillation import forward_kl
from idp_peft.recover.stored_teacher import StoredTeacher, truncated_kl
from idp_peft.texts.data import load_texts, token_blocks
from idp_peft.texts.tokens import padded_batch
from idp_peft_cli import main
from tests.tiny import VOCAB
from tests.tiny_folder import tiny_folder, tiny_texts

pytest.importorskip("datasets")
TEXT = {"dataset": "text.jsonl", "block_tokens": 16, "min_tokens": 4}
RUN = {**TEXT, "context_tokens": 4, "max_steps": 4, "num_prompts": 2, "num_virtual_tokens": 4, "seed": 1}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tiny_folder(tmp_path / "model")
    tiny_folder(tmp_path / "dense", seed=1)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny_texts(90)))
    return tmp_path


def blocks() -> list[list[int]]:
    return token_blocks(load_tokenizer("dense"), load_texts("text.jsonl"), 16, 4)


def adapter(folder: str) -> dict[str, torch.Tensor]:
    return load_file(f"{folder}/adapter/adapter_model.safetensors")


def test_it_says_what_the_dense_model_says_of_every_token(here):
    teach("dense", "teacher", top_k=5, **TEXT)
    assert len(list(Path("teacher").glob("shard-*"))) > 1, "else nothing is asked of a second shard"
    stored, dense = StoredTeacher("teacher"), load_model("dense")
    stored.check(blocks(), load_tokenizer("model"))
    rows = [blocks()[0], blocks()[-1][:9], blocks()[70]]
    known = [row for row in rows if row in blocks()]
    ids, mask = padded_batch(known)
    found, logprobs = stored.predictions(ids, mask)
    with torch.no_grad():
        expected = dense(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    real = mask.bool()
    assert torch.allclose(expected.gather(-1, found)[real], logprobs[real], atol=1e-5)
    assert torch.allclose(expected.topk(5).values[real], logprobs[real], atol=1e-5)


def test_the_truncated_loss_is_exact_with_all_tokens_and_never_more_than_the_full_one():
    torch.manual_seed(0)
    logits, target = 3 * torch.randn(50, VOCAB), 3 * torch.randn(50, VOCAB)
    full = forward_kl(logits, target)
    best = target.log_softmax(-1).topk(VOCAB)
    assert math.isclose(truncated_kl(logits, best.indices, best.values), full, rel_tol=1e-4)
    before = 0.0
    for top_k in (1, 4, 16, 64):
        best = target.log_softmax(-1).topk(top_k)
        kept = float(truncated_kl(logits, best.indices, best.values))
        assert before < kept <= float(full) * (1 + 1e-5)
        before = kept


def test_its_gradient_is_that_of_the_outcomes_it_keeps():
    torch.manual_seed(0)
    logits = torch.randn(6, VOCAB, dtype=torch.float32, requires_grad=True)
    best = torch.randn(6, VOCAB).log_softmax(-1).topk(8)
    truncated_kl(logits, best.indices, best.values).backward()
    other = logits.detach().clone().requires_grad_(True)
    own = other.log_softmax(-1).exp()
    outcomes = torch.cat([own.gather(-1, best.indices), 1 - own.gather(-1, best.indices).sum(-1, keepdim=True)], -1)
    teacher = torch.cat([best.values.exp(), 1 - best.values.exp().sum(-1, keepdim=True)], -1)
    (teacher * (teacher / outcomes).log()).sum().backward()
    assert torch.allclose(logits.grad, other.grad, atol=1e-5)


@pytest.mark.parametrize("method", ["idp", "lora"])
def test_a_repair_from_all_its_tokens_is_that_from_the_model(here, method):
    teach("dense", "teacher", top_k=VOCAB, **TEXT)
    recover("model", "from-files", teacher="teacher", method=method, init="vocab", **RUN)
    recover("model", "from-model", teacher="dense", method=method, init="vocab", **RUN)
    found, expected = adapter("from-files"), adapter("from-model")
    moved = [not torch.allclose(expected[name], torch.zeros_like(expected[name])) for name in expected]
    assert any(moved)
    for name in expected:
        assert torch.allclose(found[name], expected[name], atol=1e-3), name


def test_an_interrupted_call_goes_on_and_says_the_same(here, monkeypatch):
    teach("dense", "whole", top_k=4, **TEXT)
    from idp_peft.recover import stored_teacher

    written = []

    def once(*args, real=stored_teacher._predictions):
        if written:
            raise KeyboardInterrupt
        written.append(1)
        return real(*args)

    monkeypatch.setattr(stored_teacher, "_predictions", once)
    with pytest.raises(KeyboardInterrupt):
        teach("dense", "teacher", top_k=4, **TEXT)
    with pytest.raises(ValueError, match="'teacher' is not complete: run `idp-peft teach` again"):
        StoredTeacher("teacher")
    monkeypatch.undo()
    monkeypatch.chdir(here)
    before = Path("teacher/shard-00000.safetensors").stat().st_mtime_ns
    teach("dense", "teacher", top_k=4, **TEXT)
    assert Path("teacher/shard-00000.safetensors").stat().st_mtime_ns == before
    for path in Path("whole").glob("shard-*"):
        assert path.read_bytes() == (Path("teacher") / path.name).read_bytes()


def test_what_does_not_fit_is_refused(here):
    teach("dense", "teacher", top_k=4, **TEXT)
    with pytest.raises(ValueError, match=r"holds predictions of another call .*top_k"):
        teach("dense", "teacher", top_k=5, **TEXT)
    with pytest.raises(ValueError, match="must be new, empty or a folder to go on with"):
        teach("dense", "model", top_k=5, **TEXT)
    with pytest.raises(ValueError, match=r"says nothing of \d+ of the \d+ training blocks"):
        recover("model", "run", teacher="teacher", **{**RUN, "block_tokens": 12})
    with pytest.raises(ValueError, match="`temperature` must be 1 with a teacher from files, got 2"):
        recover("model", "run", teacher="teacher", temperature=2.0, **RUN)
    with pytest.raises(ValueError, match="`dataset` 'self' needs a `teacher` that can write"):
        recover("model", "run", teacher="teacher", **{**RUN, "dataset": "self"})
    Path("teacher/teacher.json").write_text("{")
    with pytest.raises(ValueError, match=r"holds a teacher\.json that cannot be read"):
        recover("model", "run", teacher="teacher", **RUN)
    assert not Path("run").exists() or not Path("run/adapter").exists()


def test_the_commands_do_it(here, capsys):
    main(
        [
            "teach",
            "--model",
            "dense",
            "--output_dir",
            "teacher",
            "--dataset",
            "text.jsonl",
            "--block_tokens",
            "16",
            "--min_tokens",
            "4",
        ]
    )
    words = [f"--{name}={value}" for name, value in RUN.items()]
    main(["recover", "--model", "model", "--teacher", "teacher", "--output_dir", "run", *words])
    first, *_, last = capsys.readouterr().out.splitlines()
    assert (first, last) == ("teacher in teacher", "adapter in run/adapter")
