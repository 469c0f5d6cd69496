"""transformers' `Trainer` and its options, beyond the loop itself (`test_training.py`)."""

from __future__ import annotations

import inspect
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    GenerationConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

from tests.reference import bank_of, brute_force_scores, concatenated_logits
from tests.tiny import tiny, token_batch
from tests.tiny_folder import tiny_tokenizer


def examples(count=8, seed=0):
    """Rows of different lengths; the first 2 to 4 tokens of each are context."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length, context = torch.randint(6, 12, (1,), generator=draw).item(), torch.randint(2, 5, (1,), generator=draw)
        ids = torch.randint(2, 97, (length,), generator=draw).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * context.item() + ids[context.item() :]})
    return rows


def a_trainer(model, folder, data=None, kind=Trainer, arguments=TrainingArguments, **options):
    to_trainer = inspect.signature(Trainer.__init__).parameters
    given = {name: options.pop(name) for name in list(options) if name in to_trainer}
    given.setdefault("data_collator", DataCollatorForSeq2Seq(tiny_tokenizer()))
    defaults = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "learning_rate": 0.05,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True}
    args = arguments(output_dir=str(folder), **{**defaults, **quiet, **options})
    return kind(model=model, args=args, train_dataset=examples() if data is None else data, **given)


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def by_the_definition(model, row):
    """Prompt and logits `[n, vocab]` of one example, its prompt chosen by what stands before its first label."""
    ids = torch.tensor([row["input_ids"]])
    ones, context = torch.ones_like(ids), (torch.tensor([row["labels"]]) == -100).long()
    context = context if context.any() else ones
    scores = brute_force_scores(model, tiny("llama", "eager"), ids, ones, context, 0, "mean")
    return scores.argmax().item(), concatenated_logits(model, tiny("llama"), ids, scores.argmax().item())[0]


def mean_loss(model, rows):
    nats = []
    for row in rows:
        targets = torch.tensor(row["labels"][1:])
        nats.append(
            torch.nn.functional.cross_entropy(by_the_definition(model, row)[1][:-1], targets, reduction="none")[
                targets != -100
            ]
        )
    return torch.cat(nats).mean().item()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_metrics_line_up_with_labels_and_targets_do_not_steer(make, tmp_path, smoothing):
    """With label smoothing `Trainer` takes the labels out of the call: the choice must not read on."""
    rows, seen = examples(8), {}
    model = make("llama", assignment="uniform")

    def compute_metrics(prediction):
        seen.update(best=prediction.predictions, labels=prediction.label_ids)
        hits = (prediction.predictions[:, :-1] == prediction.label_ids[:, 1:])[prediction.label_ids[:, 1:] != -100]
        return {"accuracy": hits.mean()}

    trainer = a_trainer(
        model,
        tmp_path,
        eval_dataset=rows,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        eval_accumulation_steps=1,
        label_smoothing_factor=smoothing,
    )
    scores = trainer.evaluate()
    hits, chosen_by_all = [], []
    for row, best, labels in zip(rows, seen["best"], seen["labels"], strict=True):
        prompt, logits = by_the_definition(model, row)
        count = len(row["input_ids"])
        assert best[:count].tolist() == logits.argmax(-1).tolist()
        assert labels[:count].tolist() == row["labels"]
        targets = np.array(row["labels"][1:])
        hits.extend((logits.argmax(-1).numpy()[:-1] == targets)[targets != -100])
        with torch.no_grad():
            model.eval()(input_ids=torch.tensor([row["input_ids"]]))
        chosen_by_all.append(model.last_selection.prompt_ids.item() != prompt)
    assert any(chosen_by_all), "else the test could not see a choice that read the targets"
    assert scores["eval_accuracy"] == pytest.approx(np.mean(hits))
    if not smoothing:
        by_batch = [mean_loss(model, rows[start : start + 3]) for start in (0, 3, 6)]
        assert scores["eval_loss"] == pytest.approx(np.average(by_batch, weights=[3, 3, 2]), abs=1e-4)


def popped(trainer, model, inputs):
    targets = inputs.pop("labels")
    return model(**inputs).logits, targets


def left_in_the_batch(trainer, model, inputs):
    return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits, inputs["labels"]


def by_place(trainer, model, inputs):
    return model(inputs["input_ids"], inputs["attention_mask"]).logits, inputs["labels"]


def in_a_dict_of_its_own(trainer, model, inputs):
    mine = {"what to say": inputs.pop("labels"), **inputs}
    inputs.clear()
    rows = {name: mine[name] for name in ("input_ids", "attention_mask")}
    return model(**rows).logits, mine["what to say"]


def in_another_function(trainer, model, inputs):
    targets = inputs.pop("labels")

    def logits_of(rows):
        return model(**rows).logits

    return logits_of(inputs), targets


def without_the_last_token(trainer, model, inputs):
    rows = {name: inputs[name][:, :-1] for name in ("input_ids", "attention_mask")}
    return model(**rows).logits, inputs["labels"][:, :-1]


def labels_of_other_tokens(trainer, model, inputs):
    """Called `labels` in the step's batch, they are its rows' whatever they say."""
    labels = inputs.pop("labels")
    inputs["labels"] = labels.where(labels == -100, 5)
    return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits, inputs["labels"]


WAYS = [
    popped,
    left_in_the_batch,
    by_place,
    in_a_dict_of_its_own,
    in_another_function,
    without_the_last_token,
    labels_of_other_tokens,
]


def with_own_loss(model, folder, way):
    """A trainer whose loss calls the model without labels, and what its forwards choose: `(input_ids, Selection)`."""
    seen = []

    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            ids = inputs["input_ids"].clone()
            logits, labels = way(self, model, inputs)
            seen.append((ids, model.last_selection))
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss

    data = examples(8)
    return a_trainer(model, folder, data, kind=Own, max_steps=1, per_device_train_batch_size=8, eval_dataset=data), seen


@pytest.mark.parametrize("way", WAYS)
def test_targets_that_an_own_loss_keeps_to_itself_do_not_steer(make, tmp_path, way):
    model, rows = make("llama"), {tuple(row["input_ids"]): row for row in examples(8)}
    (expected, whole), chosen = choices(model, list(rows.values())), {}
    assert expected != whole, "else the test could not see a choice that read the targets"
    trainer, seen = with_own_loss(model, tmp_path, way)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer.evaluate()
        trainer.train()
    assert sum(len(ids) for ids, _ in seen) == 16
    for ids, selection in seen:
        for row, prompt in zip(ids.tolist(), selection.prompt_ids.tolist(), strict=True):
            key = next(key for key in rows if list(key) == row[: len(key)] and not any(row[len(key) :]))
            assert prompt == expected[list(rows).index(key)]
            chosen[key] = prompt
    assert len(chosen) == 8


def choices(model, rows):
    """The prompts that contexts choose, and those that whole rows choose."""
    lists = []
    for masked in (True, False):
        whole = [row | {"labels": row["labels"] if masked else row["input_ids"]} for row in rows]
        lists.append([by_the_definition(model, row)[0] for row in whole])
    return lists


def targets_without_their_place(trainer, model, inputs):
    """Shifted by one, as a loss wants them: nothing says of which tokens they are."""
    shifted = torch.nn.functional.pad(inputs.pop("labels")[:, 1:], (0, 1), value=-100)
    logits = model(**inputs).logits
    return logits, torch.nn.functional.pad(shifted[:, :-1], (1, 0), value=-100)


def test_targets_that_cannot_be_known_are_warned_of(make, tmp_path):
    trainer, seen = with_own_loss(make("llama"), tmp_path, targets_without_their_place)
    with pytest.warns(UserWarning, match="targets may steer the choice"):
        trainer.train()
    ((ids, selection),) = seen
    model = make("llama")
    with torch.no_grad():
        model(input_ids=ids, attention_mask=(ids != 0).long())
    assert torch.equal(selection.prompt_ids, model.last_selection.prompt_ids)


def test_other_rows_that_a_prediction_step_runs_are_not_read_by_its_labels(make, tmp_path):
    model, rows, chosen = make("llama"), examples(3), []

    class LooksAtOthers(Trainer):
        def prediction_step(self, model, inputs, *args, **kwargs):
            done = super().prediction_step(model, inputs, *args, **kwargs)
            with torch.no_grad():
                model(input_ids=inputs["input_ids"].flip(0), attention_mask=inputs["attention_mask"].flip(0))
            chosen.append(model.last_selection)
            return done

    a_trainer(model, tmp_path, rows, kind=LooksAtOthers).evaluate(rows)
    batch = DataCollatorForSeq2Seq(tiny_tokenizer())(rows)
    with torch.no_grad():
        model(input_ids=batch["input_ids"].flip(0), attention_mask=batch["attention_mask"].flip(0))
    assert torch.equal(chosen[0].scores, model.last_selection.scores)


def test_predictions_without_labels_read_everything(make, tmp_path):
    model = make("llama")
    ids, _ = token_batch([7] * 4)
    rows = [{"input_ids": row.tolist()} for row in ids]
    prediction = a_trainer(model, tmp_path, data_collator=DataCollatorForSeq2Seq(tiny_tokenizer())).predict(rows)
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
    assert np.abs(prediction.predictions - expected.numpy()).max() <= 1e-5


def test_accumulated_gradients_are_those_of_one_big_batch(make, tmp_path):
    """Rows hold different numbers of targets: each token counts the same."""
    weights, logged = [], []
    for size, steps in ((8, 1), (2, 4)):
        model = make("llama")
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "optim": "sgd"}
        logged.append(losses(a_trainer(model, tmp_path, **options, max_steps=3, learning_rate=0.5, max_grad_norm=0)))
        weights.append(bank_of(model).weight.detach())
    start = bank_of(make("llama")).weight.detach()
    assert (weights[0] - start).abs().max() > 1e-2
    assert torch.allclose(weights[0], weights[1], atol=1e-5)
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_trains_alike(make, tmp_path, use_reentrant):
    weights, logged = [], []
    for options in (
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}},
    ):
        model = make("llama")
        logged.append(losses(a_trainer(model, tmp_path, optim="sgd", learning_rate=0.5, **options)))
        weights.append(bank_of(model).weight.detach())
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)
    assert (weights[0] - bank_of(make("llama")).weight).abs().max() > 1e-2
    assert torch.allclose(weights[0], weights[1], atol=1e-5)


def test_checkpointing_layers_drop_caches_but_never_the_prompt(make):
    """They do so whenever they are in training mode, without gradients too."""
    model = make("llama")
    ids, _ = token_batch([9, 9])
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).logits
        generated = model.generate(input_ids=ids, max_new_tokens=3)
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for use_cache in (True, False):
            assert (model(input_ids=ids, labels=ids, use_cache=use_cache).logits - expected).abs().max() <= 1e-5
        assert torch.equal(model.generate(input_ids=ids, max_new_tokens=3, use_cache=False), generated)
        with pytest.raises(ValueError, match=r"gradient checkpointing drops the cache: call `model.eval\(\)`"):
            model.generate(input_ids=ids, max_new_tokens=3)
        assert torch.equal(model.eval().generate(input_ids=ids, max_new_tokens=3), generated)


def test_the_best_checkpoints_prompts_come_back(make, tmp_path):
    model = make("llama")
    rows = examples(8)
    trainer = a_trainer(
        model,
        tmp_path,
        rows,
        eval_dataset=examples(8, seed=1),
        max_steps=5,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        load_best_model_at_end=True,
        greater_is_better=True,  # so that it is not the last one
        **{f"{each}_strategy": "steps" for each in ("eval", "save")},
        eval_steps=1,
        save_steps=1,
    )
    trainer.train()
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    best = 1 + evaluated.index(max(evaluated))
    assert best < 5, "else the last prompts would do"
    file = load_file(tmp_path / f"checkpoint-{best}" / "adapter_model.safetensors")
    last = load_file(tmp_path / "checkpoint-5" / "adapter_model.safetensors")
    (stored,), (other,) = file.values(), last.values()
    assert not torch.equal(stored, other)
    assert torch.equal(bank_of(model).weight, stored)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(evaluated), abs=1e-6), "no stale prompt cache"


def test_rows_sorted_by_length_train_alike(make, tmp_path):
    known = inspect.signature(TrainingArguments).parameters
    option = {"group_by_length": True} if "group_by_length" in known else {"train_sampling_strategy": "group_by_length"}
    model, rows, batches = make("llama"), examples(), []
    read = {tuple(row["input_ids"]): row for row in rows}

    def note(_, args, kwargs):
        both = zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True)
        ids = [tuple(ids[seen.bool()].tolist()) for ids, seen in both]
        batches.append([read[each] for each in ids])

    model.register_forward_pre_hook(note, with_kwargs=True)
    logged = losses(a_trainer(model, tmp_path, rows, learning_rate=0.0, **option))
    assert logged == pytest.approx([mean_loss(model, batch) for batch in batches], abs=1e-4)
    assert max(len(row["input_ids"]) for row in rows) == len(batches[0][0]["input_ids"])


def test_a_smaller_batch_is_found_after_running_out_of_memory(make, tmp_path):
    model, sizes = make("llama", num_prompts=2), []

    def run_out(_, args):
        sizes.append(len(args[0]))
        if len(args[0]) > 2:
            raise RuntimeError("CUDA out of memory.")

    # In the middle of the decoder, where everything of IDP's is under way.
    handle = model.get_base_model().model.layers[1].register_forward_pre_hook(run_out)
    trainer = a_trainer(model, tmp_path, per_device_train_batch_size=3, auto_find_batch_size=True)
    found = losses(trainer)
    handle.remove()
    assert max(sizes) == 3
    assert trainer._train_batch_size == 2
    assert all(np.isfinite(found))
    ids, _ = token_batch([9, 9])
    with torch.no_grad():
        model.eval()(input_ids=ids, prompt_ids=torch.tensor([1, 0]))
        assert model.last_selection.prompt_ids.tolist() == [1, 0]


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_noise_on_embeddings_reaches_neither_prompts_nor_base_nor_the_choice(make, tmp_path, gradient_checkpointing):
    model, chosen = make("llama"), []
    rows = examples(8)
    with torch.no_grad():
        expected = [by_the_definition(model, row)[0] for row in rows]
    remember = model.base_model.layer.remember
    model.base_model.layer.remember = lambda selection: (
        chosen.extend(selection.prompt_ids.tolist()),
        remember(selection),
    )
    order = []
    model.register_forward_pre_hook(lambda _, a, kwargs: order.extend(kwargs["input_ids"].tolist()), with_kwargs=True)
    options = {"max_steps": 2, "learning_rate": 0.0, "gradient_checkpointing": gradient_checkpointing}
    noisy = losses(a_trainer(model, tmp_path, rows, neftune_noise_alpha=30.0, **options))
    start = bank_of(make("llama")).weight
    assert torch.equal(bank_of(model).weight, start), "the learning rate is zero"
    for ids, prompt in zip(order, chosen, strict=True):
        row = next(i for i, each in enumerate(rows) if ids[: len(each["input_ids"])] == each["input_ids"])
        assert prompt == expected[row], "a training example chooses what it would choose at inference"
    del model.base_model.layer.remember
    silent = losses(a_trainer(make("llama"), tmp_path, rows, **options))
    assert noisy != pytest.approx(silent, rel=1e-3), "else there was no noise"
    ids, _ = token_batch([9, 9])
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, make("llama")(input_ids=ids).logits)
    base = model.unload().state_dict()
    for key, value in tiny("llama").state_dict().items():
        assert torch.equal(base[key], value)


def test_predictions_can_be_generated(make, tmp_path):
    model = make("llama")
    ids, mask = token_batch([4, 7, 5], "left")
    rows = [
        {"input_ids": row[seen.bool()].tolist(), "labels": row[seen.bool()].tolist()}
        for row, seen in zip(ids, mask, strict=True)
    ]
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    trainer = a_trainer(
        model,
        tmp_path,
        kind=Seq2SeqTrainer,
        arguments=Seq2SeqTrainingArguments,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        predict_with_generate=True,
        generation_config=GenerationConfig(max_new_tokens=4, pad_token_id=0, do_sample=False),
    )
    prediction = trainer.predict(rows)
    alone = [model.generate(input_ids=torch.tensor([row["input_ids"]]), max_new_tokens=4)[0, -4:] for row in rows]
    assert prediction.predictions[:, 7:11].tolist() == [tokens.tolist() for tokens in alone]


def test_the_language_modelling_collator(make, tmp_path):
    rows = [{"input_ids": row["input_ids"]} for row in examples(4)]
    model = make("llama")
    collator = DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False)
    labelled = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows]
    expected = mean_loss(model, labelled)
    evaluated = a_trainer(model, tmp_path, rows, data_collator=collator, per_device_eval_batch_size=4).evaluate(rows)
    tokens = sum(len(row["input_ids"]) for row in rows)
    # transformers 5.0 divides by all labels, a row's first too, which nothing predicts.
    possible = [expected, expected * (tokens - len(rows)) / tokens]
    assert any(evaluated["eval_loss"] == pytest.approx(value, abs=1e-4) for value in possible)
    logged = losses(a_trainer(model, tmp_path, rows, data_collator=collator, max_steps=8))
    assert logged[-1] < logged[0]


@pytest.mark.parametrize("flash", [False, True])
def test_the_flattening_collator_is_refused(make, tmp_path, flash):
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=flash)
    trainer = a_trainer(make("llama"), tmp_path, data_collator=collator)
    with pytest.raises(ValueError, match="IDP cannot run packed rows"):
        trainer.train()
