"""Fields of requests: what passes is listed, and nothing that returns or forces a soft prompt's tokens is in the list."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the proxy's web framework is in the extra 'serving'")

from idp_peft.serving.openai_errors import RequestError
from idp_peft.serving.prompted_request import RequestPrompter
from idp_peft.serving.request_fields import CHAT_FIELDS, COMPLETION_FIELDS, REFUSED
from tests.tiny import VOCAB
from tests.tiny_proxy import tiny_prompter

CHAT = [{"role": "user", "content": "w5"}]
PATHS = {"completion": {"prompt": [5, 6]}, "chat": {"messages": CHAT}}
# Fields of vLLM, llama.cpp, SGLang and others that no stranger may set, and why.
NOT_SERVED = {
    # they return the prompt
    "echo": True,
    "prompt_logprobs": 0,
    "return_token_ids": True,
    "return_tokens": True,
    "return_prompt_token_ids": True,
    "n_probs": 5,
    "post_sampling_probs": True,
    "verbose": True,
    "__verbose": True,
    "return_hidden_states": True,
    "logprob_start_len": 0,
    "top_logprobs_num": 5,
    "token_ids_logprob": [98],
    "details": True,
    "logprob_token_ids": [98],
    "return_prompt_text": True,
    "return_token_offsets": True,
    "routed_experts_prompt_start": 0,
    "decoder_input_details": True,
    # they cut or replace what stands in front
    "truncate_prompt_tokens": 3,
    "prompt_embeds": "AAAA",
    "prompt_token_ids": [98],
    "input_ids": [98],
    "input_embeds": [[0.0]],
    "chat_template": "{{ messages }}",
    "suffix": "w5",
    "input_prefix": "w5",
    "input_suffix": "w5",
    "input_extra": [],
    "n_keep": 3,
    "n_discard": 3,
    "image_data": [],
    "mm_processor_kwargs": {},
    "media_io_kwargs": {},
    "multi_modal_data": {},
    "mm_payload": {},
    "truncation_side": "left",
    # they force tokens
    "allowed_token_ids": [98],
    "bad_words": ["w5"],
    "logits_processors": ["x"],
    "custom_logit_processor": "x",
    "custom_params": {},
    "use_beam_search": True,
    "length_penalty": 2.0,
    "grammar": 'root ::= "w5"',
    "guided_grammar": "root ::= x",
    "guided_decoding_backend": "x",
    "guided_whitespace_pattern": ".",
    "structural_tag": "{}",
    "ebnf": "root ::= x",
    "samplers": ["temperature"],
    "mirostat": 2,
    "dynatemp_range": 1.0,
    # they reach into the engine
    "id_slot": 0,
    "slot_id": 0,
    "cache_prompt": True,
    "lora": [{"id": 0}],
    "lora_path": "x",
    "session_params": {},
    "rid": "x",
    "request_id": "x",
    "priority": -100,
    "bootstrap_host": "x",
    "kv_transfer_params": {"remote_host": "x"},
    "ec_transfer_params": {},
    "session_id": "x",
    "vllm_xargs": {},
    "extra_args": {},
    "something_of_next_year": 1,
}
# Values of fields that are served, but not so.
WRONG = [
    ("logit_bias", {"98": 100}),
    ("logit_bias", {"98": -99}),
    ("logit_bias", {" 5": 1}),
    ("logit_bias", {"05": 1}),
    ("logit_bias", {"+5": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"\u0665": 1}),
    ("logit_bias", {"9" * 5000: 1}),
    ("logit_bias", {"5": "1"}),
    ("logit_bias", {"5": True}),
    ("logit_bias", {"5": 1e6}),
    ("logit_bias", {str(token): -100 for token in range(VOCAB)}),
    ("logit_bias", [1]),
    ("repetition_penalty", 0.01),
    ("repetition_penalty", -1),
    ("repeat_penalty", 0.5),
    ("presence_penalty", -50),
    ("frequency_penalty", "x"),
    ("stop_token_ids", [98]),
    ("stop_token_ids", "w5"),
    ("structured_outputs", {"grammar": "root ::= x"}),
    ("structured_outputs", {"structural_tag": "{}"}),
    ("response_format", {"type": "structural_tag"}),
    ("response_format", {"type": "grammar", "grammar": "x"}),
    ("response_format", "json"),
    ("temperature", "0"),
    ("temperature", False),
    ("temperature", -1),
    ("n", 10**9),
    ("n", 0),
    ("best_of", 10**9),
    ("max_tokens", 1e300),
    ("max_tokens", -1),
    ("logprobs", -1),
    ("logprobs", 10**6),
    ("stream", "yes"),
    ("stop", [5]),
    ("metadata", []),
]


@pytest.fixture(scope="module")
def prompter(tmp_path_factory):
    return tiny_prompter(tmp_path_factory.mktemp("fields"))


@pytest.fixture(params=PATHS)
def path(request) -> str:
    return request.param


def refused(prompter, path: str, fields: dict) -> RequestError:
    with pytest.raises(RequestError) as caught:
        getattr(prompter, path)({**PATHS[path], **fields})
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize("name", NOT_SERVED)
def test_a_field_that_is_not_served_is_a_400_with_its_name(prompter, path, name):
    error = refused(prompter, path, {name: NOT_SERVED[name], "temperature": 0})
    assert error.param == name
    why = REFUSED.get(name, "it is not among the fields that this proxy hands on")
    assert error.message == f"`{name}` is not served with soft prompts: {why}"


@pytest.mark.parametrize(("name", "value"), WRONG, ids=[f"{name}={value!s:.30}" for name, value in WRONG])
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_value_that_breaks_its_fields_rule_is_a_400_with_its_name(prompter, path, name, value, temperature):
    error = refused(prompter, path, {"temperature": temperature, name: value})
    assert error.param == name
    assert error.message.startswith(f"`{name}` must be ")


def test_a_field_that_says_nothing_is_left_out(prompter):
    body, _ = prompter.completion(
        {**PATHS["completion"], "temperature": 0, "prompt_logprobs": None, "echo": False, "id_slot": None, "stop": None}
    )
    assert set(body) == {"prompt", "temperature"}


SERVED = {
    "best_of": 2,
    "cache_salt": "x",
    "ignore_eos": True,
    "include_stop_str_in_output": True,
    "max_tokens": 5,
    "metadata": {"a": "b"},
    "min_p": 0.1,
    "n": 2,
    "seed": 7,
    "skip_special_tokens": False,
    "stop": ["x", "y"],
    "stop_token_ids": [5],
    "stream": True,
    "stream_options": {"include_usage": True},
    "top_k": -1,
    "top_p": 0.9,
    "user": "x",
}
STEERING = {
    "frequency_penalty": 1,
    "guided_choice": ["w5"],
    "guided_json": {},
    "guided_regex": "w.",
    "logit_bias": {"5": 7},
    "min_tokens": 3,
    "presence_penalty": -2,
    "repeat_penalty": 1.1,
    "repetition_penalty": 1.0,
    "response_format": {"type": "json_object"},
    "structured_outputs": {"choice": ["w5"]},
}


def test_all_that_is_served_reaches_the_engine_as_it_is(prompter, path):
    for fields in (SERVED, {**SERVED, **STEERING, "logit_bias": None}):
        body, _ = getattr(prompter, path)({**PATHS[path], **fields, "temperature": 0.5})
        for name, value in fields.items():
            assert value is None or body[name] == value


@pytest.mark.parametrize("name", STEERING)
def test_beside_what_can_change_the_greatest_logit_greedy_requests_have_the_bias_too(prompter, path, name):
    body, _ = getattr(prompter, path)({**PATHS[path], "temperature": 0, name: STEERING[name]})
    own = STEERING[name] if name == "logit_bias" else {}
    assert body["logit_bias"] == {**own, **prompter.exported.logit_bias}


def test_the_page_on_serving_lists_the_fields():
    page = (Path(__file__).parent.parent / "docs" / "serving.md").read_text(encoding="utf-8")
    lists = page[page.index("### Fields") :].partition("\n* ")[0].partition("`/v1/completions`:")
    both, (completions, _, chats) = lists[0], lists[2].partition("`/v1/chat/completions`:")
    named = {
        name: set(re.findall("`([a-z_]+)`", text)) for name, text in (("b", both), ("c", completions), ("h", chats))
    }
    assert named["b"] == set(COMPLETION_FIELDS) & set(CHAT_FIELDS)
    assert named["b"] | named["c"] == set(COMPLETION_FIELDS)
    assert named["b"] | named["h"] == set(CHAT_FIELDS)
    assert set(REFUSED) <= set(re.findall("`([a-z_]+)`", page[page.index("* Not in the list") :]))


def test_every_field_that_steers_is_in_the_list_of_this_test():
    both = {**COMPLETION_FIELDS, **CHAT_FIELDS}
    assert {name for name, field in both.items() if field.steers} == {*STEERING, "tool_choice"}


def test_fields_that_the_proxy_is_told_of_pass_with_the_bias(prompter):
    other = RequestPrompter(prompter.router, prompter.exported, extra_fields=["min_keep", "prompt_logprobs"])
    body, _ = other.completion({**PATHS["completion"], "temperature": 0, "min_keep": 3})
    assert body["min_keep"] == 3
    assert body["logit_bias"] == prompter.exported.logit_bias
    assert refused(other, "completion", {"prompt_logprobs": 1}).param == "prompt_logprobs", "never these"


def nested(depth: int):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"metadata": {"a": nested(100)}}, "the body must be nested at most 64 deep"),
        ({"metadata": {str(index): 1 for index in range(20_001)}}, "the body must hold at most 20000 values"),
        ({"metadata": {"a": [[]] * 20_001}}, "the body must hold at most 20000 values"),
        ({"metadata": {"a": float("nan")}}, "the body must hold finite numbers"),
        ({"top_p": float("inf")}, "the body must hold finite numbers"),
    ],
)
def test_a_body_that_is_too_large_to_walk_through_is_refused(prompter, path, fields, text):
    assert text in refused(prompter, path, fields).message


def test_an_error_is_short_and_can_be_written_whatever_the_request_said(prompter):
    error = refused(prompter, "completion", {"\ud800" + "x" * 100_000: 1})
    assert len(error.message) == len(error.param) == 1000
    error.message.encode()
    error.param.encode()


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": ["<|idp:0:00|>"]},
        {"user": "a <|idp:3:03|> b"},
        {"metadata": {"<|idp:1:02|>": 1}},
        {"guided_choice": ["w5", "<|idp:1:02|>"]},
        {"response_format": {"type": "json_schema", "json_schema": {"const": "<|idp:1:02|>"}}},
    ],
)
def test_no_field_may_hold_a_name_of_a_soft_prompts_token(prompter, path, fields):
    (name,) = fields
    error = refused(prompter, path, fields)
    assert (error.message, error.param) == (f"`{name}` must not hold the names of soft prompt tokens", name)


@pytest.mark.parametrize(
    "message",
    [
        {"content": "w5 <|idp:0:00|>"},
        {"content": [{"type": "text", "text": "<|idp:0:00|>"}]},
        {"content": "w5", "reasoning": "<|idp:0:00|>"},
        {"content": "w5", "tool_calls": [{"function": {"name": "f", "arguments": "<|idp:0:00|>"}}]},
        {"content": "w5", "tool_calls": [{"function": {"name": "f", "arguments": '"<|idp:0:\\u0030\\u0030|>"'}}]},
        {"content": "w5", "<|idp:0:00|>": "w5"},
    ],
)
def test_no_message_may_hold_one_where_ever_it_stands(prompter, message):
    """Whether the template shows it or not: the engine's may."""
    assert "must not hold the names" in refused(prompter, "chat", {"messages": [{"role": "user", **message}]}).message


def test_names_that_are_no_tokens_are_text(prompter):
    prompter.chat({"messages": [{"role": "user", "content": "w5 <|idp:9:99|> <|idp:"}]})
