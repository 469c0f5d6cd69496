"""TRL's trainers, run as their users run them."""

from __future__ import annotations

import math

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model

import idp_peft
from idp_peft import IDPConfig
from tests.reference import bank_of, brute_force_scores, concatenated_logits
from tests.tiny import tiny, token_batch
from tests.tiny_chats import chat_tokenizer, tiny_answers, tiny_questions
from tests.tiny_folder import tiny_folder

pytest.importorskip("trl", reason="TRL is not installed: `pip install idp-peft[test]` has it")
datasets = pytest.importorskip("datasets")

from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer  # noqa: E402

_ARGUMENTS = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "max_steps": 1,
    "learning_rate": 0.05,
    "logging_steps": 1,
    "max_length": 32,
    "bf16": False,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
}


def idp(**config):
    return IDPConfig(task_type="CAUSAL_LM", **{"num_prompts": 4, "num_virtual_tokens": 4, **config})


def sft(model, folder, data, **arguments):
    extra = {
        name: arguments.pop(name) for name in ("peft_config", "compute_metrics", "eval_dataset") if name in arguments
    }
    args = SFTConfig(output_dir=str(folder), **{**_ARGUMENTS, **arguments})
    return SFTTrainer(model=model, args=args, train_dataset=data, processing_class=chat_tokenizer(), **extra)


def chats(questions, answers):
    turns = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in zip(questions, answers, strict=True)
    ]
    return datasets.Dataset.from_list([{"messages": both} for both in turns])


def pairs(questions, answers):
    return datasets.Dataset.from_list(
        [{"prompt": f"{q} ", "completion": f"{a} <s>"} for q, a in zip(questions, answers, strict=True)]
    )


def expected_rows(model, texts, first_labels):
    """By the definition, row by row: what the prompt that a row's context chooses makes of the row.

    Args:
        texts (`list[str]`): each row, as the model reads it.
        first_labels (`list[int]`): where each row's targets begin; the choice reads what stands before.

    Returns:
        `(prompt_ids, nats, hits)`: per row, the prompt, and float32 and bool `[targets]`.
    """
    base, eager, tokenizer = tiny("llama"), tiny("llama", "eager"), chat_tokenizer()
    prompt_ids, nats, hits = [], [], []
    for text, first in zip(texts, first_labels, strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids
        ones, context = torch.ones_like(ids), (torch.arange(ids.shape[1]) < first)[None].long()
        prompt = brute_force_scores(model, eager, ids, ones, context if first else ones, 0, "mean").argmax().item()
        logits = concatenated_logits(model, base, ids, prompt)[0]
        targets = ids[0, max(first, 1) :]
        before = logits[max(first, 1) - 1 : -1]
        prompt_ids.append(prompt)
        nats.append(torch.nn.functional.cross_entropy(before, targets, reduction="none"))
        hits.append(before.argmax(-1) == targets)
    return prompt_ids, nats, hits


def render(questions, answers):
    turns = zip(questions, answers, strict=True)
    return [f"w2 {question} w3 w4 {answer} <s>" for question, answer in turns]


def plain_weights(model):
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {key: value for key, value in base.state_dict().items() if "idp" not in key}


@pytest.mark.parametrize("given", ["peft_config", "wrapped", "folder"])
@pytest.mark.parametrize("form", [chats, pairs])
def test_sft_trains_saves_and_loads(make, tmp_path, given, form):
    questions = tiny_questions(4)
    data = form(questions * 4, tiny_answers(make("llama"), questions) * 4)
    untouched, torch_seed = tiny("llama"), 3
    settings = {"max_steps": 12, "learning_rate": 0.05, "seed": torch_seed, "lr_scheduler_type": "constant"}
    settings["per_device_train_batch_size"] = 16  # all rows: losses of batches that differ tell little
    if given == "wrapped":
        trainer = sft(make("llama"), tmp_path / "run", data, **settings)
    else:
        model = tiny_folder(tmp_path / "base") if given == "folder" else tiny("llama")
        trainer = sft(model, tmp_path / "run", data, peft_config=idp(), **settings)
    start = bank_of(trainer.model).weight.detach().clone()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12
    assert sum(losses[-4:]) < sum(losses[:4]) - 1
    assert (bank_of(trainer.model).weight - start).abs().max() > 0.1
    weights = plain_weights(trainer.model)
    assert weights.keys() == untouched.state_dict().keys()
    for key, value in untouched.state_dict().items():
        assert torch.equal(weights[key], value), "the base is never touched"

    trainer.save_model(str(tmp_path / "adapter"))
    ids, mask = token_batch([5, 9])
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model(input_ids=ids, attention_mask=mask).logits
        if given == "folder":
            loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
        else:
            loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path / "adapter")
        assert torch.equal(loaded.eval()(input_ids=ids, attention_mask=mask).logits, expected)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("form", ["completion_only_loss", "assistant_only_loss", "prompt and messages"])
