"""The rules of choice, apart from any model."""

from __future__ import annotations

import pytest
import torch

from idp_peft.selection import context_tokens, deal_evenly, random_prompts, scores_from_attention
from tests.reference import brute_force_scores
from tests.tiny import tiny, token_batch


def test_random_choice_depends_on_the_context_alone():
    ids, mask = token_batch([9, 5, 7])
    chosen = random_prompts(ids, mask.bool(), 4, seed=3)
    for row in range(3):
        alone = ids[row][mask[row].bool()][None]
        assert random_prompts(alone, torch.ones_like(alone).bool(), 4, seed=3) == chosen[row]
    right, right_mask = token_batch([9, 5, 7], "right")
    assert torch.equal(random_prompts(right, right_mask.bool(), 4, seed=3), chosen)


def test_random_choice_is_even_and_changes_with_the_seed():
    ids = torch.randint(0, 50_000, (20_000, 6), generator=torch.Generator().manual_seed(0))
    context = torch.ones_like(ids).bool()
    for seed in (0, 1, 2**20):
        counts = random_prompts(ids, context, 5, seed).bincount(minlength=5)
        assert (counts - 4000).abs().max() < 4 * (20_000 * 0.2 * 0.8) ** 0.5  # four standard deviations
    agree = (random_prompts(ids, context, 5, 0) == random_prompts(ids, context, 5, 1)).float().mean()
    assert 0.18 < agree < 0.22
    assert (random_prompts(ids.flip(1), context, 5, 0) != random_prompts(ids, context, 5, 0)).any(), "order must count"


@pytest.mark.parametrize("seed", [2**32, 2**40 + 1, 2**63 - 1])
def test_every_seed_that_a_config_takes_chooses(make, seed):
    ids, mask = token_batch([9, 5, 7])
    assert random_prompts(ids, mask.bool(), 4, seed).max() < 4
    model = make("llama", selection="random", selection_seed=seed)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    assert torch.equal(model.last_selection.prompt_ids, random_prompts(ids, mask.bool(), 4, seed))


@pytest.mark.parametrize("batch", [0, 1, 3, 4, 10])
def test_uniform_assignment_deals_prompts_evenly(batch):
    torch.manual_seed(0)
    counts = deal_evenly(batch, 4).bincount(minlength=4)
    assert counts.sum() == batch
    assert counts.max() - counts.min() <= 1
    assert batch < 3 or len({tuple(deal_evenly(batch, 4).tolist()) for _ in range(20)}) > 1, "the deal must be shuffled"


@pytest.mark.parametrize(("batch", "processes"), [(1, 4), (3, 2), (4, 2), (5, 3)])
def test_processes_with_one_seed_deal_what_one_process_deals_over_the_whole_batch(batch, processes):
    def deal(*arguments):
        torch.manual_seed(3)
        return deal_evenly(*arguments).tolist()

    parts = [deal(batch, 4, rank, processes) for rank in range(processes)]
    assert [prompt for part in parts for prompt in part] == deal(batch * processes, 4)


def test_sum_favours_long_prompts_and_mean_does_not():
    on_prompts = torch.tensor([[[0.2, 0.3]]])  # one token, two prompts of 2 and 6 tokens
    context = torch.ones(1, 1).bool()
    assert scores_from_attention(on_prompts, context, [2, 6], "sum").argmax() == 1
    assert scores_from_attention(on_prompts, context, [2, 6], "mean").argmax() == 0


def test_labels_hide_themselves_and_what_follows():
    real = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]).bool()
    labels = torch.tensor([[-100, -100, -100, 7, -100], [7, 7, 7, 7, 7], [-100] * 5])
    context = context_tokens(real, None, labels)
    assert context.tolist() == [[False, True, True, False, False], [True] * 5, [True] * 4 + [False]]


def test_the_choice_reads_only_what_stands_before_the_first_label(make):
    model = make("llama")
    ids, mask = token_batch([9, 6])
    labels = ids.clone()
    labels[:, :6] = -100
    other = ids.clone()
    other[:, 6:] = 3
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, labels=labels)
        scores = model.last_selection.scores
        model(input_ids=other, attention_mask=mask, labels=labels)
        assert torch.allclose(model.last_selection.scores, scores, atol=1e-6)
        context = mask * (torch.arange(9) < 6)
        expected = brute_force_scores(model, tiny("llama", "eager"), ids, mask, context, 0, "mean")
        assert torch.allclose(scores, expected, atol=1e-5)
        everything = torch.ones_like(mask)
        model(input_ids=ids, attention_mask=mask, labels=labels, selection_mask=everything)
        assert not torch.allclose(model.last_selection.scores, scores, atol=1e-5), "selection_mask decides over labels"


def test_drafted_tokens_never_steer(make):
    model = make("llama")
    ids, _ = token_batch([6])
    repeated = torch.cat([ids, ids], dim=1)  # prompt lookup drafts what followed before
    plain = model.generate(input_ids=repeated, max_new_tokens=4)
    scores = model.last_selection.scores
    looked_up = model.generate(input_ids=repeated, max_new_tokens=4, prompt_lookup_num_tokens=4)
    assert torch.allclose(model.last_selection.scores, scores, atol=1e-6)
    assert torch.equal(plain, looked_up)


