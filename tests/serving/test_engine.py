"""A real vLLM says, by every route, what the adapter's own model says: token for token."""

from __future__ import annotations

import json
import re

import pytest
import torch

pytest.importorskip("vllm", reason="`make test-serving` makes an environment with it")

from benchmarks.serving.engines import VLLM_BLOCK
from idp_peft.serving import Router, VllmPrompts, proxy_app
from idp_peft.serving.prompted_request import RequestPrompter
from idp_peft.serving.proxy import ProxySettings
from tests.loopback import Server, client
from tests.patience import PATIENCE
from tests.serving.vllm_server import VllmServer, subject

TOKENS = 16
PLAIN = {"model": "idp", "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
GREEDY = {**PLAIN, "return_token_ids": True}
# The proxy refuses that one, with which an engine tells the prompt's tokens, too: each token's logprob tells the answer's.
LOGPROBS = {"/v1/completions": {"logprobs": 0}, "/v1/chat/completions": {"logprobs": True}}


@pytest.fixture(scope="module", params=["tiny", "gemma2", "default"])
def one(request, tmp_path_factory):
    return subject(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def engine(one, tmp_path_factory):
    flags = ("--enable-prompt-embeds", "--trust-request-chat-template")
    with VllmServer(one.exported.folder, tmp_path_factory.mktemp("engine") / "log", flags) as server:
        yield server


@pytest.fixture(scope="module")
def http(engine):
    with client(engine.url, timeout=PATIENCE) as http:
        yield http


@pytest.fixture(scope="module")
def proxy(one, engine):
    prompter = RequestPrompter(Router.from_pretrained(one.exported.folder), one.exported)
    with (
        Server(proxy_app(prompter, ProxySettings(engine.url, "idp"))) as server,
        client(server.url, timeout=PATIENCE) as http,
    ):
        yield http


@pytest.fixture(scope="module")
def prompts(one):
    return VllmPrompts(Router.from_pretrained(one.adapter, one.base))


def bias(one) -> dict:
    """What a request of a tied model carries where no proxy adds it."""
    return {"logit_bias": one.exported.logit_bias} if one.exported.tied else {}


def post(http, path: str, body: dict, one=None) -> list[int]:
    """The token ids of an answer."""
    answer = http.post(path, json=body if one is None else {**body, **bias(one)})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["token_ids"]


def post_to_proxy(proxy, path: str, body: dict) -> list[list[int]]:
    """The token ids of all answers, from a proxy."""
    answer = proxy.post(path, json={**body, **LOGPROBS[path], "return_tokens_as_token_ids": True})
    assert answer.status_code == 200, answer.text
    return [token_ids(choice["logprobs"]) for choice in answer.json()["choices"]]


def token_ids(logprobs: dict) -> list[int]:
    """Those of `"token_id:5"`, as completions and chats write them."""
    tokens = logprobs["tokens"] if "tokens" in logprobs else [one["token"] for one in logprobs["content"]]
    return [int(token.removeprefix("token_id:")) for token in tokens]


# ---------------------------------------------------------------------- the vocabulary


def test_token_ids_of_a_prompt_in_front_give_what_the_adapter_gives(one, http):
    for text in one.texts:
        for prompt in range(4):
            body = {**GREEDY, "prompt": one.exported.token_ids[prompt] + one.ids(text)}
            assert post(http, "/v1/completions", body, one) == one.say(one.ids(text), prompt)
        assert post(http, "/v1/completions", {**GREEDY, "prompt": one.ids(text)}, one) == one.say(one.ids(text), -1)


def test_names_of_a_prompts_tokens_in_front_of_a_text_do_too(one, http):
    for prompt in (0, 3):
        body = {**GREEDY, "prompt": "".join(one.exported.tokens[prompt]) + one.texts[0]}
        assert post(http, "/v1/completions", body, one) == one.say(one.ids(one.texts[0]), prompt)


def test_the_chat_template_puts_the_prompt_that_a_request_names_in_front(one, http):
    for prompt in (1, 2):
        body = {**GREEDY, "messages": one.chat, "chat_template_kwargs": {"idp_prompt": prompt}}
        assert post(http, "/v1/chat/completions", body, one) == one.say(one.chat_ids, prompt)
    assert post(http, "/v1/chat/completions", {**GREEDY, "messages": one.chat}, one) == one.say(one.chat_ids, -1)


def test_sampling_with_the_bias_never_picks_a_prompts_token(one, http):
    hot = {**GREEDY, "temperature": 2, "max_tokens": 64, "n": 8, "seed": 5, "logit_bias": one.exported.logit_bias}
    choices = http.post(
        "/v1/completions", json={**hot, "prompt": one.exported.token_ids[0] + one.ids(one.texts[0])}
    ).json()["choices"]
    tokens = [token for choice in choices for token in choice["token_ids"]]
    assert len(tokens) == 8 * 64
    assert max(tokens) < one.exported.vocab_size


# ---------------------------------------------------------------------- embeddings


def test_embeddings_over_http_give_what_the_adapter_gives(one, http, prompts):
    for prompt in (0, 2):
        body = prompts.completion_body([one.texts[0]], [prompt], **GREEDY)
        assert post(http, "/v1/completions", body, one) == one.say(one.ids(one.texts[0]), prompt)
    answer = http.post("/v1/completions", json=prompts.completion_body(one.texts, **GREEDY, **bias(one))).json()
    for text, choice in zip(one.texts, answer["choices"], strict=True):
        assert choice["token_ids"] == one.say(one.ids(text), None)


def test_a_content_part_of_a_chat_gives_what_the_adapter_gives(one, http, prompts):
    for prompt in (None, 2):
        body = prompts.chat_body(one.chat, prompt, **GREEDY, chat_template=prompts.chat_template())
        assert post(http, "/v1/chat/completions", body, one) == one.say(one.chat_ids, prompt)


# ---------------------------------------------------------------------- the proxy


def test_the_proxy_gives_what_the_adapters_own_choice_gives(one, proxy):
    for text in one.texts:
        assert post_to_proxy(proxy, "/v1/completions", {**PLAIN, "prompt": text}) == [one.say(one.ids(text), None)]
    answers = post_to_proxy(proxy, "/v1/completions", {**PLAIN, "prompt": one.texts})
    assert answers == [one.say(one.ids(text), None) for text in one.texts]
    answers = post_to_proxy(proxy, "/v1/chat/completions", {**PLAIN, "messages": one.chat})
    assert answers == [one.say(one.chat_ids, None)]


def test_a_stream_through_the_proxy_says_the_same(one, proxy):
    tokens = []
    body = {**PLAIN, "prompt": one.texts[1], "stream": True, "logprobs": 0, "return_tokens_as_token_ids": True}
    with proxy.stream("POST", "/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                tokens += token_ids(json.loads(line.removeprefix("data: "))["choices"][0]["logprobs"])
    assert tokens == one.say(one.ids(one.texts[1]), None)


def test_sampling_through_the_proxy_never_picks_a_prompts_token(one, proxy):
    hot = {**PLAIN, "temperature": 2, "max_tokens": 64, "n": 8, "seed": 6, "prompt": one.texts[0]}
    answers = post_to_proxy(proxy, "/v1/completions", hot)
    assert max(token for answer in answers for token in answer) < one.exported.vocab_size


# ---------------------------------------------------------------------- the prefix cache


def hits(http) -> float:
    """Tokens that were found in the cache so far."""
    found = re.findall(r"^vllm:prefix_cache_hits_total\{[^}]*\} (\S+)$", http.get("/metrics").text, re.MULTILINE)
    assert found
    return sum(map(float, found))


def test_a_prompt_of_whole_blocks_is_computed_once(one, http):
    front = one.exported.token_ids[1]
    assert len(front) == VLLM_BLOCK
    post(http, "/v1/completions", {**GREEDY, "prompt": front + one.ids(one.texts[0])}, one)
    for text in one.texts[1:]:
        before = hits(http)
        post(http, "/v1/completions", {**GREEDY, "prompt": front + one.ids(text)}, one)
        assert hits(http) - before == VLLM_BLOCK


def test_a_prompt_that_ends_within_a_block_is_computed_again(one, http):
    front = one.exported.token_ids[2][: VLLM_BLOCK - 1]
    post(http, "/v1/completions", {**GREEDY, "prompt": front + one.ids(one.texts[0])}, one)
    before = hits(http)
    post(http, "/v1/completions", {**GREEDY, "prompt": front + one.ids(one.texts[1])}, one)
    assert hits(http) == before


def test_a_prompt_of_embeddings_is_computed_once_too(one, http, prompts):
    post(http, "/v1/completions", prompts.completion_body([one.texts[0]], [3], **GREEDY))
    before = hits(http)
    post(http, "/v1/completions", prompts.completion_body([one.texts[1]], [3], **GREEDY))
    assert hits(http) - before == VLLM_BLOCK


def test_what_the_engine_says_is_its_own_and_not_an_accident(one):
    """The prompts differ from each other and from none, so that a wrong one is seen."""
    said = [tuple(one.say(one.ids(one.texts[0]), prompt)) for prompt in (-1, 0, 1, 2, 3)]
    assert len(set(said)) == len(said)
    assert torch.isfinite(one.model.base_model.layer.active_bank.embeddings()).all()
