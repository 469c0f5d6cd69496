"""`recover`: what it trains, that it can be stopped at any time, and that the base stays as it was."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from idp_peft.key_values import keys_and_values
from idp_peft.models.fingerprint import fingerprint
from idp_peft.recover import recover
from idp_peft.recover.arguments import EFFORTS, RecoverArguments
from idp_peft.recover.centroids import context_means
from idp_peft.recover.distillation import forward_kl
from idp_peft.recover.methods import lora_parameters_per_rank, nearest_lora, prefix_parameters_per_token
from idp_peft.recover.training import collate, training_examples
from idp_peft.texts.data import blocks, load_texts
from idp_peft.texts.examples import read_examples
from idp_peft_cli import main
from idp_peft_cli.help import help_text
from idp_peft_cli.options import RecoverOptions
from tests.commands import run_recover
from tests.patience import PATIENCE
from tests.tiny import tiny
from tests.tiny_folder import tiny_folder, tiny_texts

pytest.importorskip("datasets")
ROOT = Path(__file__).parent.parent
CENTROIDS = "base_model.model.model.idp.idp_prompts.centroids"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a model, a teacher and text, as the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tiny_folder(tmp_path / "model")
    tiny_folder(tmp_path / "teacher", seed=1)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny_texts()))
    return tmp_path


def flags(output: str = "run", **changes) -> list[str]:
    values = {
        "model": "model",
        "dataset": "text.jsonl",
        "output_dir": output,
        "max_steps": 6,
        "save_steps": 2,
        "block_tokens": 16,
        "context_tokens": 4,
        "min_tokens": 4,
        "num_prompts": 3,
        "num_virtual_tokens": 4,
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def run(output: str = "run", **changes) -> Path:
    return run_recover(flags(output, **changes), recover)


def test_a_run_that_began_before_there_were_scales_has_none(here):
    adapter = run(scales=False, max_steps=1)
    record = json.loads(Path("run/run.json").read_text())
    del record["settings"]["scales"]
    Path("run/run.json").write_text(json.dumps(record))
    assert run(scales=False, max_steps=1) == adapter
    with pytest.raises(ValueError, match=r"holds a run with other settings \(scales: False, now True\)"):
        run(max_steps=1)


def test_the_packaged_model_can_be_repaired_from_openings_of_its_text(here, monkeypatch):
    from idp_peft.offline import assets

    monkeypatch.setattr(assets, "default_model", lambda: here / "model")
    named, by_folder = run("a", model="default", max_steps=1), run("b", max_steps=1)
    assert all(torch.equal(weights(named)[name], value) for name, value in weights(by_folder).items())


def weights(adapter: Path) -> dict[str, torch.Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


def same(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("method", ["idp", "prompt_tuning", "prefix_tuning", "lora"])
@pytest.mark.parametrize("teacher", [None, "teacher"])
def test_every_method_and_objective_learns_and_loads_again(here, method, teacher):
    adapter = run(method=method, max_steps=30, learning_rate=0.03, **({"teacher": teacher} if teacher else {}))
    record = json.loads((here / "run" / "run.json").read_text())
    losses = [entry["loss"] for entry in record["training"]["history"] if "loss" in entry]
    assert sum(losses[-3:]) < sum(losses[:3]), losses
    assert record["status"] == "complete"
    assert record["training"]["objective"] == ("distillation" if teacher else "language modelling")
    model = AutoPeftModelForCausalLM.from_pretrained(adapter)
    assert model.peft_config["default"].peft_type.value.lower() == method


def test_a_teacher_that_is_the_model_itself_leaves_nothing_to_learn_for_lora(here):
    run(method="lora", teacher="model", max_steps=1, logging_steps=1)
    record = json.loads((here / "run" / "run.json").read_text())
    assert abs(record["training"]["history"][0]["loss"]) < 1e-6  # a fresh LoRA changes nothing, so KL is 0


def test_forward_kl_is_the_formula():
    torch.manual_seed(0)
    s, z = torch.randn(5, 11), torch.randn(5, 11)
    p, q = (z / 2).softmax(-1), (s / 2).softmax(-1)
    torch.testing.assert_close(forward_kl(s, z, 2.0), 4 * (p * (p / q).log()).sum())
    assert forward_kl(z, z).abs() < 1e-5


def test_forward_kl_of_unequal_vocabularies_is_over_the_rows_that_both_have():
    torch.manual_seed(0)
    s, z = torch.randn(5, 11), torch.randn(5, 14)
    p, q = (z[:, :11] / 2).softmax(-1), (s / 2).softmax(-1)
    torch.testing.assert_close(forward_kl(s, z, 2.0), 4 * (p * (p / q).log()).sum())
    p, q = (s / 2).softmax(-1), (z[:, :11] / 2).softmax(-1)
    torch.testing.assert_close(forward_kl(z, s, 2.0), 4 * (p * (p / q).log()).sum())


def with_rows(folder: str, rows: int, tokens: int = 0) -> None:
    """Give a model more rows than its tokenizer has tokens, as most have, and the tokenizer some tokens more."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.resize_token_embeddings(rows, mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.add_tokens([f"new{number}" for number in range(tokens)])
    tokenizer.save_pretrained(folder)


