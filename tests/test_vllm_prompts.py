"""vLLM prompts of embeddings: what an engine would compute from them is what the adapter computes."""

from __future__ import annotations

import base64
import io
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from idp_peft.serving import Router, VllmPrompts
from tests.tiny_chats import CHAT_TEMPLATE, chat_tokenizer
from tests.tiny_serving import Saved, saved

TEXTS = ["w5 w11 w7 w30", "w64 w9", "w8 w20 w31 w44 w2 w3"]


def prompts_of(one: Saved) -> VllmPrompts:
    return VllmPrompts(Router.from_pretrained(one.adapter, one.base))


def engine(one: Saved, vectors: torch.Tensor) -> list[int]:
    """An engine that is given embeddings."""
    base = AutoModelForCausalLM.from_pretrained(one.base).eval()
    return base.generate(inputs_embeds=vectors[None], max_new_tokens=8, do_sample=False)[0].tolist()


def decoded(text: str) -> torch.Tensor:
    return torch.load(io.BytesIO(base64.b64decode(text, validate=True)), weights_only=True)


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt"])
def test_the_embeddings_make_an_engine_say_what_the_adapter_says(tmp_path, name):
    one = saved(tmp_path, name)
    prompts = prompts_of(one)
    tokenizer = chat_tokenizer()
    for forced in (None, [2, 0, -1]):
        chosen = prompts.router.route(TEXTS).prompt_ids.tolist() if forced is None else forced
        for text, prompt, made in zip(TEXTS, chosen, prompts.for_llm(TEXTS, forced), strict=True):
            ids = tokenizer(text)["input_ids"]
            assert set(made) == {"prompt_embeds"}
            assert made["prompt_embeds"].shape == (
                len(ids) + (4 if prompt >= 0 else 0),
                prompts.router.prompts[0].shape[1],
            )
            assert engine(one, made["prompt_embeds"]) == one.generate(ids, prompt)


def test_the_mixed_form_leaves_the_texts_tokens_to_the_engine(tmp_path):
    one = saved(tmp_path, "gemma3")
    prompts = prompts_of(one)
    embeddings = AutoModelForCausalLM.from_pretrained(one.base).get_input_embeddings()
    for whole, mixed in zip(prompts.for_llm(TEXTS), prompts.for_llm(TEXTS, mixed=True), strict=True):
        is_token = torch.tensor(mixed["prompt_is_token_ids"])
        looked_up = embeddings(torch.tensor(mixed["prompt_token_ids"]))
        assert torch.equal(torch.where(is_token[:, None], looked_up, mixed["prompt_embeds"]), whole["prompt_embeds"])
        assert is_token.tolist() == [False] * 4 + [True] * (len(is_token) - 4)


def test_a_completions_body_holds_the_embeddings_and_what_else_was_given(tmp_path):
    prompts = prompts_of(saved(tmp_path))
    body = json.loads(json.dumps(prompts.completion_body(TEXTS, model="m", max_tokens=3)))
    assert {name: body[name] for name in body if name != "prompt_embeds"} == {"model": "m", "max_tokens": 3}
    for text, made in zip(body["prompt_embeds"], prompts.for_llm(TEXTS), strict=True):
        assert torch.equal(decoded(text), made["prompt_embeds"])
    (alone,) = prompts.for_llm(TEXTS[:1])
    assert torch.equal(decoded(prompts.completion_body(TEXTS[:1])["prompt_embeds"]), alone["prompt_embeds"])


def test_the_base64_of_a_prompt_holds_that_prompt_alone(tmp_path):
    body = prompts_of(saved(tmp_path, num_virtual_tokens=4)).chat_body([{"role": "user", "content": "w5"}], 1)
    (small,) = (part["data"] for part in body["messages"][0]["content"])
    body = prompts_of(saved(tmp_path / "more", num_prompts=60, num_virtual_tokens=4)).chat_body(
        [{"role": "user", "content": "w5"}], 1
    )
    assert len(body["messages"][0]["content"][0]["data"]) == len(small), "a view would bring all prompts along"


def test_a_chat_body_begins_with_a_message_that_the_chat_template_puts_in_front(tmp_path):
    one = saved(tmp_path)
    prompts = prompts_of(one)
    chat = [
        {"role": "user", "content": "w5 w6"},
        {"role": "assistant", "content": "w7"},
        {"role": "user", "content": "w8"},
    ]
    body = prompts.chat_body(chat, model="m")
    tokenizer = chat_tokenizer()
    plain = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    row = tokenizer(plain, add_special_tokens=False)["input_ids"]
    chosen = int(prompts.router.route([row]).prompt_ids[0])
    first, *rest = body["messages"]
    assert rest == chat
    assert first["role"] == "idp"
    ((part),) = first["content"]
    assert part["type"] == "prompt_embeds"
    assert torch.equal(decoded(part["data"]), prompts.router.prompts[chosen])
    assert torch.equal(
        decoded(prompts.chat_body(chat, 2)["messages"][0]["content"][0]["data"]), prompts.router.prompts[2]
    )
    # An engine puts a placeholder where the part was, as a text or as a list of one.
    for content in ("<placeholder>", [{"type": "text", "text": "<placeholder>"}]):
        messages = [{"role": "idp", "content": content}, *chat]
        rendered = tokenizer.apply_chat_template(
            messages, chat_template=prompts.chat_template(), tokenize=False, add_generation_prompt=True
        )
        assert rendered == f"<placeholder>{plain}"
    assert tokenizer.apply_chat_template(chat, chat_template=prompts.chat_template(), tokenize=False) == (
        tokenizer.apply_chat_template(chat, chat_template=CHAT_TEMPLATE, tokenize=False)
    )


def test_a_key_value_prompt_is_a_placeholder_in_front_of_the_texts_tokens(tmp_path):
    one = saved(tmp_path, prompts="key_values", init_weights=False)
    prompts, tokenizer = prompts_of(one), chat_tokenizer()
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    chosen = prompts.router.route(TEXTS).prompt_ids.tolist()
    made = [prompt["prompt_token_ids"] for prompt in prompts.for_llm(TEXTS)]
    assert made == [[prompt] * 4 + row for prompt, row in zip(chosen, rows, strict=True)]
    body = prompts.completion_body(TEXTS, [2, -1, 0], model="m")
    assert body == {"model": "m", "prompt": [[2] * 4 + rows[0], rows[1], [0] * 4 + rows[2]]}
    with pytest.raises(ValueError, match=r"`prompt_ids` must be between -1 \(no prompt\) and 2, got 3"):
        prompts.for_llm(TEXTS[:1], [3])
    with pytest.raises(ValueError, match="render the chat, and use `completion_body`"):
        prompts.chat_body([{"role": "user", "content": "w5"}], 1)


def test_what_is_no_prompt_is_refused(tmp_path):
    prompts = prompts_of(saved(tmp_path))
    with pytest.raises(ValueError, match=r"`prompt_ids` must be between -1 \(no prompt\) and 2, got 3"):
        prompts.for_llm(TEXTS[:1], [3])
    prompts.router.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="the tokenizer must have one chat template"):
        prompts.chat_template()


def test_building_prompts_imports_no_vllm(tmp_path):
    import sys

    prompts_of(saved(tmp_path)).for_llm(TEXTS)
    assert "vllm" not in sys.modules
