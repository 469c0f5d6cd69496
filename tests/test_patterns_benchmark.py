"""The benchmark of patterns, from its command line to its files, on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from benchmarks.patterns import __main__ as benchmark
from benchmarks.patterns.__main__ import measure, parse, write
from idp_peft import IDPConfig
from tests.reference import bank_of
from tests.tiny import tiny
from tests.tiny_folder import tiny_folder, tiny_texts

pytest.importorskip("datasets")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Arguments for a dense and a compressed model, and two adapters, one of them of trained prompts."""
    here = tmp_path_factory.mktemp("patterns")
    dense, compressed = (tiny_folder(here / name, seed=seed) for seed, name in enumerate(("dense", "compressed")))
    (here / "texts.txt").write_text("\n".join(tiny_texts(8, words=24)))
    texts = {"init": "text", "init_text": ["w5 w6 w7", "w8 w9"], "tokenizer_name_or_path": compressed}
    prompts = IDPConfig(task_type="CAUSAL_LM", num_prompts=2, num_virtual_tokens=3, **texts)
    idp = get_peft_model(tiny("llama", seed=1), prompts)
    with torch.no_grad():
        bank_of(idp).weight.add_(0.5)
    idp.save_pretrained(here / "idp.lm.seed0" / "adapter")
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False)
    get_peft_model(tiny("llama", seed=1), lora).save_pretrained(here / "lora.lm.seed0" / "adapter")
    adapters = [f"--adapter=IDP={here}/idp.lm.seed0/adapter", f"--adapter=LoRA={here}/lora.lm.seed0/adapter"]
    sizes = ["--blocks=3", "--tokens=16", "--context=4", f"--dataset={here}/texts.txt"]
    return [f"--model={compressed}", f"--dense={dense}", *adapters, *sizes]


def test_the_benchmark_measures_models_adapters_and_controls(command, tmp_path):
    options = parse([*command, "--control=IDP", f"--output={tmp_path}/result.json"])
    write(measure(options), options.output)
    result = json.loads(options.output.read_text())
    models = ["compressed", "IDP", "LoRA", "IDP, untrained", "IDP on dense"]
    assert list(result["nats"]) == ["reference", *models]
    assert all(len(losses) == 3 for losses in result["nats"].values())
    assert result["all_tokens"]["models"] == result["without_first"]["models"] == models
    assert (result["all_tokens"]["tokens"], result["without_first"]["tokens"]) == (48, 45)
    about = result["adapters"]["IDP"]
    assert (about["method"], about["parameters"]) == ("IDP", 2 * 3 * 32)
    assert about["from"].endswith("/idp.lm.seed0")
    distances = result["all_tokens"]["activations"]["hidden"]["distance"]
    assert distances["IDP"] != distances["IDP, untrained"]
    assert set(result["behind_prompts"]["IDP"]["attention"]["distance"]) == {"IDP"}
    table = options.output.with_suffix(".md").read_text()
    assert "| IDP, untrained |" in table
    assert "## IDP beside the dense model with the same bank" in table
    own, other = (result["all_tokens"]["prompt_ids"][name] for name in ("IDP", "IDP on dense"))
    assert f"the same prompt for {sum(map(int.__eq__, own, other))} of 3 blocks" in table
    assert {file.name for file in tmp_path.glob("*.png")} == {"result-all-tokens.png", "result-without-first.png"}


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--control=prefix"], "--control must be the name of an --adapter (IDP, LoRA), got prefix"),
        (["--adapter=compressed=x"], "--adapter names must differ, and not be 'compressed' or 'reference'"),
        (["--adapter=x"], "must be NAME=PATH, got 'x'"),
    ],
)
def test_wrong_commands_are_refused(command, more, text, capsys):
    with pytest.raises(SystemExit):
        parse([*command, *more])
    assert text in capsys.readouterr().err


def test_too_little_text_is_refused(command):
    with pytest.raises(SystemExit, match="--blocks 9: only 8 documents have 16 tokens"):
        measure(parse([*command, "--blocks=9"]))


def test_the_table_of_the_readme_is_the_result_files():
    folder = Path(benchmark.__file__).parent
    result = json.loads((folder / "results" / "gptq-3bit.json").read_text())
    means = {name: sum(losses) / len(losses) for name, losses in result["nats"].items()}
    hidden, attention = (result["without_first"][part] for part in ("activations", "attention"))
    labels = {"IDP": "IDP, 4 x 32", "one prompt": "one prompt of 128"}
    for name in ("IDP", "one prompt", "LoRA, budget", "LoRA, rank 16", "IDP, untrained"):
        recovery = (means["compressed"] - means[name]) / (means["compressed"] - means["reference"])
        layers = [hidden["hidden"][measure][name] for measure in ("distance", "closed", "aside")]
        distance, closed, aside, prompt = (sum(x) / len(x) for x in (*layers, attention["prompt_share"][name]))
        shown = f"{prompt:.2f} |" if prompt else "|"
        row = f"| {labels.get(name, name)} | {100 * recovery:.1f} % | {distance:.3f} | {closed:.2f} | {aside:.2f} | {shown}"
        assert row in (folder / "README.md").read_text()
