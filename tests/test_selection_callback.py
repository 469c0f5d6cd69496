"""The selection report inside a training run: logged, and without any effect on it."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from idp_peft import SelectionCallback, selection_report
from tests.reference import bank_of
from tests.tiny_folder import tiny_texts, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*prompts were never chosen:UserWarning")


def rows(count, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 97, (count, 10), generator=generator)
    labels = ids.clone()
    labels[:, :4] = -100
    pairs = zip(ids, labels, strict=True)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": label} for row, label in pairs]


class Tracker(TrainerCallback):
    """Stands where the integrations of `report_to` stand: before the user's callbacks."""

    def __init__(self) -> None:
        self.seen: list[dict] = []

    def on_log(self, args, state, control, logs=None, **_):
        self.seen.append(dict(logs))


def trainer_of(model, folder, callbacks, steps=8, **arguments):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 4, "learning_rate": 0.05, **arguments}
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, logging_steps=1, report_to=[],
        disable_tqdm=True, seed=3, use_cpu=True, **settings,
    )  # fmt: skip
    evaluated = settings.pop("eval_dataset", None) or rows(9, seed=1)
    return Trainer(model=model, args=arguments, train_dataset=rows(24, 0), eval_dataset=evaluated, callbacks=callbacks)


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_each_evaluation_logs_the_numbers_of_the_report(make, tmp_path):
    model = make("llama")
    trainer = trainer_of(model, tmp_path, [callback := SelectionCallback(oracle=True)], steps=4)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in entries] == [2, 4]
    expected = selection_report(model, rows(9, seed=1), oracle=True)
    assert entries[-1].items() >= expected.metrics().items()
    assert sum(entries[-1][f"eval_prompt_share_{i}"] for i in range(4)) == pytest.approx(1)
    assert entries[0]["eval_oracle_gain"] != entries[1]["eval_oracle_gain"]
    assert callback.report.prompt_ids.tolist() == expected.prompt_ids.tolist()
    assert not any("eval_selection_entropy" in e for e in trainer.state.log_history if "eval_loss" not in e)
    written = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert written[-1]["eval_oracle_agreement"] == expected.oracle_agreement
    # The free choice's loss is the one that the trainer itself evaluated.
    assert expected.mean_losses["free"] == pytest.approx(entries[-1]["eval_loss"], rel=1e-3)
    metrics = trainer.evaluate(metric_key_prefix="test")
    assert metrics["test_selection_entropy"] == pytest.approx(expected.entropy)


@pytest.mark.parametrize("settings", [{"assignment": "uniform"}, {"assignment": "selected"}])
def test_training_with_the_callback_is_bit_equal_to_training_without(make, tmp_path, settings):
    banks, curves = [], []
    for number, callbacks in enumerate([[], [SelectionCallback(oracle=True)]]):
        trainer = trainer_of(model := make("llama", **settings), tmp_path / str(number), callbacks)
        trainer.train()
        banks.append(bank_of(model).weight.detach().clone())
        curves.append(losses(trainer))
    assert len(set(curves[0])) > 1
    assert curves[0] == curves[1]
    assert torch.equal(banks[0], banks[1])


def test_a_collator_that_draws_random_numbers_changes_nothing_either(make, tmp_path):
    states = []
    for callbacks in ([], [SelectionCallback()]):
        trainer = trainer_of(make("llama"), tmp_path, callbacks, steps=1)
        plain = trainer.data_collator

        def noisy(features, plain=plain):
            torch.rand(1)
            return plain(features)

        trainer.data_collator = noisy
        torch.manual_seed(0)
        trainer.evaluate()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_resuming_with_the_callback_is_exact(make, tmp_path):
    whole = trainer_of(first := make("llama", assignment="uniform"), tmp_path, [SelectionCallback()])
    whole.train()
    resumed = trainer_of(second := make("llama", assignment="uniform"), tmp_path, [SelectionCallback()])
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert torch.equal(bank_of(first).weight, bank_of(second).weight)
    keys = ("eval_selection_entropy", "eval_selection_margin", "eval_prompt_share_0")
    histories = [[[e[k] for k in keys] for e in t.state.log_history if "eval_loss" in e] for t in (whole, resumed)]
    assert len(histories[0]) == 4
    assert histories[0] == histories[1]


