"""The result file of one model: what it says, that it is whole or not there, and that it is kept."""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from idp_peft.evaluation import result_file
from idp_peft.evaluation.result_file import evaluate
from idp_peft.models import loading
from tests.test_adapters import word_tokenizer
from tests.test_perplexity import texts
from tests.tiny import tiny


def changed(options: dict, **changes) -> dict:
    return {**options, **changes}


@pytest.fixture
def options(tmp_path, monkeypatch):
    """Options for a tiny model and ten texts, with the loaders of both replaced."""
    monkeypatch.setattr(loading, "load_model", lambda name, **_: tiny("llama"))
    monkeypatch.setattr(loading, "load_tokenizer", lambda name, **_: word_tokenizer())
    data = types.ModuleType("idp_peft.texts.data")
    data.load_texts = lambda source, split, column, config: texts(*range(5, 15))
    monkeypatch.setitem(sys.modules, "idp_peft.texts.data", data)
    return {"model": "tiny", "output": str(tmp_path / "results" / "result.json"), "window": 8, "stride": 6}


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_dense_model_makes_a_result_of_the_documented_shape(options):
    result = read(evaluate(**options))
    assert list(result) == [
        *("format", "label", "role", "model", "adapter", "method", "extra_parameters", "num_prompts", "training"),
        *("settings", "environment", "seconds", "perplexity", "tasks"),
    ]
    assert (result["format"], result["label"], result["role"], result["model"]) == (1, "dense", "dense", "tiny")
    assert (result["adapter"], result["method"], result["extra_parameters"], result["num_prompts"]) == (
        None,
        None,
        0,
        None,
    )
    perplexity = result["perplexity"]["wiki:held_out"]
    assert [item["id"] for item in perplexity["items"]] == [str(number) for number in range(10)]
    assert (perplexity["window"], perplexity["stride"], perplexity["selection_reads"]) == (8, 6, "context")
    assert result["settings"]["window"] == 8
    assert result["environment"]["torch"]


def test_an_adapter_is_loaded_described_and_its_training_copied(options, make, tmp_path):
    run = tmp_path / "run"
    make("llama").save_pretrained(run / "adapter")
    (run / "run.json").write_text(json.dumps({"training": {"steps": 3, "history": []}, "other": 1}))
    result = read(evaluate(**changed(options, adapter=str(run / "adapter"), limit=4, each_prompt=True)))
    assert (result["label"], result["role"], result["method"]) == ("IDP", "recovered", "idp")
    assert (result["num_prompts"], result["extra_parameters"]) == (4, 4 * 4 * 32)
    assert result["training"] == {"steps": 3, "history": []}
    items = result["perplexity"]["wiki:held_out"]["items"]
    assert len(items) == 4
    assert all(len(item["nats_by_prompt"]) == 4 for item in items)
    dense = read(evaluate(**changed(options, limit=4, output=str(tmp_path / "dense.json"))))
    assert [item["id"] for item in dense["perplexity"]["wiki:held_out"]["items"]] == [item["id"] for item in items]


def test_lora_is_labelled_and_counted(options, tmp_path):
    model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "lora")
    result = read(evaluate(**changed(options, adapter=str(tmp_path / "lora"))))
    assert (result["label"], result["method"], result["num_prompts"]) == ("LoRA", "lora", None)
    assert result["extra_parameters"] == 3 * 2 * (32 + 32)


def test_a_compressed_model_is_known_by_its_note(options, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "compression.json").write_text("{}")
    result = read(evaluate(**changed(options, model=str(tmp_path / "model"))))
    assert (result["label"], result["role"]) == ("compressed", "compressed")
    named = changed(options, role="dense", label="a name", output=str(tmp_path / "named.json"))
    assert [read(evaluate(**named))[key] for key in ("label", "role")] == ["a name", "dense"]


def test_a_result_of_the_same_settings_is_kept_and_of_others_refused(options, monkeypatch, caplog):
    path = evaluate(**options)
    before = path.read_bytes()
    monkeypatch.setattr(result_file, "load", lambda *_: pytest.fail("measured again"))
    with caplog.at_level("INFO"):
        assert evaluate(**options) == path
    assert "holds this result already" in caplog.text
    assert path.read_bytes() == before
    with pytest.raises(
        ValueError, match=r"other settings \(limit was None and is 3; seed was 0 and is 1\): choose another"
    ):
        evaluate(**changed(options, limit=3, seed=1))
    path.write_text("something else")
    with pytest.raises(ValueError, match="exists and is no result file: choose another name"):
        evaluate(**options)
    assert path.read_text() == "something else"


def test_a_result_older_than_its_adapter_is_not_taken_for_its_own(options, make, tmp_path):
    make("llama").save_pretrained(tmp_path / "adapter")
    options = changed(options, adapter=str(tmp_path / "adapter"))
    path = evaluate(**options)
    assert evaluate(**options) == path
    os.utime(tmp_path / "adapter" / "adapter_model.safetensors", (path.stat().st_mtime + 10,) * 2)
    with pytest.raises(ValueError, match=r"is older than `adapter` .*: remove it to measure again"):
        evaluate(**options)


def test_a_run_that_breaks_leaves_no_file(options, monkeypatch):
    def broken(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(result_file, "evaluate_model", broken)
    with pytest.raises(KeyboardInterrupt):
        evaluate(**options)
    monkeypatch.undo()
    folder = Path(options["output"]).parent
    with pytest.raises(TypeError):
        result_file.write(Path(options["output"]), {"not": {"json"}})
    assert not list(folder.glob("*"))


def test_wrong_options_are_refused_before_anything_is_loaded(options, monkeypatch, tmp_path):
    monkeypatch.setattr(result_file, "load", lambda *_: pytest.fail("loaded"))
    for wrong, message in [
        ({"stride": 9}, r"`stride` must be from 1 to `window` \(8\), got 9"),
        ({"limit": 0}, "`limit` must be at least 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"role": "other"}, "`role` must be dense, compressed or recovered, got 'other'"),
        ({"dataset": "none"}, "nothing to measure: `dataset` is 'none' and `tasks` is empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate(**changed(options, **wrong))
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match=r"is no adapter: there is no adapter_config\.json in it"):
        result_file.load("tiny", str(tmp_path))
