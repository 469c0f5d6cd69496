"""Training with the hosts' own loops."""

from __future__ import annotations

import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model, inject_adapter_in_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from idp_peft import IDPConfig
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


def chosen_by(model, **call):
    with torch.no_grad():
        model.eval()(**call)
    return model.last_selection


@pytest.mark.parametrize("config", [{}, {"selection": "random"}, {"selection_layer": 1}], ids=str)
def test_a_loop_that_says_nothing_of_targets_chooses_by_whole_rows_and_is_told_so_once(make, config):
    model = make("llama", **config)
    ids, mask = token_batch([9, 6, 8, 7])
    batch = {"input_ids": ids, "attention_mask": mask}
    expected = chosen_by(model, **batch).prompt_ids
    model.train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            model(**batch).logits.square().mean().backward()
            assert torch.equal(model.last_selection.prompt_ids, expected)
    (said,) = [str(each.message) for each in caught if each.category is UserWarning]
    assert re.search(r"targets may steer the choice.*Pass `labels`.*or `selection_mask` in the model's call", said)
    parts = bank_of(model).weight.grad.split(bank_of(model).lengths)
    assert {i for i, part in enumerate(parts) if part.abs().max() > 0} == set(expected.tolist())


@pytest.mark.parametrize("say", ["labels", "selection_mask", "prompt_ids"])
def test_a_loop_that_says_what_is_context_is_told_nothing(make, say):
    model = make("llama").train()
    ids, _ = token_batch([9, 9])
    labels = ids.masked_fill(torch.arange(9) < 4, -100)
    said = {"labels": labels, "selection_mask": labels == -100, "prompt_ids": torch.tensor([0, 1])}[say]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=ids, **{say: said}).logits.sum().backward()
    if say != "prompt_ids":
        chosen = model.last_selection
        assert torch.equal(chosen.prompt_ids, chosen_by(model, input_ids=ids[:, :4]).prompt_ids)


@pytest.mark.filterwarnings("ignore:this training step says nothing:UserWarning")
@pytest.mark.parametrize("assignment", ["uniform", "selected"])
def test_an_adapter_that_transformers_added_trains_in_a_plain_loop_too(assignment):
    base = tiny("llama")  # `add_adapter` calls this function; newer versions want a PEFT that is not out
    inject_adapter_in_model(IDPConfig(num_prompts=4, num_virtual_tokens=4, assignment=assignment), base)
    bank = base.model.idp.idp_prompts["default"]
    start, (ids, mask) = bank.weight.detach().clone(), token_batch([9, 6, 8, 7])
    optimizer = torch.optim.SGD([p for p in base.parameters() if p.requires_grad], lr=0.5)
    base.train()
    base(input_ids=ids, attention_mask=mask).logits.square().mean().backward()
    optimizer.step()
    assert (bank.weight - start).abs().max() > 0
    for key, value in tiny("llama").state_dict().items():
        assert torch.equal(base.state_dict()[key], value)


@pytest.mark.parametrize("assignment", ["selected", "uniform", "all"])
@pytest.mark.parametrize("native", [False, True])
def test_generation_in_training_mode_chooses_as_ever(native, assignment):
    base, config = tiny("llama"), IDPConfig(num_prompts=4, num_virtual_tokens=4, assignment=assignment)
    torch.manual_seed(0)
    model = base if native else get_peft_model(base, config)
    if native:
        inject_adapter_in_model(config, base)
    layer, (ids, mask) = base.model.idp, token_batch([9, 6, 8, 7, 4, 5])
    call = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 3, "do_sample": False}
    model.eval()
    expected, chosen = model.generate(**call), layer.last_selection.prompt_ids
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(model.generate(**call), expected)
    assert torch.equal(layer.last_selection.prompt_ids, chosen)
    assert model.training


def accumulated(model, batch):
    for row in range(4):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        (model(**one).loss / 4).backward()


def two_forwards(model, batch):
    halves = [{name: value[part] for name, value in batch.items()} for part in (slice(2), slice(2, 4))]
    sum(model(**half).loss / 2 for half in halves).backward()


def after_a_forward_without_gradients(model, batch):
    with torch.no_grad():
        model(**batch)
    model(**batch).loss.backward()


def after_a_generation(model, batch):
    model.generate(input_ids=batch["input_ids"], max_new_tokens=2, do_sample=False)
    model(**batch).loss.backward()


def after_inference_mode(model, batch):
    with torch.inference_mode():
        model(**batch)
        model.generate(input_ids=batch["input_ids"], max_new_tokens=2, do_sample=False)
    model(**batch).loss.backward()


def after_an_evaluation(model, batch):
    model.eval()
    model(**batch)
    model.train()
    model(**batch).loss.backward()


def with_checkpointing(model, batch):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**batch).loss.backward()


def compiled(model, batch):
    torch.compile(model, backend="eager")(**batch).loss.backward()
    torch.compiler.reset()


@pytest.mark.parametrize("has_labels", [True, False])
@pytest.mark.parametrize(
    "loop",
    [
        accumulated,
        two_forwards,
        after_a_forward_without_gradients,
        after_a_generation,
        after_inference_mode,
        after_an_evaluation,
        with_checkpointing,
        compiled,
    ],
)
@pytest.mark.filterwarnings("ignore:this training step says nothing:UserWarning")
def test_loops_by_hand_have_the_gradient_of_one_batch(make, loop, has_labels):
    ids, _ = token_batch([9] * 4)
    labels = ids.masked_fill(torch.arange(9) < 5, -100)
    batch, gradients = {"input_ids": ids, "labels": labels}, []

    for run in (lambda model, batch: model(**batch).loss.backward(), loop):
        model = make("llama").train()
        own = model if has_labels else WithItsOwnLoss(model)
        run(own, batch)
        gradients.append(bank_of(model).weight.grad)
    assert gradients[0].abs().max() > 0
    assert torch.allclose(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


class WithItsOwnLoss(torch.nn.Module):
    """A model that is called without the labels; they are compared with its logits."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self, labels, **batch):
        logits = self.model(**batch).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(logits=logits, loss=loss)

    def __getattr__(self, name):
        inside = ("generate", "gradient_checkpointing_enable")
        return getattr(self.model, name) if name in inside else super().__getattr__(name)


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
