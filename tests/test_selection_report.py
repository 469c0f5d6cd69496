"""The selection report against its definitions, written out slowly: every example alone, every prompt forced."""

from __future__ import annotations

import math
import random
import subprocess
import sys
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader

import idp_peft
from idp_peft.analysis import SelectionReport, attention_map
from tests.reference import bank_of
from tests.tiny import tiny
from tests.tiny_folder import tiny_texts, tiny_tokenizer


def rows(count=12, seed=0, context=3, **columns):
    """Examples of 5 to 12 tokens whose first `context` tokens are not labelled."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        ids = [draw.randrange(2, 97) for _ in range(draw.randrange(5, 13))]
        row = {"input_ids": ids, "labels": [-100] * context + ids[context:]}
        made.append(row | {name: value(number) for name, value in columns.items()})
    return made


def report_on(model, dataset, **arguments) -> SelectionReport:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return idp_peft.selection_report(model, dataset, **arguments)


def chosen_alone(model, dataset):
    """What `model(...)` chooses for each example alone: prompts `[N]`, scores `[N, M]`."""
    selections = []
    for row in dataset:
        with torch.no_grad():
            model(**{name: torch.tensor([row[name]]) for name in ("input_ids", "labels") if name in row})
        selections.append(model.last_selection)
    scores = [s.scores for s in selections]
    return torch.cat([s.prompt_ids for s in selections]), None if scores[0] is None else torch.cat(scores)


def nats_alone(model, row, prompt: int) -> float:
    """-sum_t log p(label_t | what stands before), token by token, of one example with a forced prompt."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row["input_ids"]]), prompt_ids=torch.tensor([prompt])).logits[0].double()
    return -sum(
        float(logits[t - 1].log_softmax(-1)[label]) for t, label in enumerate(row["labels"]) if label != -100 and t > 0
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "phi3_longrope"])
@pytest.mark.parametrize("labelled", [True, False])
def test_choices_and_margins_are_the_models_own(make, name, labelled):
    model = make(name, num_virtual_tokens=[3, 5, 2, 5])
    data = rows() if labelled else [{"input_ids": row["input_ids"]} for row in rows()]
    # Rotary frequencies that change with the length change with the longest row of a batch, in the model too.
    report = report_on(model, data, batch_size=1 if name == "phi3_longrope" else 5)
    prompts, scores = chosen_alone(model, data)
    counts = Counter(prompts.tolist())
    assert len(counts) > 1, "a choice that is always the same shows nothing"
    assert report.prompt_ids.tolist() == prompts.tolist()
    assert report.counts.tolist() == [counts[prompt] for prompt in range(4)]
    assert report.shares.tolist() == [counts[prompt] / 12 for prompt in range(4)]
    np.testing.assert_allclose(report.scores, scores.numpy(), atol=1e-6)
    ordered = scores.sort(descending=True).values
    np.testing.assert_allclose(report.margins, (ordered[:, 0] - ordered[:, 1]).numpy(), atol=1e-6)
    assert report.margin_quantiles[0.5] == pytest.approx(float(np.median(report.margins)))
    slow = -sum(n / 12 * math.log(n / 12) for n in counts.values())
    assert report.entropy == pytest.approx(slow)
    assert report.normalized_entropy == pytest.approx(slow / math.log(4))
    assert report.reads_labels == 0


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_oracle_is_the_best_forced_prompt_of_each_example_alone(make, name):
    model, data = make(name, num_virtual_tokens=[3, 5, 2, 5]), rows()
    data[4]["labels"] = [-100] * len(data[4]["labels"])  # nothing to score: no oracle
    data[7]["labels"] = list(data[7]["input_ids"])  # no context: the choice reads what is scored
    report = report_on(model, data, oracle=True, batch_size=5)
    nats = np.array([[nats_alone(model, row, prompt) for prompt in range(4)] for row in data])
    tokens = np.array([sum(label != -100 for label in row["labels"][1:]) for row in data])
    np.testing.assert_allclose(report.nats, nats, rtol=1e-5, atol=1e-5)
    assert report.tokens.tolist() == tokens.tolist()
    best = nats.argmin(1)
    best[4] = -1
    assert report.oracle_ids.tolist() == best.tolist()
    chosen, _ = chosen_alone(model, data)
    scored = [row for row in range(12) if row != 4]
    agreeing = sum(int(chosen[row]) == best[row] for row in scored)
    assert report.oracle_agreement == pytest.approx(agreeing / 11)
    assert 0 < agreeing < 11
    for i in range(4):
        for j in range(4):
            assert report.confusion[i, j] == sum(int(chosen[row]) == i and best[row] == j for row in scored)
    by_chance = sum((chosen[scored] == i).float().mean().item() * (best[scored] == i).mean() for i in range(4))
    assert report.chance_agreement == pytest.approx(by_chance)
    losses = report.mean_losses
    assert losses["free"] == pytest.approx(sum(nats[row, chosen[row]] for row in scored) / tokens.sum(), rel=1e-5)
    assert losses["random"] == pytest.approx(nats.mean(1).sum() / tokens.sum(), rel=1e-5)
    assert losses["oracle"] == pytest.approx(nats.min(1).sum() / tokens.sum(), rel=1e-5)
    assert losses["single_optimistic"] == pytest.approx(nats.sum(0).min() / tokens.sum(), rel=1e-5)
    assert losses["oracle"] < losses["single_optimistic"] <= losses["single"]
    assert report.reads_labels == 1
    assert "1 choices read tokens that are scored" in str(report)


