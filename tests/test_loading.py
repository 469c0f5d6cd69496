"""Models of every format from folders, files and hub ids, and what a user is told when there is none."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

import idp_peft
from idp_peft import IDPConfig
from idp_peft.models.fingerprint import fingerprint
from idp_peft.models.gradient_probe import probe_gradients
from idp_peft.models.loading import accepted_by_trainer, load_model, load_tokenizer
from tests.tiny import tiny, token_batch
from tests.tiny_folder import tiny_folder
from tests.tiny_gguf import tiny_gguf


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def packed_folder(folder, symmetric: bool = False) -> str:
    """A tiny model of 3-bit words, as compressed-tensors writes it when nobody thinks of loading."""
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    source = tiny_folder(folder)
    model = tiny("llama")
    weights = {"num_bits": 3, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 8}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            grouped = module.weight.detach().unflatten(-1, (-1, 8))
            low, high = grouped.amin(-1), grouped.amax(-1)
            scale, zero_point = calculate_qparams(low, high, module.quantization_scheme.weights)
            module.weight_scale.data.copy_(scale)
            if hasattr(module, "weight_zero_point"):
                module.weight_zero_point.data.copy_(zero_point)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(source)
    compressor.update_config(source)
    return source


def test_a_dense_folder_is_read_in_float32_and_evaluation_mode(tmp_path):
    model = load_model(tiny_folder(tmp_path))
    assert model.dtype == torch.float32
    assert not model.training
    assert fingerprint(model) == fingerprint(tiny("llama"))
    assert load_model(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_tokenizer_gets_a_padding_token_and_pads_on_the_left(tmp_path):
    plain = AutoTokenizer.from_pretrained(tiny_folder(tmp_path))
    plain.pad_token, plain.padding_side = None, "right"
    plain.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("w4 w5")["input_ids"] == [4, 5]
    assert tokenizer.pad_token == "<s>"
    assert tokenizer(["w4 w5", "w6"], padding=True)["attention_mask"] == [[1, 1], [0, 1]]
    assert AutoTokenizer.from_pretrained(tmp_path).padding_side == "right", "its file stays as it is"


@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_words_load_and_their_weights_never_change(symmetric, tmp_path):
    model = load_model(packed_folder(tmp_path, symmetric), for_training=True)
    before = fingerprint(model)
    ids, _ = token_batch([8])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert fingerprint(model) == before
    groups = model.model.layers[0].mlp.up_proj.weight.reshape(-1, 8)
    assert max(len(group.unique()) for group in groups) in range(4, 9)
    assert (
        model.model.layers[0].mlp.up_proj.weight - tiny("llama").model.layers[0].mlp.up_proj.weight
    ).abs().max() < 0.2
    assert logits.isfinite().all()
    assert probe_gradients(model).trainable
    if symmetric:  # asymmetric ones are refused by plain from_pretrained in newer versions of transformers
        plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        with torch.no_grad():
            assert torch.equal(plain(input_ids=ids).logits, logits)


def test_a_gguf_file_becomes_a_dense_model_that_can_be_saved(tmp_path):
    gguf = pytest.importorskip("gguf", reason="needs gguf")
    kind = gguf.GGMLQuantizationType.Q8_0
    tiny_gguf(tmp_path / "tiny.gguf", packed=kind)
    table = tiny("llama").get_input_embeddings().weight.detach().numpy()
    unpacked = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(table, kind), kind))
    assert not torch.equal(unpacked, torch.from_numpy(table))
    for source in (tmp_path / "tiny.gguf", tmp_path):
        loaded = load_model(source, for_training=True)
        assert not hasattr(loaded.config, "quantization_config")
        assert not getattr(loaded, "is_quantized", False)
        assert type(loaded.model.layers[0].mlp.up_proj) is torch.nn.Linear
        assert torch.equal(loaded.model.embed_tokens.weight, unpacked)
    loaded.save_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert fingerprint(again) == fingerprint(loaded)
    shutil.copy(tmp_path / "tiny.gguf", tmp_path / "other.gguf")
    with pytest.raises(ValueError, match=r"holds 2 GGUF files, name one of them: other.gguf, tiny.gguf"):
        load_model(tmp_path)


def test_four_bits_of_bitsandbytes_stay_trainable_after_an_evaluation(tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    # It packs blocks of 64.
    config = tiny("llama").config
    config.hidden_size, config.intermediate_size, config.head_dim = 128, 128, 32
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    rule = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = load_model(tmp_path, for_training=True, quantization_config=rule)
    before = fingerprint(model)
    assert probe_gradients(model).trainable
    assert fingerprint(model) == before
    # On processors with AVX512-BF16 the model as plain from_pretrained gives it is not, and the probe says so.
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=rule)
    repacks = plain.model.layers[0].mlp.up_proj.support_avx512bf16_for_cpu
    assert probe_gradients(plain).verdict == ("inference only" if repacks else "trainable")


@pytest.mark.parametrize("accepted", [True, False])
def test_the_trainer_accepts_a_base_that_it_refuses_by_policy(accepted, tmp_path):
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    from transformers import TorchAoConfig

    rule = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=quantization.PerGroup(16))
    base = load_model(tiny_folder(tmp_path / "base"), for_training=True, quantization_config=TorchAoConfig(rule))
    assert probe_gradients(base).trainable
    before = fingerprint(base)
    model = get_peft_model(base, IDPConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    attributes, base_attributes = set(vars(model)), set(vars(base))
    options = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "learning_rate": 0.1}
    arguments = TrainingArguments(str(tmp_path / "run"), max_steps=2, use_cpu=True, **options)
    data = [{"input_ids": torch.arange(2, 20), "labels": torch.arange(2, 20)}] * 4
    settings = {"args": arguments, "train_dataset": data, "data_collator": default_data_collator}
    if not accepted:
        with pytest.raises(ValueError, match="do not support training"):
            Trainer(model, **settings)
        return
    with accepted_by_trainer(model):
        trainer = Trainer(model, **settings)
    assert set(vars(model)) == attributes
    assert set(vars(base)) == base_attributes
    prompts = {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}
    trainer.train()
    assert all(not torch.equal(value, prompts[name]) for name, value in model.named_parameters() if name in prompts)
    assert fingerprint(model) == before
    with pytest.raises(RuntimeError, match="inside"), accepted_by_trainer(model):
        raise RuntimeError("inside")
    assert "_hf_peft_config_loaded" not in vars(model)


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "no/where/at/all", "nowhere.gguf"])
def test_a_missing_place_is_one_line(name):
    for load in (load_model, load_tokenizer):
        with pytest.raises(FileNotFoundError) as error:
            load(name)
        assert str(error.value) == f"there is no model at {name}"


def test_a_hub_id_that_cannot_be_reached_is_one_line(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="nobody/nothing is neither a folder nor a model of the hub: ") as error:
        load_model("nobody/nothing")
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_model_says_why(tmp_path):
    with pytest.raises(ValueError, match=r"is no model: it has neither a config.json nor a .gguf file"):
        load_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter, not a model"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="got the file"):
        load_model(tmp_path / "adapter_config.json")
    (tmp_path / "adapter_config.json").unlink()
    tiny("llama").config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is no complete model: ") as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("method", "module", "advice"),
    [("gptq", "gptqmodel", "idp-peft[gptqmodel]"), ("compressed-tensors", "compressed_tensors", "compressed-tensors")],
)
def test_a_missing_reader_is_named(method, module, advice, tmp_path):
    if importlib.util.find_spec(module) is not None:
        pytest.skip(f"{module} is installed")
    folder = tiny_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ImportError) as error:
        load_model(folder)
    assert str(error.value) == f'reading a {method} model needs another library: pip install "{advice}"'


# ------------------------------------------------------------------ an adapter on its base


@pytest.fixture
def adapter(tmp_path):
    """A folder of an adapter on the tiny model in the folder `base` beside it."""
    model = get_peft_model(
        load_model(tiny_folder(tmp_path / "base")), IDPConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=token_batch([8])[0]).logits


def test_an_adapter_is_loaded_with_the_base_it_names(adapter):
    model, tokenizer = idp_peft.load(adapter)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer("w4 w5")["input_ids"] == [4, 5]
    assert tokenizer.pad_token is not None
    expected = PeftModel.from_pretrained(load_model(adapter.parent / "base"), adapter).eval()
    assert torch.equal(logits(model), logits(expected))
    assert idp_peft.load(adapter, dtype=torch.bfloat16)[0].get_base_model().dtype == torch.bfloat16


def test_another_base_may_be_given_and_a_missing_one_asks_for_it(adapter):
    moved = adapter.parent / "moved"
    (adapter.parent / "base").rename(moved)
    with pytest.raises(FileNotFoundError) as error:
        idp_peft.load(adapter)
    assert str(error.value) == (
        f"the base of `adapter` {str(adapter)!r} could not be loaded (there is no model at {adapter.parent / 'base'}): pass "
        "`base`, the folder or Hub id where that model is now"
    )
    assert logits(idp_peft.load(adapter, base=moved)[0]).isfinite().all()
    with pytest.raises(FileNotFoundError, match=r"^there is no model at ./nowhere$"):
        idp_peft.load(adapter, base="./nowhere")


def test_an_adapter_that_names_no_base_asks_for_it(adapter):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match=r"does not say what its base is: pass `base`$"):
        idp_peft.load(adapter)
    idp_peft.load(adapter, base=adapter.parent / "base")


@pytest.mark.parametrize("place", ["", "checkpoint-2"])
def test_the_tokenizer_beside_an_adapter_wins_over_the_bases(adapter, place):
    where = adapter / place
    if place:
        shutil.copytree(adapter, where)
    tokenizer = load_tokenizer(adapter.parent / "base")
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(where)
    model, tokenizer = idp_peft.load(adapter, subfolder=place or None)
    assert tokenizer("w4 new")["input_ids"] == [4, 97]
    assert model.get_input_embeddings().weight.shape[0] == 98


def test_a_compressed_base_is_unpacked_as_when_it_is_loaded_alone(tmp_path):
    base = packed_folder(tmp_path / "base")
    model = get_peft_model(load_model(base), IDPConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(idp_peft.load(tmp_path / "adapter")[0]), logits(model.eval()))
    assert "compressed-tensors, 3 bits, groups of 8" in (tmp_path / "adapter" / "README.md").read_text()


def test_adapters_of_other_methods_load_as_well(tmp_path):
    base = load_model(tiny_folder(tmp_path / "base"))
    lora = get_peft_model(
        base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    )
    lora.save_pretrained(tmp_path / "lora")
    assert torch.equal(logits(idp_peft.load(tmp_path / "lora")[0]), logits(lora.eval()))


def test_what_is_no_adapter_or_of_an_unknown_method_is_one_line(adapter, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_type": "TELEPATHY"}))
    for name, kind, text in [
        (adapter, ValueError, "is of a method that PEFT does not know ('TELEPATHY'): import the package it comes from"),
        (adapter.parent / "base", FileNotFoundError, "is no adapter: there is no adapter_config.json in it"),
        (adapter.parent / "nowhere", FileNotFoundError, "is no adapter: there is no adapter_config.json in it"),
        ("nobody/nothing", ValueError, "`adapter` 'nobody/nothing' could not be loaded: "),
    ]:
        with pytest.raises(kind, match=re.escape(text)) as error:
            idp_peft.load(name)
        assert "\n" not in str(error.value)
