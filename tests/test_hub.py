"""Pushing to a hub and loading from it in another process, against a server in this one: never a real network."""

from __future__ import annotations

import copy
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import RepoCard
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, get_peft_model

from idp_peft import IDPConfig
from idp_peft.evaluation.description import adapter_parameters
from idp_peft.hub.adapter_folder import push_adapter
from idp_peft.hub.peft_model import IDPPeftModel, IDPPeftModelForCausalLM
from idp_peft.hub.push import PushError
from tests.hosts import needs_transformers_adapter_methods
from tests.hub_server import TOKEN, HubServer, metadata_errors, only_hub
from tests.tiny import tiny
from tests.tiny_folder import tiny_folder

ROOT = Path(__file__).parent.parent

# Somebody trains on a base of the hub and pushes, by the model and by Trainer.
AUTHOR = """
import json, torch, idp_peft
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

def make():
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained("org/base")
    return get_peft_model(base, idp_peft.IDPConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))

model = make()
ids = torch.arange(2, 12)[None]
json.dump(model.eval()(input_ids=ids).logits.tolist(), open("logits.json", "w"))
model.save_pretrained("saved")
commit = model.push_to_hub("user/name", results="result.json", tags=["mine"], commit_message="Mine")
assert (type(commit).__name__, commit.commit_message, commit.repo_url.repo_id) == ("CommitInfo", "Mine", "user/name")

model.add_adapter("other", idp_peft.IDPConfig(task_type="CAUSAL_LM", num_prompts=2, num_virtual_tokens=3))
model.push_to_hub("user/two", private=True)
model.push_to_hub("user/name", revision="experiment")

data = [{"input_ids": torch.arange(2, 20), "labels": torch.arange(2, 20)}] * 8
options = dict(max_steps=2, use_cpu=True, push_to_hub=True, hub_strategy="end", report_to="none", disable_tqdm=True)
arguments = TrainingArguments("trained", hub_model_id="user/trained", save_strategy="no", learning_rate=0.1, **options)
trainer = Trainer(make(), arguments, train_dataset=data, data_collator=default_data_collator,
                  processing_class=AutoTokenizer.from_pretrained("org/base"))
trainer.train()
trainer.push_to_hub()
"""
# Somebody else, on a machine of their own, who knows the name of the repository.
READER = """
import contextlib, io, json, re, sys, torch
from huggingface_hub import hf_hub_download
from peft import AutoPeftModelForCausalLM, PeftConfig

def snippet(repo_id, revision=None):
    card = open(hf_hub_download(repo_id, "README.md", revision=revision)).read()
    return re.search(r"```python\\n(.*?)```", card, re.DOTALL).group(1)

found = {"before the import": []}
for load in (PeftConfig, AutoPeftModelForCausalLM):
    try:
        load.from_pretrained("user/name")
    except KeyError as error:
        found["before the import"].append(repr(error))
for name in ("name", "trained", "two"):
    there, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(snippet(f"user/{name}"), there)
    tokens = int(there["output"].shape[-1] - there["inputs"]["input_ids"].shape[-1])
    found[name] = {"printed": printed.getvalue().splitlines(), "tokens": tokens, "training": there["model"].training}
ids = torch.arange(2, 12)[None]
model = AutoPeftModelForCausalLM.from_pretrained("user/name").eval()
found["logits"] = model(input_ids=ids).logits.tolist()
found["class"] = type(model).__qualname__
found["config"] = PeftConfig.from_pretrained("user/name").base_model_name_or_path
import idp_peft
model, tokenizer = idp_peft.load("user/two", subfolder="other")
found["other"] = [model.active_peft_config.num_prompts, tokenizer("w4 w5")["input_ids"]]
model, _ = idp_peft.load("user/name", base="base", revision="experiment", subfolder="other", token=True)
found["experiment"] = model.active_peft_config.num_virtual_tokens
try:
    idp_peft.load("user/nothing")
except ValueError as error:
    found["nothing"] = str(error)
json.dump(found, open("found.json", "w"))
"""