def test_a_selection_mask_steers_the_report_as_it_steers_the_model(make):
    model, data = make("llama"), rows(context=2)
    for row in data:
        row["selection_mask"] = [0, 0, 0, *[1] * (len(row["input_ids"]) - 3)]
    report = report_on(model, data)
    for row, prompt in zip(data, report.prompt_ids, strict=True):
        with torch.no_grad():
            model(**{name: torch.tensor([row[name]]) for name in ("input_ids", "labels", "selection_mask")})
        assert model.last_selection.prompt_ids.item() == prompt
    assert report.prompt_ids.tolist() != report_on(model, rows(context=2)).prompt_ids.tolist()
    assert report.reads_labels == 12


def test_every_kind_of_dataset_says_the_same(make):
    model, data = make("llama"), rows(8)
    of_rows = report_on(model, data, oracle=True)
    of_dataset = report_on(model, Dataset.from_list(data), oracle=True)
    tensors = report_on(model, [{k: torch.tensor(v) for k, v in row.items()} for row in data], oracle=True)

    def padded(batch):
        width = max(len(row["input_ids"]) for row in batch)
        left = [width - len(row["input_ids"]) for row in batch]
        return {
            "input_ids": torch.tensor([[0] * n + row["input_ids"] for n, row in zip(left, batch, strict=True)]),
            "attention_mask": torch.tensor([[0] * n + [1] * (width - n) for n in left]),
            "labels": torch.tensor([[-100] * n + row["labels"] for n, row in zip(left, batch, strict=True)]),
        }

    of_loader = report_on(model, DataLoader(data, batch_size=3, collate_fn=padded), oracle=True)
    for other in (of_dataset, tensors, of_loader):
        assert other.prompt_ids.tolist() == of_rows.prompt_ids.tolist()
        np.testing.assert_allclose(other.nats, of_rows.nats, rtol=1e-4)
    few = report_on(model, data, oracle=True, max_examples=5)
    assert few.prompt_ids.tolist() == of_rows.prompt_ids[:5].tolist()
    assert len(report_on(model, (row for row in data), max_examples=5).prompt_ids) == 5


