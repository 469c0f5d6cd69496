"""What PEFT's own test suite asks of a method on decoder models, asked of IDP: names, saving, loading, switching, leaving."""

from __future__ import annotations

import copy
import io
import json
import pickle

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from peft.functional import cast_adapter_dtype, delete_adapter, set_adapter, set_requires_grad
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file

from idp_peft import IDPConfig
from tests.tiny import VOCAB, tiny, token_batch

ARCHITECTURES = ["llama", "gpt2", "opt", "gemma2", "bloom"]
IDS, MASK = token_batch([5, 8], side="left")
INPUT = {"input_ids": IDS, "attention_mask": MASK}


def config(**fields) -> IDPConfig:
    return IDPConfig(task_type="CAUSAL_LM", **{"num_prompts": 3, "num_virtual_tokens": [2, 4, 3], **fields})


def randomize(model, name: str = "default", seed: int = 1):
    """Prompts of their own: those of two fresh adapters on the same base would be alike."""
    with torch.no_grad():
        weight = bank(model, name).weight
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) * 0.3)
    return model


def made(architecture: str = "llama", name: str = "default", seed: int = 1, **fields):
    return randomize(get_peft_model(tiny(architecture), config(**fields), adapter_name=name).eval(), name, seed)


def bank(model, name: str = "default"):
    return next(module for module in model.modules() if isinstance(module, BaseTunerLayer)).idp_prompts[name]


@torch.no_grad()
def logits(model, **arguments) -> torch.Tensor:
    return model(**INPUT, **arguments).logits


def bits(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(model, expected: dict[str, torch.Tensor]) -> bool:
    found = model.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name", ["q", "idp", "idp_", "idp_prompts", "model", "weight", "layers", "lm_head", "a-b", "ä"]
)
def test_any_name_that_torch_can_give_to_a_module_is_saved_and_loaded(name, tmp_path):
    model = made(name=name)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert list(load_file(tmp_path / name / "adapter_model.safetensors")) == [
        "base_model.model.model.idp.idp_prompts.weight"
    ]
    for loaded_as in (name, "default", "other"):
        loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path / name, adapter_name=loaded_as)
        assert torch.equal(logits(loaded), expected)
        assert loaded.active_adapters == [loaded_as]


@pytest.mark.parametrize("name", ["a.b", "default.x", "", "keys", "forward"])
def test_another_name_is_refused_and_the_base_left_as_it_was(name):
    base = tiny("llama")
    before = bits(base)
    with pytest.raises(ValueError, match="an adapter's name must not be empty, have a dot in it"):
        get_peft_model(base, config(), adapter_name=name)
    assert same_bits(base, before)
    assert not base._forward_pre_hooks
    model = made()
    expected = logits(model)
    with pytest.raises(ValueError, match="an adapter's name must not be empty"):
        model.add_adapter(name, config())
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), expected)


def test_names_that_are_parts_of_each_other_stay_apart(tmp_path):
    names = ["a", "ab", "b", "aba", "default"]
    model = made(name="a")
    for seed, name in enumerate(names[1:], 2):
        model.add_adapter(name, config(num_prompts=2, num_virtual_tokens=seed))
        randomize(model, name, seed)
    expected = {}
    for name in names:
        model.set_adapter(name)
        expected[name] = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["a", "ab", "default"])
    assert not (tmp_path / "b").exists()
    for name, folder in (("a", tmp_path / "a"), ("ab", tmp_path / "ab"), ("default", tmp_path)):
        (weight,) = load_file(folder / "adapter_model.safetensors").values()
        assert torch.equal(weight, bank(model, name).weight)
    model.delete_adapter("a")
    assert sorted(model.peft_config) == ["ab", "aba", "b", "default"]
    for name in ("ab", "aba", "b", "default"):
        model.set_adapter(name)
        assert torch.equal(logits(model), expected[name])


# ---------------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_adapter_is_the_same_however_it_is_loaded(architecture, tmp_path):
    model = made(architecture)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    for low in (False, True):
        base = tiny(architecture)
        before = bits(base)
        loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low)
        assert torch.equal(logits(loaded), expected)
        assert loaded.peft_config["default"].inference_mode
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        result = loaded.load_adapter(tmp_path, "second", is_trainable=True, low_cpu_mem_usage=low)
        assert result.missing_keys == []
        assert result.unexpected_keys == []
        loaded.set_adapter("second")
        assert torch.equal(logits(loaded), expected)
        assert loaded.get_nb_trainable_parameters()[0] == bank(model).weight.numel()
        assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
        assert same_bits(loaded.unload(), before)


