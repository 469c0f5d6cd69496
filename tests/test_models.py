"""docs/models.md is what the sweep over transformers' model classes found; a few of its rows are run here, all of them by
`make test-models`."""

from __future__ import annotations

import pytest

from tests.every_model.sweep import outcome, read_results, rows
from tests.every_model.table import PAGE, render, versions

# One of each kind: what makes it hard, or why it is refused.
ROWS = [
    "Llama4ForCausalLM",  # attention in chunks; `get_decoder()` stops too early
    "ModernBertDecoderForCausalLM",  # `get_decoder()` leads to its head
    "GPTNeoForCausalLM",  # windows that the cache does not know
    "PhimoeForCausalLM",  # a window that only the mask knows
    "DogeForCausalLM: few keys",  # a bias that the layer makes itself, and keys that it drops
    "DeepseekV3ForCausalLM",  # keys and values of different widths
    "GptOssForCausalLM",  # attention sinks
    "XGLMForCausalLM",  # positions that are computed and added
    "Ministral3ForCausalLM: scaled by position",
    "FalconForCausalLM: ALiBi",
    "SmolVLMForConditionalGeneration",  # makes a cache for every call, in training too
    "Lfm2ForCausalLM",  # convolutions
    "WhisperForCausalLM",  # cross-attention
    "BertLMHeadModel",  # both directions
    "DbrxForCausalLM",  # attention in a place of its own
    "MusicgenMelodyForCausalLM",  # one table per codebook
]


@pytest.mark.parametrize("row", ROWS)
def test_a_model_is_right_or_refused_as_the_table_says(row):
    known = read_results()
    if row not in rows():
        pytest.skip("this transformers has no such model")
    found = outcome(row)
    assert found.status in ("works", "refused"), found.reason
    assert found == known.get(row, found)


def test_the_page_is_made_of_the_results():
    assert PAGE.read_text() == render(), "run `python -m tests.every_model.table`"


def test_every_row_is_right_or_says_why_not():
    assert len(versions()) == 2
    for version in versions():
        for row, found in read_results(version).items():
            assert found.status in ("works", "refused", "not built", "fails by itself"), row
            assert bool(found.reason) == (found.status != "works"), row
            assert found.status != "refused" or found.reason.startswith("IDP "), row