def test_long_inputs_are_scored_in_chunks_with_the_same_result(make, monkeypatch):
    model = make("gemma2", num_virtual_tokens=[3, 5, 2, 5])
    ids, mask = token_batch([9, 30])
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
        whole = model.last_selection.scores
        monkeypatch.setattr("idp_peft.probe._CHUNK_ELEMENTS", 700)
        model(input_ids=ids, attention_mask=mask)
    assert torch.allclose(model.last_selection.scores, whole, atol=1e-6)


def test_fixed_selection_uses_its_prompt(make):
    model = make("llama", selection="fixed", fixed_prompt=2)
    ids, mask = token_batch([4, 6])
    with torch.no_grad():
        free = model(input_ids=ids, attention_mask=mask).logits
        forced = model(input_ids=ids, attention_mask=mask, prompt_ids=torch.tensor([2, 2])).logits
    assert torch.equal(free, forced)
    model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2)
    assert model.last_selection.prompt_ids.tolist() == [2, 2]


def test_a_choice_is_kept_at_every_step_without_a_cache(make):
    """Random selection hashes the whole input, so choosing again at a later step would show."""
    model = make("llama", selection="random", num_virtual_tokens=[3, 5, 2, 5])
    ids, mask = token_batch([4, 9, 6, 5, 7])
    arguments = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 8}
    cached = model.generate(**arguments)
    chosen = model.last_selection.prompt_ids
    assert torch.equal(model.generate(**arguments, use_cache=False), cached)
    assert torch.equal(model.last_selection.prompt_ids, chosen)
    assert torch.equal(model.generate(**arguments, prompt_ids=chosen), cached)


def test_a_call_leaves_nothing_for_the_next(make):
    """TRL's fused heads call the decoder directly: labels and prompts of an earlier call must be gone."""
    model = make("llama")
    ids, mask = token_batch([6, 9])
    decoder = model.get_base_model().model
    with torch.no_grad():
        decoder(input_ids=ids, attention_mask=mask)
        free = model.last_selection.scores
        model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(torch.arange(9) < 7, -100))
        model(input_ids=ids, attention_mask=mask, prompt_ids=torch.tensor([3, 3]))
        decoder(input_ids=ids, attention_mask=mask)
    assert torch.equal(model.last_selection.scores, free)


def test_a_call_speaks_to_its_own_model_alone(make, tmp_path):
    """A draft model with a smaller bank of its own is not given the target's prompt."""
    make("llama", num_prompts=2, seed=1).save_pretrained(tmp_path)
    draft = tiny("llama", seed=1)
    draft.load_adapter(str(tmp_path))
    model = make("llama")
    ids, _ = token_batch([7])
    forced = {"input_ids": ids, "prompt_ids": torch.tensor([3]), "max_new_tokens": 6}
    assert torch.equal(model.generate(**forced, assistant_model=draft), model.generate(**forced))
    assert draft.model.idp.last_selection.prompt_ids < 2


def test_positional_labels_are_labels(make):
    model = make("llama")
    ids, mask = token_batch([6, 9])
    labels = ids.masked_fill(torch.arange(9) < 7, -100)
    base = model.get_base_model()
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, labels=labels)
        scores = model.last_selection.scores
        base(ids, mask, None, None, None, labels)
    assert torch.equal(model.last_selection.scores, scores)


def test_generating_in_training_mode_selects(make):
    ids, mask = token_batch([6, 9])
    for assignment in ("uniform", "all", "selected"):
        model = make("llama", assignment=assignment)
        expected = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3)
        model.train()
        assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3), expected)
        assert model.last_selection.scores is not None


@pytest.mark.parametrize("arguments", [{"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True, "top_k": 1}])
def test_forced_prompts_with_several_sequences_per_row(make, arguments):
    model = make("llama", num_virtual_tokens=[3, 5, 2, 5])
    ids, mask = token_batch([6, 9, 4])
    forced = torch.tensor([2, -1, 0])
    together = model.generate(
        input_ids=ids, attention_mask=mask, prompt_ids=forced, max_new_tokens=4, **arguments
    ).view(3, -1, 13)
    for row in range(3):
        alone = ids[row][mask[row].bool()][None]
        expected = model.generate(input_ids=alone, prompt_ids=forced[row][None], max_new_tokens=4, **arguments)
        assert torch.equal(together[row][:, -4:], expected[:, -4:])


def test_the_second_turn_reports_and_keeps_the_first_turns_choice(make):
    model = make("llama", num_virtual_tokens=[3, 5, 2, 5])
    ids, mask = token_batch([6, 9, 4])
    forced = torch.tensor([0, 2, 3])
    first = model.generate(
        input_ids=ids, attention_mask=mask, prompt_ids=forced, max_new_tokens=3, return_dict_in_generate=True
    )
    with torch.no_grad():
        model(input_ids=ids[:1])  # something else in between
    longer = torch.cat([first.sequences, ids[:, -2:]], dim=1)
    longer_mask = torch.cat([mask, torch.ones(3, 5, dtype=torch.long)], dim=1)
    call = {"input_ids": longer, "attention_mask": longer_mask, "max_new_tokens": 3}
    cache = first.past_key_values
    import copy

    with pytest.raises(ValueError, match="`selection_mask` cannot steer a choice that the cache was started with"):
        model.generate(**call, past_key_values=copy.deepcopy(cache), selection_mask=longer_mask)
    second = model.generate(**call, past_key_values=cache)
    assert model.last_selection.prompt_ids.tolist() == [0, 2, 3]
    assert torch.equal(second, model.generate(**call, prompt_ids=forced))
