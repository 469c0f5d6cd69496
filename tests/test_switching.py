"""An adapter that another thread sets while a call runs: the call keeps the one it began with."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import LogitsProcessor

from idp_peft import IDPConfig
from idp_peft.hosting.architectures import find_decoder
from tests.reference import bank_of
from tests.tiny import token_batch


@pytest.fixture
def two(make):
    """A model with two banks of unlike sizes, "default" of four prompts and "other" of two longer ones."""

    def build(name: str = "llama"):
        model = make(name)
        model.add_adapter("other", IDPConfig(task_type="CAUSAL_LM", num_prompts=2, num_virtual_tokens=[6, 7]))
        with torch.no_grad():
            bank_of(model, "other").weight.normal_()
        model.set_adapter("default")
        return model.eval()

    return build


def in_another_thread(work) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


class Switches(LogitsProcessor):
    """Sets the other adapter, from another thread, while the third token is being chosen."""

    def __init__(self, model) -> None:
        self.model, self.calls = model, 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.calls == 3:
            in_another_thread(lambda: self.model.set_adapter("other"))
        return scores


WAYS = {
    "cache": {},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "static cache": {"cache_implementation": "static"},
    "forced prompts": {"prompt_ids": [3, 2]},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("way", list(WAYS))
def test_a_generate_keeps_the_adapter_it_began_with(way, name, two):
    model = two(name)
    ids, mask = token_batch([7, 4])
    if way == "prompt lookup":
        ids, mask = ids[:1], mask[:1]
    arguments = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 8, "do_sample": False, **WAYS[way]}
    expected = model.generate(**arguments)
    switches = Switches(model)
    found = model.generate(**arguments, logits_processor=[switches])
    assert switches.calls >= 3
    assert model.base_model.layer.active_name == "other", "the next call has the other one"
    assert torch.equal(found, expected)
    model.set_adapter("default")
    assert torch.equal(model.generate(**arguments), expected)


@pytest.mark.parametrize("labels", [False, True])
def test_a_forward_keeps_the_adapter_it_began_with(labels, two):
    model = two()
    ids, mask = token_batch([7, 4])
    more = {"labels": ids} if labels else {}
    expected = model(ids, attention_mask=mask, **more).logits
    decoder = find_decoder(model.get_base_model())
    handle = decoder.register_forward_pre_hook(
        lambda *_: in_another_thread(lambda: model.set_adapter("other")), prepend=True
    )
    found = model(ids, attention_mask=mask, **more).logits
    handle.remove()
    assert torch.equal(found, expected)
    assert not torch.equal(model(ids, attention_mask=mask, **more).logits, expected)


def test_a_call_whose_adapters_are_disabled_in_the_middle_says_so(two):
    model = two()
    ids, _ = token_batch([7])

    class Disables(Switches):
        def __call__(self, input_ids, scores):
            self.model.base_model.layer.enable_adapters(False)
            return scores

    with pytest.raises(RuntimeError, match="can only be continued by a model with its IDP adapter enabled"):
        model.generate(input_ids=ids, max_new_tokens=4, logits_processor=[Disables(model)])


def test_threads_that_switch_and_threads_that_generate(two):
    model = two()
    ids, mask = token_batch([7, 4])
    arguments = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    allowed = []
    for name in ("other", "default"):
        model.set_adapter(name)
        allowed.append(model.generate(**arguments).tolist())
    found, stop = [], threading.Event()

    def switch() -> None:
        while not stop.is_set():
            model.set_adapter("other")
            model.set_adapter("default")

    def generate() -> None:
        for _ in range(6):
            found.append(model.generate(**arguments).tolist())

    switching, workers = threading.Thread(target=switch), [threading.Thread(target=generate) for _ in range(3)]
    for thread in (switching, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    stop.set()
    switching.join()
    assert len(found) == 18
    assert all(one in allowed for one in found)
