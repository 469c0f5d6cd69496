"""The benchmark of the choice: its statistics against made-up data, its passes through models against the library's own."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import benchmarks.choice.__main__ as command
from benchmarks.choice import tables
from benchmarks.choice.agreement import (
    between_items,
    permutation_p,
    ranks,
    resampled_two_way,
    two_way,
    within_items,
)
from benchmarks.choice.analysis import BY_ANY_LAYER, BY_CONTEXT, BY_LAYER_0, analyse
from benchmarks.choice.every_layer import first_token_shares, scores_at_every_layer
from benchmarks.choice.losses import nats_of_every_prompt
from benchmarks.choice.measure import Settings, measure
from benchmarks.choice.orders import all_orders, balanced_orders, dependence, explained
from benchmarks.choice.records import Bank, group_of, read_groups
from benchmarks.choice.views import idp_scores, naive_scores
from idp_peft.evaluation import score_chunks
from idp_peft.evaluation.chunks import mask_context
from idp_peft.evaluation.prompted import idp_layer
from idp_peft.report.choices import ORACLE, RANDOM, SINGLE
from tests.reference import prompts_of
from tests.tiny import tiny, token_batch

FOLDER = Path(command.__file__).parent
LENGTHS = [2, 4, 3]
SMALL = Settings(
    blocks=4,
    block_tokens=12,
    context_tokens=5,
    order_blocks=4,
    every_order_blocks=4,
    order_layer_step=2,
    bfloat16=False,
)


def bank(nats, scores, context=None, name="made.up", lengths=None) -> Bank:
    """Made-up measurements: `nats` and `context` `[items, M]`, `scores` `[layers, items, M]`."""
    nats, scores = np.asarray(nats, dtype=float), np.asarray(scores, dtype=float)
    context = nats if context is None else np.asarray(context, dtype=float)
    record = {"name": name, "adapter": {"lengths": lengths or [2] * nats.shape[1]}}
    return Bank(record, nats, context, scores)


def interactions(items: int = 40, prompts: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two tables without row and column means that are orthogonal to each other, of length 1."""
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(2, items, prompts))
    for table in (first, second):
        table -= table.mean(1, keepdims=True)
        table -= table.mean(0, keepdims=True)
    second -= first * (first * second).sum() / (first**2).sum()
    return first / np.linalg.norm(first), second / np.linalg.norm(second)


# ---------------------------------------------------------------------- correlations


def test_equal_values_share_their_mean_rank():
    assert ranks(np.array([[3.0, 1.0, 3.0, 7.0]])).tolist() == [[2.5, 1.0, 2.5, 4.0]]


