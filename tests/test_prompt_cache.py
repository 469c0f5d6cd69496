"""The prompt cache is computed once, is exactly as large as it must be, and is never stale."""

from __future__ import annotations

import copy

import pytest
import torch

from idp_peft import prompt_cache as remembered_cache
from tests.reference import bank_of, concatenated_logits
from tests.tiny import tiny, token_batch


@pytest.fixture
def computed(monkeypatch):
    """Counts computations of the prompt cache."""
    counts = []
    original = remembered_cache.compute_prompt_cache

    def counting(*arguments):
        counts.append(1)
        return original(*arguments)

    monkeypatch.setattr(remembered_cache, "compute_prompt_cache", counting)
    return counts


def run(model, ids, prompt=1):
    with torch.no_grad():
        return model(input_ids=ids, prompt_ids=torch.tensor([prompt])).logits


def test_it_is_computed_once_for_any_number_of_requests(make, computed):
    model = make("llama")
    for length in (3, 9, 5):
        ids, mask = token_batch([length, 4])
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask)
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, num_beams=2)
    assert len(computed) == 1


def test_frequencies_that_a_model_writes_into_itself_do_not_make_it_stale(make, computed):
    model = make("phi3_longrope")
    for length in (3, 6, 5):
        run(model, token_batch([length])[0])
    assert len(computed) == 1


@pytest.mark.parametrize(("new_tokens", "prompt_is_run"), [(3, False), (60, True)])
def test_left_padding_runs_the_prompt_again_only_if_the_window_will_fill_up(make, new_tokens, prompt_is_run):
    model = make("mistral")  # a window of 60
    ids, mask = token_batch([4, 9])
    model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=1)
    seen = []
    handle = (
        model.get_base_model().model.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    )
    model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens)
    handle.remove()
    assert seen[0] == (13 if prompt_is_run else 9)


@pytest.mark.parametrize("lengths", [[4, 4, 4], [2, 5, 3]])
def test_its_size_is_the_formula(make, lengths):
    model = make("llama", num_prompts=3, num_virtual_tokens=lengths)
    cache = model.base_model.layer.prompt_cache()
    layers, kv_heads, head_dim = 3, 2, 8
    assert cache.nbytes == 2 * layers * 3 * max(lengths) * kv_heads * head_dim * 4


def test_a_request_runs_no_prompt_token(make):
    model = make("llama")
    ids, _ = token_batch([7])
    run(model, ids)
    seen = []
    block = model.get_base_model().model.layers[1]
    handle = block.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    model.generate(input_ids=ids, max_new_tokens=3)
    handle.remove()
    assert seen == [7, 1, 1]


def step(model):
    optimizer = torch.optim.AdamW(bank_of(model).parameters(), lr=0.5)
    model.train()
    ids, _ = token_batch([5])
    model(input_ids=ids, labels=ids, prompt_ids=torch.tensor([1])).loss.backward()
    optimizer.step()
    model.eval()


def in_place(model):
    with torch.no_grad():
        bank_of(model).weight.mul_(2)


def behind_autograds_back(model):
    bank_of(model).weight.data.mul_(2)


def through_numpy(model):
    bank_of(model).weight.detach().numpy()[:] *= 2


def replaced(model):
    bank_of(model).weight = torch.nn.Parameter(bank_of(model).weight.detach() * 2)


def loaded(model):
    state = {key: value * 2 if "idp_prompts" in key else value for key, value in model.state_dict().items()}
    model.load_state_dict(state)


