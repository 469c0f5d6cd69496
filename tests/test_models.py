"""docs/models.md is what the sweep over transformers' model classes found; a few of its rows are run here, all of them by
`make test-models`."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from peft import get_peft_model

from idp_peft import IDPConfig
from idp_peft.composition.base_skeleton import position_counts_bank
from idp_peft.hosting.architectures import find_decoder, first_scaled_slot
from tests.every_model.check import tokens
from tests.every_model.shrink import tiny_model
from tests.every_model.sweep import outcome, read_results, rows
from tests.every_model.table import PAGE, render, versions

# One of each kind: what makes it hard, or why it is refused.
ROWS = [
    "Llama4ForCausalLM",  # attention in chunks; `get_decoder()` stops too early
    "ModernBertDecoderForCausalLM",  # `get_decoder()` leads to its head
    "GPTNeoForCausalLM",  # windows that the cache does not know
    "PhimoeForCausalLM",  # a window that only the mask knows
    "DogeForCausalLM",  # a bias that the layer makes itself
    "DeepseekV3ForCausalLM",  # keys and values of different widths
    "GptOssForCausalLM",  # attention sinks
    "XGLMForCausalLM",  # positions that are computed and added
    "FalconForCausalLM: ALiBi",
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


def prompted(name: str, **config):
    model = tiny_model(getattr(tf, name), **config)
    return get_peft_model(model, IDPConfig(task_type="CAUSAL_LM", num_prompts=2, num_virtual_tokens=4)).eval()


SCALED = {"llama_4_scaling_beta": 0.5, "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("Llama4ForCausalLM", {"no_rope_layers": [1, 0, 1], "floor_scale": 12}),
        ("Ministral3ForCausalLM", {"rope_parameters": {**SCALED, "original_max_position_embeddings": 11}}),
    ],
)
def test_padding_is_not_counted_where_attention_is_scaled_by_place(name, config):
    """By position: a padded row is that row alone. By cache slot: an error, from the first slot that is scaled on."""
    model = prompted(name, **config)
    ids, mask = tokens([5, 7], "left")
    with torch.no_grad():
        assert model(input_ids=ids, attention_mask=mask, use_cache=False).logits.shape[:2] == (2, 7), "below the first"
    ids, mask = tokens([5, 9], "left")
    alone = model(input_ids=ids[:1, 4:]).logits[0]
    if first_scaled_slot(find_decoder(model.get_base_model())) is None:
        assert name != "Llama4ForCausalLM"
        together = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0, 4:]
        assert (together - alone).abs().max() < 1e-4
        return
    message = r"left-padded rows of {} positions on \w+: from 11 on it scales attention by a token's place in the cache"
    with pytest.raises(ValueError, match=message.format(13)):
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    with pytest.raises(ValueError, match=message.format(12)):
        model.generate(input_ids=ids[:, 2:], attention_mask=mask[:, 2:], max_new_tokens=1)


@pytest.mark.parametrize(
    ("name", "counts"), [("XGLMForCausalLM", True), ("GPTNeoForCausalLM", True), ("LlamaForCausalLM", False)]
)
def test_the_length_of_a_bank_counts_where_positions_are_added(name, counts):
    assert position_counts_bank(tiny_model(getattr(tf, name))) is counts


def test_a_layer_whose_windows_count_slots_cannot_choose():
    model = tiny_model(tf.GPTNeoForCausalLM)
    with pytest.raises(
        ValueError, match=r"`selection_layer` must be 0 on 'gpt_neo', got 2: the windows of its deeper layers"
    ):
        get_peft_model(model, IDPConfig(task_type="CAUSAL_LM", selection_layer=2))
    get_peft_model(model, IDPConfig(task_type="CAUSAL_LM", selection_layer=2, selection="random"))


def test_keys_that_are_dropped_by_what_comes_later_are_refused():
    if tf.__version__.startswith("5.0."):
        pytest.skip("Doge is refused: it attends in both directions")
    model = prompted("DogeForCausalLM", keep_window_size=12)
    assert model(input_ids=torch.arange(20, 28)[None]).logits.shape[:2] == (1, 8)
    message = (
        r"9 input tokens and 4 prompt positions are more than the 12 keys that the model attends to at once "
        r"\(`keep_window_size`\), and which of them it drops depends on later tokens: shorten the input to 8 tokens"
    )
    with pytest.raises(ValueError, match=message):
        model(input_ids=torch.arange(20, 29)[None])
