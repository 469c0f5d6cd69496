"""Training loops, with the default settings and others: what they train, and what their choice reads."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: `pip install idp-peft[test]` has it")
pytest.importorskip("datasets")

import trl

from tests.training_loops import LOOPS, NOT_RUN, PAGE, TRL, batch, run, table, table_of

pytestmark = pytest.mark.xdist_group("training_loops")  # the table is made of what the other tests ran
UNKNOWN_TARGETS = ("an own loop that passes neither", "an own loop that calls the decoder")
REFUSED = "TRL: Reward"


@pytest.mark.parametrize("name", [name for name in LOOPS if name != REFUSED])
def test_the_default_settings_train_the_prompts_that_contexts_choose(name):
    outcome = run(name, assignment="selected")
    assert outcome.error is None
    assert outcome.moved
    assert (outcome.read, outcome.warned) == (("row", True) if name in UNKNOWN_TARGETS else ("context", False))


@pytest.mark.slow
@pytest.mark.parametrize("assignment", ["uniform", "all"])
@pytest.mark.parametrize("name", list(LOOPS))
def test_other_assignments_train_or_name_one_that_does(name, assignment):
    outcome = run(name, assignment=assignment)
    if outcome.error is None:
        assert outcome.moved
        assert (outcome.read, outcome.warned) == ("dealt", False)
    elif name != REFUSED:
        named = re.search(r"use assignment=('selected'(?: or 'uniform')?)", outcome.error)[1]
        for instead in re.findall(r"'(\w+)'", named):
            assert run(name, assignment=instead).moved


@pytest.mark.parametrize("name", UNKNOWN_TARGETS)
@pytest.mark.parametrize(
    "config",
    [
        {"num_prompts": 1},
        {"num_prompts": 1, "assignment": "uniform"},
        {"num_prompts": 1, "assignment": "all"},
        {"selection": "fixed", "fixed_prompt": 2},
        {"assignment": "uniform"},
    ],
    ids=str,
)
def test_where_nothing_is_chosen_nothing_is_to_be_said(name, config):
    outcome = run(name, **config)
    assert outcome.error is None
    assert outcome.moved
    assert not outcome.warned


@pytest.mark.parametrize("name", ["TRL: SFT", "TRL: DPO", "TRL: CPO", "TRL: GRPO", "TRL: Distillation"])
@pytest.mark.parametrize("assignment", ["uniform", "all"])
def test_one_prompt_is_the_same_for_all_answers_and_has_no_mean(name, assignment):
    assert run(name, num_prompts=1, assignment=assignment).moved


def test_a_reward_model_is_refused_before_it_trains():
    message = (
        r"IDP needs a causal language model with its head \(AutoModelForCausalLM\), got LlamaForSequenceClassification"
    )
    assert re.fullmatch(message, run(REFUSED, assignment="selected").error)


@pytest.mark.slow
def test_the_page_has_the_table_of_what_was_run():
    assert table_of(PAGE.read_text(encoding="utf-8")) == table(), "run `python -m tests.training_loops`"


def test_the_four_calls_of_the_page_choose_as_it_says(make):
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    model, rows, chosen, said = make("llama", num_prompts=4).train(), batch(), [], []
    labels = rows.pop("labels")
    for line in code.splitlines():
        names = {"model": model, "batch": rows, "labels": labels, "prompt_ids": torch.tensor([0, 1] * 4)}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            exec(line, names)
        assert names["out"].logits.requires_grad
        chosen.append(model.last_selection.prompt_ids.tolist())
        said.append(len(caught))
    assert chosen[0] == chosen[1] != chosen[3]
    assert chosen[2] == [0, 1] * 4
    assert said == [0, 0, 0, 1]


def test_every_trainer_of_trl_is_run_or_has_a_reason():
    files = Path(trl.__file__).parent.rglob("*_trainer.py")
    classes = {
        name for file in files for name in re.findall(r"^class ([A-Z]\w+)Trainer\(", file.read_text(), re.MULTILINE)
    }
    assert classes == {name for _, name, *_ in TRL.values()} | {"Reward"} | set(NOT_RUN)