def test_a_config_of_the_callers_is_the_one_that_is_used(tmp_path):
    model = made()
    model.save_pretrained(tmp_path)
    mine = config(selection="fixed", fixed_prompt=2)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path, config=mine)
    assert loaded.peft_config["default"] is mine
    assert torch.equal(logits(loaded), logits(model, prompt_ids=torch.tensor([2, 2])))


def test_a_config_of_a_later_version_is_read_without_what_it_does_not_know(tmp_path):
    made().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "from_the_future": 1}))
    with pytest.warns(UserWarning, match="from_the_future"):
        read = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(read, IDPConfig)
    assert not hasattr(read, "from_the_future")
    with pytest.warns(UserWarning, match="from_the_future"):
        assert torch.equal(logits(PeftModel.from_pretrained(tiny("llama"), tmp_path)), logits(made()))


def test_a_config_survives_files_dicts_copies_and_pickles(tmp_path):
    first = config(selection="random", selection_seed=7, assignment="all")
    first.save_pretrained(tmp_path)
    others = [
        IDPConfig.from_pretrained(tmp_path),
        IDPConfig(**IDPConfig.from_json_file(str(tmp_path / "adapter_config.json"))),
        copy.copy(first),
        copy.deepcopy(first),
        pickle.loads(pickle.dumps(first)),
    ]
    for other in others:
        assert type(other) is IDPConfig
        assert {**other.to_dict(), "peft_version": None} == {**first.to_dict(), "peft_version": None}
    assert not first.is_prompt_learning
    assert first.peft_type.value == "IDP"


@pytest.mark.parametrize("field", ["target_modules", "modules_to_save", "trainable_token_indices"])
def test_fields_that_mean_nothing_here_are_refused(field):
    with pytest.raises(ValueError, match=f"`{field}` must be None, got .*: IDP trains its prompts and nothing else"):
        config(**{field: ["q_proj"]})
    for unknown in ("layers_to_transform", "bias", "target_parameters", "r"):
        with pytest.raises(TypeError, match=unknown):
            config(**{unknown: 1})


def test_a_hub_adapter_is_asked_for_at_its_revision(tmp_path, monkeypatch):
    model = made()
    model.save_pretrained(tmp_path)
    asked = set()

    def download(repo, filename, subfolder=None, revision=None, **_):
        asked.add((repo, revision))
        return str(tmp_path / filename)

    for module in ("peft.config", "peft.peft_model", "idp_peft.hosting.checkpoint", "peft.utils.save_and_load"):
        if hasattr(__import__(module, fromlist=["x"]), "hf_hub_download"):
            monkeypatch.setattr(f"{module}.hf_hub_download", download)
    monkeypatch.setattr("peft.utils.save_and_load.file_exists", lambda **names: (tmp_path / names["filename"]).exists())
    loaded = PeftModel.from_pretrained(tiny("llama"), "someone/adapter", revision="v1")
    assert torch.equal(logits(loaded), logits(model))
    assert asked == {("someone/adapter", "v1")}


# ---------------------------------------------------------------------- the base's embeddings, and its architecture


def test_embeddings_that_were_saved_too_are_loaded_where_they_fit(tmp_path):
    def grown(seed: int):
        base = tiny("llama")
        torch.manual_seed(seed)
        base.resize_token_embeddings(VOCAB + 5)
        return base

    model = randomize(get_peft_model(grown(1), config()).eval())
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 3
    other = grown(2)
    assert not torch.equal(other.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert torch.equal(logits(PeftModel.from_pretrained(other, tmp_path)), logits(model))
    base = tiny("llama")
    before = bits(base)
    with pytest.raises(ValueError, match=rf"shape \[{VOCAB + 5}, 32\].*call `resize_token_embeddings\({VOCAB + 5}\)`"):
        PeftModel.from_pretrained(base, tmp_path)
    assert same_bits(base, before)
    assert not base._forward_pre_hooks


def test_an_auto_class_grows_the_base_to_the_tokenizer_beside_the_adapter(tmp_path):
    from tests.tiny_folder import tiny_folder, tiny_tokenizer

    base = tiny_folder(tmp_path / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["new", "newer"])
    grown = tiny("llama")
    grown.resize_token_embeddings(len(tokenizer))
    model = randomize(get_peft_model(grown, config()).eval())
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    tokenizer.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))


