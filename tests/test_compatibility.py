"""Everything of `forward` and `generate`, on every architecture: right, or the base model alone is not right either."""

from __future__ import annotations

import copy

import pytest

from benchmarks.compatibility.matrix import FEATURES, contestant, judge
from tests.tiny import NAMES, VOCAB, tiny


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("feature", list(FEATURES))
def test_feature_is_right(name, feature):
    base = tiny(name)
    verdict, message = judge(feature, contestant("idp", base, VOCAB))
    if verdict == "undefined":
        pytest.skip(f"{name}, {feature}: {message}")
    if verdict != "right":
        # The base alone, on inputs as long as prompt and input together.
        alone_contestant = contestant("base", base, VOCAB)
        alone_contestant.lengths = tuple(length + 4 for length in alone_contestant.lengths)
        alone, alone_message = judge(feature, alone_contestant)
        if alone != "right":
            pytest.skip(f"{name}, {feature}: the base model alone: {alone} ({alone_message})")
    assert verdict == "right", message


@pytest.mark.parametrize(
    "feature", ["left-padded batch, forward", "left-padded batch, generate", "left-padded batch, beams"]
)
def test_a_broken_method_is_noticed(feature):
    """The checks can fail: swap two prompts behind the method's back."""
    broken = contestant("idp", tiny("llama"), VOCAB)
    definition = copy.deepcopy(broken)
    bank = broken.model.base_model.layer.idp_prompts["default"]
    bank.weight.data = bank.weight.data.roll(1, 0)
    broken.prompt = definition.prompt
    assert judge(feature, broken)[0] == "wrong"
