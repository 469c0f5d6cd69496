"""Training with the hosts' own loops."""

from __future__ import annotations

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.reference import bank_of
from tests.tiny import tiny, token_batch


def rows(count=32, length=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 97, (count, length), generator=generator)
    ids = ids[:4].repeat(count // 4, 1)  # few enough to be learned
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args, state, control, logs=None, **_):
        if logs and "loss" in logs:
            self.values.append(logs["loss"])


def train(model, folder, steps=16, resume=None, **arguments):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        logging_steps=1,
        save_steps=8,
        report_to=[],
        disable_tqdm=True,
        seed=3,
        use_cpu=True,
        **arguments,
    )
    losses = Losses()
    trainer = Trainer(
        model=model, args=arguments, train_dataset=rows(), eval_dataset=rows(8, seed=1), callbacks=[losses]
    )
    trainer.train(resume_from_checkpoint=resume)
    return losses.values, trainer


@pytest.mark.parametrize("assignment", ["uniform", "selected", "all"])
def test_trainer_resumes_exactly_where_it_was(make, tmp_path, assignment):
    whole, _ = train(model := make("llama", assignment=assignment), tmp_path / "whole")
    resumed_model = make("llama", assignment=assignment)
    with torch.no_grad():
        bank_of(resumed_model).weight.zero_()  # everything must come from the checkpoint
    resumed, _ = train(resumed_model, tmp_path / "whole", resume=str(tmp_path / "whole" / "checkpoint-8"))
    assert whole[8:] == resumed[-8:]
    assert torch.equal(bank_of(model).weight, bank_of(resumed_model).weight)
    assert sum(whole[-4:]) < sum(whole[:4])


def test_training_moves_prompts_and_nothing_else(make, tmp_path):
    model, untouched = make("llama", assignment="uniform"), tiny("llama")
    start = bank_of(model).weight.detach().clone()
    train(model, tmp_path)
    assert (bank_of(model).weight - start).abs().amax(-1).min() > 0, "every prompt of the bank trains under uniform"
    base = model.unload().state_dict()
    for key, value in untouched.state_dict().items():
        assert torch.equal(base[key], value)


def test_a_checkpoint_loads_with_the_auto_class(make, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "base")
    model = make("llama")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    train(model, tmp_path / "run")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-16")
    ids, mask = token_batch([5, 9])
    model.eval()
    with torch.no_grad():
        assert torch.equal(
            loaded(input_ids=ids, attention_mask=mask).logits, model(input_ids=ids, attention_mask=mask).logits
        )


def test_evaluation_selects_and_keeps_logits_aligned_with_labels(make, tmp_path):
    model = make("llama")
    _, trainer = train(model, tmp_path, steps=1)
    prediction = trainer.predict(rows(8, seed=1))
    assert prediction.predictions.shape == (8, 12, 97)
    assert prediction.label_ids.shape == (8, 12)
    ids = torch.stack([row["input_ids"] for row in rows(8, seed=1)])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    assert torch.allclose(torch.from_numpy(prediction.predictions), expected, atol=1e-5)


def test_gradient_accumulation_and_checkpointing_train_alike(make, tmp_path):
    plain, _ = train(make("llama", num_prompts=1), tmp_path / "a", steps=3)
    checkpointed, _ = train(make("llama", num_prompts=1), tmp_path / "b", steps=3, gradient_checkpointing=True)
    accumulated, _ = train(make("llama", num_prompts=1), tmp_path / "c", steps=3, gradient_accumulation_steps=2)
    assert plain == pytest.approx(checkpointed, rel=1e-4)
    assert all(torch.isfinite(torch.tensor(accumulated)))


def test_all_is_the_mean_over_prompts(make):
    model = make("llama", assignment="all", num_virtual_tokens=[3, 5, 2, 5])
    ids, mask = token_batch([5, 9, 7])
    labels = ids.masked_fill(mask == 0, -100)
    model.train()
    output = model(input_ids=ids, attention_mask=mask, labels=labels)
    output.loss.backward()
    gradient = bank_of(model).weight.grad.clone()
    model.zero_grad()
    each = [model(input_ids=ids, attention_mask=mask, labels=labels, prompt_ids=torch.full((3,), i)) for i in range(4)]
    mean = torch.stack([one.loss for one in each]).mean()
    mean.backward()
    assert torch.allclose(output.loss, mean, rtol=1e-5)
    assert torch.allclose(gradient, bank_of(model).weight.grad, atol=1e-6)
    assert output.logits.shape == (3, 9, 97)
    assert torch.allclose(output.logits, torch.stack([one.logits for one in each]).mean(0), atol=1e-5)
    counted = model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=torch.tensor(18))
    tokens = (labels[:, 1:] != -100).sum()
    assert torch.allclose(counted.loss * 18 / tokens, mean, rtol=1e-5)
    with pytest.raises(ValueError, match="assignment='all' needs `labels`"):
        model(input_ids=ids, attention_mask=mask)
    with pytest.raises(ValueError, match="assignment='all' works through the model's own forward"):
        model.get_base_model().model(input_ids=ids, attention_mask=mask)