def test_prompts_of_another_architecture_are_refused_and_not_left_as_they_started(tmp_path):
    made("llama").save_pretrained(tmp_path)
    base = tiny("gpt2")  # of the same width
    before = bits(base)
    with pytest.raises(ValueError, match="holds the prompts of 'model', but this model's decoder is 'transformer'"):
        PeftModel.from_pretrained(base, tmp_path)
    assert same_bits(base, before)
    assert not base._forward_pre_hooks


def test_a_key_mapping_renames_the_place_of_the_prompts(tmp_path):
    model = made()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({"base_model.model.old.idp.idp_prompts.weight": bank(model).weight.detach().clone()}, file)
    with pytest.raises(ValueError, match="or pass `key_mapping`"):
        PeftModel.from_pretrained(tiny("llama"), tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path, key_mapping={r"^old\.": "model."})
    assert torch.equal(logits(loaded), logits(model))


# ---------------------------------------------------------------------- switching, disabling, deleting, leaving


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_base_is_bit_equal_after_every_way_out(architecture):
    base = tiny(architecture)
    before, expected = bits(base), logits(base)
    model = randomize(get_peft_model(base, config()).eval())
    model.add_adapter("other", config(num_prompts=2, num_virtual_tokens=5))
    changed = logits(model)
    assert not torch.equal(changed, expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
        with pytest.raises(RuntimeError, match="inside"), model.disable_adapter():
            raise RuntimeError("inside")
    assert torch.equal(logits(model), changed)
    model.base_model.disable_adapter_layers()
    assert torch.equal(logits(model), expected)
    model.base_model.enable_adapter_layers()
    assert torch.equal(logits(model), changed)
    model.set_adapter("other")
    model.delete_adapter("other")
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model), changed)
    with pytest.raises(ValueError, match="nope does not exist"):
        model.delete_adapter("nope")
    again = model.unload()
    assert again is base
    assert same_bits(again, before)
    assert torch.equal(logits(again), expected)
    assert not hasattr(again, "peft_config")


def test_the_last_adapter_can_be_deleted_and_a_new_one_added():
    model = made()
    model.delete_adapter("default")
    assert model.peft_config == {}
    assert model.active_adapters == []
    with torch.no_grad():
        assert torch.equal(model.base_model(**INPUT).logits, logits(tiny("llama")))
    model.add_adapter("new", config())
    model.set_adapter("new")
    randomize(model, "new")
    assert torch.equal(logits(model), logits(made()))


def trainable(model) -> set[str]:
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(".idp_prompts." in name for name in names)
    return {name.split(".")[-2] for name in names}


def test_the_adapter_in_force_trains_and_no_other():
    model = made()
    model.add_adapter("other", config())
    assert trainable(model) == {"default"}
    model.set_adapter("other")
    assert trainable(model) == {"other"}
    model.set_requires_grad("default")
    assert trainable(model) == {"default", "other"}
    model.set_requires_grad(["default", "other"], requires_grad=False)
    assert trainable(model) == set()
    model.set_adapter("default", inference_mode=True)
    assert model.active_adapters == ["default"]
    assert trainable(model) == set()


def test_banks_of_several_sizes_live_side_by_side():
    model = made()
    first = logits(model)
    model.add_adapter("big", config(num_prompts=6, num_virtual_tokens=[1, 2, 3, 4, 5, 6]))
    model.set_adapter("big")
    logits(model)
    assert model.base_model.last_selection.scores.shape == (2, 6)
    big = model.generate(**INPUT, max_new_tokens=3, do_sample=False)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.set_adapter("big")
    assert torch.equal(model.generate(**INPUT, max_new_tokens=3, do_sample=False), big)


def test_numbers_and_status_are_those_of_the_bank(capsys):
    model = made()
    model.add_adapter("other", config(num_prompts=2, num_virtual_tokens=5))
    base, bank_size, other = sum(p.numel() for p in tiny("llama").parameters()), 9 * 32, 10 * 32
    assert model.get_nb_trainable_parameters() == (bank_size, base + bank_size + other)
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith(
        f"trainable params: {bank_size} || all params: {base + bank_size + other:,}"
    )
    status = model.get_model_status()
    assert status.adapter_model_type == "IDPModel"
    assert status.peft_types == {"default": "IDP", "other": "IDP"}
    assert (status.trainable_params, status.num_adapter_layers, status.enabled) == (bank_size, 1, True)
    assert status.active_adapters == ["default"]
    assert status.available_adapters == ["default", "other"]
    assert status.requires_grad == {"default": True, "other": False}
    assert status.merged_adapters == []
    assert status.devices == {"default": ["cpu"], "other": ["cpu"]}
    (layer,) = model.get_layer_status()
    assert (layer.name, layer.module_type) == ("model.model.idp", "IDPLayer")
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


