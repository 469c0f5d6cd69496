"""The four sub-commands one after the other, on a tiny model, as a user would run them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from idp_peft_cli import main
from tests.tiny_folder import tiny_folder, tiny_texts

pytest.importorskip("datasets")
pytest.importorskip("matplotlib")
pytest.importorskip("llmcompressor", reason="llm-compressor is not installed: `make test-compression` has it")


def run(*words) -> None:
    main([str(word) for word in words])


def digest(folder: str) -> dict[str, str]:
    files = sorted(path for path in Path(folder).iterdir() if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tiny_folder(tmp_path / "dense")
    Path("text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny_texts(60)))
    return tmp_path


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [("gptq-3bit", []), ("gptq-3bit", ["--symmetric"]), ("sparsegpt-50", []), ("sparsegpt-2:4", [])],
)
def test_a_dense_model_is_compressed_repaired_measured_and_reported(here, recipe, flags, capsys):
    data = ["--dataset", "text.jsonl"]
    run(
        *("compress", "--model", "dense", "--recipe", recipe, "--output_dir", "small", *data, *flags),
        *("--calibration_samples", 16, "--calibration_tokens", 24, "--group_size", 16),
    )
    before = digest("small")
    blocks = ["--block_tokens", 16, "--context_tokens", 4, "--min_tokens", 4, "--use_cpu", "--disable_tqdm", "true"]
    for method in (["idp", "--num_prompts", 3, "--num_virtual_tokens", 4], ["lora", "--lora_rank", 2]):
        train = ["--max_steps", 4, "--learning_rate", 0.02, "--teacher", "dense", "--output_dir", f"run-{method[0]}"]
        run("recover", "--model", "small", "--method", *method, *data, *blocks, *train)
    measure = [*data, "--window", 40, "--stride", 36, "--limit", 20]
    run("evaluate", "--model", "dense", "--output", "results/dense.json", *measure)
    run("evaluate", "--model", "small", "--output", "results/small.json", *measure)
    for method, more in (("idp", ["--each_prompt"]), ("lora", [])):
        adapter = ["--adapter", f"run-{method}/adapter", "--output", f"results/{method}.json"]
        run("evaluate", "--model", "small", *adapter, *measure, *more)
    run("report", "--results", "results", "--output_dir", "report")

    assert digest("small") == before, "the compressed model's files are not touched"
    text = Path("report/report.md").read_text()
    assert all(name in text for name in ("dense", "compressed", "IDP", "LoRA"))
    assert "<svg" in Path("report/report.html").read_text() or "data:image" in Path("report/report.html").read_text()
    idp = json.loads(Path("results/idp.json").read_text())
    (scores,) = idp["perplexity"].values()
    assert len(scores["items"]) == 20
    assert idp["training"]["objective"] == "distillation"
    # A document is one window here: the chosen prompt, when it is forced, gives what the free choice gave.
    for item in scores["items"]:
        assert item["nats_by_prompt"][item["prompt"]] == pytest.approx(item["nats"], abs=1e-3)
    weights = AutoModelForCausalLM.from_pretrained("small").state_dict()
    if recipe.startswith("sparsegpt"):
        layer = weights["model.layers.0.mlp.up_proj.weight"]
        assert (layer == 0).float().mean() == pytest.approx(0.5, abs=0.05)
    assert torch.isfinite(torch.tensor(scores["nats_per_token"]))