def assigned(model):
    state = {key: value * 2 if "idp_prompts" in key else value for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


@pytest.mark.parametrize("change", [step, in_place, behind_autograds_back, through_numpy, replaced, loaded, assigned])
def test_changed_prompts_are_seen_at_once(make, computed, change):
    model, base = make("llama"), tiny("llama")
    ids, _ = token_batch([7])
    before = run(model, ids)
    change(model)
    after = run(model, ids)
    assert (after - before).abs().max() > 1e-2
    assert (after - concatenated_logits(model, base, ids, 1)).abs().max() <= 1e-4


def test_a_dtype_move_of_the_base_is_seen(make):
    model = make("llama")
    ids, _ = token_batch([7])
    run(model, ids)
    model.to(torch.float64)
    base = tiny("llama").to(torch.float64)
    assert (run(model, ids) - concatenated_logits(model, base, ids, 1)).abs().max() <= 1e-10
    model.to(torch.bfloat16)
    assert run(model, ids).dtype == torch.bfloat16


def test_a_device_move_is_seen(make):
    """One machine, one device: the meta device stands in for the second."""
    model = make("llama")
    run(model, token_batch([7])[0])
    remembered, tokens = model.base_model.layer.idp_remembered["default"], bank_of(model).weight.detach()
    device, *rest = remembered._setting
    assert remembered._is_fresh([tokens], (device, *rest))
    assert not remembered._is_fresh([tokens], (torch.device("meta"), *rest))


def test_changed_base_weights_are_seen(make):
    model, base = make("llama"), tiny("llama")
    ids, _ = token_batch([7])
    run(model, ids)
    for network in (model.get_base_model(), base):
        with torch.no_grad():
            network.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    assert (run(model, ids) - concatenated_logits(model, base, ids, 1)).abs().max() <= 1e-4


def test_autocast_has_a_cache_of_its_own(make):
    model = make("llama")
    ids, _ = token_batch([7])
    plain = run(model, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = run(model, ids)
    assert torch.equal(run(model, ids), plain)
    assert 0 < (low.float() - plain).abs().max() < 0.05 * plain.abs().max()


def test_each_adapter_has_its_own(make, computed):
    model, base = make("llama"), tiny("llama")
    from idp_peft import IDPConfig

    model.add_adapter("other", IDPConfig(task_type="CAUSAL_LM", num_prompts=2, num_virtual_tokens=6))
    ids, _ = token_batch([7])
    first = run(model, ids)
    model.set_adapter("other")
    assert (run(model, ids) - first).abs().max() > 1e-2
    model.set_adapter("default")
    assert torch.equal(run(model, ids), first)
    assert len(computed) == 2, "switching back computes nothing"
    assert (first - concatenated_logits(model, base, ids, 1)).abs().max() <= 1e-4


def test_inference_mode_leaves_a_cache_that_training_can_use(make):
    model = make("llama")
    ids, _ = token_batch([7])
    with torch.inference_mode():
        model(input_ids=ids)
    for parameter in model.get_base_model().model.layers.parameters():
        parameter.requires_grad_(True)
    bank_of(model).weight.requires_grad_(False)
    model(input_ids=ids, prompt_ids=torch.tensor([0]), labels=ids).loss.backward()
    assert model.get_base_model().model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0


def test_nan_in_the_prompts_is_an_error(make):
    model = make("llama")
    ids, _ = token_batch([7])
    with torch.no_grad():
        bank_of(model).weight[5, 3] = float("nan")
    message = r"prompt\(s\) \[1\] of the bank hold NaN or infinity"
    with pytest.raises(ValueError, match=message):
        run(model, ids)
    with pytest.raises(ValueError, match=message):
        model.generate(input_ids=ids, max_new_tokens=2)
    model.train()
    with pytest.raises(ValueError, match=message):
        model(input_ids=ids, labels=ids)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ValueError, match=message):
        model(input_ids=ids, labels=ids)


def test_it_stays_out_of_the_state_dict_and_survives_copies(make):
    model = make("llama")
    ids, _ = token_batch([7])
    before = run(model, ids)
    assert [key for key in model.state_dict() if "idp" in key] == [
        "base_model.model.model.idp.idp_prompts.default.weight"
    ]
    twin = copy.deepcopy(model)
    in_place(twin)
    assert (run(twin, ids) - before).abs().max() > 1e-2
    assert torch.equal(run(model, ids), before)


def test_nothing_drops_out_of_it(make):
    model = make("gpt2")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    expected = model.base_model.layer.prompt_cache().keys[-1]
    model.base_model.layer.idp_remembered["default"].forget()
    model.train()
    assert torch.equal(model.base_model.layer.prompt_cache().keys[-1], expected)
    assert all(module.training for module in model.modules()), "every module must be back in its own mode"


def test_a_started_cache_follows_its_rows(make):
    """Repeat, drop and reorder rows of a cache with different prompts, then go on from it."""
    model = make("llama", num_virtual_tokens=[3, 5, 2, 5])
    ids, mask = token_batch([6, 9, 7])
    forced = torch.tensor([0, 2, -1])
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask, prompt_ids=forced).logits

        def start():
            first = {"input_ids": ids[:, :-1], "attention_mask": mask[:, :-1]}
            return model(**first, prompt_ids=forced, use_cache=True).past_key_values

        for change, rows in (
            (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
            (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
            (lambda cache: cache.reorder_cache(torch.tensor([1, 2, 0])), [1, 2, 0]),
        ):
            cache = start()
            change(cache)
            output = model(input_ids=ids[rows, -1:], attention_mask=mask[rows], past_key_values=cache)
            assert (output.logits[:, 0] - whole[rows, -1]).abs().max() <= 1e-4
        cache = start()
        assert cache.get_seq_length() == 8
        cache.crop(-3)
        assert cache.get_seq_length() == 5
        output = model(input_ids=ids[:, 5:], attention_mask=mask, past_key_values=cache)
        assert (output.logits - whole[:, 5:])[mask[:, 5:].bool()].abs().max() <= 1e-4
        twin = copy.deepcopy(cache)
        for each in (cache, twin):
            output = model(
                input_ids=ids[:, -1:],
                attention_mask=torch.nn.functional.pad(mask, (0, 1), value=1),
                past_key_values=each,
            )
            assert each.get_seq_length() == 10
            assert output.logits.shape == (3, 1, 97)
        cache.reset()
        if cache.get_seq_length():
            return  # transformers 5.0 resets a dynamic cache to zeros of the same length
        again = model(input_ids=ids, attention_mask=mask, prompt_ids=forced, past_key_values=cache).logits
        assert (again - whole)[mask.bool()].abs().max() <= 1e-4
