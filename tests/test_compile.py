"""torch.compile of the base: the same tokens, and nothing is compiled again for another prompt."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from tests.reference import bank_of
from tests.tiny import tiny, token_batch

# How people compile a transformers model. The "eager" backend runs the graphs as they are: what is tested is what they hold
# and when they are made.
WAYS = {
    "forward": lambda base: setattr(base, "forward", torch.compile(base.forward, backend="eager")),
    "decoder forward": lambda base: setattr(base.model, "forward", torch.compile(base.model.forward, backend="eager")),
    "compile()": lambda base: base.compile(backend="eager"),
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def ask(model, ids, **arguments):
    arguments = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static", **arguments}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **arguments)


def graphs() -> int:
    return counters["stats"].get("unique_graphs", 0)


def compiles_the_base_again(way: str, ids) -> bool:
    """Whether a second request like the first compiles something where there is no IDP, as under torch 2.6."""
    base = tiny("llama")
    WAYS[way](base)
    ask(base, ids)
    once = graphs()
    ask(base, ids)
    again = graphs() > once
    torch.compiler.reset()
    counters.clear()
    return again


@pytest.mark.parametrize("way", list(WAYS))
def test_requests_that_choose_other_prompts_compile_nothing_after_the_first(make, way):
    ids, _ = token_batch([9])
    if compiles_the_base_again(way, ids):
        pytest.skip("this torch compiles the base alone again for a second request, whose cache is another")
    plain, model = make("llama"), make("llama")
    with torch.no_grad():
        bank_of(model).weight.copy_(bank_of(plain).weight)
    WAYS[way](model.get_base_model())
    assert torch.equal(ask(model, ids, prompt_ids=0), ask(plain, ids, prompt_ids=0))
    warm, chosen = graphs(), set()
    assert warm > 0, "nothing was compiled"
    for prompt in (1, 3, 2, 0):
        assert torch.equal(ask(model, ids, prompt_ids=prompt), ask(plain, ids, prompt_ids=prompt))
    for seed in range(8):
        other = torch.randint(2, 97, (1, 9), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(ask(model, other), ask(plain, other))
        assert torch.equal(model.last_selection.prompt_ids, plain.last_selection.prompt_ids)
        chosen.add(int(model.last_selection.prompt_ids))
    assert len(chosen) > 1, "the inputs must differ in what they choose"
    assert graphs() == warm


@pytest.mark.slow
def test_a_request_of_another_length_does_compile(make):
    """So the count above can fail."""
    model = make("llama")
    WAYS["decoder forward"](model.get_base_model())
    ask(model, token_batch([9])[0])
    warm = graphs()
    ask(model, token_batch([12])[0])
    assert graphs() > warm