def test_texts_need_their_tokenizer(make):
    model, tokenizer, texts = make("llama"), tiny_tokenizer(), tiny_texts(9, words=8)
    report = report_on(model, texts, tokenizer=tokenizer)
    as_ids = [{"input_ids": tokenizer(text)["input_ids"]} for text in texts]
    assert report.prompt_ids.tolist() == chosen_alone(model, as_ids)[0].tolist()
    as_rows = report_on(model, Dataset.from_list([{"text": text} for text in texts]), tokenizer=tokenizer)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert report.prompt_ids.tolist() == as_rows.prompt_ids.tolist() == report_on(model, batch).prompt_ids.tolist()
    with pytest.raises(ValueError, match="`tokenizer` must be given for texts, as example 0 is one"):
        idp_peft.selection_report(model, texts)


def test_transformers_own_loading_is_served(make, tmp_path):
    wrapped, data = make("llama"), rows()
    wrapped.save_pretrained(tmp_path)
    native = tiny("llama")
    native.load_adapter(str(tmp_path))
    expected = report_on(wrapped, data, oracle=True)
    got = report_on(native, data, oracle=True)
    assert got.prompt_ids.tolist() == expected.prompt_ids.tolist()
    np.testing.assert_allclose(got.nats, expected.nats, rtol=1e-6)


def test_the_active_adapter_is_the_one_reported(make):
    model, data = make("llama"), rows()
    model.add_adapter("other", idp_peft.IDPConfig(task_type="CAUSAL_LM", num_prompts=2, num_virtual_tokens=3))
    assert report_on(model, data).num_prompts == 4
    model.set_adapter("other")
    assert report_on(model, data).num_prompts == 2


def test_rules_without_scores_have_no_margins(make):
    data = rows()
    for settings in ({"selection": "random"}, {"selection": "fixed", "fixed_prompt": 2}, {"num_prompts": 1}):
        model = make("llama", **settings)
        report = report_on(model, data, oracle=True)
        assert report.prompt_ids.tolist() == chosen_alone(model, data)[0].tolist()
        assert report.scores is None
        assert report.margins is None
        assert report.margin_quantiles is None
        assert "margin" not in str(report)
        assert "eval_selection_margin" not in report.metrics()
        assert report.to_dataframe()["margin"].isna().all()
        assert report.plot() is not None
    assert report.entropy == report.normalized_entropy == 0  # one prompt
    assert report.oracle_agreement == 1


def test_the_model_is_left_as_it_was(make):
    model, data = make("llama"), rows()
    model.train()
    decoder = model.get_base_model().model
    decoder.layers[1].eval()  # a module with a mode of its own
    modes = [module.training for module in model.modules()]
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]), prompt_ids=torch.tensor([3]))
    before, state = model.last_selection, torch.get_rng_state()
    report_on(model, data, oracle=True)
    assert [module.training for module in model.modules()] == modes
    assert model.last_selection is before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match="must be a list of integers"):
        idp_peft.selection_report(model, [{"input_ids": ["a"]}])
    broken = [*data, {"input_ids": [5, 96 + 5], "labels": [-100, 5]}]  # no such token: fails inside the model
    with pytest.raises(IndexError):
        idp_peft.selection_report(model, broken, oracle=True)
    assert [module.training for module in model.modules()] == modes
    assert model.last_selection is before


def test_prompts_that_are_never_chosen_are_named_with_what_to_do(make):
    model, pool = make("llama"), rows(64)
    choices = report_on(model, pool).prompt_ids.tolist()
    common = [prompt for prompt, _ in Counter(choices).most_common(2)]
    data = [row for row, choice in zip(pool, choices, strict=True) if choice in common]
    first, second = never = [prompt for prompt in range(4) if prompt not in common]
    text = rf"2 of 4 prompts were never chosen in {len(data)} examples: {first}, {second}\. "
    with pytest.warns(UserWarning, match=text) as caught:
        report = idp_peft.selection_report(model, data)
    assert report.never_chosen == never
    assert caught[0].filename == __file__
    text = str(caught[0].message)
    assert "train with fewer prompts (num_prompts=2), or with assignment='uniform'" in text
    assert text in str(report)
    model.peft_config["default"].assignment = "uniform"
    assert "use fewer prompts (num_prompts=2), or assignment='selected'" in report_on(model, data).warning
    model.peft_config["default"].prompt_names = names = ["sums", "code", "chat", "maths"]
    assert f": {first} ('{names[first]}'), {second} ('{names[second]}'). " in report_on(model, data).warning
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        idp_peft.selection_report(model, data[:3])  # fewer examples than prompts say nothing
        idp_peft.selection_report(make("llama", selection="fixed"), data)
    model = make("llama", selection="random")
    alike = [{"input_ids": [5, 6, 7]}] * 12
    with pytest.warns(UserWarning, match="With selection='random' that is chance: measure on more examples"):
        idp_peft.selection_report(model, alike)