# Rows of the model and of its teacher, and tokens that the tokenizer of either has beyond the 97 of both.
VOCABULARIES = {
    "a padded teacher": (97, 128, 0, 0),
    "a padded model": (128, 97, 0, 0),
    "both padded": (112, 128, 0, 0),
    "tokens that only the teacher has": (97, 128, 0, 3),
    "tokens that only the model has": (112, 97, 3, 0),
    "tokens in rows that pad the teacher": (112, 128, 3, 0),
    "tokens without rows": (97, 97, 3, 3),
}


@pytest.mark.parametrize("case", list(VOCABULARIES))
def test_a_teacher_needs_the_models_tokens_and_not_its_number_of_rows(here, case):
    rows, teachers_rows, tokens, teachers_tokens = VOCABULARIES[case]
    with_rows("teacher", 128)
    shutil.copytree("teacher", "same")  # the very model, with other rows
    with_rows("same", rows, tokens)
    with_rows("teacher", teachers_rows, teachers_tokens)
    for dataset in ("text.jsonl", "self"):
        settings = {"teacher": "teacher", "dataset": dataset, "self_samples": 24, "method": "lora"}
        run(f"run-{dataset}", model="same", max_steps=1, logging_steps=1, **settings)
        record = json.loads(Path(f"run-{dataset}", "run.json").read_text())
        assert abs(record["training"]["history"][0]["loss"]) < 1e-6
    sampled = {i for line in Path("run-self/self_text.jsonl").read_text().splitlines() for i in json.loads(line)}
    assert max(sampled) < 97, "no row that pads a vocabulary is text"
    run("bank", model="same", teacher="teacher")


def test_text_with_a_token_that_the_teacher_does_not_have_is_refused(here):
    with_rows("model", 128, tokens=2)
    with_rows("teacher", 128)
    with Path("text.jsonl").open("a") as file:
        file.write(json.dumps({"text": "w5 w6 new1 w7"}) + "\n")
    with pytest.raises(ValueError, match="holds 1 tokens that") as error:
        run(teacher="teacher")
    assert str(error.value) == (
        "`dataset` 'text.jsonl' holds 1 tokens that `model` or `teacher` does not have, 'new1' (id 98) for one: give models "
        "of one vocabulary, or text without them"
    )
    assert not Path("run").exists()
    run()  # alone it has them


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (("w7", "other"), "1 tokens differ, 'w7' for one (97 tokens, teacher 97)"),
        (("w96", "w6"), "tokens differ"),
    ],
)
def test_a_teacher_whose_tokens_differ_is_refused(here, change, text):
    file = Path("teacher/tokenizer.json")
    words = json.loads(file.read_text())
    vocabulary = words["model"]["vocab"]
    (old, new), number = change, vocabulary[change[0]]
    del vocabulary[old]
    vocabulary[new] = number
    file.write_text(json.dumps(words))
    with pytest.raises(ValueError, match="`teacher` must have the model's vocabulary: ") as error:
        run(teacher="teacher")
    assert text in str(error.value)