def test_the_loss_is_that_of_the_completion_behind_the_prompt_its_context_chose(
    make, tmp_path, form, gradient_checkpointing
):
    questions = tiny_questions(8, seed=1)
    model = make("llama", num_virtual_tokens=[3, 5, 2, 5])
    answers = tiny_answers(model, questions)
    spoken = [len(answer.split()) + 1 for answer in answers]
    if form == "completion_only_loss":
        data, options = pairs(questions, answers), {"completion_only_loss": True}
        texts = [f"{question} {answer} <s>" for question, answer in zip(questions, answers, strict=True)]
    else:
        data, options = chats(questions, answers), {"assistant_only_loss": True}
        texts = render(questions, answers)
        if form == "prompt and messages":
            halves = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in data]
            data, options = datasets.Dataset.from_list(halves), {}
    first_labels = [len(text.split()) - count for text, count in zip(texts, spoken, strict=True)]
    prompt_ids, nats, hits = expected_rows(model, texts, first_labels)
    by_whole_row, *_ = expected_rows(model, texts, [0] * len(texts))
    assert prompt_ids != by_whole_row, "else the test could not see a choice that read the targets"

    options = {"per_device_train_batch_size": 8, "gradient_checkpointing": gradient_checkpointing, **options}
    trainer = sft(model, tmp_path, data, **options)
    trainer.train()
    (logged,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged["loss"] == pytest.approx(torch.cat(nats).mean().item(), abs=2e-5)
    assert logged["mean_token_accuracy"] == pytest.approx(torch.cat(hits).float().mean().item())
    assert 0 < logged["mean_token_accuracy"] < 1
    assert sorted(model.last_selection.prompt_ids.tolist()) == sorted(prompt_ids)


def test_every_token_of_a_chat_counts_without_such_a_choice(make, tmp_path):
    questions = tiny_questions(8, seed=1)
    model = make("llama")
    answers = tiny_answers(model, questions)
    trainer = sft(model, tmp_path, chats(questions, answers), per_device_train_batch_size=8)
    _, nats, _ = expected_rows(model, render(questions, answers), [0] * 8)
    trainer.train()
    # transformers 5.0 divides by all labels, a row's first too, which nothing predicts.
    targets = sum(len(row) for row in nats)
    expected = [torch.cat(nats).sum().item() / count for count in (targets, targets + len(nats))]
    assert any(trainer.state.log_history[0]["loss"] == pytest.approx(value, abs=2e-5) for value in expected)


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
def test_metrics_get_the_logits_of_the_prompt_that_the_context_chose(make, tmp_path):
    """TRL runs the model a second time for them, without labels."""
    questions, seen = tiny_questions(8, seed=1), {}
    model = make("llama", assignment="uniform")
    answers = tiny_answers(model, questions)

    def compute_metrics(prediction):
        seen.update(logits=torch.from_numpy(prediction.predictions), labels=torch.from_numpy(prediction.label_ids))
        return {}

    data = pairs(questions, answers)
    trainer = sft(model, tmp_path, data, eval_dataset=data, compute_metrics=compute_metrics)
    scores = trainer.evaluate()
    texts = [f"{question} {answer} <s>" for question, answer in zip(questions, answers, strict=True)]
    first_labels = [len(question.split()) for question in questions]
    prompt_ids, nats, hits = expected_rows(model, texts, first_labels)
    assert prompt_ids != expected_rows(model, texts, [0] * 8)[0]
    width = max(len(text.split()) for text in texts)
    assert seen["logits"].shape == (8, width, 97)
    assert seen["labels"].shape == (8, width)
    for row, (text, first, prompt) in enumerate(zip(texts, first_labels, prompt_ids, strict=True)):
        ids = chat_tokenizer()(text, return_tensors="pt").input_ids
        expected = concatenated_logits(model, tiny("llama"), ids, prompt)[0]
        assert (seen["logits"][row, : len(expected)] - expected).abs().max() <= 1e-4
        assert seen["labels"][row, first : len(expected)].tolist() == ids[0, first:].tolist()
        assert (seen["labels"][row, :first] == -100).all()
    halves = [torch.cat(nats[:4]), torch.cat(nats[4:])]  # one per batch, as `Trainer` averages
    assert scores["eval_loss"] == pytest.approx(sum(half.mean().item() for half in halves) / 2, abs=2e-5)
    hits = [torch.cat(hits[:4]).float().mean().item(), torch.cat(hits[4:]).float().mean().item()]
    assert trainer.state.log_history[-1]["eval_mean_token_accuracy"] == pytest.approx(sum(hits) / 2)


def test_evaluation_while_training(make, tmp_path):
    questions = tiny_questions(8)
    data = chats(questions, tiny_answers(make("llama"), questions))
    trainer = sft(make("llama"), tmp_path, data, eval_dataset=data, eval_strategy="steps", eval_steps=1, max_steps=3)
    trainer.train()
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 3
    assert evaluated[-1] < evaluated[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "packed",
    [
        {"packing": True, "packing_strategy": "bfd"},
        {"packing": True, "packing_strategy": "bfd_split"},
        {"packing": True, "packing_strategy": "wrapped"},
        {"packing": True, "packing_strategy": "wrapped", "padding_free": True},
        {"padding_free": True, "max_length": None},
    ],
    ids=lambda packed: "-".join(str(value) for value in packed.values()),
)
def test_rows_of_several_documents_are_refused(make, tmp_path, packed, attention):
    questions = tiny_questions(8)
    trainer = sft(make("llama", attention), tmp_path, chats(questions, questions), **packed)
    with pytest.raises(ValueError, match="IDP cannot run packed rows"):
        trainer.train()


def test_packed_evaluation_is_refused_and_packed_training_says_nothing_of_it(make, tmp_path):
    questions = tiny_questions(8)
    data = chats(questions, questions)
    wrapped = {"packing_strategy": "wrapped", "eval_dataset": data}
    trainer = sft(make("llama"), tmp_path, data, eval_packing=True, **wrapped)
    trainer.train()
    with pytest.raises(ValueError, match="IDP cannot run packed rows"):
        trainer.evaluate()
    trainer = sft(make("llama"), tmp_path, data, packing=True, eval_packing=False, **wrapped)
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    with pytest.raises(ValueError, match="IDP cannot run packed rows"):
        trainer.train()


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_the_fused_head_trains_one_prompt_per_row(make, tmp_path, loss_type):
    """Every assignment that gives a row one prompt; `dft` weighs each token's loss by its probability."""
    questions = tiny_questions(4)
    for assignment in ("selected", "uniform"):
        model = make("llama", assignment=assignment)
        answers = tiny_answers(model, questions)
        data = pairs(questions, answers)
        trainer = sft(model, tmp_path, data, loss_type=loss_type)
        before = bank_of(model).weight.detach().clone()
        nats = {}
        for prompt in range(4):
            logits = [
                (concatenated_logits(model, tiny("llama"), ids, prompt)[0], ids[0], len(question.split()))
                for question, answer in zip(questions, answers, strict=True)
                for ids in [chat_tokenizer()(f"{question} {answer} <s>", return_tensors="pt").input_ids]
            ]
            for row, (scores, ids, first) in enumerate(logits):
                nats[row, prompt] = torch.nn.functional.cross_entropy(
                    scores[first - 1 : -1], ids[first:], reduction="none"
                )
        order = []
        trainer.model.register_forward_pre_hook(
            lambda _, args, kwargs, order=order: order.extend(kwargs["input_ids"].tolist()), with_kwargs=True
        )
        trainer.train()
        texts = [chat_tokenizer()(question).input_ids for question in questions]
        rows = [next(i for i, ids in enumerate(texts) if read[: len(ids)] == ids) for read in order]
        chosen = model.last_selection.prompt_ids.tolist()
        whole = torch.cat([nats[pair] for pair in zip(rows, chosen, strict=True)])
        weight = torch.exp(-whole) if loss_type == "dft" else 1
        assert trainer.state.log_history[0]["loss"] == pytest.approx((whole * weight).mean().item(), abs=2e-5)
        moved = (bank_of(model).weight - before).abs().amax(-1).split(4)
        assert {i for i, part in enumerate(moved) if part.max() > 0} == set(chosen)
        assert assignment != "uniform" or set(chosen) == {0, 1, 2, 3}


def test_training_every_prompt_on_every_example_needs_the_models_own_loss(make, tmp_path):
    questions = tiny_questions(4)
    trainer = sft(make("llama", assignment="all"), tmp_path, chats(questions, questions))
    with pytest.raises(ValueError, match=r"assignment='all' trains on the model's own loss, and TRL's fused head"):
        trainer.train()


# ---------------------------------------------------------------------- preferences


def preferences(model, count=4):
    questions = tiny_questions(count, seed=1)
    chosen, rejected = tiny_answers(model, questions, 3), tiny_answers(model, questions[::-1], 5)
    rows = zip(questions, chosen, rejected, strict=True)
    return [{"prompt": f"{q} ", "chosen": f"{good} ", "rejected": f"{bad} "} for q, good, bad in rows]


def dpo(model, folder, rows, peft_config=None, **arguments):
    args = DPOConfig(output_dir=str(folder), **{**_ARGUMENTS, **arguments})
    data = datasets.Dataset.from_list(rows)
    tokenizer = chat_tokenizer()
    return DPOTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=peft_config)