# ---------------------------------------------------------------------- what has no meaning here says so


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda model: model.merge_adapter(), "an IDP adapter cannot be merged"),
        (lambda model: model.merge_and_unload(), "an IDP adapter cannot be merged"),
        (lambda model: model.merge_and_unload(safe_merge=True), "an IDP adapter cannot be merged"),
        (lambda model: model.base_model.layer.merge(), "an IDP adapter cannot be merged"),
        (lambda model: model.unmerge_adapter(), "there is nothing to unmerge"),
        (lambda model: model.add_weighted_adapter(["default"], [1.0], "x"), "IDP adapters cannot be averaged"),
        (lambda model: model(**INPUT, adapter_names=["default", "x"]), "IDP cannot mix adapters in one batch"),
        (lambda model: model.generate(**INPUT, adapter_names=["default", "x"]), "IDP cannot mix adapters in one batch"),
        (lambda model: model.add_adapter("lora", LoraConfig(task_type="CAUSAL_LM")), "different peft types"),
        (lambda model: PeftMixedModel(tiny("llama"), config()), "not compatible with the `PeftMixedModel`"),
        (lambda model: set_adapter(model, ["default", "other"]), "one IDP adapter can be active at a time"),
    ],
)
def test_what_an_adapter_cannot_do_is_refused_and_changes_nothing(action, message):
    model = made()
    model.add_adapter("other", config())
    expected, before = logits(model), bits(model)
    with pytest.raises((ValueError, TypeError), match=message):
        action(model)
    assert same_bits(model, before)
    assert sorted(model.peft_config) == ["default", "other"]
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model), expected)


def test_hotswapping_is_pefts_own_refusal(tmp_path):
    made(seed=2).save_pretrained(tmp_path)
    model = made()
    expected = logits(model)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but IDP was passed"):
        hotswap_adapter(model, str(tmp_path), adapter_name="default", torch_device="cpu")
    assert torch.equal(logits(model), expected)


# ---------------------------------------------------------------------- the low-level interface


@pytest.mark.parametrize("low", [False, True])
def test_an_injected_adapter_takes_the_state_of_a_saved_one(low):
    model = made()
    state = get_peft_model_state_dict(model)
    assert list(state) == ["base_model.model.model.idp.idp_prompts.weight"]
    base = tiny("llama")
    assert inject_adapter_in_model(config(), base, low_cpu_mem_usage=low) is base
    assert {parameter.device.type for parameter in base.parameters()} == ({"cpu", "meta"} if low else {"cpu"})
    kept = dict(state)
    for names in (state, {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}):
        result = set_peft_model_state_dict(base, names, low_cpu_mem_usage=low)
        assert not result.unexpected_keys
        assert not [name for name in result.missing_keys if "idp" in name]
        assert torch.equal(logits(base), logits(model))
    assert state.keys() == kept.keys(), "the caller's state is left as it was"
    assert list(get_peft_model_state_dict(base)) == ["model.idp.idp_prompts.weight"]


def test_the_functions_of_peft_work_on_an_injected_adapter():
    base = tiny("llama")
    plain = logits(base)
    for name in ("a", "b"):
        inject_adapter_in_model(config(), base, adapter_name=name)
    set_adapter(base, "b")
    randomize(base, "b")
    assert trainable(base) == {"b"}
    assert not torch.equal(logits(base), plain)
    set_requires_grad(base, ["a", "b"], True)
    assert trainable(base) == {"a", "b"}
    status = get_model_status(base)
    assert status.active_adapters == ["b"]
    assert [layer.name for layer in get_layer_status(base)] == ["model.idp"]
    assert delete_adapter(base, "b", prefix="idp_") == ["a"]
    assert get_model_status(base).available_adapters == ["a"]
    assert logits(base).shape == plain.shape


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_prompts_are_float32_or_by_request_of_the_bases_dtype(tmp_path, dtype, autocast, low_cpu_mem_usage):
    base, option = tiny("llama", dtype=dtype), {"autocast_adapter_dtype": autocast}
    made().save_pretrained(tmp_path / "float32")
    model = get_peft_model(base, config(), **option).eval()
    model.add_adapter("other", config(), **option)
    model.load_adapter(tmp_path / "float32", "loaded", **option, low_cpu_mem_usage=low_cpu_mem_usage)
    wanted = torch.float32 if autocast else dtype
    assert {bank(model, name).weight.dtype for name in ("default", "other", "loaded")} == {wanted}
    (saved,) = load_file(tmp_path / "float32" / "adapter_model.safetensors").values()
    assert torch.equal(bank(model, "loaded").weight, saved.to(wanted))
    assert {p.dtype for n, p in model.named_parameters() if ".idp." not in n} == {dtype}
    for name in ("default", "loaded"):
        model.set_adapter(name)
        assert logits(model).dtype == dtype
        assert model.generate(**INPUT, max_new_tokens=2, do_sample=False).shape == (2, 10)
    expected = logits(model)
    model.save_pretrained(tmp_path / "own", selected_adapters=["loaded"])
    again = PeftModel.from_pretrained(tiny("llama", dtype=dtype), tmp_path / "own" / "loaded", **option).eval()
    assert bank(again).weight.dtype == wanted
    assert torch.equal(logits(again), expected)
    again.train().set_requires_grad("default")
    again(**INPUT, labels=IDS.masked_fill(MASK == 0, -100)).loss.backward()
    assert bank(again).weight.grad.dtype == wanted
    assert bank(again).weight.grad.abs().max() > 0


