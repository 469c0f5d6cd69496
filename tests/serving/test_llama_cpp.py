"""The real model under llama.cpp: nats per token of held-out text, beside transformers on the same file, with the base as control.

Tokens are not compared: llama.cpp rounds activations to 8 bits before it multiplies them with quantised weights, so the base
itself says other tokens there.
"""

from __future__ import annotations

import statistics
import warnings
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from benchmarks.common.real_gguf import write_gguf
from idp_peft import IDPConfig
from idp_peft.models.loading import load_model, load_tokenizer
from idp_peft.serving import ExportedModel, export_to_gguf
from idp_peft.texts.data import load_texts
from tests.llama_cpp import LlamaServer
from tests.reference import bank_of

TEXTS, CONTEXT, SCORED = 12, 32, 32
LIKELY = 2000  # log-probabilities that are asked for; all of them where the token is not among these


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    """The base's file, an adapter's model on it, and what `export --to-gguf` makes of both."""
    folder = tmp_path_factory.mktemp("real")
    file = write_gguf(folder / "base.gguf")
    base = load_model(str(file))
    config = {"num_prompts": 2, "num_virtual_tokens": 32, "scales": True, "scale_group_size": 32}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, IDPConfig(task_type="CAUSAL_LM", **config)).eval()
    with torch.no_grad():
        bank_of(model).scales.normal_(std=0.1)
        model.save_pretrained(folder / "adapter")
    exported = ExportedModel.from_folder(export_to_gguf(folder / "adapter", folder / "served", str(file)))
    return model, file, exported


@pytest.fixture(scope="module")
def rows(subject) -> list[list[int]]:
    tokenizer, rows = load_tokenizer(str(subject[1])), []
    for text in load_texts("wiki", "held_out"):
        ids = tokenizer(text)["input_ids"][: CONTEXT + SCORED]
        if len(ids) == CONTEXT + SCORED:
            rows.append(ids)
        if len(rows) == TEXTS:
            return rows
    raise AssertionError("too few texts")


def nats_in_llama_cpp(file: Path, rows: list[list[int]], front: list[int]) -> list[float]:
    """Of each row's last tokens, behind the ids in front: one request per token."""
    server = LlamaServer(file, context=256)

    def of(ids: list[int], token: int) -> float:
        for count in (LIKELY, 10**6):
            answer = server.post(
                "/completion", prompt=ids, n_predict=1, n_probs=count, cache_prompt=True, temperature=0
            )
            found = {one["id"]: one["logprob"] for one in answer["completion_probabilities"][0]["top_logprobs"]}
            if token in found:
                return -found[token]
        raise AssertionError(f"llama.cpp gives token {token} no probability")

    return [
        statistics.mean(of(front + row[:place], row[place]) for place in range(CONTEXT, CONTEXT + SCORED))
        for row in rows
    ]


@torch.no_grad()
def nats_in_transformers(model, rows: list[list[int]], prompt: int) -> list[float]:
    ids = torch.tensor(rows)
    logits = model(input_ids=ids, prompt_ids=torch.full((len(rows),), prompt)).logits[:, CONTEXT - 1 : -1]
    return (
        torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, CONTEXT:], reduction="none").mean(1).tolist()
    )


def apart(left: list[float], right: list[float]) -> float:
    return statistics.mean(abs(a - b) for a, b in zip(left, right, strict=True))


def test_the_exported_file_scores_text_as_the_adapter_does(subject, rows):
    model, file, exported = subject
    base = {"transformers": nats_in_transformers(model, rows, -1), "llama.cpp": nats_in_llama_cpp(file, rows, [])}
    control = apart(*base.values())
    served = exported.folder / "model.gguf"
    for prompt, front in enumerate(exported.token_ids):
        ours, theirs = nats_in_transformers(model, rows, prompt), nats_in_llama_cpp(served, rows, front)
        print(
            f"prompt {prompt}: {statistics.mean(ours):.4f} {statistics.mean(theirs):.4f}, apart {apart(ours, theirs):.4f}; base "
            f"{statistics.mean(base['transformers']):.4f} {statistics.mean(base['llama.cpp']):.4f}, apart {control:.4f}"
        )
        assert apart(ours, base["transformers"]) > 10 * control, "the adapter must matter"
        assert apart(ours, theirs) < 3 * control, (
            "no more than the engines differ on the base, but for the rounding of scales"
        )