def test_groups_are_counted_and_their_information_is_the_definition(make):
    model = make("llama")
    data = rows(30, task=lambda number: ["sums", "code", "chat"][number % 3])
    report = report_on(model, Dataset.from_list(data), group="task")
    assert report.group_names == ["sums", "code", "chat"]
    pairs = list(zip(report.groups, report.prompt_ids.tolist(), strict=True))
    for row, task in enumerate(report.group_names):
        for prompt in range(4):
            assert report.group_counts[row, prompt] == pairs.count((task, prompt))
    slow = 0.0
    for task, prompt in set(pairs):
        both = pairs.count((task, prompt)) / 30
        slow += both * math.log(both / (1 / 3) / report.shares[prompt])
    assert report.group_information == pytest.approx(slow)
    assert 0 < report.chance_group_information < math.log(3)
    table = report.group_table()
    assert table.loc["code", "prompt 1"] == pairs.count(("code", 1))
    same = report_on(model, data, group=[row["task"] for row in data])
    assert same.groups == report.groups
    of_prompt = report_on(model, data, group=report.prompt_ids.tolist())
    assert of_prompt.group_information == pytest.approx(of_prompt.entropy)
    with pytest.raises(ValueError, match=r"`group` must have one value per example \(30\), got 2"):
        idp_peft.selection_report(model, data, group=[1, 2])
    with pytest.raises(ValueError, match="`group` names the column 'topic', which example 0 lacks"):
        idp_peft.selection_report(model, data, group="topic")
    with pytest.raises(ValueError, match="the report has no groups: give `group`"):
        report_on(model, data).group_table()


def test_the_tables_hold_what_the_report_holds(make):
    model, data = make("llama"), rows(task=lambda number: number % 2)
    data[4]["labels"] = [-100] * len(data[4]["labels"])
    model.peft_config["default"].prompt_names = ["a", "b", "c", "d"]
    report = report_on(model, data, oracle=True, group="task")
    prompts, examples = report.to_dataframe(), report.examples()
    assert prompts["name"].tolist() == ["a", "b", "c", "d"]
    assert prompts["count"].tolist() == report.counts.tolist()
    assert prompts["share"].sum() == pytest.approx(1)
    assert prompts["oracle_count"].sum() == 11
    assert list(examples.columns[:5]) == ["example", "prompt", "margin", "oracle", "group"]
    assert examples["prompt"].tolist() == report.prompt_ids.tolist()
    assert examples["oracle"].isna().tolist() == [row == 4 for row in range(12)]
    assert examples["group"].tolist() == [0, 1] * 6
    assert (examples["loss"] - examples["oracle_loss"]).drop(4).min() >= 0
    by_prompt = examples.groupby("prompt")["margin"].mean()
    for prompt, margin in by_prompt.items():
        assert prompts["margin"][prompt] == pytest.approx(margin)
    weighted = (examples["loss"] * report.tokens).sum() / report.tokens.sum()
    assert weighted == pytest.approx(report.mean_losses["free"])
    assert report_on(model, rows()).examples()["oracle"].isna().all()


