"""A GGUF file is a base like any other: every command and every function takes it, also where others lie beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import idp_peft
from idp_peft import IDPConfig
from idp_peft.composition.base_skeleton import skeleton
from idp_peft.evaluation.description import describe
from idp_peft.hosting.init_text import text_token_ids
from idp_peft.hub.base_model import base_of
from idp_peft.models.fingerprint import fingerprint
from idp_peft.models.loading import load_model, load_tokenizer
from idp_peft.recover.methods import METHODS
from idp_peft.serving import ExportedModel, Router
from idp_peft_cli import main
from tests.hub_server import HubServer, metadata_errors, only_hub
from tests.tiny import tiny, token_batch
from tests.tiny_folder import tiny_texts

pytest.importorskip("gguf", reason="gguf is not installed")
pytest.importorskip("datasets")
from tests.tiny_gguf import tiny_gguf

BASE, TEXTS = "models/tiny.gguf", ["the w5 w6", "w7", "hello there, w8 w9"]
TRAIN = ["--block_tokens", 16, "--context_tokens", 4, "--min_tokens", 4, "--use_cpu", "--disable_tqdm", "true"]
TRAIN += ["--num_prompts", 3, "--num_virtual_tokens", 4, "--max_steps", 2, "--dataset", "text.jsonl"]


def run(*words) -> None:
    main([str(word) for word in words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models in one folder, as quantizations of a model mostly come, and an adapter that was trained on one of them."""
    folder = tmp_path_factory.mktemp("gguf")
    for seed, name in enumerate(("tiny", "other")):
        tiny_gguf(folder / "models" / f"{name}.gguf", seed=seed)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny_texts(20)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_HUB_OFFLINE", "1")
        run("recover", "--model", BASE, "--output_dir", "run", *TRAIN)
    return folder


