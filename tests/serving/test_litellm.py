"""LiteLLM, which other applications call models with, through the proxy to a real llama.cpp."""

from __future__ import annotations

import json
import os

import pytest

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network for prices when it is imported
pytest.importorskip("litellm", reason="`make test-serving` makes an environment with it")
pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")

import litellm

from tests.llama_proxy import CALLING, CHAT, KEY, MODEL, TOOLS, llama_proxy
from tests.patience import PATIENCE


@pytest.fixture(scope="module")
def to_proxy(tmp_path_factory):
    with llama_proxy(tmp_path_factory.mktemp("llama")) as url:
        yield {"api_base": url, "api_key": KEY, "timeout": PATIENCE, "max_retries": 0, "temperature": 0}


@pytest.fixture
def ask(to_proxy):
    """Asks for a chat's answer."""

    def ask(messages=CHAT, model=MODEL, **settings):
        return litellm.completion(f"openai/{model}", messages=messages, **{**to_proxy, "max_tokens": 5, **settings})

    return ask


def test_a_chat_and_its_next_turn(ask):
    answer = ask()
    assert answer.usage.completion_tokens == 5
    assert answer._hidden_params["additional_headers"]["llm_provider-x-idp-prompt"] in ("0", "1", "2")
    turn = ask([*CHAT, answer.choices[0].message, {"role": "user", "content": "and?"}])
    prompts = {one._hidden_params["additional_headers"]["llm_provider-x-idp-prompt"] for one in (answer, turn)}
    assert len(prompts) == 1


def test_completions(to_proxy):
    settings = {"model": f"text-completion-openai/{MODEL}", "prompt": "hello", "max_tokens": 5, **to_proxy}
    assert litellm.text_completion(**settings).choices[0].text
    assert litellm.text_completion(**settings, extra_body={"idp_prompt": 1}).choices[0].text


def test_a_stream_with_its_usage(ask):
    whole = ask()
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == (
        whole.choices[0].message.content
    )
    (usage,) = [chunk.usage for chunk in chunks if getattr(chunk, "usage", None)]
    assert usage.total_tokens == whole.usage.total_tokens


def test_several_choices(ask):
    assert [choice.index for choice in ask(n=2, temperature=1.5).choices] == [0, 1]


def test_tools_are_called_and_answered(ask):
    message = ask(**CALLING).choices[0].message
    call, *_ = message.tool_calls  # it calls again and again
    assert (call.function.name, json.loads(call.function.arguments)) == ("look", {})
    message.tool_calls = [call]
    turn = [*CHAT, message, {"role": "tool", "tool_call_id": call.id, "content": "seen"}]
    assert ask(turn, tools=TOOLS, tool_choice="none").choices[0].message.content


def test_errors_are_those_that_the_client_knows(ask, to_proxy):
    with pytest.raises(litellm.AuthenticationError, match="the bearer token is missing or wrong"):
        ask(api_key="wrong")
    with pytest.raises(litellm.NotFoundError, match="the model 'other' does not exist: this serves 'org/tiny'"):
        ask(model="other")
    with pytest.raises(litellm.BadRequestError, match="is not served with soft prompts"):
        ask(extra_body={"echo": True})
    with pytest.raises(litellm.NotFoundError, match="This serves POST /v1/completions"):
        litellm.embedding(f"openai/{MODEL}", input="hello", api_base=to_proxy["api_base"], api_key=KEY)