def answer_logps(row, answer, logits_of):
    """Log-probability of an answer and its end, by a function from ids to logits `[1, n, vocab]`."""
    ids = chat_tokenizer()(row["prompt"] + row[answer] + "<s>", return_tensors="pt").input_ids
    first = len(row["prompt"].split())
    logits = logits_of(ids)[0, first - 1 : -1]
    return logits.log_softmax(-1).gather(-1, ids[0, first:, None]).sum().item()


def logps_behind_the_chosen_prompt(model, row, answer):
    text, first = row["prompt"] + row[answer] + "<s>", len(row["prompt"].split())
    (prompt,), _, _ = expected_rows(model, [text], [first])
    return answer_logps(row, answer, lambda ids: concatenated_logits(model, tiny("llama"), ids, prompt))


def base_logps(row, answer):
    base = tiny("llama")
    with torch.no_grad():
        return answer_logps(row, answer, lambda ids: base(input_ids=ids).logits)


@pytest.mark.parametrize("precompute", [False, True])
def test_dpo_compares_with_the_base_model(tmp_path, precompute):
    """A new adapter's reference is the base model, the adapter disabled."""
    rows = preferences(tiny("llama"))
    trainer = dpo(tiny("llama"), tmp_path, rows, idp(), precompute_ref_log_probs=precompute, beta=1.0)
    model, differences = trainer.model, {}
    for answer in ("chosen", "rejected"):
        pairs = [(logps_behind_the_chosen_prompt(model, row, answer), base_logps(row, answer)) for row in rows]
        differences[answer] = sum(ours - theirs for ours, theirs in pairs) / len(rows)
    start = bank_of(model).weight.detach().clone()
    trainer.train()
    logged = trainer.state.log_history[0]
    for answer, difference in differences.items():
        assert abs(difference) > 0.1
        assert logged[f"rewards/{answer}"] == pytest.approx(difference, abs=1e-3)
    if precompute:
        for answer in ("chosen", "rejected"):
            expected = sorted(base_logps(row, answer) for row in rows)
            assert sorted(trainer.train_dataset[f"ref_{answer}_logps"]) == pytest.approx(expected, abs=1e-4)
    read = model.last_selection
    if not precompute:
        assert torch.equal(*read.prompt_ids.chunk(2)), "both answers of a pair stand behind the same prompt"
    assert (bank_of(model).weight - start).abs().max() > 0
    for key, value in tiny("llama").state_dict().items():
        assert torch.equal(plain_weights(model)[key], value)