def test_a_number_of_the_report_can_pick_the_best_checkpoint(make, tmp_path):
    trainer = trainer_of(
        make("llama"), tmp_path, [SelectionCallback()], load_best_model_at_end=True, save_steps=2,
        metric_for_best_model="selection_margin", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    margins = {e["step"]: e["eval_selection_margin"] for e in trainer.state.log_history if "eval_loss" in e}
    assert trainer.state.best_metric == max(margins.values())
    assert trainer.state.best_global_step == max(margins, key=margins.get)


@pytest.mark.parametrize("given", [True, False])
def test_trackers_see_the_numbers_where_the_callback_is_given_its_trainer(make, tmp_path, given):
    tracker = Tracker()
    trainer = trainer_of(make("llama"), tmp_path, [tracker], steps=2)
    trainer.add_callback(SelectionCallback(trainer if given else None))
    trainer.train()
    seen = [logs for logs in tracker.seen if "eval_selection_entropy" in logs]
    assert len(seen) == (1 if given else 0)
    assert sum("eval_selection_entropy" in entry for entry in trainer.state.log_history) == 1


def test_several_evaluation_sets_keep_their_names(make, tmp_path):
    model = make("llama")
    trainer = trainer_of(model, tmp_path, [SelectionCallback()], steps=2)
    sets = {"near": rows(9, seed=1), "far": rows(9, seed=2)}
    metrics = trainer.evaluate(sets)
    for name, data in sets.items():
        assert metrics[f"eval_{name}_selection_entropy"] == selection_report(model, data).entropy
    assert metrics["eval_near_selection_margin"] != metrics["eval_far_selection_margin"]


def test_the_cap_is_kept_and_one_warning_names_idle_prompts(make, tmp_path, caplog):
    model = make("llama")
    with torch.no_grad():
        tokens = bank_of(model).weight.view(4, 4, -1)
        tokens[1:] = tokens[0]
    trainer = trainer_of(model, tmp_path, [callback := SelectionCallback(max_examples=5)], learning_rate=0.0)
    with caplog.at_level(logging.WARNING, "idp_peft"):
        trainer.train()
    assert len(callback.report.prompt_ids) == 5
    warned = [record.getMessage() for record in caplog.records if "never chosen" in record.getMessage()]
    assert len(warned) == 1
    assert warned[0].startswith("step 2: 3 of 4 prompts were never chosen in 5 examples: 1, 2, 3. ")
    with pytest.raises(ValueError, match="`max_examples` must be at least 1, got 0"):
        SelectionCallback(max_examples=0)


def test_it_reads_streams_and_stripped_columns(make, tmp_path):
    from datasets import Dataset

    model = make("llama")
    data = Dataset.from_list([{k: v.tolist() for k, v in row.items()} | {"task": "a"} for row in rows(9, seed=1)])
    expected = selection_report(model, rows(9, seed=1)).prompt_ids.tolist()
    for dataset in (data, data.to_iterable_dataset()):
        trainer = trainer_of(model, tmp_path, [callback := SelectionCallback(max_examples=6)], steps=2)
        trainer.evaluate(dataset)
        assert callback.report.prompt_ids.tolist() == expected[:6]


def test_it_works_in_the_trainer_of_trl(make, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    texts = tiny_texts(20, words=12)
    data = Dataset.from_list([{"prompt": t[:20].rsplit(" ", 1)[0], "completion": t[20:]} for t in texts])
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=2, eval_strategy="steps", eval_steps=1, report_to=[], use_cpu=True,
        disable_tqdm=True, per_device_train_batch_size=4, bf16=False, loss_type="nll",
    )  # fmt: skip
    model = make("llama")
    trainer = trl.SFTTrainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=data, processing_class=tiny_tokenizer(),
        callbacks=[callback := SelectionCallback(oracle=True, max_examples=8)],
    )  # fmt: skip
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(entries) == 2
    assert all("eval_oracle_agreement" in entry for entry in entries)
    assert callback.report.reads_labels == 0, "the prompt alone steers"
    assert len(callback.report.prompt_ids) == 8