def test_distillation_scores_labelled_positions_only_and_mixes_in_language_modelling(here):
    """The trainer's loss against one written out by hand, on a padded batch, at weight 0.7 and temperature 2."""
    from peft import get_peft_model
    from transformers import TrainingArguments

    from idp_peft import IDPConfig
    from idp_peft.recover.training import make_trainer

    model = get_peft_model(tiny("llama"), IDPConfig(task_type="CAUSAL_LM", num_prompts=1, num_virtual_tokens=4)).eval()
    teacher = tiny("llama", seed=1).eval()
    blocks = [list(range(2, 18)), list(range(30, 39))]
    arguments = TrainingArguments(output_dir="run", use_cpu=True, report_to="none")
    trainer = make_trainer(model, arguments, training_examples(blocks, 6), None, teacher, 0.7, 2.0)
    batch = collate(training_examples(blocks, 6))
    with torch.no_grad():
        found = trainer.compute_loss(model, dict(batch))
        total, count = 0.0, 0
        for ids, context in zip(blocks, (6, 4), strict=True):
            one = torch.tensor([ids])
            s, z = model(input_ids=one).logits[0], teacher(input_ids=one).logits[0]
            for t in range(context, len(ids)):
                own = torch.nn.functional.cross_entropy(s[t - 1], one[0, t])
                total += 0.7 * forward_kl(s[t - 1 : t], z[t - 1 : t], 2.0) + 0.3 * own
                count += 1
    torch.testing.assert_close(found, total / count, rtol=1e-5, atol=1e-6)


def test_distillation_under_assignment_all_is_the_mean_over_prompts(here):
    adapter = run(teacher="teacher", assignment="all", max_steps=2, learning_rate=0.05)
    started = run("other", teacher="teacher", assignment="all", max_steps=1, learning_rate=1e-9)
    moved = (weights(adapter).popitem()[1] - weights(started).popitem()[1]).abs().amax(-1)  # [M * k]
    assert (moved > 0).all(), "every prompt learns from every example"


def test_the_base_is_bit_identical_after_recover(here):
    model = Path("model/model.safetensors")
    before, print_before = model.read_bytes(), fingerprint(AutoModelForCausalLM.from_pretrained("model"))
    adapter = run(learning_rate=0.05)
    assert model.read_bytes() == before
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("model"), adapter)
    assert fingerprint(loaded) == print_before
    assert json.loads(Path("run/run.json").read_text())["base_sha256"] == print_before


