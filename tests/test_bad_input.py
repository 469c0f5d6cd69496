"""Bad input is an error that says what to do, or does what the base model does; never something else."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.tiny import tiny, token_batch


def run(model, ids, **arguments):
    with torch.no_grad():
        return model(input_ids=ids, **arguments)


def test_an_empty_batch(make):
    model = make("llama")
    for shape in ((0, 5), (2, 0)):
        with pytest.raises(ValueError, match=rf"the input is empty: got {shape[0]} rows of {shape[1]} tokens"):
            run(model, torch.zeros(shape, dtype=torch.long))


def test_a_batch_of_one_token(make):
    assert run(make("llama"), torch.tensor([[5]])).logits.shape == (1, 1, 97)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_bigcode", "gptj"])
def test_an_input_longer_than_the_positions_left(make, name):
    model = make(name)
    message = r"61 input tokens and 4 prompt positions need 65 positions, but the model has 64: shorten the input to 60"
    with pytest.raises(ValueError, match=message):
        run(model, torch.ones(1, 61, dtype=torch.long))
    assert run(model, torch.ones(1, 60, dtype=torch.long)).logits.shape == (1, 60, 97)
    padded, mask = token_batch([60, 3])
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), padded], dim=1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), mask], dim=1)
    assert run(model, padded, attention_mask=mask).logits.shape == (2, 63, 97), "padding takes no position"
    with pytest.raises(ValueError, match="65 positions, but the model has 64"):
        model.generate(input_ids=torch.ones(1, 58, dtype=torch.long), max_new_tokens=5)


@pytest.mark.parametrize(
    ("prompt_ids", "message"),
    [
        (torch.tensor([0, 4]), r"`prompt_ids` must be between -1 \(no prompt\) and 3, got \[0, 4\]"),
        (torch.tensor([0, -2]), r"`prompt_ids` must be between -1 \(no prompt\) and 3, got \[0, -2\]"),
        (
            torch.tensor([0]),
            r"`prompt_ids` must be integers of shape \[2\], one per row, got torch.int64 of shape \[1\]",
        ),
        (torch.tensor([[0, 1]]), r"must be integers of shape \[2\].*got torch.int64 of shape \[1, 2\]"),
        (torch.tensor([0.0, 1.0]), r"must be integers of shape \[2\].*got torch.float32 of shape \[2\]"),
    ],
)
def test_prompt_ids_out_of_range_or_of_the_wrong_shape(make, prompt_ids, message):
    model = make("llama")
    ids, mask = token_batch([4, 6])
    with pytest.raises(ValueError, match=message):
        run(model, ids, attention_mask=mask, prompt_ids=prompt_ids)
    with pytest.raises(ValueError, match=message):
        model.generate(input_ids=ids, attention_mask=mask, prompt_ids=prompt_ids, max_new_tokens=2)
    assert run(model, ids, attention_mask=mask).logits.shape == (2, 6, 97), "an error must leave nothing behind"


def test_an_all_zero_selection_mask_row(make):
    model = make("llama")
    ids, mask = token_batch([4, 6])
    selection_mask = torch.ones_like(mask)
    selection_mask[1] = 0
    message = r"`selection_mask` leaves no token to choose a prompt by in row\(s\) \[1\]"
    with pytest.raises(ValueError, match=message):
        run(model, ids, attention_mask=mask, selection_mask=selection_mask)
    with pytest.raises(ValueError, match=message):
        model.generate(input_ids=ids, attention_mask=mask, selection_mask=selection_mask, max_new_tokens=2)
    on_padding = 1 - mask
    with pytest.raises(ValueError, match=r"in row\(s\) \[0, 1\]"):
        run(model, ids, attention_mask=mask, selection_mask=on_padding)
    with pytest.raises(ValueError, match=r"`selection_mask` must have the input's shape \[2, 6\], got \[2, 5\]"):
        run(model, ids, attention_mask=mask, selection_mask=selection_mask[:, 1:])


def test_a_row_of_padding_alone(make):
    model = make("llama")
    ids, mask = token_batch([4, 6])
    mask[0] = 0
    with pytest.raises(ValueError, match=r"`attention_mask` has no real token in row\(s\) \[0\]: drop them, or force"):
        run(model, ids, attention_mask=mask)
    forced = run(model, ids, attention_mask=mask, prompt_ids=torch.tensor([0, 1])).logits
    alone = run(model, ids[1:], prompt_ids=torch.tensor([1])).logits
    assert (forced[1] - alone[0]).abs().max() <= 1e-4


def test_masks_that_do_not_fit(make):
    model = make("llama")
    ids, mask = token_batch([4, 6])
    with pytest.raises(ValueError, match=r"`attention_mask` must cover the input, \[2, 6\], got \[2, 5\]"):
        run(model, ids, attention_mask=mask[:, 1:])
    with pytest.raises(ValueError, match=r"IDP needs a 2-D `attention_mask` \[batch, tokens\], got a 4-D tensor"):
        run(model, ids, attention_mask=torch.zeros(2, 1, 6, 6))
    cache = run(model, ids, attention_mask=mask, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"must cover the cache and the input, \[2, 8\], got \[2, 2\]"):
        run(model, ids[:, :2], attention_mask=mask[:, -2:], past_key_values=cache)


def test_packed_rows_are_refused(make):
    model = make("llama")
    ids, _ = token_batch([6])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(ValueError, match="IDP cannot run packed rows"):
        run(model, ids, position_ids=positions)
    with pytest.raises(ValueError, match="IDP cannot run packed rows"):
        run(model, ids, cu_seq_lens_q=torch.tensor([0, 3, 6]))


def test_own_positions_are_kept(make):
    """A caller who gives positions gets them, moved by K."""
    model = make("llama")
    ids, mask = token_batch([4, 6])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    plain = run(model, ids, attention_mask=mask).logits
    assert torch.equal(run(model, ids, attention_mask=mask, position_ids=positions).logits, plain)
    apart = positions + 5 * (torch.arange(6) > 3)
    assert (run(model, ids, attention_mask=mask, position_ids=apart).logits - plain).abs().max() > 1e-3


def test_caches_that_do_not_belong(make):
    model, base = make("llama"), tiny("llama")
    ids, _ = token_batch([6])
    foreign = DynamicCache()
    run(base, ids, past_key_values=foreign)
    with pytest.raises(ValueError, match="the cache already holds 6 tokens that no prompt of adapter 'default'"):
        run(model, ids, past_key_values=foreign)
    own = run(model, ids, use_cache=True, prompt_ids=torch.tensor([1])).past_key_values
    assert own.get_seq_length() == 6
    with pytest.raises(RuntimeError, match="this cache begins with an IDP prompt"), model.disable_adapter():
        run(model, ids, past_key_values=own)
    with pytest.raises(RuntimeError, match="this cache begins with an IDP prompt"):
        run(base, ids, past_key_values=own)
    with pytest.raises(ValueError, match=r"`prompt_ids` \[2\] differ from those the cache was started with, \[1\]"):
        run(model, ids, past_key_values=own, prompt_ids=torch.tensor([2]))
    with pytest.raises(ValueError, match="the cache holds 1 rows, the input has 2"):
        run(model, ids.repeat(2, 1), past_key_values=own)
    small = StaticCache(config=base.config, max_cache_len=3)
    with pytest.raises(ValueError, match="the static cache holds 3 positions, the prompts alone take 4"):
        model.generate(input_ids=ids, past_key_values=small, max_new_tokens=2)


def test_a_users_own_static_cache(make):
    model = make("llama")
    ids, _ = token_batch([6])
    cache = StaticCache(config=model.config, max_cache_len=20)
    generated = model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=4)
    assert torch.equal(generated, model.generate(input_ids=ids, max_new_tokens=4))


def test_selection_arguments_without_an_adapter(make):
    model = make("llama")
    ids, mask = token_batch([6])
    with model.disable_adapter(), pytest.raises(ValueError, match="need an active IDP adapter and an input"):
        model.generate(input_ids=ids, prompt_ids=torch.tensor([0]))
    with (
        model.disable_adapter(),
        pytest.raises(ValueError, match="`selection_mask` given, but no IDP adapter is active"),
    ):
        run(model, ids, selection_mask=mask)


def test_an_error_inside_the_model_leaves_nothing_behind(make, monkeypatch):
    model = make("llama")
    ids, mask = token_batch([4, 6])
    before = run(model, ids, attention_mask=mask).logits
    block = model.get_base_model().model.layers[1]

    def fail(*_):
        raise RuntimeError("on purpose")

    handle = block.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        run(model, ids, attention_mask=mask, prompt_ids=torch.tensor([1, 2]))
    with pytest.raises(RuntimeError, match="on purpose"):
        model.generate(input_ids=ids, attention_mask=mask, prompt_ids=torch.tensor([1, 2]))
    handle.remove()
    assert torch.equal(run(model, ids, attention_mask=mask).logits, before)
    with model.disable_adapter():
        assert torch.equal(
            run(model, ids, attention_mask=mask).logits, run(tiny("llama"), ids, attention_mask=mask).logits
        )


def test_outputs_have_the_base_models_shapes(make):
    for name in ("llama", "gpt2", "mistral_small_window"):
        model, base = make(name, "eager"), tiny(name, "eager")
        ids, mask = token_batch([4, 9])
        wanted = {"output_hidden_states": True, "output_attentions": True, "attention_mask": mask, "use_cache": True}
        ours, theirs = run(model, ids, **wanted), run(base, ids, **wanted)
        assert ours.logits.shape == theirs.logits.shape
        assert [h.shape for h in ours.hidden_states] == [h.shape for h in theirs.hidden_states]
        assert all(a.shape == (2, 4, 9, 9 + 4) for a in ours.attentions), "prompt columns stay, prompt rows do not"
        assert ours.past_key_values.get_seq_length() == 9
        as_tuple = run(model, ids, attention_mask=mask, return_dict=False, use_cache=False)
        assert isinstance(as_tuple, tuple)
        assert (as_tuple[0] - ours.logits).abs().max() <= 1e-5
        assert run(model, ids, attention_mask=mask, use_cache=False).past_key_values is None


def test_chunked_prefill_of_a_padded_input_needs_a_mask(make):
    model = make("llama")
    ids, mask = token_batch([4, 6])
    arguments = {"prefill_chunk_size": 2, "max_new_tokens": 3}
    with pytest.raises(ValueError, match="needs `attention_mask` for an input with padding tokens"):
        model.generate(input_ids=ids, past_key_values=DynamicCache(), **arguments)
    chunked = model.generate(input_ids=ids, attention_mask=mask, past_key_values=DynamicCache(), **arguments)
    assert torch.equal(chunked, model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3))


NOTHING_IS_CHOSEN = [{"num_prompts": 1}, {"selection": "fixed", "fixed_prompt": 2}]


@pytest.mark.parametrize("config", NOTHING_IS_CHOSEN, ids=str)
def test_what_a_choice_needs_is_not_asked_for_where_nothing_is_chosen(make, config):
    """In training, see `test_training_loops.py`; with adapters that transformers added, `test_adapters.py`."""
    model = make("llama", **config)
    ids, _ = token_batch([4, 6])
    chunked = model.generate(
        input_ids=ids, past_key_values=DynamicCache(), prefill_chunk_size=2, max_new_tokens=3, pad_token_id=0
    )
    assert torch.equal(chunked, model.generate(input_ids=ids, max_new_tokens=3, pad_token_id=0))
    with pytest.raises(ValueError, match="`selection_layer` must be 0 on 'falcon', a model with ALiBi, got 1"):
        make("falcon_alibi", selection_layer=1)
    alibi = make("falcon_alibi", selection_layer=1, **config)
    assert torch.equal(run(alibi, ids).logits, run(make("falcon_alibi", **config), ids).logits)
