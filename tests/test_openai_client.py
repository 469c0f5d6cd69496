"""The `openai` package, as its users call it, through the proxy to a real llama.cpp."""

from __future__ import annotations

import asyncio
import json

import pytest

pytest.importorskip("openai", reason="OpenAI's client is not installed")
pytest.importorskip("gguf", reason="GGUF files need the package gguf")
pytest.importorskip("starlette", reason="the proxy's web framework is in the extra 'serving'")
pytest.importorskip("uvicorn", reason="the proxy's server is in the extra 'serving'")

import openai

from tests.llama_proxy import CALLING, CHAT, KEY, MODEL, TOOLS, llama_proxy
from tests.patience import PATIENCE


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with llama_proxy(tmp_path_factory.mktemp("llama")) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=url, api_key=KEY, timeout=PATIENCE, max_retries=0) as client:
        yield client


def test_completions_choose_or_are_given_a_prompt(client):
    settings = {"model": MODEL, "prompt": "hello", "max_tokens": 5, "temperature": 0}
    raw = client.completions.with_raw_response.create(**settings)
    answer, prompt = raw.parse(), int(raw.headers["x-idp-prompt"])
    assert answer.usage.completion_tokens == 5
    for forced in (prompt, -1):
        again = client.completions.with_raw_response.create(**settings, extra_body={"idp_prompt": forced})
        assert again.headers["x-idp-prompt"] == str(forced)
        assert again.parse().choices[0].text == answer.choices[0].text or forced == -1
    both = client.completions.create(model=MODEL, prompt=["hello", "there"], max_tokens=5, temperature=0)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[0].text == answer.choices[0].text


def test_a_chat_and_its_next_turn(client):
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=CHAT, max_tokens=5, temperature=0)
    answer = raw.parse()
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.completion_tokens == 5
    messages = [*CHAT, answer.choices[0].message, {"role": "user", "content": [{"type": "text", "text": "and?"}]}]
    turn = client.chat.completions.with_raw_response.create(model=MODEL, messages=messages, max_completion_tokens=5)
    assert turn.headers["x-idp-prompt"] == raw.headers["x-idp-prompt"]
    assert turn.parse().usage.prompt_tokens > answer.usage.total_tokens


def test_a_stream_with_its_usage(client):
    settings = {"model": MODEL, "max_tokens": 5, "temperature": 0}
    whole = client.chat.completions.create(messages=CHAT, **settings)
    chunks = list(
        client.chat.completions.create(messages=CHAT, stream=True, stream_options={"include_usage": True}, **settings)
    )
    assert len(chunks) > 3
    said = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert said == whole.choices[0].message.content
    assert (chunks[-1].choices, chunks[-1].usage.total_tokens) == ([], whole.usage.total_tokens)
    whole = client.completions.create(prompt="hello", **settings)
    parts = client.completions.create(prompt="hello", stream=True, **settings)
    assert "".join(choice.text for part in parts for choice in part.choices) == whole.choices[0].text


def test_a_stream_of_the_asynchronous_client(client, url):
    async def said() -> str:
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, timeout=PATIENCE, max_retries=0) as other:
            stream = await other.chat.completions.create(
                model=MODEL, messages=CHAT, max_tokens=5, temperature=0, stream=True
            )
            return "".join([choice.delta.content or "" async for chunk in stream for choice in chunk.choices])

    whole = client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=5, temperature=0)
    assert asyncio.run(said()) == whole.choices[0].message.content


def test_several_choices(client):
    settings = {"model": MODEL, "n": 2, "max_tokens": 8, "temperature": 1.5, "seed": 3}
    chat = client.chat.completions.create(messages=CHAT, **settings)
    texts = client.completions.create(prompt="hello", **settings)
    for choices in (chat.choices, texts.choices):
        assert sorted(choice.index for choice in choices) == [0, 1]


def test_tools_are_called_and_answered(client):
    called = client.chat.completions.create(model=MODEL, messages=CHAT, temperature=0, **CALLING)
    message = called.choices[0].message
    call, *_ = message.tool_calls  # it calls again and again
    assert (call.function.name, json.loads(call.function.arguments)) == ("look", {})
    chunks = client.chat.completions.create(model=MODEL, messages=CHAT, temperature=0, stream=True, **CALLING)
    parts = [part for chunk in chunks for choice in chunk.choices for part in choice.delta.tool_calls or []]
    parts = [part for part in parts if part.index == 0]
    assert parts[0].function.name == "look"
    assert "".join(part.function.arguments or "" for part in parts) == call.function.arguments
    message = message.model_copy(update={"tool_calls": [call]})
    turn = [*CHAT, message, {"role": "tool", "tool_call_id": call.id, "content": "seen"}]
    settings = {"model": MODEL, "tools": TOOLS, "max_tokens": 5, "temperature": 0}
    raw = [client.chat.completions.with_raw_response.create(messages=chat, **settings) for chat in (CHAT, turn)]
    assert len({one.headers["x-idp-prompt"] for one in raw}) == 1
    before, after = (one.parse().usage.prompt_tokens for one in raw)
    assert after - before > len("<tool_call>look</tool_call>toolseen")


def test_an_answer_of_a_form(client):
    schema = {"type": "object", "properties": {"a": {"const": "b"}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "form", "schema": schema}}
    answer = client.chat.completions.create(
        model=MODEL, messages=CHAT, response_format=form, max_tokens=50, temperature=0
    )
    assert json.loads(answer.choices[0].message.content) == {"a": "b"}


def test_models(client):
    listed = list(client.models.list())
    assert [model.id for model in listed] == [MODEL]
    assert client.models.retrieve(MODEL) == listed[0]
    with pytest.raises(openai.NotFoundError, match=r"the model 'other' does not exist: this serves 'org/tiny'"):
        client.models.retrieve("other")


def test_errors_are_those_that_the_client_knows(client, url):
    with openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as stranger:
        for ask in (stranger.models.list, lambda: stranger.completions.create(model=MODEL, prompt="hello")):
            with pytest.raises(openai.AuthenticationError, match="the bearer token is missing or wrong"):
                ask()
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="other", messages=CHAT)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="hello", echo=True)
    assert (caught.value.param, caught.value.type) == ("echo", "invalid_request_error")
    for ask in (
        lambda: client.responses.create(model=MODEL, input="hello"),
        lambda: client.embeddings.create(model=MODEL, input="hello"),
        client.files.list,
    ):
        with pytest.raises(openai.NotFoundError, match="This serves POST /v1/completions, POST /v1/chat/completions"):
            ask()
