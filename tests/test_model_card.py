"""The model card: its text, its metadata, and what others wrote in it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, RepoCard

from idp_peft import IDPConfig
from idp_peft.hub.base_model import Base, base_of, describe_quantization, is_hub_id
from idp_peft.hub.card_results import read_results
from idp_peft.hub.card_text import CardFacts, body
from idp_peft.hub.model_card import BEGIN, END, write_card
from idp_peft.offline import assets
from tests.hub_server import metadata_errors

DEMO = Path(__file__).parent.parent / "benchmarks" / "demo" / "results"
GPTQ = {"quant_method": "gptq", "bits": 3, "group_size": 64}
NOTE = {
    "format": 1,
    "model": "default",
    "recipe": "gptq-3bit",
    "backend": "llmcompressor",
    "versions": {"llmcompressor": "0.14.0.1", "torch": "2.13.0"},
    "group_size": 64,
    "symmetric": False,
    "calibration": {"texts": 1881, "samples": 64, "tokens_per_sample": 256},
    "seed": 0,
}


def facts(**changes) -> CardFacts:
    config = IDPConfig(task_type="CAUSAL_LM", num_prompts=4, num_virtual_tokens=32)
    return replace(CardFacts("user/name", Base("org/base", True, GPTQ), {"": config}, 73_728), **changes)


def snippet(card: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card.partition(END)[0], re.DOTALL)
    return code


def read(file: Path) -> dict:
    card = RepoCard(file.read_text())
    assert not metadata_errors(card.content)
    return card.data.to_dict()


def test_the_whole_text_for_a_base_on_the_hub():
    assert body(facts()) == (
        "Soft prompts that repair a compressed language model. Each input chooses one of them: *Inference-time Dynamic\n"
        "Prompting* ([arXiv 2310.00867](https://arxiv.org/abs/2310.00867)), a PEFT method of the package `idp-peft`. "
        "No weight of\nthe base is changed.\n"
        "\n"
        "## Use\n"
        "\n"
        "```python\n"
        "import idp_peft  # pip install \"idp-peft[gptqmodel]\"; without this import PEFT raises KeyError: 'IDP'\n"
        "\n"
        'model, tokenizer = idp_peft.load("user/name")\n'
        'inputs = tokenizer("The capital of France is", return_tensors="pt", return_token_type_ids=False).to(model.device)\n'
        "output = model.generate(**inputs, max_new_tokens=20)\n"
        "print(tokenizer.decode(output[0], skip_special_tokens=True))\n"
        "print(model.last_selection)  # which prompt the input chose, and the scores of all\n"
        "```\n"
        "\n"
        'With PEFT itself, after the same import: `AutoPeftModelForCausalLM.from_pretrained("user/name")`.\n'
        "\n"
        "## The base\n"
        "\n"
        "[org/base](https://huggingface.co/org/base): gptq, 3 bits, groups of 64.\n"
        "\n"
        "## The prompts\n"
        "\n"
        "* 4 prompts of 32 tokens, chosen by the input's attention in layer 0 (mean over a prompt's tokens).\n"
        "  Trained with `assignment='selected'`, started with `init='vocab'`.\n"
        "* 73,728 numbers in all, in one safetensors file."
    )


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"num_virtual_tokens": [2, 3, 4, 5]}, "4 prompts of 2 + 3 + 4 + 5 tokens"),
        ({"selection": "random"}, "chosen by a hash of the input (`selection='random'`)"),
        ({"selection": "fixed", "fixed_prompt": 2}, "chosen by nobody: always prompt 2"),
        ({"selection_layer": -1, "selection_reduction": "sum"}, "attention in layer -1 (sum over a prompt's tokens)"),
    ],
)
def test_the_settings_of_the_bank_are_told(config, text):
    assert text in body(facts(adapters={"": IDPConfig(**config)}))


def test_the_training_is_told_without_paths():
    text = body(
        facts(training={"objective": "distillation", "steps": 30, "dataset": "/home/me/text.jsonl", "history": []})
    )
    assert "* Training: objective distillation, steps 30, dataset text.jsonl." in text


# ------------------------------------------------------------------ the base


def test_a_base_on_the_hub_is_in_the_metadata(tmp_path):
    write_card(tmp_path / "README.md", facts())
    assert read(tmp_path / "README.md") == {
        "library_name": "peft",
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "pipeline_tag": "text-generation",
        "tags": ["idp", "soft-prompt", "gptq"],
    }


def test_a_local_base_is_not_in_the_metadata_and_the_text_says_how_it_was_made(tmp_path):
    folder = tmp_path / "compressed"
    folder.mkdir()
    (folder / "compression.json").write_text(json.dumps(NOTE))
    quantization = {
        "quant_method": "compressed-tensors",
        "config_groups": {"a": {"weights": {"num_bits": 3, "group_size": 64}}},
    }
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    write_card(tmp_path / "README.md", facts(base=base_of(str(folder))))
    data, text = read(tmp_path / "README.md"), (tmp_path / "README.md").read_text()
    assert "base_model" not in data
    assert data["base_model_relation"] == "adapter"
    assert data["tags"] == ["idp", "soft-prompt", "compressed-tensors", "gptq"]
    assert str(tmp_path) not in text
    assert 'idp_peft.load("user/name", base="compressed")' in snippet(text)
    assert "import idp_peft  # pip install idp-peft compressed-tensors; without" in snippet(text)
    assert (
        "A local folder, `compressed`, which is not part of this repository: compressed-tensors, 3 bits, groups of 64.\n\n"
        "It was made by, and can be made again with:\n\n```bash\n"
        'pip install "idp-peft[llmcompressor,demo]"\n'
        "idp-peft compress --model default --recipe gptq-3bit --output_dir compressed --backend llmcompressor --group_size 64 "
        "--calibration_samples 64 --calibration_tokens 256 --seed 0\n```"
    ) in text
    assert "The calibration text had 1,881 documents" in text
    assert "llmcompressor 0.14.0.1, torch 2.13.0; other versions may give slightly other weights" in text


def test_the_command_on_the_card_is_one_that_our_command_line_takes(tmp_path):
    from idp_peft_cli.parsing import parse

    (command,) = Base("/x/small", note={**NOTE, "symmetric": True}).commands
    (options,) = parse("compress", command.split()[2:])
    assert (options.model, options.recipe, options.output_dir, options.symmetric) == (
        "default",
        "gptq-3bit",
        "small",
        True,
    )
    assert (options.calibration_samples, options.group_size, options.seed) == (64, 64, 0)


def test_a_base_that_was_compressed_twice_takes_two_commands():
    note = {"model": "/runs/sparse", "recipe": "rtn-4bit", "earlier": {**NOTE, "recipe": "sparsegpt-50"}}
    base = Base("/runs/small", note=note)
    assert [re.findall(r"--(?:model|output_dir) (\S+)", command) for command in base.commands] == [
        ["default", "small-1"],
        ["small-1", "small"],
    ]
    assert base.formats == ["sparsegpt", "rtn"]


def test_a_base_made_from_a_folder_of_one_machine_promises_no_command():
    base = Base("/x/small", note={**NOTE, "model": "/x/dense"})
    assert base.commands == []
    assert "made with the recipe gptq-3bit from a model that is a local folder as well" in body(facts(base=base))


def test_the_packaged_model_is_fetched_by_whoever_follows_the_snippet(tmp_path, monkeypatch):
    monkeypatch.setenv("IDP_CACHE", str(tmp_path))
    base = base_of(str(assets.cache_folder() / "smollm2-135m-instruct-dense"))
    assert base.is_packaged
    assert 'idp_peft.load("user/name", base="default")' in body(facts(base=base))
    assert "pip install idp-peft gguf;" in body(facts(base=base))
    assert not base_of(str(tmp_path.parent / "model")).is_packaged


def test_what_reads_like_a_hub_id():
    assert all(map(is_hub_id, ("org/base", "gpt2", "org/Model-3.1_x")))
    assert not any(
        map(is_hub_id, ("/a/b", "./base", "../base", "~/base", "a/b/c", "a\\b", "x/model.gguf", "", None, ["a"]))
    )


def test_a_folder_of_that_name_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert base_of("runs/small").on_hub
    (tmp_path / "runs" / "small").mkdir(parents=True)
    assert not base_of("runs/small").on_hub


@pytest.mark.parametrize(
    ("quantization", "text"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "awq, 4 bits, groups of 128"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            "bitsandbytes, 4 bits, nf4",
        ),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1}, "gptq, 4 bits"),
        ({"quant_method": "hqq"}, "hqq"),
    ],
)
def test_a_format_in_one_line(quantization, text):
    assert describe_quantization(quantization) == text


# ------------------------------------------------------------------ what others wrote


def test_what_others_wrote_stays_and_our_part_is_renewed(tmp_path):
    file = tmp_path / "README.md"
    write_card(file, facts())
    card = ModelCard.load(file)
    card.data.license, card.data.language, card.data.datasets = "apache-2.0", ["en"], ["org/data"]
    card.data["tags"] += ["medical"]
    card.data["pipeline_tag"] = "question-answering"
    others = {"task": {"type": "text-generation"}, "dataset": {"type": "org/data", "name": "Data"}}
    others["metrics"] = [{"type": "accuracy", "value": 0.5}]
    card.data["model-index"] = [{"name": "mine", "results": [others]}]
    card.text = "\n# My title\n\nBefore.\n" + card.text + "\nAfter.\n"
    file.write_text(f"---\n{json.dumps(card.data.__dict__)}\n---\n{card.text}")
    config = IDPConfig(num_prompts=2, num_virtual_tokens=8)
    for _ in range(2):
        write_card(file, facts(place="user/other", adapters={"": config}))
    text, data = file.read_text(), read(file)
    assert text.count(BEGIN) == text.count(END) == text.count("## Use") == 1
    assert "2 prompts of 8 tokens" in text
    assert "4 prompts" not in text
    assert "user/name" not in text
    assert "# name" not in text
    assert "\n# My title\n\nBefore.\n" in text
    assert text.endswith("\nAfter.\n")
    assert (data["license"], data["language"], data["datasets"]) == ("apache-2.0", ["en"], ["org/data"])
    assert data["tags"] == ["idp", "soft-prompt", "gptq", "medical"]
    assert data["pipeline_tag"] == "question-answering"
    assert data["model-index"] == [{"name": "mine", "results": [others]}]


def test_writing_a_card_twice_changes_nothing(tmp_path):
    file = tmp_path / "README.md"
    write_card(file, facts())
    before = file.read_bytes()
    write_card(file, facts())
    assert file.read_bytes() == before


def test_the_part_goes_below_the_first_heading_and_never_into_a_block_of_code(tmp_path):
    file = tmp_path / "README.md"
    file.write_text("```bash\n# no heading\n```\n\n# Heading\n\nText.\n")
    write_card(file, facts())
    assert re.search(rf"```bash\n# no heading\n```\n\n# Heading\n\n{re.escape(BEGIN)}\nSoft", file.read_text())
    file.write_text("```bash\n# no heading\n```\n")
    write_card(file, facts())
    assert re.search(
        rf"{re.escape(BEGIN)}\n# name\n\nSoft(.|\n)*{re.escape(END)}\n\n```bash\n# no heading", file.read_text()
    )


def test_a_path_that_others_gave_as_the_base_goes_and_a_hub_id_stays(tmp_path):
    file = tmp_path / "README.md"
    for given, kept in (("/models/small", None), ("user/small-gptq", "user/small-gptq")):
        file.write_text(f"---\nbase_model: {given}\nlibrary_name: transformers\ntags: nice\n---\n")
        write_card(file, facts(base=Base("/models/small")))
        assert read(file).get("base_model") == kept
        assert read(file)["tags"] == ["nice", "idp", "soft-prompt"]


def test_a_card_that_cannot_be_read_is_left_with_a_warning(tmp_path, caplog):
    file = tmp_path / "README.md"
    file.write_text("---\ntags: [a\n---\ntext")
    write_card(file, facts())
    assert file.read_text() == "---\ntags: [a\n---\ntext"
    assert "README.md is left as it is: its metadata cannot be read" in caplog.text


# ------------------------------------------------------------------ results


def test_results_of_the_demo_become_a_table_and_model_index(tmp_path):
    results = read_results([DEMO], 4, 73_728)
    write_card(tmp_path / "README.md", facts(results=results, training=results.ours["training"]))
    text, data = (tmp_path / "README.md").read_text(), read(tmp_path / "README.md")
    assert (
        "| model | perplexity on wiki:held_out | local_arc_easy, acc in % | local_piqa, acc_norm in % | extra parameters |\n"
        "| --- | ---: | ---: | ---: | ---: |\n"
        "| dense | 28.19 | 65.0 | 60.0 | 0 |\n"
        "| compressed | 43.12 | 40.0 | 70.0 | 0 |\n"
        "| **IDP** (this adapter) | 41.35 | 40.0 | 60.0 | 73,728 |\n"
        "| LoRA | 36.91 | 45.0 | 70.0 | 57,600 |\n"
    ) in text
    assert "at most 20 documents and questions each" in text
    assert "objective distillation, steps 30, learning rate 0.03" in text
    (model,) = data["model-index"]
    assert model["name"] == "name"
    found = {(r["dataset"]["name"], m["type"]): (m["value"], m["args"]) for r in model["results"] for m in r["metrics"]}
    how = {"measured_by": "idp-peft evaluate", "limit": 20, "seed": 0}
    assert found == {
        ("wiki", "perplexity"): (41.345, {**how, "window": 256, "stride": 192}),
        ("local_arc_easy", "acc"): (0.4, how),
        ("local_piqa", "acc_norm"): (0.6, how),
    }
    assert [r["dataset"].get("split") for r in model["results"]] == ["held_out", None, None]


def test_results_are_renewed_beside_those_of_others_and_go_when_none_are_given(tmp_path):
    file = tmp_path / "README.md"
    others = {
        "task": {"type": "text-generation"},
        "dataset": {"type": "d", "name": "D"},
        "metrics": [{"type": "a", "value": 1}],
    }
    file.write_text(f"---\n{json.dumps({'model-index': [{'name': 'mine', 'results': [others]}]})}\n---\n")
    results = read_results(DEMO / "idp.json", 4, 73_728)
    for _ in range(2):
        write_card(file, facts(results=results))
    (model,) = read(file)["model-index"]
    assert model["name"] == "mine"
    assert model["results"][0] == others
    assert len(model["results"]) == 4
    write_card(file, facts())
    assert read(file)["model-index"] == [{"name": "mine", "results": [others]}]
    assert "## Results" not in file.read_text()


def test_wrong_results_are_named(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"there is no file or folder .*missing"):
        read_results(tmp_path / "missing", 4, 73_728)
    with pytest.raises(FileNotFoundError, match=r"no result file .* in the folder"):
        read_results(tmp_path, 4, 73_728)
    with pytest.raises(ValueError, match=r"other\.json is no result file written by `evaluate`"):
        read_results([tmp_path / "other.json"], 4, 73_728)
    with pytest.raises(
        ValueError, match=r"\(IDP, 2 prompts, 100 parameters\), got 0, from 'dense', 'compressed', 'IDP', 'LoRA'"
    ):
        read_results(DEMO, 2, 100)


def test_of_several_results_that_of_the_folder_is_taken(tmp_path):
    for name in ("a", "b"):
        row = json.loads((DEMO / "idp.json").read_text())
        (tmp_path / f"{name}.json").write_text(json.dumps({**row, "label": name, "adapter": str(tmp_path / name)}))
    with pytest.raises(ValueError, match="got 2, from 'a', 'b'"):
        read_results(tmp_path, 4, 73_728)
    assert read_results(tmp_path, 4, 73_728, tmp_path / "b").ours["label"] == "b"
