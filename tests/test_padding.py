"""Padding on the side that `generate` goes on from: on the left, or refused, never a row that goes on behind its padding."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, DynamicCache

import idp_peft
from idp_peft import IDPConfig
from idp_peft.models.loading import load_tokenizer
from idp_peft.recover.training import collate, training_examples
from idp_peft.serving import Router, export_to_vocab
from idp_peft.texts.tokens import padded_batch
from tests.tiny import tiny, token_batch
from tests.tiny_folder import tiny_folder

LENGTHS = [4, 9, 6]
GREEDY = {"max_new_tokens": 4, "do_sample": False}
REFUSED = (
    r"`generate` needs padding on the left: row\(s\) \[0, 2\] end in padding, and new tokens would come behind it. "
    "Set `tokenizer.padding_side = 'left'` before you tokenize"
)


@pytest.fixture
def adapter(tmp_path):
    """A folder of an adapter on the tiny model in `base` beside it, whose tokenizer pads on the right, as most do."""
    base = AutoModelForCausalLM.from_pretrained(tiny_folder(tmp_path / "base"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(base, IDPConfig(task_type="CAUSAL_LM", num_virtual_tokens=[3, 5, 2, 5])).save_pretrained(
            tmp_path / "adapter"
        )
    assert AutoTokenizer.from_pretrained(tmp_path / "base").padding_side == "right"
    return tmp_path / "adapter"


# ------------------------------------------------------------------ tokenizers that are handed out


def beside_it(adapter):
    AutoTokenizer.from_pretrained(adapter.parent / "base").save_pretrained(adapter)
    return idp_peft.load(adapter)[1]


def of_an_exported_model(adapter):
    return AutoTokenizer.from_pretrained(export_to_vocab(adapter, adapter.parent / "served"))


HANDED_OUT = {
    "load": lambda adapter: idp_peft.load(adapter)[1],
    "load, beside the adapter": beside_it,
    "load_tokenizer": lambda adapter: load_tokenizer(adapter.parent / "base"),
    "router": lambda adapter: Router.from_pretrained(adapter).tokenizer,
    "export": of_an_exported_model,
}


@pytest.mark.parametrize("way", list(HANDED_OUT))
@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_of_a_tokenizer_that_we_hand_out_is_answered_as_each_row_alone(adapter, way, beams):
    texts = ["w5 w6", "w7 w8 w9 w10 w11 w12", "w20 w21 w22"]
    tokenizer, (model, _) = HANDED_OUT[way](adapter), idp_peft.load(adapter)

    def answers(texts: list[str]) -> torch.Tensor:
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        return model.generate(**batch, **GREEDY, num_beams=beams)[:, -4:]

    assert torch.equal(answers(texts), torch.cat([answers([text]) for text in texts]))


# ------------------------------------------------------------------ what pads for itself, whatever a tokenizer says


def test_training_and_evaluation_pad_on_the_right_by_themselves():
    rows = [[5, 6, 7], [8, 9]]
    batch = collate(training_examples(rows, 1))
    assert batch["attention_mask"].tolist() == padded_batch(rows)[1].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]


@pytest.mark.parametrize("assignment", ["selected", "all"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral_small_window"])
def test_a_loss_is_the_same_with_a_tokenizer_of_ours_as_with_one_that_pads_on_the_right(
    make, adapter, name, assignment
):
    model = make(name, assignment=assignment).train()
    losses = []
    for tokenizer in (AutoTokenizer.from_pretrained(adapter.parent / "base"), load_tokenizer(adapter.parent / "base")):
        rows = [tokenizer(text) for text in ("w5 w6 w7", "w8 w9 w10 w11 w12 w13")]
        rows = [{**row, "labels": [-100, *row["input_ids"][1:]]} for row in rows]
        losses.append(model(**DataCollatorForSeq2Seq(tokenizer)(rows)).loss)
    assert torch.allclose(*losses, rtol=1e-5)


# ------------------------------------------------------------------ padding on the right is refused by every `generate`


def second_turn(model, ids, mask):
    opening = torch.full_like(ids[:, :1], 5)
    first = model.generate(input_ids=opening, **GREEDY, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, ids], dim=1)
    mask = torch.cat([torch.ones_like(first.sequences), mask], dim=1)
    return model.generate(input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, **GREEDY)


def in_chunks() -> dict:
    return {"prefill_chunk_size": 3, "past_key_values": DynamicCache()}  # transformers 5.0 makes no cache of its own


WAYS = {
    "greedy": lambda model, ids, mask: model.generate(input_ids=ids, attention_mask=mask, **GREEDY),
    "a mask of booleans": lambda model, ids, mask: model.generate(ids, attention_mask=mask.bool(), **GREEDY),
    "no mask": lambda model, ids, mask: model.generate(ids, **GREEDY),
    "no mask, another padding token": lambda model, ids, mask: model.generate(
        ids.masked_fill(mask == 0, 96), pad_token_id=96, **GREEDY
    ),
    "beams": lambda model, ids, mask: model.generate(ids, attention_mask=mask, num_beams=3, **GREEDY),
    "sampling": lambda model, ids, mask: model.generate(ids, attention_mask=mask, do_sample=True),
    "embeddings": lambda model, ids, mask: model.generate(
        inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask, **GREEDY
    ),
    "no cache": lambda model, ids, mask: model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY),
    "own cache": lambda model, ids, mask: model.generate(
        ids, attention_mask=mask, past_key_values=DynamicCache(config=model.config), **GREEDY
    ),
    "static cache": lambda model, ids, mask: model.generate(
        ids, attention_mask=mask, cache_implementation="static", **GREEDY
    ),
    "chunks": lambda model, ids, mask: model.generate(ids, attention_mask=mask, **in_chunks(), **GREEDY),
    "forced": lambda model, ids, mask: model.generate(ids, attention_mask=mask, prompt_ids=[0, -1, 2], **GREEDY),
    "forced, chunks, no mask": lambda model, ids, mask: model.generate(
        ids, prompt_ids=[0, 1, 2], **in_chunks(), **GREEDY
    ),
    "second turn": second_turn,
}


@pytest.mark.parametrize("way", list(WAYS))
def test_padding_on_the_right_is_refused(make, way):
    model = make("llama", num_virtual_tokens=[3, 5, 2, 5])
    right, left = token_batch(LENGTHS, "right"), token_batch(LENGTHS, "left")
    with pytest.raises(ValueError, match=REFUSED):
        WAYS[way](model, *right)
    if way != "no mask, another padding token":
        WAYS[way](model, *left)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bloom"])
@pytest.mark.parametrize("turn", [1, 2])
def test_padding_on_the_right_is_refused_where_the_hosts_own_generate_runs(make, name, turn):
    """As behind `model.load_adapter`: the adapter is there, our `generate` is not called."""
    base = make(name).get_base_model()
    way = second_turn if turn == 2 else WAYS["greedy"]
    with pytest.raises(ValueError, match=REFUSED):
        way(base, *token_batch(LENGTHS, "right"))
    way(base, *token_batch(LENGTHS, "left"))


def test_chunks_of_padding_on_the_left_are_no_padding_on_the_right(make):
    ids, mask = token_batch([2, 9])  # the first two chunks of the first row are padding alone
    for model in (make("llama"), make("llama", selection="fixed").get_base_model()):
        together = model.generate(input_ids=ids, attention_mask=mask, **in_chunks(), **GREEDY)
        alone = model.generate(input_ids=ids[:1, -2:], **GREEDY)
        assert torch.equal(together[0, -4:], alone[0, -4:])


def test_a_padding_token_that_ends_texts_too_is_text_where_no_mask_says_otherwise(make):
    """transformers cannot tell them apart either, and takes all tokens for real."""
    model = make("llama")
    ids, _ = token_batch([4])
    ids[0, -1] = 96
    model.generate(ids, pad_token_id=96, eos_token_id=[95, 96], **GREEDY)


def test_the_base_alone_and_forward_take_either_side(make):
    model = make("llama")
    ids, mask = token_batch(LENGTHS, "right")
    with model.disable_adapter():
        model.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    assert isinstance(model, PeftModel)
    assert model(input_ids=ids, attention_mask=mask).logits.isfinite().all()
    assert tiny("llama").generate(input_ids=ids, attention_mask=mask, **GREEDY).shape == (3, 13)
