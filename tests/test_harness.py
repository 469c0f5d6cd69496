"""Through lm-evaluation-harness: its own numbers for a plain model, one prompt per question for IDP."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from idp_peft.evaluation.harness import HarnessModel
from idp_peft.evaluation.requests import rows, shared_context
from tests.test_adapters import word_tokenizer
from tests.test_perplexity import with_adapter
from tests.tiny import tiny


def tokenizer():
    words = word_tokenizer()
    words.eos_token = "<s>"
    return words


def words(count: int, draw: random.Random) -> str:
    return " ".join(f"w{draw.randrange(2, 97)}" for _ in range(count))


def request(question: int, choice: int, context: str, continuation: str, task: str = "t") -> Instance:
    metadata = (task, question, 1)
    return Instance("loglikelihood", {}, (context, continuation), choice, metadata=metadata)


def multiple_choice(questions: int = 12, seed: int = 0) -> list[Instance]:
    """Questions with a context of their own, of different lengths, and four choices; some of one word."""
    draw, requests = random.Random(seed), []
    for question in range(questions):
        context = words(draw.randint(2, 9), draw)
        lengths = [1] * 4 if question % 3 == 0 else [draw.randint(1, 6) for _ in range(4)]
        requests += [request(question, i, context, " " + words(n, draw)) for i, n in enumerate(lengths)]
    return requests


def ids(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


def alone(model, context: list[int], continuation: list[int], **idp) -> float:
    """The definition: the log-likelihood of a continuation, one row, no padding; last n logits."""
    tokens = torch.tensor([context + continuation])
    with torch.no_grad():
        logits = model(input_ids=tokens, **idp).logits[0, -tokens.shape[1] :].log_softmax(-1)
    return sum(float(logits[len(context) + i - 1, token]) for i, token in enumerate(continuation))


def chosen_alone(model, tokens: list[int]) -> int:
    with torch.no_grad():
        model(input_ids=torch.tensor([tokens]))
    return int(model.last_selection.prompt_ids[0])


def test_a_plain_model_scores_what_the_harness_gives_it():
    draw = random.Random(1)
    requests = multiple_choice()
    requests += [
        request(50, 0, "", "w5 w6 w7"),
        request(51, 0, words(70, draw), " w9 w10"),
        request(52, 0, "w4", " w4"),
    ]
    ours = HarnessModel(tiny("llama"), tokenizer(), batch_size=5)
    theirs = HFLM(pretrained=tiny("llama"), tokenizer=tokenizer(), batch_size=3)
    for mine, expected in zip(
        ours.loglikelihood(requests, disable_tqdm=True), theirs.loglikelihood(requests, disable_tqdm=True), strict=True
    ):
        assert abs(mine[0] - expected[0]) < 1e-4
        assert mine[1] == expected[1]
    assert ours.prompts == {}
    rolling = [Instance("loglikelihood_rolling", {}, (words(90, draw),), 0, metadata=("t", 0, 1))]
    assert abs(ours.loglikelihood_rolling(rolling, True)[0] - theirs.loglikelihood_rolling(rolling, True)[0]) < 1e-3


def test_greedy_is_what_the_model_would_write():
    model = tiny("llama")
    written = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)[0, 3:].tolist()
    right, wrong = (" ".join(f"w{token}" for token in tokens) for tokens in (written, [*written[:2], 2]))
    answers = HarnessModel(model, tokenizer()).loglikelihood(
        [request(0, 0, "w5 w6 w7", " " + right), request(0, 1, "w5 w6 w7", " " + wrong)], disable_tqdm=True
    )
    assert [greedy for _, greedy in answers] == [True, False]


def test_all_choices_of_a_question_are_scored_under_the_prompt_that_its_context_chooses(make):
    model, requests = make("llama"), multiple_choice(seed=1)
    lm = HarnessModel(model, tokenizer(), batch_size=5)
    answers = lm.loglikelihood(requests, disable_tqdm=True)
    steers = set()
    for item, (score, _) in zip(requests, answers, strict=True):
        context, continuation = map(ids, item.args)
        prompt = chosen_alone(model, context)
        assert lm.prompts["t", item.doc_id] == prompt
        assert abs(score - alone(model, context, continuation, prompt_ids=torch.tensor([prompt]))) < 1e-4
        if chosen_alone(model, context + continuation) != prompt:
            steers.add(item.idx)
    assert steers == {0, 1, 2, 3}, "a choice that read any one of the answers would be seen"
    assert len(set(lm.prompts.values())) > 1


def test_the_harness_own_route_would_score_choices_of_one_question_under_different_prompts(make):
    model, requests = make("llama"), multiple_choice()
    prompts: dict[int, set[int]] = {}
    for item in requests:
        context, continuation = map(ids, item.args)
        prompts.setdefault(item.doc_id, set()).add(chosen_alone(model, (context + continuation)[:-1]))
    assert any(len(of_question) > 1 for of_question in prompts.values())
    naive = HFLM(pretrained=model, tokenizer=tokenizer(), batch_size=5).loglikelihood(requests, disable_tqdm=True)
    ours = HarnessModel(model, tokenizer(), batch_size=5).loglikelihood(requests, disable_tqdm=True)
    assert max(abs(a[0] - b[0]) for a, b in zip(naive, ours, strict=True)) > 1e-2


def test_where_contexts_hold_the_options_the_choice_reads_what_stands_before_them(make):
    model, draw, requests = make("llama"), random.Random(3), []
    before = [words(draw.randint(2, 8), draw) for _ in range(10)]
    for question, text in enumerate(before):
        after = " " + words(3, draw)
        requests += [request(question, i, f"{text} w{10 + i} w{20 + i}", after) for i in range(2)]
    lm = HarnessModel(model, tokenizer())
    lm.loglikelihood(requests, disable_tqdm=True)
    assert [lm.prompts["t", question] for question in range(10)] == [chosen_alone(model, ids(text)) for text in before]


def test_a_question_that_begins_with_its_options_chooses_by_the_prefix_token(make):
    model = make("llama")
    lm = HarnessModel(model, tokenizer())
    requests = [request(0, 0, "w5 w6", " w7"), request(0, 1, "w8 w6", " w7")]
    answers = lm.loglikelihood(requests, disable_tqdm=True)
    prompt = chosen_alone(model, [1])
    assert lm.prompts == {("t", 0): prompt}
    assert abs(answers[0][0] - alone(model, [5, 6], [7], prompt_ids=torch.tensor([prompt]))) < 1e-4


def test_an_unconditional_request_does_not_take_the_context_away_from_its_question(make):
    model = make("llama")
    lm = HarnessModel(model, tokenizer())
    requests = multiple_choice(4)
    lm.loglikelihood([*requests, *(request(q, 9, "", "w5 w6") for q in range(4))], disable_tqdm=True)
    for item in requests:
        assert lm.prompts["t", item.doc_id] == chosen_alone(model, ids(item.args[0]))


def test_a_forced_prompt_is_used_for_every_request(make):
    model, requests = make("llama"), multiple_choice(3)
    for prompt in (-1, 2):
        lm = HarnessModel(model, tokenizer(), prompt_id=prompt)
        for item, (score, _) in zip(requests, lm.loglikelihood(requests, disable_tqdm=True), strict=True):
            context, continuation = map(ids, item.args)
            assert abs(score - alone(model, context, continuation, prompt_ids=torch.tensor([prompt]))) < 1e-4
        assert set(lm.prompts.values()) == {prompt}
    with pytest.raises(ValueError, match="needs a model with an active IDP adapter"):
        HarnessModel(tiny("llama"), tokenizer(), prompt_id=0)


def test_an_over_long_question_is_cut_at_the_left_for_the_answer_and_for_the_choice(make):
    model, draw = make("llama"), random.Random(5)
    lm = HarnessModel(model, tokenizer())
    assert lm.max_length == 64 - 4  # the prompt takes its positions
    whole = set()
    for question in range(8):
        context, choices = words(150, draw), [" " + words(n, draw) for n in (1, 7)]
        requests = [request(question, i, context, choice) for i, choice in enumerate(choices)]
        answers = lm.loglikelihood(requests, disable_tqdm=True)
        prompt = lm.prompts["t", question]
        assert prompt == chosen_alone(model, ids(context)[150 + 7 - 61 :])  # what both choices still have in common
        whole.add(prompt == chosen_alone(model, ids(context)))
        for choice, (score, _) in zip(choices, answers, strict=True):
            kept = ids(context)[150 + len(ids(choice)) - 61 :]
            assert abs(score - alone(model, kept, ids(choice), prompt_ids=torch.tensor([prompt]))) < 1e-4
    assert False in whole  # what was cut off would have changed a choice


@pytest.mark.parametrize("kind", ["lora", "prompt_tuning", "prefix_tuning"])
def test_pefts_own_methods_score_and_write_what_they_do_alone(kind):
    model, requests = with_adapter(kind), multiple_choice(6)
    lm = HarnessModel(model, tokenizer(), batch_size=5)
    for item, (score, _) in zip(requests, lm.loglikelihood(requests, disable_tqdm=True), strict=True):
        assert abs(score - alone(model, *map(ids, item.args))) < 1e-4
    contexts = [item.args[0] for item in requests[::4]]
    for context, text in zip(contexts, lm.generate_until(generations(contexts), disable_tqdm=True), strict=True):
        assert text.split() == written(model, context)


def generations(contexts: list[str]) -> list[Instance]:
    options = {"until": ["never"], "max_gen_toks": 5, "do_sample": False}
    return [
        Instance("generate_until", {}, (context, options), 0, metadata=("t", number, 1))
        for number, context in enumerate(contexts)
    ]


def written(model, context: str, **idp) -> list[str]:
    prompt = torch.tensor([ids(context)])
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options, **idp)
    return tokenizer().decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True).split()


def test_a_padded_batch_writes_what_each_row_does_alone_behind_the_prompt_its_context_chooses(make):
    model, draw = make("llama"), random.Random(7)
    contexts = [words(draw.randint(2, 12), draw) for _ in range(8)]
    lm = HarnessModel(model, tokenizer(), batch_size=3)
    texts = lm.generate_until(generations(contexts), disable_tqdm=True)
    for number, (context, text) in enumerate(zip(contexts, texts, strict=True)):
        assert text.split() == written(model, context)
        assert lm.prompts["t", number] == chosen_alone(model, ids(context))
    forced = HarnessModel(model, tokenizer(), batch_size=3, prompt_id=1)
    texts = forced.generate_until(generations(contexts), disable_tqdm=True)
    for context, text in zip(contexts, texts, strict=True):
        assert text.split() == written(model, context, prompt_ids=torch.tensor([1]))
    assert set(forced.prompts.values()) == {1}


def test_one_word_answers_share_a_row_but_not_across_prompts():
    requests = [(None, [5, 6], [token]) for token in (7, 8)] * 2
    assert len(rows(requests, [None] * 4, 64)) == 1
    assert len(rows(requests, [0, 0, 1, 1], 64)) == 2


def test_the_shared_context_ends_where_requests_differ():
    requests = [(None, [5, 6, 7], [9]), (None, [5, 6, 8], [9])]
    assert shared_context(requests, 64) == [5, 6]
    assert shared_context([(None, [5, 6], [9]), (None, [5, 6, 8], [9])], 64) == [5, 6]
    with pytest.raises(ValueError, match="continuation of 1 to 2 tokens"):
        shared_context([(None, [5], [6, 7, 8])], 2)