def test_rank_correlation_within_items_knows_the_textbook_cases():
    score = np.array([[1.0, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [5, 5, 5, 5]])
    value = np.array([[10.0, 20, 30, 99], [4, 3, 2, 1], [1, 3, 2, 4], [1, 2, 3, 4]])
    assert within_items(score, value) == pytest.approx([1, -1, 0.8, 0])
    assert within_items(score[:2, :2], value[:2, :2]).tolist() == [1, -1]  # of two prompts: agreement or not


def test_rank_correlation_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    score, value = np.random.default_rng(0).integers(0, 5, size=(2, 20, 6)).astype(float)
    expected = [stats.spearmanr(left, right).statistic for left, right in zip(score, value, strict=True)]
    assert within_items(score, value) == pytest.approx(expected)


@pytest.mark.parametrize("share", [1.0, 0.6, 0.0, -0.6])
def test_the_two_way_correlation_is_that_of_what_items_and_prompts_leave(share):
    same, other = interactions()
    rng = np.random.default_rng(1)
    # Items and prompts differ a thousand times more than what is to be found, on both sides and alike.
    items, prompts = 1000 * rng.normal(size=(40, 1)), 1000 * rng.normal(size=(1, 4))
    score = same + items + prompts
    value = share * same + np.sqrt(1 - share**2) * other + items + prompts
    assert two_way(score, value) == pytest.approx(share, abs=1e-9)
    assert within_items(score, value).mean() == 1.0  # the prompts' general worth is all that ranks see


def test_a_prompt_whose_own_column_is_what_agrees_stands_out():
    rng = np.random.default_rng(2)
    score, value = rng.normal(size=(2, 400, 3))
    score[:, 1] += 5 * (signal := rng.normal(size=400))
    value[:, 1] += 5 * signal
    found = between_items(score, value)
    assert found.argmax() == 1
    assert found[1] > 0.9
    flat = np.zeros((5, 3))
    assert two_way(flat, value[:5]) == 0.0
    assert between_items(flat, value[:5]).tolist() == [0, 0, 0]


def test_a_resample_is_centred_anew():
    rng = np.random.default_rng(3)
    score, value = rng.normal(size=(2, 6, 3))
    times = np.array([[1, 1, 1, 1, 1, 1], [3, 0, 1, 0, 0, 2], [0, 2, 2, 2, 0, 0]])
    expected = [two_way(np.repeat(score, row, axis=0), np.repeat(value, row, axis=0)) for row in times]
    assert resampled_two_way(score, value, times) == pytest.approx(expected)


def test_the_permutation_test_sees_a_relation_and_none():
    same, other = interactions()
    assert permutation_p([(same, 0.5 * same + other)], draws=1000) < 0.01
    assert permutation_p([(same, other)], draws=1000) > 0.5
    assert permutation_p([(same, same), (same, -same)], draws=1000) == 1.0  # banks that contradict each other


# ---------------------------------------------------------------------- uses of the prompts


def test_the_layer_is_never_scored_on_items_it_was_chosen_on():
    # Layer l takes the good prompt for item l alone: on the items it is chosen on, some layer always looks better.
    items = 12
    scores = np.ones((items, items, 2))
    scores[np.arange(items), np.arange(items), 1] = 2
    uses = analyse([bank([[1.0, 0.0]] * items, scores)], "mean").uses
    assert uses.points[BY_ANY_LAYER] == 1.0
    assert uses.points[3] == pytest.approx(1 - 1 / items)


def test_a_layer_that_is_always_right_is_found_and_tested():
    rng = np.random.default_rng(8)
    nats = rng.normal(size=(40, 3))
    scores = np.stack([np.exp(rng.normal(size=nats.shape)), np.exp(-nats)])
    found = analyse([bank(nats, scores, context=rng.normal(size=nats.shape))], "mean")
    assert found.uses.points[BY_ANY_LAYER] == pytest.approx(found.uses.points[ORACLE])
    assert found.uses.points[BY_LAYER_0] == found.uses.points[0] > found.uses.points[1]
    assert [found.layers[1].within.value, found.layers[1].two_way.value] == pytest.approx([1, 1])
    assert found.layers[1].holm["two_way"] == pytest.approx(2 * found.layers[1].two_way.p)
    assert found.layers[1].holm["over_random"] < 0.05 < found.layers[0].holm["two_way"]
    assert found.layers[1].counts == [np.bincount(nats.argmin(1)).tolist()]
    assert found.uses.points[RANDOM] == pytest.approx(nats.mean())


def test_the_context_chooses_the_prompt_of_least_loss():
    nats = np.array([[1.0, 2.0], [2.0, 1.0], [3.0, 4.0]])
    found = analyse([bank(nats, np.ones((1, 3, 2)), context=nats)], "mean")
    assert found.uses.points[BY_CONTEXT] == pytest.approx(5 / 3)
    assert found.context.counts == [[2, 1]]


def test_attending_to_prompts_more_or_less_is_no_preference():
    same, other = interactions()
    general = np.random.default_rng(5).uniform(0.1, 10, size=(40, 1)) * np.array([[1.0, 2, 3, 4]])
    nats = -(general + 0.01 * other)  # an item that needs prompts more needs all of them more
    row = analyse([bank(nats, general[None] * np.exp(0.1 * same))], "mean").layers[0]
    assert row.within.value == 1
    assert abs(row.two_way.value) < 0.35
    assert two_way(general, -nats) > 0.99  # without the logarithm


def test_seeds_are_averaged_and_lengths_divide_sums():
    first = bank([[1.0, 0.0]] * 4, np.ones((1, 4, 2)) * [1, 3], lengths=[1, 4])
    second = bank([[5.0, 3.0]] * 4, np.ones((1, 4, 2)) * [1, 3], lengths=[1, 4])
    assert analyse([first, second], "sum").uses.points[0] == 1.5
    assert analyse([first, second], "mean").uses.points[0] == 3.0
    assert analyse([first, second], "mean").uses.points[SINGLE] == 1.5


# ---------------------------------------------------------------------- orders


@pytest.mark.parametrize("num_prompts", [2, 3, 4, 5])
def test_balanced_orders_have_every_prompt_at_every_place_equally_often(num_prompts):
    orders = np.array(balanced_orders(num_prompts))
    counts = [np.bincount(place, minlength=num_prompts).tolist() for place in orders.T]
    assert counts == [[len(orders) // num_prompts] * num_prompts] * num_prompts


def test_every_order_is_there_or_as_many_as_24():
    assert len({tuple(order) for order in all_orders(4)}) == 24
    assert len(all_orders(2)) == 2
    assert len(all_orders(6)) == 24
    assert all(sorted(order) == list(range(6)) for order in all_orders(6))
    assert all_orders(6)[0] == list(range(6))


def test_variance_goes_to_the_place_or_to_the_prompt():
    orders = balanced_orders(3)
    place_of = np.argsort(orders, axis=1)
    by_place = np.array([5.0, 1.0, 1.0])[place_of][:, None].repeat(2, 1)  # [orders, items, M]: the first place draws
    by_prompt = np.broadcast_to(np.array([1.0, 2.0, 6.0]), by_place.shape)
    assert explained(by_place, orders) == pytest.approx({"place": 1, "prompt": 0})
    assert explained(by_prompt, orders) == pytest.approx({"place": 0, "prompt": 1})
    both = explained(by_place + by_prompt, orders)
    assert both == pytest.approx({"place": 32 / (32 + 42), "prompt": 42 / (32 + 42)})
    assert dependence(by_place, orders).at_place == [1, 0, 0]
    assert dependence(by_place, orders).changing == 1
    assert dependence(by_prompt, orders).changing == 0
    assert dependence(by_prompt, orders).at_place == pytest.approx([1 / 3] * 3)


def test_variance_needs_balanced_orders():
    with pytest.raises(ValueError, match="every prompt at every place equally often"):
        explained(np.ones((2, 3, 3)), [[0, 1, 2], [1, 0, 2]])


def test_contexts_beyond_a_change_of_the_rotary_frequencies_are_refused(make):
    model, ids = make("phi3_longrope", num_prompts=3, num_virtual_tokens=LENGTHS), token_batch([12] * 2)[0]
    with pytest.raises(
        ValueError, match=r"must leave prompts and context, .* tokens, where the model's rotary frequencies"
    ):
        measure(model, ids, Settings(blocks=2, block_tokens=12, context_tokens=10))


def test_idp_chooses_alike_in_every_order_and_the_naive_view_does_not(make):
    model = make("llama", num_prompts=3, num_virtual_tokens=LENGTHS)
    contexts, orders = token_batch([8] * 20)[0], all_orders(3)
    ours = idp_scores(idp_layer(model), orders, contexts).numpy()  # [orders, layers, items, M]
    naive = naive_scores(idp_layer(model), orders, contexts, [0, 1, 2])[0].numpy()
    assert ours.shape == naive.shape == (6, 3, 20, 3)
    for layer in range(3):
        same, other = dependence(ours[:, layer], orders), dependence(naive[:, layer], orders)
        assert same.largest_difference < 1e-5
        assert same.changing == 0
        assert other.largest_difference > 0.1
        assert other.changing > 0.1


def test_the_naive_view_is_the_plain_model_on_all_prompts_end_to_end(make):
    model, order = make("llama", num_prompts=3, num_virtual_tokens=LENGTHS), [2, 0, 1]
    contexts = token_batch([7] * 2)[0]
    found, first = (
        part[0] for part in naive_scores(idp_layer(model), [order], contexts, [0, 2])
    )  # [layers, items, ...]
    base, prompts = tiny("llama", "eager"), prompts_of(model)
    embeds = base.get_input_embeddings()(contexts)
    front = torch.cat([prompts[i] for i in order])[None].expand(2, -1, -1)
    with torch.no_grad():
        weights = base(inputs_embeds=torch.cat([front, embeds], dim=1), output_attentions=True).attentions
    for number, layer in enumerate((0, 2)):
        seen = weights[layer].mean(1)[:, sum(LENGTHS) :]  # [items, n, keys]
        parts = seen[..., : sum(LENGTHS)].split([LENGTHS[i] for i in order], -1)
        for place, prompt in enumerate(order):
            torch.testing.assert_close(found[number][:, prompt], parts[place].mean((1, 2)))
        torch.testing.assert_close(first[number], seen[..., 0].sum(1) / seen[..., : sum(LENGTHS)].sum((1, 2)))
    assert model.get_base_model().config._attn_implementation == "sdpa"


# ---------------------------------------------------------------------- passes through the model


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gpt2", "mistral_small_window"])
def test_each_layer_scores_as_a_free_forward_with_labels_would(make, architecture, reduction):
    model = make(architecture, num_prompts=3, num_virtual_tokens=LENGTHS, selection_reduction=reduction)
    layer, ids, context = idp_layer(model), token_batch([12] * 3)[0], 7
    found = scores_at_every_layer(layer.decoder, layer.prompt_cache(), ids[:, :context], reduction)
    assert len(found) == 3
    for number in range(3):
        layer.active_config.selection_layer = number
        with torch.no_grad():
            model(input_ids=ids, labels=mask_context(ids, context))
        torch.testing.assert_close(found[number], model.last_selection.scores)
        assert model.last_selection.prompt_ids.tolist() == found[number].argmax(-1).tolist()


def test_the_share_of_a_first_token_is_that_of_the_plain_model_with_one_prompt(make):
    model, ids = make("llama", num_prompts=1, num_virtual_tokens=3), token_batch([6] * 2)[0]
    layer, base = idp_layer(model), tiny("llama", "eager")
    found = first_token_shares(layer.decoder, layer.prompt_cache(), ids)  # [layers, 1]
    embeds = torch.cat([prompts_of(model)[0][None].expand(2, -1, -1), base.get_input_embeddings()(ids)], dim=1)
    with torch.no_grad():
        weights = base(inputs_embeds=embeds, output_attentions=True).attentions
    for number in range(3):
        seen = weights[number][:, :, 3:, :3].mean((1, 2))  # [items, k]
        torch.testing.assert_close(found[number, 0], (seen[:, 0] / seen.sum(-1)).mean())


def test_a_model_that_cannot_be_read_in_one_pass_is_refused(make):
    layer = idp_layer(make("bloom"))
    with pytest.raises(ValueError, match=r"AttentionInterface.*BloomAttention does not"):
        scores_at_every_layer(layer.decoder, layer.prompt_cache(), token_batch([4])[0], "mean")


def test_nats_of_a_prompt_are_those_of_the_evaluation(make):
    model, ids = make("llama", num_prompts=3, num_virtual_tokens=LENGTHS), token_batch([12] * 3)[0]
    after, context = nats_of_every_prompt(model, ids, 5, 3, batch_size=2)
    for prompt in range(3):
        rest = score_chunks(model, ids.tolist(), 5, prompt_id=prompt).nats
        torch.testing.assert_close(after[:, prompt], rest, rtol=1e-5, atol=1e-5)
        before = score_chunks(model, ids[:, :5].tolist(), 1, prompt_id=prompt).nats
        torch.testing.assert_close(context[:, prompt], before, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="`context_tokens` must be from 2 to 11, got 12"):
        nats_of_every_prompt(model, ids, 12, 3)


def test_a_bank_of_one_prompt_has_no_choice_to_look_at(make):
    with pytest.raises(ValueError, match="at least two prompts"):
        measure(make("llama", num_prompts=1), token_batch([12] * 4)[0], SMALL)


# ---------------------------------------------------------------------- files


def test_seeds_of_one_bank_are_one_group():
    assert group_of("idp.distillation.seed0") == group_of("idp.distillation.seed12") == "idp.distillation"
    assert group_of("composed-seed1") == group_of("composed") == "composed"


@pytest.fixture
def results(make, tmp_path, monkeypatch):
    """A folder of results of two seeds of one bank, by the command, and how often something was measured."""
    for seed in (0, 1):
        make("llama", num_prompts=3, num_virtual_tokens=LENGTHS).save_pretrained(tmp_path / f"adapter{seed}")
    runs = []
    monkeypatch.setattr(command, "_base", lambda name: tiny("llama"))
    monkeypatch.setattr(command, "_blocks", lambda name, settings: token_batch([12] * settings.blocks)[0])
    monkeypatch.setattr("benchmarks.choice.measure.Settings", lambda **given: replace(SMALL, **given))
    monkeypatch.setattr(
        "benchmarks.choice.measure.measure", lambda *arguments: runs.append(arguments) or measure(*arguments)
    )

    def run(*more: str) -> Path:
        adapters = [f"--adapter=tiny.seed{seed}={tmp_path / f'adapter{seed}'}" for seed in (0, 1)]
        command.main(["somewhere/base", *adapters, "--output", str(tmp_path / "results"), *more])
        return tmp_path / "results"

    return run, runs


def test_what_was_measured_is_not_measured_again(results):
    run, runs = results
    run("--blocks", "4")
    run("--blocks", "4")
    assert len(runs) == 2
    run("--blocks", "5")
    assert len(runs) == 4


def test_tables_and_figure_come_from_the_files_alone(results):
    pytest.importorskip("matplotlib")
    folder = results[0]("--blocks", "4")
    record = json.loads((folder / "tiny.seed0.json").read_text())
    assert np.array(record["scores"]).shape == (3, 4, 3)
    assert record["largest_difference_from_own_choice"] < 1e-5
    assert max(record["orders"]["idp"]["largest_difference"]) < 1e-5
    assert np.array(record["orders"]["naive"]["scores"]).shape == (6, 2, 4, 3)
    assert record["model"] == "base"
    tables.main(["--results", str(folder)])
    report = (folder / "report.md").read_text()
    assert "tiny.seed0, tiny.seed1: prompts of 2 + 4 + 3 tokens on base" in report
    assert report.count("**Layer by layer**") == 2  # mean and sum differ
    assert (folder / "choice.png").stat().st_size > 10_000


def test_banks_that_were_measured_otherwise_are_not_pooled(results):
    run, _ = results
    folder = run("--blocks", "4")
    record = json.loads((folder / "tiny.seed1.json").read_text())
    record["settings"]["context_tokens"] = 4
    (folder / "tiny.seed1.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="'tiny' must have one model, one set of lengths and one set of settings"):
        read_groups(folder)


def test_a_wrong_adapter_argument_says_what_it_must_be(capsys):
    with pytest.raises(SystemExit):
        command.parse(["base", "--adapter", "runs/adapter"])
    assert "must be NAME=PATH" in capsys.readouterr().err


def test_the_readme_says_what_the_report_says():
    readme, report = ((FOLDER / name).read_text(encoding="utf-8") for name in ("README.md", "results/report.md"))
    rows = re.findall(r"^\|.*\|$", readme.split("<!-- from results/report.md -->")[1], re.MULTILINE)
    assert len(rows) >= 8
    assert [row for row in rows if row not in report] == []