def test_selected_trains_the_prompt_the_example_would_choose(make):
    model = make("llama", assignment="selected")
    ids, mask = token_batch([5, 9, 7])
    labels = ids.clone()
    labels[:, :6] = -100
    call = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    with torch.no_grad():
        model(**call)
    chosen = model.last_selection.prompt_ids
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**call).loss.backward()
        assert torch.equal(model.last_selection.prompt_ids, chosen)
    parts = bank_of(model).weight.grad.split(bank_of(model).lengths)
    assert {i for i, part in enumerate(parts) if part.abs().max() > 0} == set(chosen.tolist())


def rows_run(model, layer: int, **batch) -> list[tuple[int, int]]:
    """Rows and tokens that reach a layer during one training step."""
    seen = []
    block = model.get_base_model().model.layers[layer]
    handle = block.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    model.train()
    model(**batch).loss.backward()
    handle.remove()
    return seen


def test_a_step_runs_each_prompt_that_the_batch_uses_once_and_no_other(make):
    model = make("llama", num_prompts=4, num_virtual_tokens=5)
    ids, _ = token_batch([7] * 6)
    forced = torch.tensor([3, 1, 1, 3, 3, 1])
    assert rows_run(model, 1, input_ids=ids, labels=ids, prompt_ids=forced) == [(2, 5), (6, 7)]
    gradient = bank_of(model).weight.grad.view(4, 5, -1).abs().amax(dim=(1, 2))
    assert gradient[[0, 2]].eq(0).all()
    assert gradient[[1, 3]].gt(0).all()


def test_rows_of_one_batch_train_behind_the_prompts_they_were_given(make):
    model = make("llama", num_prompts=4, num_virtual_tokens=[5, 2, 4, 6])
    ids, _ = token_batch([7] * 6)
    batch = {"input_ids": ids, "labels": ids, "prompt_ids": torch.tensor([3, 1, 1, 0, 3, 1])}
    with torch.no_grad():
        expected = model(**batch).logits
    model.train()
    assert (model(**batch).logits - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("selection_layer", [0, 1])
def test_choosing_in_training_runs_all_prompts_up_to_the_selection_layer(make, selection_layer):
    model = make("llama", num_prompts=4, num_virtual_tokens=5, selection_layer=selection_layer)
    ids, _ = token_batch([7] * 6)
    labels = ids.masked_fill(torch.arange(7) < 4, -100)
    seen = rows_run(model, selection_layer, input_ids=ids, labels=labels)
    used = len(model.last_selection.prompt_ids.unique())
    assert seen == [(4, 5), (used, 5), (6, 7)]
    assert (used, 5) in rows_run(model, 2, input_ids=ids, labels=labels)
    assert (4, 5) not in rows_run(model, 2, input_ids=ids, labels=labels)


@pytest.mark.parametrize("selection_layer", [0, 2])
@pytest.mark.parametrize("lengths", [[5, 5, 5], [2, 6, 4]])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gptj"])
def test_training_chooses_what_inference_chooses(make, name, lengths, selection_layer):
    model = make(name, num_prompts=3, num_virtual_tokens=lengths, selection_layer=selection_layer)
    ids, mask = token_batch([9, 7, 5, 8])
    labels = ids.masked_fill((torch.arange(9) < 4) | (mask == 0), -100)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, labels=labels)
    expected = model.last_selection
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        assert torch.equal(model.last_selection.prompt_ids, expected.prompt_ids)
        assert (model.last_selection.scores - expected.scores).abs().max() <= 1e-6


def test_autocast_trains_float32_prompts(make):
    model = make("llama")
    ids, _ = token_batch([9, 9])
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert bank_of(model).weight.grad.dtype == torch.float32
    assert bank_of(model).weight.grad.abs().max() > 0


def test_selected_needs_to_know_what_is_context(make, tmp_path):
    model = make("llama", assignment="selected")
    ids, _ = token_batch([9, 9])
    model.train()
    with pytest.raises(ValueError, match="assignment='selected' needs `labels` or `selection_mask`"):
        model(input_ids=ids)
    assert model(input_ids=ids, selection_mask=torch.ones_like(ids)).logits.shape == (2, 9, 97)
    with pytest.raises(ValueError, match="Trainer's label smoothing takes the labels out of it"):
        train(model, tmp_path, steps=1, label_smoothing_factor=0.1)


def test_other_trainable_parameters_get_their_gradient_through_frozen_prompts(make):
    """In evaluation mode too: the prompts' keys depend on the weights that train."""
    model = make("llama")
    ids, _ = token_batch([9, 9])
    bank_of(model).weight.requires_grad_(False)
    weight = model.get_base_model().model.layers[1].self_attn.k_proj.weight.requires_grad_(True)
    call = {"input_ids": ids, "labels": ids, "prompt_ids": torch.tensor([1, 2])}
    gradients = []
    for training in (True, False):
        model.train(training)
        model.zero_grad()
        model(**call).loss.backward()
        gradients.append(weight.grad.clone())
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.zero_grad()
    model(**call).loss.backward()
    gradients.append(weight.grad.clone())
    assert gradients[0].abs().max() > 1e-3
    for gradient in gradients[1:]:
        assert torch.allclose(gradient, gradients[0], atol=1e-6)