def python(code: str, server: HubServer, folder: Path) -> None:
    environment = server.environment(folder / "home") | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr


def result_of(parameters: int, num_prompts: int = 4) -> dict:
    """A result file of an adapter, as small as it may be."""
    names = {"format": 1, "label": "IDP", "role": "recovered", "model": "org/base", "adapter": "saved", "method": "idp"}
    text = {"window": 256, "stride": 192, "nats_per_token": 1.0, "perplexity": 2.71828, "items": []}
    task = {"metric": "acc", "score": 0.25, "chance": 0.25, "items": []}
    settings = {"dataset": "wiki", "dataset_split": "held_out", "limit": None, "seed": 0}
    sizes = {"extra_parameters": parameters, "num_prompts": num_prompts}
    return {
        **names,
        **sizes,
        "settings": settings,
        "perplexity": {"wiki:held_out": text},
        "tasks": {"local_piqa": task},
    }


def base_folder(folder: Path) -> Path:
    """A base whose tokenizer returns token types unless it is told not to; decoders refuse those."""
    tiny_folder(folder)
    file = folder / "tokenizer_config.json"
    names = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | names))
    return folder


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """What the author left on the server and in a folder, and what the reader found."""
    author, reader = tmp_path_factory.mktemp("author"), tmp_path_factory.mktemp("reader")
    base_folder(reader / "base")
    (author / "result.json").write_text(json.dumps(result_of(4 * 4 * 32)))
    with HubServer() as server, pytest.MonkeyPatch.context() as patch:
        server.add("org/base", reader / "base")
        only_hub(server, patch, author / "hub")
        patch.chdir(author)
        exec(AUTHOR, {})
        python(READER, server, reader)
        unknown = [page for page in server.refused if "agent-harnesses" not in page]  # the library's own statistics
        assert not unknown, unknown
        yield server, author, json.loads((reader / "found.json").read_text())


def card_of(server: HubServer, repo_id: str) -> RepoCard:
    card = RepoCard(server.files(repo_id)["README.md"].decode())
    assert not metadata_errors(card.content)
    return card


def test_a_pushed_repository_holds_an_adapter_and_nothing_else(pushed):
    server, author, _ = pushed
    files = server.files("user/name")
    assert sorted(files) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert files[name] == (author / "saved" / name).read_bytes()


def test_its_card_has_the_metadata_that_the_hub_sorts_by(pushed):
    server, _, _ = pushed
    data = card_of(server, "user/name").data.to_dict()
    index = data.pop("model-index")
    assert data == {
        "library_name": "peft",
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "pipeline_tag": "text-generation",
        "tags": ["idp", "soft-prompt", "mine"],
    }
    metrics = [(metric["type"], metric["value"]) for result in index[0]["results"] for metric in result["metrics"]]
    assert metrics == [("perplexity", 2.7183), ("acc", 0.25)]


def test_another_process_loads_by_the_name_of_the_repository(pushed):
    _, author, found = pushed
    assert found["config"] == "org/base"
    assert found["class"] == "IDPPeftModelForCausalLM"
    assert torch.allclose(torch.tensor(found["logits"]), torch.tensor(json.loads((author / "logits.json").read_text())))


@pytest.mark.parametrize("name", ["name", "trained", "two"])
def test_the_snippet_of_the_card_runs_in_another_process(pushed, name):
    _, _, found = pushed
    assert found[name]["tokens"] == 20
    assert found[name]["training"] is False
    assert found[name]["printed"][1].startswith("Selection(prompt_ids=")


def test_without_the_import_peft_says_only_the_name_which_the_first_line_of_the_snippet_repeats(pushed):
    server, _, found = pushed
    assert found["before the import"] == ["KeyError('IDP')"] * 2
    code = re.search(r"```python\n(.*)\n", card_of(server, "user/name").text).group(1)
    assert code == "import idp_peft  # pip install idp-peft; without this import PEFT raises KeyError: 'IDP'"