@pytest.fixture
def here(folder, monkeypatch, tmp_path):
    """The folder is the working directory; what a test writes goes to its own `tmp_path`."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def is_base(model) -> bool:
    """Whether a model has the weights of the file that was named, and not of the one beside it."""
    table = model.get_input_embeddings().weight
    return torch.equal(table, tiny("llama").get_input_embeddings().weight)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=token_batch([8])[0]).logits


@pytest.fixture
def expected(here):
    """What the adapter says on its base."""
    base = load_model(BASE)
    assert is_base(base)
    return logits(PeftModel.from_pretrained(base, "run/adapter").eval())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_it_and_names_it(here, method):
    data = ["--dataset", "self", "--self_samples", 8] if method == "idp" else []
    run("recover", "--model", BASE, "--teacher", BASE, "--method", method, "--output_dir", here / "run", *TRAIN, *data)
    assert PeftConfig.from_pretrained(str(here / "run/adapter")).base_model_name_or_path == BASE
    model, _ = idp_peft.load(here / "run/adapter")
    assert is_base(model.get_base_model())


@pytest.mark.parametrize("named", [BASE, "./models/tiny.gguf", "absolute", "only one in its folder"])
def test_an_adapter_loads_with_the_file_that_it_was_made_on(here, named):
    if named == "only one in its folder":
        shutil.copytree("models", here / "models", ignore=shutil.ignore_patterns("other*"))
        named = here / "models"
    named = Path(BASE).absolute() if named == "absolute" else named
    base = load_model(named)
    assert base.name_or_path == base.config.name_or_path
    assert Path(base.name_or_path).name == "tiny.gguf"
    get_peft_model(base, IDPConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).save_pretrained(here / "adapter")
    shutil.copy(BASE, Path(base.name_or_path).with_name("later.gguf"))
    model, tokenizer = idp_peft.load(here / "adapter")
    Path(base.name_or_path).with_name("later.gguf").unlink()
    assert is_base(model.get_base_model())
    assert tokenizer("the w5")["input_ids"] == load_tokenizer(BASE)("the w5")["input_ids"]


def test_the_default_start_is_text_that_its_tokenizer_reads(here):
    config = PeftConfig.from_pretrained("run/adapter")
    assert (config.init, config.tokenizer_name_or_path) == ("text", None)
    config.tokenizer_name_or_path = BASE
    tokenizer = load_tokenizer(BASE)
    wanted = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in config.init_text]
    assert text_token_ids(config) == wanted
    for place, more in (("models", {"gguf_file": "tiny.gguf"}), (str(Path(BASE).absolute()), None)):
        config.tokenizer_name_or_path, config.tokenizer_kwargs = place, more
        assert text_token_ids(config) == wanted


def test_it_is_measured_alone_and_with_an_adapter_and_reported(here):
    pytest.importorskip("matplotlib")
    measure = ["--dataset", "text.jsonl", "--dataset_split", "train", "--window", 40, "--stride", 36, "--limit", 4]
    tiny("llama").save_pretrained(here / "dense")
    load_tokenizer(BASE).save_pretrained(here / "dense")
    run("evaluate", "--model", here / "dense", "--output", here / "results/dense.json", *measure)
    base = ["evaluate", "--model", BASE, "--role", "compressed", "--output"]
    run(*base, here / "results/base.json", *measure)
    run("evaluate", "--model", BASE, "--adapter", "run/adapter", "--output", here / "results/idp.json", *measure)
    run("report", "--results", here / "results", "--output_dir", here / "report")
    assert "IDP" in (here / "report/report.md").read_text()
    run(*base, here / "results/base.json", *measure)  # is there already
    Path(BASE).touch()
    with pytest.raises(SystemExit):
        run(*base, here / "results/base.json", *measure)


def test_a_file_of_packed_weights_is_a_compressed_model_and_one_of_whole_numbers_a_dense_one(here):
    import gguf

    tiny_gguf(here / "packed.gguf", packed=gguf.GGMLQuantizationType.Q8_0)
    (here / "compression.json").write_text("{}")  # of another model in that folder
    shutil.copy(BASE, here / "whole.gguf")
    for name, role in (("packed.gguf", "compressed"), ("whole.gguf", "dense")):
        settings = {"model": str(here / name), "adapter": None, "role": None, "label": None}
        assert describe(load_model(here / name), settings)["role"] == role


def test_it_is_compressed_by_every_backend_that_is_installed(here):
    pytest.importorskip("torchao", reason="torchao is not installed")
    data = ["--dataset", "text.jsonl", "--group_size", 16]
    run(
        "compress",
        "--model",
        BASE,
        "--recipe",
        "rtn-4bit",
        "--backend",
        "torchao",
        "--output_dir",
        here / "small",
        *data,
    )
    assert {path.name for path in here.iterdir()} == {"small"}, "nothing of the unpacked copy is left"
    assert is_base(load_model(here / "small"))
    assert json.loads((here / "small/compression.json").read_text())["model"] == BASE
    assert load_tokenizer(here / "small")(TEXTS[0]) == load_tokenizer(BASE)(TEXTS[0])


@pytest.mark.parametrize("base_model", [None, BASE])
def test_banks_are_composed_and_split_and_still_name_it(here, expected, base_model):
    assert is_base_name(skeleton(BASE).name_or_path)
    idp_peft.compose(["run/adapter"], here / "bank", base_model=base_model)
    assert is_base_name(PeftConfig.from_pretrained(str(here / "bank")).base_model_name_or_path)
    assert torch.equal(logits(idp_peft.load(here / "bank")[0]), expected)
    run("recover", "--model", BASE, "--output_dir", here / "plain", "--scales", "false", *TRAIN)
    folders = idp_peft.split(here / "plain/adapter", here / "prompts", base_model=base_model)
    assert all(is_base_name(PeftConfig.from_pretrained(place).base_model_name_or_path) for place in folders)
    assert is_base(idp_peft.load(folders[0])[0].get_base_model())


def is_base_name(name: str) -> bool:
    return name == BASE


def test_it_is_routed_exported_and_served_behind_the_proxy(here, expected, monkeypatch):
    uvicorn = pytest.importorskip("uvicorn", reason="the proxy's server is in the extra 'serving'")
    model, tokenizer = idp_peft.load("run/adapter")
    (here / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    run("route", "--adapter", "run/adapter", "--input", here / "in.jsonl", "--output", here / "out.jsonl")
    run("export", "--to_vocab", "--fold_scales", "--adapter", "run/adapter", "--output_dir", here / "served")
    assert {path.name for path in here.iterdir()} == {"in.jsonl", "out.jsonl", "served"}
    exported = ExportedModel.from_folder(here / "served")
    routed = [json.loads(line)["prompt_id"] for line in (here / "out.jsonl").read_text().splitlines()]
    assert Router.from_pretrained(here / "served").route(TEXTS).prompt_ids.tolist() == routed
    plain = load_model(here / "served")
    for text, prompt in zip(TEXTS, routed, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            wanted = model(input_ids=ids).logits
            assert model.last_selection.prompt_ids.tolist() == [prompt]
            behind = torch.cat([torch.tensor([exported.token_ids[prompt]]), ids], dim=1)
            found = plain(input_ids=behind).logits[:, -ids.shape[1] :, : wanted.shape[-1]]
        assert (found - wanted).abs().max() < 1e-4
    apps = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **_: apps.append(app))
    run("proxy", "--model", here / "served", "--engine", "http://127.0.0.1:9")
    assert len(apps) == 1


def test_an_adapter_on_it_is_pushed_with_a_card_that_says_so(here, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with HubServer() as server:
        only_hub(server, monkeypatch, here / "hub")
        run("push", "--adapter", "run/adapter", "--repo", "you/repaired")
        idp_peft.load("run/adapter")[0].push_to_hub("you/live")
        for repo in ("you/repaired", "you/live"):
            card = server.files(repo)["README.md"].decode()
            assert not metadata_errors(card)
            assert f'idp_peft.load("{repo}", base="tiny.gguf")' in card
            assert "pip install idp-peft gguf;" in card
            assert "`base` is the GGUF file of the base model ([below](#the-base)), here `tiny.gguf`." in card
            assert "A local GGUF file, `tiny.gguf`, which is not part of this repository." in card
            assert "base_model:" not in card
    assert base_of(BASE).formats == ["gguf"]


def test_the_harness_takes_it_by_name_and_by_the_adapter_alone(here, expected):
    pytest.importorskip("lm_eval")
    from lm_eval.api.registry import get_model

    import idp_peft.evaluation.lm_eval  # noqa: F401

    for names in ({}, {"pretrained": BASE}, {"pretrained": "models", "gguf_file": "tiny.gguf"}):
        lm = get_model("idp")(**names, peft="run/adapter", device="cpu")
        assert torch.equal(logits(lm.model), expected)
        assert lm.tokenizer("the w5")["input_ids"] == load_tokenizer(BASE)("the w5")["input_ids"]


def test_what_is_chosen_on_it_is_reported(here):
    model, tokenizer = idp_peft.load("run/adapter")
    report = idp_peft.selection_report(model, [{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS])
    assert len(report.prompt_ids) == len(TEXTS)


def test_peft_loads_the_adapter_on_a_base_that_is_there_and_says_who_loads_both(here, expected):
    assert torch.equal(logits(PeftModel.from_pretrained(load_model(BASE), "run/adapter").eval()), expected)
    assert torch.equal(logits(idp_peft.load("run/adapter")[0]), expected)
    for more in ({}, {"gguf_file": "tiny.gguf"}):
        with pytest.raises(ValueError, match="which PEFT's auto classes cannot load") as error:
            AutoPeftModelForCausalLM.from_pretrained("run/adapter", **more)
        assert str(error.value) == (
            f"the base of adapter 'run/adapter' is the GGUF file {BASE!r}, which PEFT's auto classes cannot load: use "
            "`model, tokenizer = idp_peft.load('run/adapter')`"
        )


def test_no_file_is_touched_and_nothing_is_left_beside_it(folder):
    assert {path.name for path in (folder / "models").iterdir()} == {"tiny.gguf", "other.gguf"}
    assert fingerprint(load_model(folder / BASE)) != fingerprint(load_model(folder / "models/other.gguf"))
    assert load_file(folder / "run/adapter/adapter_model.safetensors")
