"""`pipeline("text-generation")`, batched, with an IDP model and with an adapter's folder."""

from __future__ import annotations

import logging
import warnings
from threading import Thread

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig, TextIteratorStreamer, pipeline

from idp_peft import IDPConfig
from tests.reference import bank_of, brute_force_scores
from tests.tiny import tiny
from tests.tiny_chats import chat_tokenizer
from tests.tiny_folder import tiny_folder

TEXTS = ["w5 w6", "w7 w8 w9 w10 w11 w12 w13", "w20 w21 w22", "w30 w31 w32 w33", "w40"]
CHATS = [
    [{"role": "user", "content": "w5 w6 w7"}],
    [{"role": "system", "content": "w8"}, {"role": "user", "content": "w9 w10 w11 w12"}],
    [
        {"role": "user", "content": "w13 w14"},
        {"role": "assistant", "content": "w15"},
        {"role": "user", "content": "w16 w17"},
    ],
]


@pytest.fixture
def places(make, tmp_path):
    """Folders of a base and of an adapter of it with a tokenizer, and the model itself."""
    base = tiny_folder(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = IDPConfig(task_type="CAUSAL_LM", num_prompts=4, num_virtual_tokens=[3, 5, 2, 5])
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    model.save_pretrained(tmp_path / "adapter")
    chat_tokenizer().save_pretrained(tmp_path / "adapter")
    return model, str(tmp_path / "adapter")


def left_padding():
    tokenizer = chat_tokenizer()
    tokenizer.padding_side = "left"  # later versions of transformers set this themselves
    return tokenizer


def settings(**more):
    return {
        "generation_config": GenerationConfig(**{"max_new_tokens": 6, "pad_token_id": 0, "do_sample": False, **more})
    }


@pytest.fixture(params=["peft model", "native model", "folder"])
def generator(request, places):
    model, adapter = places
    if request.param == "peft model":
        return pipeline("text-generation", model=model, tokenizer=left_padding(), batch_size=3)
    if request.param == "folder":
        return pipeline("text-generation", model=adapter, tokenizer=left_padding(), batch_size=3)
    native = AutoModelForCausalLM.from_pretrained(model.peft_config["default"].base_model_name_or_path)
    native.load_adapter(adapter)
    return pipeline("text-generation", model=native, tokenizer=left_padding(), batch_size=3)


def said_alone(model, ids):
    """What a row is answered with by itself, without padding."""
    return model.generate(input_ids=torch.tensor([ids]), **settings())[0, len(ids) :].tolist()


def test_every_text_is_what_it_is_alone(generator, places):
    tokenizer = left_padding()
    outputs = generator(TEXTS, return_tensors=True, **settings())
    for text, (output,) in zip(TEXTS, outputs, strict=True):
        ids = tokenizer(text).input_ids
        expected = ids + said_alone(places[0], ids)
        assert output["generated_token_ids"][-len(expected) :] == expected
    whole = generator(TEXTS, **settings())
    parts = generator(TEXTS, return_full_text=False, **settings())
    for text, (full,), (part,) in zip(TEXTS, whole, parts, strict=True):
        assert full["generated_text"].startswith(text)
        assert full["generated_text"][len(text) :].split() == part["generated_text"].split()
        alone = said_alone(places[0], tokenizer(text).input_ids)
        assert part["generated_text"].split() == tokenizer.decode(alone, skip_special_tokens=True).split()


def test_chats(generator, places):
    tokenizer = left_padding()
    outputs = generator(CHATS, **settings())
    for chat, (output,) in zip(CHATS, outputs, strict=True):
        *before, answer = output["generated_text"]
        assert before == chat
        assert answer["role"] == "assistant"
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True).input_ids
        alone = tokenizer.decode(said_alone(places[0], ids), skip_special_tokens=True)
        assert answer["content"].split() == alone.split()


def test_each_row_of_a_batch_gets_its_own_prompt(generator, places):
    model, tokenizer = places[0], left_padding()
    generator(TEXTS[:3], **settings())
    served = generator.model
    chosen = served.last_selection if isinstance(served, PeftModel) else served.model.idp.last_selection
    expected = []
    for text in TEXTS[:3]:
        ids = tokenizer(text, return_tensors="pt").input_ids
        ones = torch.ones_like(ids)
        expected.append(brute_force_scores(model, tiny("llama", "eager"), ids, ones, ones, 0, "mean").argmax().item())
    assert chosen.prompt_ids.tolist() == expected
    assert len(set(expected)) > 1


def test_several_answers_per_text(generator, places):
    torch.manual_seed(0)
    sampled = generator(TEXTS[:3], num_return_sequences=4, **settings(do_sample=True))
    assert [len(answers) for answers in sampled] == [4, 4, 4]
    assert len({answer["generated_text"] for answers in sampled for answer in answers}) > 3
    beams = generator(TEXTS[:3], return_tensors=True, **settings(num_beams=3, num_return_sequences=2))
    tokenizer = left_padding()
    for text, answers in zip(TEXTS, beams, strict=False):
        ids = torch.tensor([tokenizer(text).input_ids])
        alone = places[0].generate(input_ids=ids, **settings(num_beams=3, num_return_sequences=2))
        assert [answer["generated_token_ids"][-alone.shape[1] :] for answer in answers] == alone.tolist()


def test_nothing_is_warned_about_that_the_base_alone_is_not(places, caplog):
    """Such as that the model's class is not supported."""
    model, adapter = places
    logging.getLogger("transformers").propagate = True
    messages = []
    for each in (model.peft_config["default"].base_model_name_or_path, model, adapter):
        caplog.clear()
        with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.WARNING):
            warnings.simplefilter("always")
            generator = pipeline("text-generation", model=each, tokenizer=left_padding(), batch_size=2)
            generator(TEXTS, max_new_tokens=6, do_sample=False)
        logged = {record.getMessage() for record in caplog.records}
        messages.append(logged | {str(each.message) for each in caught})
    base, *ours = messages
    for each in ours:
        assert each - base == set()


@pytest.mark.parametrize("as_pipeline", [True, False])
def test_streaming_from_a_thread(places, as_pipeline):
    model, tokenizer = places[0], left_padding()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    if as_pipeline:
        generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
        thread = Thread(target=generator, args=(TEXTS[1],), kwargs={"streamer": streamer, **settings()})
    else:
        inputs = tokenizer(TEXTS[1], return_tensors="pt")
        thread = Thread(target=model.generate, kwargs={**inputs, "streamer": streamer, **settings()})
    thread.start()
    pieces = list(streamer)
    thread.join()
    alone = said_alone(model, tokenizer(TEXTS[1]).input_ids)
    assert "".join(pieces).split() == tokenizer.decode(alone, skip_special_tokens=True).split()
    assert len(pieces) > 1


def test_a_folder_brings_its_prompts(places):
    model, adapter = places
    served = pipeline("text-generation", model=adapter).model
    assert torch.equal(served.model.idp.idp_prompts["default"].weight, bank_of(model).weight)