def test_several_adapters_lie_as_peft_lays_them(pushed):
    server, _, found = pushed
    assert server.repos["user/two"].private
    assert {path for path in server.files("user/two") if "other/" in path} == {
        "other/adapter_config.json",
        "other/adapter_model.safetensors",
    }
    text = card_of(server, "user/two").text
    assert 'Further adapters: `subfolder="other"`.' in text
    assert "* Root: 4 prompts of 4 tokens" in text
    assert "* `other`: 2 prompts of 3 tokens" in text
    assert found["other"] == [2, [4, 5]]


def test_a_branch_of_its_own_leaves_the_main_one_alone(pushed):
    server, _, found = pushed
    assert "other/adapter_config.json" in server.files("user/name", "experiment")
    assert "other/adapter_config.json" not in server.files("user/name")
    assert found["experiment"] == 3


def test_a_repository_that_is_not_there_is_one_line(pushed):
    _, _, found = pushed
    assert found["nothing"].startswith("`adapter` 'user/nothing' could not be loaded: ")
    assert "\n" not in found["nothing"]


def test_the_trainer_leaves_its_own_text_and_right_metadata(pushed):
    server, author, _ = pushed
    files, card = server.files("user/trained"), card_of(server, "user/trained")
    assert files["adapter_model.safetensors"] == (author / "trained" / "adapter_model.safetensors").read_bytes()
    assert {"adapter_config.json", "tokenizer.json"} < set(files)
    assert card.data.to_dict() == {
        "library_name": "peft",
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "pipeline_tag": "text-generation",
        "tags": ["idp", "soft-prompt", "generated_from_trainer"],
    }
    assert 'idp_peft.load("user/trained")' in card.text
    assert "- learning_rate: 0.1" in card.text
    assert card.text.count("\n# ") == 1