def test_prompts_that_start_in_float32_are_not_rounded_first():
    torch.manual_seed(0)
    model = get_peft_model(tiny("llama", dtype=torch.bfloat16), config(init="random"))
    weight = bank(model).weight
    assert not torch.equal(weight, weight.bfloat16().float())


def test_prompts_of_an_injected_adapter_are_float32():
    base = inject_adapter_in_model(config(), tiny("llama", dtype=torch.bfloat16))
    assert bank(base).weight.dtype == torch.float32
    cast_adapter_dtype(base, "default")
    assert bank(base).weight.dtype == torch.float32


# ---------------------------------------------------------------------- copies, modes, generation, training


def test_a_whole_model_can_be_saved_by_torch_and_copied():
    model = made()
    expected = logits(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(logits(torch.load(file, weights_only=False)), expected)
    twin = copy.deepcopy(model)
    randomize(twin, seed=9)
    assert not torch.equal(logits(twin), expected)
    assert torch.equal(logits(model), expected)
    assert twin.base_model.layer.model is twin.get_base_model()


def test_an_adapter_on_a_base_in_training_mode_is_in_training_mode():
    model = get_peft_model(tiny("llama").train(), config())
    assert model.training
    assert model.base_model.layer.training
    model.eval()
    assert not bank(model).training


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generate_takes_its_input_by_place_and_by_name(architecture):
    model = made(architecture)
    options = {"attention_mask": MASK, "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(input_ids=IDS, **options)
    assert torch.equal(model.generate(IDS, **options), expected)
    assert torch.equal(model.generate(inputs=IDS, **options), expected)
    for dtype in (torch.float16, torch.bfloat16):
        assert model.to(dtype).generate(input_ids=IDS, **options).shape == expected.shape


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_can_be_switched_on_and_off_between_steps(architecture, use_reentrant):
    model = made(architecture).train()
    # Forced: what is drawn for `assignment="uniform"` depends on how often the base itself draws, OPT in every layer.
    options = {"prompt_ids": torch.tensor([0, 2]), "labels": IDS.masked_fill(MASK == 0, -100)}

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(**INPUT, **options).loss.backward()
        return bank(model).weight.grad.clone()

    plain = gradient()
    assert plain.abs().sum() > 0
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert torch.allclose(gradient(), plain, rtol=1e-4, atol=1e-5)
    model.gradient_checkpointing_disable()
    assert torch.equal(gradient(), plain)
    assert all(p.grad is None for name, p in model.named_parameters() if ".idp." not in name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_moves_the_bank_in_force_and_nothing_else(architecture):
    model = made(architecture, assignment="all").train()
    model.add_adapter("other", config())
    before = bits(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**INPUT, labels=IDS.masked_fill(MASK == 0, -100)).loss.backward()
    optimizer.step()
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert len(changed) == 1
    assert changed[0].endswith(".idp.idp_prompts.default.weight")


def test_a_base_prepared_for_kbit_training_takes_an_adapter():
    base = prepare_model_for_kbit_training(tiny("llama"))
    model = get_peft_model(base, config(assignment="uniform"))
    assert trainable(model) == {"default"}
    model.enable_input_require_grads()
    assert model.get_input_embeddings()(IDS).requires_grad
    model.train()(**INPUT, labels=IDS).loss.backward()
    assert bank(model).weight.grad.abs().sum() > 0