def test_a_base_that_changes_under_training_is_noticed(here, monkeypatch):
    train = Trainer.train

    def meddle(self, *args, **kwargs):
        result = train(self, *args, **kwargs)
        with torch.no_grad():
            self.model.get_base_model().lm_head.weight[0, 0] += 1
        return result

    monkeypatch.setattr(Trainer, "train", meddle)
    with pytest.raises(RuntimeError, match="training changed the base model's weights"):
        run()
    assert not Path("run/adapter").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_killed_in_the_middle_resumes_to_the_same_adapter(here, number):
    steps = {"max_steps": 60, "save_steps": 3, "learning_rate": 0.05, "assignment": "uniform"}
    whole = run("whole", **steps)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # In its fifth step, behind a checkpoint, it waits for the signal.
    code = (
        "import itertools, pathlib, sys, time, transformers\n"
        "step, count = transformers.Trainer.training_step, itertools.count(1)\n"
        "def waiting(*args, **kwargs):\n"
        "    if next(count) == 5:\n"
        "        pathlib.Path('waits').touch()\n"
        "        while not pathlib.Path('signalled').exists():\n"
        "            time.sleep(0.01)\n"
        "    return step(*args, **kwargs)\n"
        "transformers.Trainer.training_step = waiting\n"
        "from idp_peft_cli import main; main(sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "recover", *flags("run", **steps)], env=environment, stderr=subprocess.PIPE
    )
    until = time.monotonic() + PATIENCE
    while process.poll() is None and not Path("waits").exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(number)
    Path("signalled").touch()
    errors = process.communicate()[1].decode()
    assert process.returncode == {signal.SIGKILL: -signal.SIGKILL}.get(number, 130), errors
    if number != signal.SIGKILL:
        assert "run the same command again to go on" in errors
        assert "Traceback" not in errors
        assert json.loads(Path("run/run.json").read_text())["status"] == "interrupted"
    assert not Path("run/adapter").exists()
    resumed = run("run", **steps)
    assert same(whole, resumed)
    record = json.loads(Path("run/run.json").read_text())
    assert record["status"] == "complete"
    assert record["training"]["steps"] == 60


def test_a_complete_run_is_not_trained_again(here, monkeypatch):
    adapter = run()
    before = (adapter / "adapter_model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(Trainer, "train", None)
    assert run() == adapter
    assert (adapter / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_a_folder_of_another_run_or_of_something_else_is_refused(here):
    run(max_steps=1)
    with pytest.raises(ValueError, match=r"holds a run with other settings \(num_prompts: 3, now 2\)"):
        run(max_steps=1, num_prompts=2)
    run(max_steps=1, logging_steps=1)  # changes nothing in the adapter
    with pytest.raises(ValueError, match="`output_dir` 'teacher' must be new, empty or a run to go on with"):
        run("teacher")


def test_a_base_that_cuts_gradients_is_refused_with_the_probes_words(here, monkeypatch):
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", _detached(modeling_llama.LlamaMLP.forward))
    monkeypatch.setattr(torch.nn.Linear, "forward", _detached(torch.nn.Linear.forward))
    with pytest.raises(ValueError, match="`model` 'model' cannot be trained through: inference only, because"):
        run()
    assert not Path("run").exists()


def _detached(forward):
    return lambda *args, **kwargs: forward(*args, **kwargs).detach()


def test_text_sampled_from_the_teacher_is_training_data_and_goes_on_where_it_was(here):
    settings = {"dataset": "self", "teacher": "teacher", "self_samples": 20, "max_steps": 2}
    run("whole", **settings)
    lines = Path("whole/self_text.jsonl").read_text().splitlines()
    assert len(lines) == 20
    assert all(2 <= len(json.loads(line)) <= 16 for line in lines)
    Path("run").mkdir()
    Path("run/run.json").write_text(
        Path("whole/run.json").read_text().replace('"complete"', '"running"').replace('"whole"', '"run"')
    )
    Path("run/self_text.jsonl").write_text("\n".join(lines[:11]) + "\n" + lines[11][:5])  # cut in the middle of a line
    run("run", **settings)
    assert Path("run/self_text.jsonl").read_text().splitlines() == lines
    assert same(Path("whole/adapter"), Path("run/adapter"))


def test_trainers_own_evaluation_reads_documents_kept_from_training(here):
    run(eval_strategy="steps", eval_steps=3, load_best_model_at_end=True, save_steps=3, eval_share=0.25)
    history = json.loads(Path("run/run.json").read_text())["training"]["history"]
    assert len([entry for entry in history if "eval_loss" in entry]) == 2


def test_centroids_are_fitted_before_training_and_every_prompt_starts_at_its_own_cluster(here):
    fitted = run(selection="centroid", max_steps=1, learning_rate=0.0)
    model = AutoPeftModelForCausalLM.from_pretrained(fitted)
    bank, tokenizer = model.base_model.layer.active_bank, AutoTokenizer.from_pretrained("model")
    assert not model.peft_config["default"].learn_centroids
    found = blocks(tokenizer, load_texts("text.jsonl"), 16, 4)
    means = context_means(model.get_input_embeddings(), read_examples(training_examples(found, 4)))
    assert bank.contexts.sum() == len(found) == bank.clusters.scores(means).argmax(-1).bincount().sum()
    assert (bank.contexts > 0).all()
    chosen = bank.clusters.scores(means).argmax(-1)
    starts = {prompt: bank.embeddings()[4 * prompt : 4 * prompt + 4] for prompt in range(3)}
    for prompt, start in starts.items():
        begins = [torch.equal(model.get_input_embeddings()(torch.tensor(block.ids[:4])), start) for block in found]
        assert any(begins), "a prompt starts at the opening of a training text"
        assert {int(chosen[number]) for number, begin in enumerate(begins) if begin} == {prompt}
    again = run("again", selection="centroid", max_steps=3, learning_rate=0.03)
    assert torch.equal(weights(again)[CENTROIDS], weights(fitted)[CENTROIDS]), "and they stay where they are"


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({}, 100),
        ({"effort": "quick"}, 30),
        ({"effort": "thorough"}, 300),
        ({"effort": "thorough", "max_steps": 7}, 7),
        ({"effort": "quick", "num_train_epochs": 2}, -1),
    ],
)
def test_effort_sets_the_steps_where_nothing_else_does(given, steps):
    arguments = RecoverArguments(output_dir="run", **given)
    assert arguments.max_steps == steps
    assert arguments.num_train_epochs == given.get("num_train_epochs", 1)


