"""Perplexity by sliding windows: what is scored, what may choose, and that every kind of model is scored alike."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from idp_peft.evaluation.documents import cut_texts, score_documents
from idp_peft.evaluation.windows import cut
from tests.test_adapters import word_tokenizer
from tests.tiny import tiny, token_batch


def texts(*lengths: int) -> list[str]:
    ids, mask = token_batch(list(lengths), side="right", seed=3)
    return [" ".join(f"w{i}" for i in row[real.bool()].tolist()) for row, real in zip(ids, mask, strict=True)]


def word_ids(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


def with_adapter(kind: str):
    torch.manual_seed(0)
    task = {"task_type": "CAUSAL_LM"}
    configs = {
        "lora": LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, **task),
        "prompt_tuning": PromptTuningConfig(num_virtual_tokens=5, **task),
        "prefix_tuning": PrefixTuningConfig(num_virtual_tokens=5, **task),
    }
    return get_peft_model(tiny("llama"), configs[kind]).eval()


@pytest.mark.parametrize("front", [[], [1]])
@pytest.mark.parametrize(("window", "stride"), [(8, 6), (8, 8), (8, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 14, 15, 40])
def test_every_token_after_the_first_context_is_scored_exactly_once(length, window, stride, front):
    ids = list(range(100, 100 + length))
    context = max(window - stride, 1)
    windows = cut(0, ids, window, stride, front)
    scored = [token for part in windows for token in part.tokens[part.context :]]
    assert scored == ids[context - len(front) :]
    for part in windows:
        assert len(part.tokens) <= window
        assert part.tokens[: len(front)] == front
        assert 1 <= len(part.tokens) - part.context <= stride
        assert part.context == context


def test_the_score_is_the_models_own_over_each_windows_last_tokens():
    model, text = tiny("llama"), texts(20)[0]
    result = score_documents(model, word_tokenizer(), [text], window=8, stride=6, batch_size=2)
    expected, ids = 0.0, word_ids(text)
    for start in (0, 6, 12):
        window = torch.tensor([ids[start : start + 8]])
        with torch.no_grad():
            log_probabilities = model(input_ids=window).logits[0].log_softmax(-1)
        expected -= sum(float(log_probabilities[t - 1, window[0, t]]) for t in range(2, window.shape[1]))
    (item,) = result["items"]
    assert item["tokens"] == 18
    assert abs(item["nats"] - expected) < 1e-4
    assert item["prompt"] is None
    assert abs(result["perplexity"] - math.exp(expected / 18)) < 1e-3


@pytest.mark.parametrize("kind", ["plain", "idp", "lora", "prompt_tuning", "prefix_tuning"])
def test_a_padded_row_scores_what_it_scores_alone(kind, make):
    model = {"plain": lambda: tiny("llama"), "idp": lambda: make("llama")}.get(kind, lambda: with_adapter(kind))()
    documents = texts(20, 5, 9, 3)
    together = score_documents(model, word_tokenizer(), documents, window=8, stride=6, batch_size=8)["items"]
    for document, item in zip(documents, together, strict=True):
        (alone,) = score_documents(model, word_tokenizer(), [document], window=8, stride=6, batch_size=1)["items"]
        assert abs(item["nats"] - alone["nats"]) < 1e-4
        assert (item["tokens"], item["prompt"]) == (alone["tokens"], alone["prompt"])


def test_prompt_tuning_is_scored_as_its_concatenation():
    model, text = with_adapter("prompt_tuning"), texts(8)[0]
    (item,) = score_documents(model, word_tokenizer(), [text], window=8, stride=6)["items"]
    ids = torch.tensor([word_ids(text)])
    prompt = model.get_prompt(1)
    with torch.no_grad():
        embeds = torch.cat([prompt, model.get_base_model().get_input_embeddings()(ids)], 1)
        log_probabilities = model.get_base_model()(inputs_embeds=embeds).logits[0, 5:].log_softmax(-1)
    expected = -sum(float(log_probabilities[t - 1, ids[0, t]]) for t in range(2, 8))
    assert abs(item["nats"] - expected) < 1e-4


def test_the_choice_reads_the_context_alone_unless_there_is_none(make):
    model, tokenizer = make("llama"), word_tokenizer()
    documents = texts(*[12] * 12)
    changed = [" ".join(text.split()[:6] + ["w3"] * 6) for text in documents]

    def chosen(source, stride):
        result = score_documents(model, tokenizer, source, window=12, stride=stride)
        return result["selection_reads"], [item["prompt"] for item in result["items"]]

    assert chosen(documents, 6) == chosen(changed, 6)
    assert chosen(documents, 6)[0] == "context"
    assert len(set(chosen(documents, 6)[1])) > 1
    reads, whole = chosen(documents, 12)
    assert reads == "window"
    assert whole != chosen(changed, 12)[1]


def test_a_forced_prompt_is_scored_and_each_prompt_can_be(make):
    model, tokenizer, documents = make("llama"), word_tokenizer(), texts(12, 8)
    result = score_documents(model, tokenizer, documents, window=8, stride=6, each_prompt=True)
    for prompt in range(4):
        forced = score_documents(model, tokenizer, documents, window=8, stride=6, prompt_id=prompt)["items"]
        for item, other in zip(result["items"], forced, strict=True):
            assert abs(item["nats_by_prompt"][prompt] - other["nats"]) < 1e-6
            assert other["prompt"] == prompt
    single = next(item for item in result["items"] if "prompts" not in item)
    assert abs(single["nats"] - single["nats_by_prompt"][single["prompt"]]) < 1e-4
    without = score_documents(model, tokenizer, documents, window=8, stride=6, prompt_id=-1)["items"]
    plain = score_documents(tiny("llama"), tokenizer, documents, window=8, stride=6)["items"]
    for item, other in zip(without, plain, strict=True):
        assert abs(item["nats"] - other["nats"]) < 1e-4


def test_a_document_of_several_windows_names_its_most_frequent_prompt(make, monkeypatch):
    from idp_peft.evaluation import documents as module

    windows = cut_texts(word_tokenizer(), texts(20, 8), 8, 6)
    items = module._items(windows, ["a", "b"], [1.0, 2.0, 3.0, 4.0], [3, 1, 1, 2])
    assert [(item["id"], item["nats"], item["prompt"]) for item in items] == [("a", 6.0, 1), ("b", 4.0, 2)]
    assert items[0]["prompts"] == [3, 1, 1]
    assert "prompts" not in items[1]


def test_a_beginning_token_of_the_tokenizer_stands_before_every_window():
    from tokenizers.processors import TemplateProcessing

    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    windows = cut_texts(tokenizer, texts(20), 8, 6)
    assert all(part.tokens[0] == 1 for part in windows)
    assert sum(len(part.tokens) - part.context for part in windows) == 19


def test_bf16_logits_are_scored_in_float32():
    model, documents = tiny("llama", dtype=torch.bfloat16), texts(8)
    (item,) = score_documents(model, word_tokenizer(), documents, window=8, stride=6)["items"]
    ids = torch.tensor([word_ids(documents[0])])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].float().log_softmax(-1)
    expected = -sum(float(logits[t - 1, ids[0, t]]) for t in range(2, 8))
    assert abs(item["nats"] - expected) < 1e-5


def test_what_cannot_be_scored_is_refused_in_one_line(make):
    model, tokenizer = tiny("llama"), word_tokenizer()
    with pytest.raises(ValueError, match="it must be longer than 64 tokens, the longest of 1 has 5"):
        score_documents(model, tokenizer, texts(5))
    with pytest.raises(ValueError, match=r"`stride` must be from 1 to `window` \(8\), got 9"):
        score_documents(model, tokenizer, texts(9), window=8, stride=9)
    with pytest.raises(ValueError, match="`window` must be at least 2 tokens, got 1"):
        score_documents(model, tokenizer, texts(9), window=1, stride=1)
    with pytest.raises(ValueError, match="needs a model with an active IDP adapter, got prompt_id=1"):
        score_documents(model, tokenizer, texts(9), window=8, stride=6, prompt_id=1)
    with pytest.raises(ValueError, match="between -1"):
        score_documents(make("llama"), tokenizer, texts(9), window=8, stride=6, prompt_id=4)


def test_training_mode_is_given_back(make):
    model = make("llama")
    model.train()
    score_documents(model, word_tokenizer(), texts(9), window=8, stride=6)
    assert model.training


def test_it_is_a_metric_of_the_evaluate_library(make):
    evaluate = pytest.importorskip("evaluate")
    from idp_peft.evaluation import Perplexity

    metric, model = Perplexity(keep_in_memory=True), make("llama")
    assert isinstance(metric, evaluate.Metric)
    options = {"model": model, "tokenizer": word_tokenizer(), "window": 8, "stride": 6}
    assert metric.compute(predictions=texts(20, 5), **options) == score_documents(
        texts=texts(20, 5), batch_size=4, **options
    )
    assert "exp(sum of nats" in metric.description


def test_importing_the_package_imports_nothing_heavy():
    script = (
        "import sys, idp_peft.evaluation; print([m for m in ('lm_eval', 'evaluate', 'datasets') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"
    script = script.replace("print(", "idp_peft.evaluation.Perplexity; print(")  # that the check can fail
    pytest.importorskip("evaluate")
    assert "evaluate" in subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout


def test_a_limit_draws_from_the_documents_that_have_something_to_score():
    from idp_peft.evaluation import evaluate_model
    from tests.tiny_folder import tiny_texts, tiny_tokenizer

    texts = [text for pair in zip(tiny_texts(12, words=3), tiny_texts(12, words=20), strict=True) for text in pair]
    result = evaluate_model(tiny("llama"), tiny_tokenizer(), texts=texts, dataset="text", limit=5, window=16, stride=12)
    drawn = [int(item["id"]) for item in result["perplexity"]["text"]["items"]]
    assert len(drawn) == 5
    assert all(index % 2 == 1 for index in drawn), "the even ones are shorter than a window's context"