def test_dpo_of_a_trained_adapter_compares_with_the_adapter_as_it_was(make, tmp_path):
    model = make("llama")
    trainer = dpo(model, tmp_path, preferences(tiny("llama")), beta=1.0, max_steps=2)
    start = bank_of(model).weight.detach().clone()
    trainer.train()
    first, last = [entry for entry in trainer.state.log_history if "rewards/chosen" in entry]
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-4)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert min(last["loss"], 0.5) < first["loss"]
    assert torch.equal(bank_of(model, "ref").weight, start)
    assert (bank_of(model).weight - start).abs().max() > 0
    assert model.active_adapter == "default"


def test_answers_that_are_compared_must_not_be_dealt_different_prompts(make, tmp_path):
    trainer = dpo(make("llama", assignment="uniform"), tmp_path, preferences(tiny("llama")))
    with pytest.raises(ValueError, match="assignment='uniform' deals a prompt to each row"):
        trainer.train()


def test_grpo_trains_the_prompt_that_sampled(make, tmp_path):
    """The choice reads what both the sampling and the training forward see before the answer."""
    model, chosen = make("llama"), []
    arguments = {**_ARGUMENTS, "max_steps": 2, "num_generations": 4, "max_completion_length": 5, "beta": 0.1}
    del arguments["max_length"]
    args = GRPOConfig(output_dir=str(tmp_path), **arguments)
    data = datasets.Dataset.from_list([{"prompt": question} for question in tiny_questions(8)])
    trainer = GRPOTrainer(
        model=model,
        # By place, not by what was sampled: in a group whose rewards are equal there is nothing to learn.
        reward_funcs=lambda completions, **_: [float(place) for place in range(len(completions))],
        args=args,
        train_dataset=data,
        processing_class=chat_tokenizer(),
    )
    layer = model.base_model.layer
    start, remember = bank_of(model).weight.detach().clone(), layer.remember
    layer.remember = lambda selection: (chosen.append(selection.prompt_ids.tolist()), remember(selection))
    trainer.train()
    assert (bank_of(model).weight - start).abs().max() > 0
    rounds = [chosen[i : i + len(chosen) // 2] for i in (0, len(chosen) // 2)]
    for calls in rounds:
        assert len(calls) >= 2
        assert all(each == calls[0] for each in calls), "sampling and training must use the same prompt"


@pytest.mark.parametrize("form", [chats, pairs])
@pytest.mark.parametrize(
    "beyond",
    [
        {"selection": "centroid"},
        {"scales": True},
        {"prompts": "key_values", "init_weights": False},
        {"prompts": "key_values", "init_weights": False, "scales": True, "selection": "centroid"},
    ],
    ids=lambda beyond: ", ".join(f"{name}={value}" for name, value in beyond.items() if name != "init_weights"),
)
def test_sft_trains_what_goes_beyond_the_paper_and_loads_it(tmp_path, beyond, form):
    base, questions = tiny("llama"), tiny_questions(4)
    data = form(questions * 4, tiny_answers(base, questions) * 4)
    model = get_peft_model(tiny("llama"), idp(**beyond))
    if "prompts" in beyond:
        idp_peft.start_at(model, base, [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16], [17, 18, 19, 20]])
    bank = bank_of(model)
    before = {name: tensor.clone() for name, tensor in bank.state_dict().items()}
    settings = {"max_steps": 12, "learning_rate": 0.03, "seed": 3, "lr_scheduler_type": "constant"}
    settings |= {"per_device_train_batch_size": 16, "gradient_checkpointing": "prompts" not in beyond}
    trainer = sft(model, tmp_path / "run", data, **settings)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.5
    moved = {name for name, tensor in bank.state_dict().items() if not torch.equal(tensor, before[name])}
    expected = {"weight"} | {"scales" for _ in [0] if bank.scales is not None}
    assert moved == expected | {name for name in ("centroids", "contexts") if bank.clusters is not None}
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path / "adapter").eval()
    ids, mask = token_batch([5, 9])
    trainer.model.eval()
    with torch.no_grad():
        logits = loaded(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(logits, trainer.model(input_ids=ids, attention_mask=mask).logits)