def test_the_efforts_are_in_the_help_and_others_are_refused():
    said = " ".join(help_text("recover", RecoverOptions).split())
    for name, steps in EFFORTS.items():
        assert re.search(rf"{name} \({steps}\b", said)
    with pytest.raises(ValueError, match="`effort` must be one of quick, standard, thorough, got 'hard'"):
        RecoverArguments(output_dir="run", effort="hard")


def test_a_single_prompt_says_what_text_it_was_trained_on(here):
    adapter = run(num_prompts=1, max_steps=3)
    model = AutoPeftModelForCausalLM.from_pretrained(adapter)
    found = blocks(AutoTokenizer.from_pretrained("model"), load_texts("text.jsonl"), 16, 4)
    means = context_means(model.get_input_embeddings(), read_examples(training_examples(found, 4)))
    bank = model.base_model.layer.active_bank
    assert bank.contexts.tolist() == [len(found)]
    assert torch.allclose(bank.centroids, means.mean(0, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("teacher", [None, "teacher"])
@pytest.mark.parametrize("selection", ["attention", "centroid"])
def test_key_value_prompts_start_at_what_the_teacher_makes_of_training_text(here, teacher, selection):
    settings = {"prompts": "key_values", "selection": selection, **({"teacher": teacher} if teacher else {})}
    start = run(max_steps=1, learning_rate=0.0, **settings)
    model = AutoPeftModelForCausalLM.from_pretrained(start)
    source = AutoModelForCausalLM.from_pretrained(teacher or "model")
    tokenizer = AutoTokenizer.from_pretrained("model")
    rows = [[1, *block.ids[:3]] for block in blocks(tokenizer, load_texts("text.jsonl"), 16, 4)]
    made = keys_and_values(source, torch.tensor(rows)).view(len(rows), -1)
    for prompt in model.base_model.layer.active_bank.embeddings().view(3, -1):
        assert (made - prompt).abs().max(-1).values.min() < 1e-6, "the beginning of a training text"
    learned = run("learned", max_steps=30, learning_rate=0.03, **settings)
    record = json.loads((here / "learned" / "run.json").read_text())
    losses = [entry["loss"] for entry in record["training"]["history"] if "loss" in entry]
    assert sum(losses[-3:]) < sum(losses[:3]), losses
    frozen = "base_model.model.model.idp.idp_prompts.frozen"
    assert torch.equal(weights(learned)[frozen], weights(start)[frozen])
    with pytest.raises(ValueError, match="`init` must be 'corpus' with prompts='key_values'"):
        run("other", **settings, init="vocab")


def test_every_named_kind_trains_a_prompt_of_its_own(here):
    rows = [{"text": text, "sort": "ba"[number % 2]} for number, text in enumerate(tiny_texts())]
    (here / "kinds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapter = run(
        dataset="kinds.jsonl", kind_column="sort", selection="centroid", eval_strategy="epoch", eval_share=0.2
    )
    model = AutoPeftModelForCausalLM.from_pretrained(adapter)
    config, bank = model.peft_config["default"], model.base_model.layer.active_bank
    assert (config.num_prompts, config.prompt_names) == (2, ["a", "b"])
    tokenizer, kept = AutoTokenizer.from_pretrained("model"), len(rows) // 2 - round(0.2 * len(rows) / 2)
    for prompt, kind in enumerate(config.prompt_names):
        texts = [row["text"] for row in rows if row["sort"] == kind][:kept]
        found = blocks(tokenizer, texts, 16, 4)
        means = context_means(model.get_input_embeddings(), read_examples(training_examples(found, 4)))
        assert torch.allclose(bank.centroids[prompt], means.mean(0), atol=1e-6)
        assert bank.contexts[prompt] == len(found)
    for wrong in ({"method": "lora"}, {"dataset": "self", "teacher": "teacher"}):
        with pytest.raises(ValueError, match="`kind_column` says which prompt a document trains"):
            run("other", **{"dataset": "kinds.jsonl", "kind_column": "sort", **wrong})
    with pytest.raises(
        ValueError, match=r"`kind_column` must be one of the columns of 'kinds\.jsonl', text, sort; got 'x'"
    ):
        run("other", dataset="kinds.jsonl", kind_column="x")


def test_budgets_are_counted_right(here):
    from peft import LoraConfig, PrefixTuningConfig, get_peft_model

    model = tiny("llama")
    counted = get_peft_model(tiny("llama"), LoraConfig(task_type="CAUSAL_LM", r=3, target_modules="all-linear"))
    assert 3 * lora_parameters_per_rank(model, None) == counted.get_nb_trainable_parameters()[0]
    counted = get_peft_model(tiny("llama"), LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj", "v_proj"]))
    assert 3 * lora_parameters_per_rank(model, ["q_proj", "v_proj"]) == counted.get_nb_trainable_parameters()[0]
    counted = get_peft_model(tiny("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    assert 5 * prefix_parameters_per_token(model.config) == counted.get_nb_trainable_parameters()[0]
    each = lora_parameters_per_rank(model, None)
    assert nearest_lora(model, 4 * each) == ("all-linear", 4)
    small = lora_parameters_per_rank(model, ["q_proj", "v_proj"])
    assert nearest_lora(model, small) == (["q_proj", "v_proj"], 1)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning", "lora"])
def test_match_budget_gives_baselines_about_the_banks_parameters(here, method):
    run(method=method, match_budget=True, max_steps=1, num_prompts=8, num_virtual_tokens=32)
    found = json.loads(Path("run/run.json").read_text())["training"]["trainable_parameters"]
    assert found == pytest.approx(8 * 32 * 32, rel=0.1)


def test_a_short_document_is_padded_and_keeps_half_of_it_as_context():
    batch = collate(training_examples([[5, 6, 7, 8, 9, 10], [5, 6]], 4))
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10], [5, 6, 0, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1, 1, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 8, 9, 10], [-100, 6, -100, -100, -100, -100]]


def test_the_command_prints_where_the_adapter_is(here, capsys):
    main(["recover", *flags(max_steps=1)])
    assert capsys.readouterr().out.strip().splitlines()[-1] == "adapter in run/adapter"