# ------------------------------------------------------------------ in this process: what can go wrong


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub that this process takes for the only one."""
    with HubServer() as server:
        only_hub(server, monkeypatch, tmp_path / "hub")
        yield server


def test_a_second_push_renews_our_part_and_keeps_what_others_wrote_on_the_hub(server, make):
    make("llama", num_virtual_tokens=4).push_to_hub("user/name")
    repo = server.repos["user/name"]
    card = repo.head("main")[1]["README.md"].decode()
    edited = card.replace("tags:", "license: mit\ntags:") + "\nTrained for my cat.\n"
    server.commit(repo, "main", {"README.md": edited.encode()})
    make("llama", num_virtual_tokens=6, seed=1).push_to_hub("user/name")
    after = card_of(server, "user/name")
    assert after.data.to_dict()["license"] == "mit"
    assert after.text.endswith("\nTrained for my cat.\n")
    assert "4 prompts of 6 tokens" in after.text
    assert after.text.count("## Use") == 1


def test_a_card_that_cannot_be_read_now_is_not_taken_from_an_earlier_push(server, make):
    model = make("llama")
    for _ in range(2):
        model.push_to_hub("user/name")  # the second one leaves the card in the cache
    server.fail("card", 500)
    with pytest.raises(PushError, match="'read the model card'"):
        model.push_to_hub("user/name")


def test_all_files_arrive_in_one_commit(server, make):
    make("llama").push_to_hub("user/name")
    make("llama", num_virtual_tokens=6).push_to_hub("user/name")
    first, *pushed = [set(files) for _, files in server.repos["user/name"].commits["main"]]
    assert not first, "the repository was empty"
    assert pushed == [{"README.md", "adapter_config.json", "adapter_model.safetensors"}] * 2
    assert server.requests.count("POST commit") == 2


def test_a_push_of_the_same_is_no_second_commit(server, make):
    model = make("llama")
    first = model.push_to_hub("user/name")
    assert model.push_to_hub("user/name").oid == first.oid


def test_a_name_alone_is_pushed_to_the_users_own(server, make):
    assert make("llama").push_to_hub("name").repo_url.repo_id == "user/name"
    assert 'idp_peft.load("user/name"' in card_of(server, "user/name").text


def test_a_pull_request_leaves_the_branch_alone(server, make):
    commit = make("llama").push_to_hub("user/name", create_pr=True)
    assert commit.pr_revision == "refs/pr/1"
    assert not server.files("user/name")
    assert "adapter_config.json" in server.files("user/name", "refs/pr/1")


STEPS = [
    ("create", 403, "create the repository", "Nothing was changed. Log in with a token that may write there"),
    ("card", 500, "read the model card", "Its files are as they were before. Push again when the Hub can be reached"),
    ("validate", "drop", "check the model card", "Its files are as they were before. Push again"),
    ("preupload", 403, "upload the weights", "Its files are as they were before. What was uploaded is kept"),
    ("lfs", "drop", "upload the weights", "Its files are as they were before. What was uploaded is kept"),
    ("upload", 403, "upload the weights", "Its files are as they were before. What was uploaded is kept"),
    ("verify", 500, "upload the weights", "Its files are as they were before. What was uploaded is kept"),
    ("commit", 403, "commit", "Its files are as they were before. Log in with a token that may write there"),
    (
        "commit",
        500,
        "commit",
        "It is not known whether the commit arrived: either all of it is there, or nothing. Push again",
    ),
    ("commit", "drop", "commit", "It is not known whether the commit arrived"),
    ("commit", "drop after", "commit", "It is not known whether the commit arrived"),
]


@pytest.mark.parametrize(("step", "how", "name", "state"), STEPS)
def test_a_push_that_fails_says_where_and_the_next_one_succeeds(server, make, step, how, name, state):
    model = make("llama")
    server.fail(step, how)
    with pytest.raises(PushError) as error:
        model.push_to_hub("user/name")
    text = str(error.value)
    assert text.startswith(f"the push to user/name failed at the step '{name}': ")
    assert state in text
    assert "\n" not in text
    assert TOKEN not in text
    if isinstance(how, int):
        assert f"the test's {how}" in text or str(how) in text
    arrived = server.files("user/name") if "user/name" in server.repos else {}
    assert bool(arrived) == (how == "drop after")
    server.heal()
    model.push_to_hub("user/name")
    assert len(server.files("user/name")) == 3


def test_a_card_that_the_hub_refuses_is_named_before_anything_is_sent(server, make):
    model = make("llama")
    model.push_to_hub("user/name")
    server.requests.clear()
    repo = server.repos["user/name"]
    card = repo.head("main")[1]["README.md"].decode()
    server.commit(
        repo, "main", {"README.md": card.replace("pipeline_tag: text-generation", "pipeline_tag: [1]").encode()}
    )
    with pytest.raises(PushError) as error:
        model.push_to_hub("user/name")
    assert str(error.value) == (
        "the push to user/name failed at the step 'check the model card': the metadata of README.md is refused: "
        '"pipeline_tag" must be a string. Its files are as they were before. Correct it and push again.'
    )
    assert not {"POST lfs", "PUT upload", "POST commit"} & set(server.requests)


def test_wrong_results_are_refused_before_a_repository_is_made(server, make, tmp_path):
    with pytest.raises(FileNotFoundError, match="`results`"):
        make("llama").push_to_hub("user/name", results=tmp_path / "missing.json")
    assert not server.requests


def test_a_push_of_the_model_sets_right_what_the_trainers_of_trl_leave(server, tmp_path):
    trl = pytest.importorskip("trl", reason="needs trl")
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_folder(tmp_path / "base")
    base, config = AutoModelForCausalLM.from_pretrained(folder), IDPConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    options = {"use_cpu": True, "push_to_hub": True, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    arguments = trl.SFTConfig(str(tmp_path / "out"), max_steps=1, hub_model_id="user/sft", max_length=16, **options)
    data = datasets.Dataset.from_dict({"text": ["w3 w4 w5 w6"] * 4})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = trl.SFTTrainer(get_peft_model(base, config), arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.push_to_hub()
    # It writes a card of its own over the model's and asks the model for its tags alone.
    left = card_of(server, "user/sft")
    assert left.data["library_name"] == "transformers"
    assert {"idp", "soft-prompt", "sft", "trl"} <= set(left.data["tags"])
    trainer.model.push_to_hub(trainer.hub_model_id)
    card, files = card_of(server, "user/sft"), server.files("user/sft")
    assert card.data["library_name"] == "peft"
    assert {"idp", "soft-prompt", "sft", "trl"} <= set(card.data["tags"])
    assert "base_model" not in card.data
    assert "None" not in card.text
    assert "This model was trained with SFT" in card.text
    assert 'idp_peft.load("user/sft", base="base")' in card.text
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} < set(files)


# ------------------------------------------------------------------ a folder without its base


def test_a_folder_is_pushed_without_its_base_byte_for_byte(server, make, tmp_path):
    model = make("llama", num_prompts=3)
    model.save_pretrained(tmp_path / "run" / "adapter")
    folder = tmp_path / "run" / "adapter"
    (tmp_path / "run" / "run.json").write_text(json.dumps({"training": {"steps": 7, "objective": "distillation"}}))
    (tmp_path / "result.json").write_text(json.dumps(result_of(3 * 4 * 32, num_prompts=3)))
    for name in ("optimizer.pt", "training_args.bin", "tokenizer.json"):
        (folder / name).write_text("x")
    push_adapter(folder, "user/name", tmp_path / "result.json")
    files = server.files("user/name")
    assert sorted(files) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"]
    assert files["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()
    card = card_of(server, "user/name")
    assert "3 prompts of 4 tokens" in card.text
    assert "objective distillation, steps 7" in card.text
    assert card.text.count("\n# name\n") == 1
    assert "perplexity on wiki:held_out" in card.text


@pytest.mark.parametrize("is_there", [True, False])
def test_the_compression_of_a_base_on_the_hub_is_read_there(server, make, tmp_path, is_there, caplog):
    model = make("llama")
    model.peft_config["default"].base_model_name_or_path = "org/small"
    model.save_pretrained(tmp_path / "adapter")
    if is_there:
        (tmp_path / "small").mkdir()
        quantization = {"quant_method": "gptq", "bits": 4, "group_size": 128}
        (tmp_path / "small" / "config.json").write_text(json.dumps({"quantization_config": quantization}))
        server.add("org/small", tmp_path / "small")
    push_adapter(tmp_path / "adapter", "user/name")
    data = card_of(server, "user/name").data.to_dict()
    assert data.get("base_model") == ("org/small" if is_there else None)
    assert ("gptq" in data["tags"]) == is_there
    assert ("the base 'org/small' is not named in the card's metadata" in caplog.text) != is_there


def test_a_folder_that_is_no_whole_idp_adapter_is_refused_before_the_hub_is_asked(server, make, tmp_path):
    lora = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    lora.save_pretrained(tmp_path / "lora")
    make("llama").save_pretrained(tmp_path / "half")
    file = tmp_path / "half" / "adapter_model.safetensors"
    make("llama").save_pretrained(tmp_path / "cut")
    (tmp_path / "cut" / file.name).write_bytes(file.read_bytes()[:100])
    make("llama", num_prompts=2).save_pretrained(tmp_path / "wrong")
    (tmp_path / "wrong" / file.name).write_bytes(file.read_bytes())
    file.unlink()
    for name, text in {
        "lora": "is a LORA adapter: this pushes IDP's",
        "half": "is not complete: there is no adapter_model.safetensors in it",
        "cut": "cannot be read and may be truncated",
        "wrong": r"holds prompts of shape \[16, 32\], expected \[8, 32\]",
        "nowhere": "is no folder",
        "": "is no adapter: there is no adapter_config.json in it",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=text):
            push_adapter(tmp_path / name, "user/name")
    assert not server.requests


# ------------------------------------------------------------------ the classes


def test_a_model_keeps_its_class_through_copies_files_and_further_adapters(make, tmp_path):
    model = make("llama")
    assert type(model) is IDPPeftModelForCausalLM
    model.add_adapter("other", IDPConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    for again in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        PeftModel.from_pretrained(tiny("llama"), tmp_path),
    ):
        assert type(again) is IDPPeftModelForCausalLM
        assert again.model_tags == ["idp", "soft-prompt"]
    bare = get_peft_model(tiny("llama"), IDPConfig())
    assert type(bare) is IDPPeftModel
    bare.save_pretrained(tmp_path / "bare")
    assert card_at(tmp_path / "bare").data["pipeline_tag"] == "text-generation"


def card_at(folder: Path) -> RepoCard:
    return RepoCard((folder / "README.md").read_text())


def test_a_saved_folder_has_the_card_that_is_kept_when_it_is_saved_again(make, tmp_path):
    folder = tmp_path / "adapter"
    model = make("llama")
    model.save_pretrained(folder)
    assert 'idp_peft.load("adapter", base="base")' in card_at(folder).text
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nMine.\n")
    model.save_pretrained(folder)
    assert card_at(folder).text.endswith("\nMine.\n")


def test_the_tags_of_the_base_are_on_the_card_and_the_base_gets_none(make, tmp_path):
    model = make("llama")
    base = model.get_base_model()
    base.add_model_tags(["small"])
    model.save_pretrained(tmp_path)
    assert set(card_at(tmp_path).data["tags"]) == {"small", "idp", "soft-prompt"}
    assert model.unload() is base
    assert base.model_tags == ["small"]


def test_models_with_another_method_or_class_stay_what_they_are(tmp_path):
    lora = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert type(lora) is PeftModelForCausalLM

    class Theirs(PeftModelForCausalLM):
        pass

    assert type(Theirs(tiny("llama"), IDPConfig(task_type="CAUSAL_LM"))) is Theirs
    assert PeftModel.push_to_hub is PeftModelForCausalLM.push_to_hub
    assert "idp_peft" not in PeftModel.push_to_hub.__module__ + PeftModel.create_or_update_model_card.__module__


@needs_transformers_adapter_methods
def test_transformers_own_adapter_methods_make_no_class_of_ours():
    base = tiny("llama")
    kind = type(base)
    base.add_adapter(IDPConfig(task_type="CAUSAL_LM"))
    assert type(base) is kind


def test_a_card_without_a_trainer_names_the_folder_even_when_a_function_is_named_like_its_method(make, tmp_path):
    def create_model_card():
        make("llama").create_or_update_model_card(str(tmp_path / "adapter"))

    (tmp_path / "adapter").mkdir()
    create_model_card()
    assert 'idp_peft.load("adapter"' in card_at(tmp_path / "adapter").text


@pytest.mark.parametrize(
    "config",
    [
        {"selection": "centroid"},
        {"prompts": "key_values", "init_weights": False},
        {"selection": "centroid", "prompts": "key_values", "init_weights": False},
    ],
)
def test_an_adapter_of_every_kind_is_pushed_with_the_count_of_what_it_trains(server, make, tmp_path, config):
    model = make("llama", num_virtual_tokens=4, **config)
    trained = model.get_nb_trainable_parameters()[0]
    assert adapter_parameters(model) == trained
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "result.json").write_text(json.dumps(result_of(trained)))
    push_adapter(tmp_path / "adapter", "user/name", tmp_path / "result.json")
    card = server.files("user/name")["README.md"].decode()
    assert f"{trained:,}" in card
    assert ("4 prompts of the keys and values of 4 tokens" in card) == ("prompts" in config)
    assert ("the prompt whose training contexts it is most like" in card) == ("selection" in config)
    model.push_to_hub("user/live")
    assert f"{trained:,}" in server.files("user/live")["README.md"].decode()