def test_the_report_reads_well_in_text_and_in_one_line(make):
    model = make("llama")
    report = report_on(model, rows(30, task=lambda number: f"task {number % 3}"), oracle=True, group="task")
    lines = str(report).splitlines()
    assert lines[0] == "Selection of 30 examples among 4 prompts (attention)"
    assert [line.split()[:3] for line in lines[2:6]] == [["prompt", str(i), str(report.counts[i])] for i in range(4)]
    assert f"{report.entropy:.3f} nats" in str(report)
    assert f"free choice {report.mean_losses['free']:.4f}" in str(report)
    assert "task 2" in str(report)
    assert "\n" not in report.summary
    assert repr(report) == f"SelectionReport({report.summary})"
    assert all(isinstance(value, float) for value in report.metrics().values())
    assert report.metrics("test")["test_oracle_agreement"] == report.oracle_agreement


@pytest.mark.parametrize("prompts", [1, 4, 64])
def test_the_figure_draws_any_number_of_prompts(make, prompts, tmp_path):
    model = make("llama", num_prompts=prompts, num_virtual_tokens=2)
    report = report_on(model, rows(40, task=lambda number: f"$task$ {number % 3}"), oracle=True, group="task")
    figure = report.plot()
    assert len([axis for axis in figure.axes if axis.get_title(loc="left")]) == (4 if prompts > 1 else 3)
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    np.testing.assert_allclose(heights, 100 * report.shares)
    figure.savefig(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 5000
    shown = figure._repr_png_()
    assert shown.startswith(b"\x89PNG")
    assert len(shown) < 25_000


@pytest.mark.parametrize("names", ["a long name of a prompt {}", "p{}", None])
@pytest.mark.parametrize(("prompts", "groups"), [(2, 3), (7, 12), (12, 24), (40, 60)])
def test_no_label_of_the_figure_lies_on_another(prompts, groups, names):
    draw, examples = np.random.default_rng(0), 240
    report = SelectionReport(
        prompt_ids=draw.integers(0, prompts, examples),
        num_prompts=prompts,
        names=None if names is None else [names.format(prompt) for prompt in range(prompts)],
        scores=draw.normal(size=(examples, prompts)).astype(np.float32),
        nats=draw.gamma(9, size=(examples, prompts)),
        tokens=np.full(examples, 9),
        groups=[f"a group of examples {number % groups}" for number in range(examples)],
    )
    figure = report.plot()
    figure.draw_without_rendering()
    seen = []
    for axis in figure.axes:
        labels = [*axis.get_xticklabels(), *axis.get_yticklabels(), axis.xaxis.label, axis.yaxis.label]
        low, high = axis.get_window_extent().get_points()
        boxes = [label.get_window_extent() for label in [*labels, axis.title, axis._left_title] if label.get_text()]
        # A tick that lies outside of its axis is not drawn.
        seen += [box for box in boxes if box.width and box.x1 > low[0] - 200 and box.x0 < high[0] + 200]
    ticks = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert len(set(ticks)) == len(ticks), "names that differ are told apart, even where they are cut"
    overlapping = [
        (one, two) for at, one in enumerate(seen) for two in seen[:at] if one.shrunk(0.99, 0.99).overlaps(two)
    ]
    assert len(seen) > 4 * 4
    assert not overlapping
    assert all(box.x0 >= 0 and box.y0 >= 0 for box in seen), "nothing is cut off"


def test_bad_input_is_an_error_that_says_what_to_do(make):
    model, data = make("llama"), rows()

    def error(text, model=model, dataset=data, **arguments):
        with pytest.raises(ValueError, match=text):
            idp_peft.selection_report(model, dataset, **arguments)

    error("`dataset` must hold at least one example, got none", dataset=[])
    error("`dataset` must hold at least one example, got none", dataset=Dataset.from_dict({"input_ids": []}))
    error("got str", dataset="a text")
    error("got DatasetDict: choose one of its splits", dataset=__import__("datasets").DatasetDict())
    error(r"example 0 .* it has the columns \['ids'\]", dataset=[{"ids": [1]}])
    error("the columns of example 1 must be of one length", dataset=[data[0], {**data[1], "labels": [1]}])
    error("example 1 has no token to choose a prompt by", dataset=[data[0], {"input_ids": [], "labels": []}])
    error("`labels` of example 0 must be a list of integers", dataset=[{"input_ids": [1, 2], "labels": 3}])
    error("`labels` must be in every example or in none, got it in 1 of 2", dataset=[data[0], {"input_ids": [3]}])
    error("`oracle=True` needs `labels` in the dataset", dataset=[{"input_ids": [3, 4]}], oracle=True)
    error("needs a label to score", dataset=[{"input_ids": [3, 4], "labels": [3, -100]}], oracle=True)
    error("`batch_size` must be at least 1, got 0", batch_size=0)
    error("`max_examples` must be at least 1, or None for all, got 0", max_examples=0)
    error("a model with an IDP adapter, got LlamaForCausalLM without one", model=tiny("llama"))
    with model.disable_adapter():
        error("adapters are disabled")
    error("positions, but the model has 64", model=make("gpt2"), dataset=[{"input_ids": [5] * 62}])
    assert isinstance(model, PeftModel)
    report_on(model, data)


# ---------------------------------------------------------------------- attention maps


@pytest.mark.parametrize("layer", [0, 1])
def test_the_attention_map_is_what_the_choice_averages(make, layer):
    model, data = make("llama", num_virtual_tokens=[3, 5, 2, 5], selection_layer=layer), rows(4)
    report = report_on(model, data)
    for row, scores in zip(data, report.scores, strict=True):
        on_prompts = attention_map(model, row["input_ids"])  # [n, M]
        assert on_prompts.shape == (len(row["input_ids"]), 4)
        assert (on_prompts.sum(-1) < 1).all()
        np.testing.assert_allclose(on_prompts[:3].mean(0) / torch.tensor([3, 5, 2, 5]), scores, atol=1e-6)
    ids, mask = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    batch = attention_map(model, ids, mask)
    assert torch.allclose(batch[0, 2:], attention_map(model, [5, 6]), atol=1e-6)
    assert torch.allclose(batch[1], attention_map(model, ids[1], layer=layer - 3), atol=1e-6)
    assert not torch.allclose(batch[1], attention_map(model, ids[1], layer=2), atol=1e-4)
    with pytest.raises(ValueError, match="`selection_layer` must be between -3 and 2"):
        attention_map(model, ids, layer=3)
    with pytest.raises(ValueError, match="`input_ids` must be token ids"):
        attention_map(model, torch.zeros(1, 2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="must have the shape of `input_ids`"):
        attention_map(model, ids, mask[:1])


@pytest.mark.parametrize("layer", [0, 1])
def test_the_choice_follows_a_prompt_to_another_place_in_the_bank(make, layer):
    model, data, order = make("llama", selection_layer=layer), rows(), [2, 0, 3, 1]
    before = report_on(model, data)
    with torch.no_grad():
        bank = bank_of(model).weight
        bank.copy_(bank.view(4, 4, -1)[order].reshape(bank.shape))
    after = report_on(model, data)
    np.testing.assert_allclose(after.scores, before.scores[:, order], atol=1e-6)
    assert [order[prompt] for prompt in after.prompt_ids] == before.prompt_ids.tolist()


# ---------------------------------------------------------------------- imports


def test_importing_analysis_brings_no_plotting_and_no_tables():
    code = "import sys, idp_peft; before = 'matplotlib' in sys.modules, 'pandas' in sys.modules\n"
    code += "import idp_peft.analysis; idp_peft.selection_report; idp_peft.SelectionCallback\n"
    code += "assert before == ('matplotlib' in sys.modules, 'pandas' in sys.modules), before"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(("module", "use"), [("pandas", "to_dataframe"), ("matplotlib", "plot")])
def test_a_missing_library_names_the_extra(make, monkeypatch, module, use):
    report = report_on(make("llama"), rows())
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "idp_peft.analysis.figure", raising=False)
    with pytest.raises(ImportError, match=rf"{module}: pip install 'idp-peft\[analysis\]'"):
        getattr(report, use)()
    assert "Selection of 12 examples" in str(report)
