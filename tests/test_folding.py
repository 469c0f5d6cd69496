"""Scales in the weights' own rows: the same logits, packed words and zeros as they were, in memory and in files."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import idp_peft
from idp_peft import IDPConfig
from idp_peft.hosting.architectures import find_decoder
from idp_peft.models.folding import check_groups, group_order, row_dimensions, rows_of
from idp_peft.scales import linear_layers
from idp_peft.serving import Router, VllmPrompts, export_folded, export_to_vocab
from idp_peft_cli import main
from tests.reference import bank_of
from tests.tiny import NAMES, VOCAB, tiny, token_batch
from tests.tiny_folder import tiny_folder, tiny_texts

FLOAT32 = 1e-4  # of the largest logit: both round, in different places
# Rounded to bfloat16, a factor differs by up to 1 in 256; the unfolded one is multiplied in float32.
BFLOAT16 = 0.5


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def scaled(base, spread: float = 0.1, **config):
    """A model with an adapter whose factors are far from 1."""
    config = {"num_prompts": 4, "num_virtual_tokens": 4, **config}
    if config.get("prompts") == "key_values":
        config["init_weights"] = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, IDPConfig(task_type="CAUSAL_LM", scales=True, **config)).eval()
    if config.get("prompts") == "key_values":
        texts = torch.randint(2, VOCAB, (config["num_prompts"], config["num_virtual_tokens"])).tolist()
        idp_peft.start_at(model, model.get_base_model(), texts)
    with torch.no_grad():
        bank_of(model).scales.normal_(std=spread)
    return model


@torch.no_grad()
def logits(model, side: str = "left") -> torch.Tensor:
    """Of the real tokens of two padded rows."""
    ids, mask = token_batch([7, 9], side)
    return model(input_ids=ids, attention_mask=mask, prompt_ids=torch.tensor([0, 1])).logits[mask.bool()]


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max() / max(1.0, float(right.abs().max())))


# ------------------------------------------------------------------ in memory


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("group", [None, 8])
def test_the_folded_model_gives_what_the_scaled_one_gave(name, group):
    model = scaled(tiny(name), scale_group_size=group)
    before = logits(model)
    assert difference(logits(tiny_with_prompts(model, name)), before) > 0.01, "the scales change nothing"
    model.fold_scales()
    assert difference(logits(model), before) <= FLOAT32
    config = model.peft_config["default"]
    assert (bank_of(model).scales, config.scales, config.scale_group_size) == (None, False, None)
    for _, module in model.named_modules():
        assert not any(type(hook).__name__ == "_ScaleOutput" for hook in module._forward_hooks.values())
    with torch.no_grad(), model.disable_adapter():
        ids = torch.tensor([[5, 6, 7]])
        assert difference(model(input_ids=ids).logits, tiny(name)(input_ids=ids).logits) > 1e-3, (
            "folding changes the base"
        )


def tiny_with_prompts(model, name: str):
    """The same prompts without scales."""
    plain = get_peft_model(tiny(name), IDPConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    with torch.no_grad():
        bank_of(plain).weight.copy_(bank_of(model).weight)
    return plain


def test_in_bfloat16_the_rows_are_rounded_to_it():
    model = scaled(tiny("llama", dtype=torch.bfloat16))
    before = logits(model)
    idp_peft.fold_scales(model)
    assert 0 < difference(logits(model), before) <= BFLOAT16


def test_zeros_stay_zero():
    base = tiny("llama")
    with torch.no_grad():
        for module in linear_layers(find_decoder(base)).values():
            module.weight[torch.rand_like(module.weight) < 0.5] = 0
    zeros = {name: tensor == 0 for name, tensor in base.state_dict().items()}
    model = scaled(base)
    model.fold_scales()
    for name, tensor in base.state_dict().items():
        if "idp" not in name:
            assert torch.equal(tensor == 0, zeros[name]), name


def test_what_is_saved_after_folding_is_an_adapter_without_scales(tmp_path):
    model = scaled(tiny("llama"), prompts="key_values")
    model.fold_scales()
    base = {name: tensor.clone() for name, tensor in model.get_base_model().state_dict().items() if "idp" not in name}
    model.save_pretrained(tmp_path)
    other = tiny("llama")
    other.load_state_dict(base)
    assert torch.equal(logits(PeftModel.from_pretrained(other, tmp_path).eval()), logits(model))


@pytest.mark.skipif(not installed("torchao"), reason="torchao is not installed")
@pytest.mark.parametrize("width", ["int8", "int3 by groups", "int4 by rows"])
def test_torchao_keeps_its_integers(width):
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    formats = {
        "int8": Int8WeightOnlyConfig,
        "int3 by groups": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=PerGroup(16)),
        "int4 by rows": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerAxis(0)),
    }
    base = tiny("llama")
    quantize_(find_decoder(base), formats[width]())
    layers = linear_layers(find_decoder(base))

    def integers(module) -> torch.Tensor:
        inner = getattr(module.weight, "tensor_impl", None)  # of older versions
        return (module.weight.qdata if inner is None else inner.int_data).clone()

    words = {name: integers(module) for name, module in layers.items()}
    model = scaled(base)
    before = logits(model)
    model.fold_scales()
    assert difference(logits(model), before) <= FLOAT32
    for name, module in layers.items():
        assert torch.equal(integers(module), words[name]), name


@pytest.mark.skipif(not installed("bitsandbytes"), reason="bitsandbytes is not installed")
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_keeps_its_words_where_blocks_lie_in_rows(nested):
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        128, 48, bias=False, quant_type="nf4", compress_statistics=nested, quant_storage=torch.uint8
    )
    layer.weight = bnb.nn.Params4bit(
        torch.randn(48, 128), requires_grad=False, quant_type="nf4", compress_statistics=nested
    )
    layer = layer.to("cpu")
    x, factors = torch.randn(3, 128), 1 + 0.1 * torch.randn(48)
    words, before = layer.weight.data.clone(), layer(x)
    (rows,) = rows_of(layer, "it")
    rows.write(factors)
    assert torch.equal(layer.weight.data, words)
    assert difference(layer(x), before * factors) <= 1e-2


# ------------------------------------------------------------------ the row of each format


FORMATS = {
    "dense": ({"weight": (torch.float16, (8, 6)), "bias": (torch.float16, (8,))}, {"weight": 0, "bias": 0}),
    "GPTQ": (
        {
            "qweight": (torch.int32, (1, 8)),
            "qzeros": (torch.int32, (3, 1)),
            "scales": (torch.float16, (3, 8)),
            "g_idx": (torch.int32, (6,)),
        },
        {"scales": -1},
    ),
    "compressed-tensors": (
        {
            "weight_packed": (torch.int32, (8, 1)),
            "weight_scale": (torch.bfloat16, (8, 3)),
            "weight_zero_point": (torch.int32, (1, 3)),
            "weight_shape": (torch.int64, (2,)),
        },
        {"weight_scale": 0},
    ),
    "not packed yet": (
        {"weight": (torch.float32, (8, 6)), "weight_scale": (torch.float32, (8, 1))},
        {"weight": 0, "weight_scale": 0},
    ),
    "fp8 by rows": (
        {"weight": (torch.float8_e4m3fn, (8, 6)), "weight_scale": (torch.float32, (8, 1))},
        {"weight_scale": 0},
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_its_tensor_of_rows(name):
    given, expected = FORMATS[name]
    assert row_dimensions(given, 8, "it") == expected


def test_conv1d_keeps_its_rows_in_columns():
    assert row_dimensions({"weight": (torch.float32, (6, 8))}, 8, "it", transposed=True) == {"weight": 1}


REFUSED = {
    "one scale for the tensor": (
        {"weight": (torch.float8_e4m3fn, (8, 6)), "weight_scale": (torch.float32, (1,))},
        "one number",
    ),
    "a scale without a shape": ({"weight": (torch.int8, (8, 6)), "weight_scale": (torch.float32, ())}, "one number"),
    "blocks across rows": (
        {"weight": (torch.float8_e4m3fn, (8, 6)), "weight_scale_inv": (torch.float32, (2, 2))},
        "blocks that cross rows",
    ),
    "scales in fp8": (
        {"weight_packed": (torch.uint8, (8, 3)), "weight_scale": (torch.float8_e4m3fn, (8, 1))},
        "too coarse",
    ),
    "a format that is not known": ({"blob": (torch.uint8, (100,))}, "rows cannot be scaled here"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_take_a_factor_per_row_is_refused_with_the_reason(name):
    given, reason = REFUSED[name]
    with pytest.raises(ValueError, match=f"it .*{reason}"):
        row_dimensions(given, 8, "it")


def hqq_layer(axis: int = 1, group: int = 16):
    """What HQQ's layer holds."""
    layer = nn.Module()
    layer.in_features, layer.out_features, layer.W_q = 32, 8, torch.zeros(8, 32, dtype=torch.uint8)
    layer.meta = {"shape": (8, 32), "group_size": group, "axis": axis, "scale": torch.ones(8 * 32 // group, 1)}
    return layer


def test_hqq_has_its_groups_row_after_row():
    factors = torch.arange(1.0, 9.0)
    (rows,) = rows_of(hqq_layer(), "it")
    assert torch.equal(rows.scaled(factors), factors.repeat_interleave(2)[:, None])
    for layer in (hqq_layer(axis=0), hqq_layer(group=64)):
        with pytest.raises(ValueError, match="it has groups that cross rows"):
            rows_of(layer, "it")


def test_bitsandbytes_blocks_that_cross_rows_are_refused():
    layer = nn.Module()
    layer.in_features, layer.out_features = 48, 8
    layer.weight = nn.Parameter(torch.zeros(192, 1, dtype=torch.uint8), requires_grad=False)
    layer.weight.quant_state = SimpleNamespace(
        shape=torch.Size([8, 48]), blocksize=64, absmax=torch.ones(6), nested=False
    )
    with pytest.raises(ValueError, match="it has blocks of 64 weights, rows of 48: some blocks cross rows"):
        rows_of(layer, "it")


@pytest.mark.parametrize("name", ["GPTQ", "compressed-tensors", "bitsandbytes", "HQQ", "scales of rows"])
def test_factors_of_groups_go_to_the_scales_of_their_groups(name):
    """Rows of 32 inputs in four groups of 8, of two factors each."""
    factors = torch.arange(1.0, 17.0).view(8, 2)
    layer = {"HQQ": lambda: hqq_layer(group=8)}.get(name, nn.Module)()
    layer.in_features, layer.out_features = 32, 8
    each = factors.repeat_interleave(2, 1)  # [channels, groups of the format]
    if name == "GPTQ":
        layer.qweight, layer.scales = torch.zeros(4, 8, dtype=torch.int32), torch.ones(4, 8)
        layer.g_idx, each = torch.arange(32) // 8, each.T
    elif name == "bitsandbytes":
        layer.weight = nn.Parameter(torch.zeros(128, 1, dtype=torch.uint8), requires_grad=False)
        layer.weight.quant_state = SimpleNamespace(
            shape=torch.Size([8, 32]), blocksize=8, absmax=torch.ones(32), nested=False
        )
        each = each.flatten()
    elif name == "HQQ":
        each = each.reshape(-1, 1)
    else:
        layer.weight_packed = torch.zeros(8, 4, dtype=torch.int32)
        layer.weight_scale = torch.ones(8, 1 if name == "scales of rows" else 4)
    for key in ("qweight", "scales", "g_idx", "weight_packed", "weight_scale"):
        if hasattr(layer, key):
            layer.register_buffer(key, layer.__dict__.pop(key))
    (rows,) = rows_of(layer, "it")
    if name == "scales of rows":
        with pytest.raises(ValueError, match=r"it has 1 scale\(s\) in a row, and 2 factors go in there: .* multiple"):
            check_groups(factors, [rows.blocks], group_order(layer), "it")
        return
    check_groups(factors, [rows.blocks], group_order(layer), "it")
    assert torch.equal(rows.scaled(factors), each)
    if name == "GPTQ":
        layer.g_idx = torch.randperm(32, generator=torch.Generator().manual_seed(0)) // 8
        with pytest.raises(ValueError, match="it has inputs in groups that are no neighbours"):
            check_groups(factors, [rows.blocks], group_order(layer), "it")


# ------------------------------------------------------------------ refused before anything changes


def test_a_refusal_changes_nothing():
    model = scaled(tiny("llama"))
    last = find_decoder(model.get_base_model()).layers[-1].mlp.down_proj
    last.weight = nn.Parameter(last.weight.to(torch.int8), requires_grad=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"layer 'layers\.2\.mlp\.down_proj' is in a format"):
        model.fold_scales()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert model.peft_config["default"].scales


def test_an_adapter_without_scales_or_beside_others_is_refused():
    plain = get_peft_model(tiny("llama"), IDPConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ValueError, match="adapter 'default' has no scales to fold"):
        idp_peft.fold_scales(plain)
    model = scaled(tiny("llama"))
    model.add_adapter("other", IDPConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ValueError, match=r"would change the base of the adapters \['other'\]"):
        model.fold_scales()
    model.delete_adapter("other")
    model.fold_scales()
    with pytest.raises(ValueError, match="they are folded already"):
        model.fold_scales()


def test_a_weight_that_another_module_shares_is_refused():
    model = scaled(tiny("llama"))
    layers = find_decoder(model.get_base_model()).layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(ValueError, match=r"layer 'layers\.0\.mlp\.up_proj' shares its weight"):
        model.fold_scales()


# ------------------------------------------------------------------ in files


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def adapter(base: str, **config):
    """An adapter with scales in the folder `adapter`, on the model in the folder `base`."""
    model = scaled(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), **config)
    model.save_pretrained("adapter")
    return model


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "gpt_neox", "phi3", "gemma2"])
@pytest.mark.parametrize(
    "config", [{"prompts": "tokens"}, {"prompts": "key_values"}, {"prompts": "tokens", "scale_group_size": 8}]
)
def test_a_folded_folder_gives_what_the_adapter_gives(here, name, config):
    tiny_folder(here / "base", name)
    model = adapter("base", **config)
    before = {name: tensor for path in Path("base").glob("*.safetensors") for name, tensor in load_file(path).items()}
    export_folded("adapter", "folded")
    base = AutoModelForCausalLM.from_pretrained("folded", dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, "folded/idp_adapter").eval()
    assert difference(logits(loaded, "right"), logits(model, "right")) <= FLOAT32
    assert (loaded.peft_config["default"].scales, loaded.peft_config["default"].scale_group_size) == (False, None)
    assert json.loads(Path("folded/idp_adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        here / "folded"
    )
    after = {name: tensor for path in Path("folded").glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert after.keys() == before.keys()
    same = {name for name, tensor in after.items() if torch.equal(tensor, before[name])}
    assert any("emb" in key or "wte" in key for key in same)
    assert any("norm" in key or "ln" in key for key in same)
    assert len(same) < len(after)


def test_an_exported_vocabulary_holds_prompts_and_scales(here):
    tiny_folder(here / "base")
    model = adapter("base")
    export_to_vocab("adapter", "served", fold_scales=True)
    engine = AutoModelForCausalLM.from_pretrained("served", dtype=torch.float32).eval()
    token_ids = json.loads(Path("served/idp_prompts.json").read_text())["prompts"][1]["token_ids"]
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        served = engine(input_ids=torch.tensor([[*token_ids, *ids[0].tolist()]])).logits[:, len(token_ids) :, :VOCAB]
        assert difference(served, model(input_ids=ids, prompt_ids=[1]).logits) <= FLOAT32
        texts = [[5, 6, 7], [11, 12, 13, 14], [40, 41]]
        chosen = [int(_chosen(model, row)) for row in texts]
    assert Router.from_pretrained("served").route(texts).prompt_ids.tolist() == chosen
    assert Router.from_pretrained("adapter").route(texts).prompt_ids.tolist() == chosen
    VllmPrompts(Router.from_pretrained("served"))


def _chosen(model, row: list[int]) -> int:
    model(input_ids=torch.tensor([row]))
    return model.base_model.last_selection.prompt_ids[0]


def test_scales_that_are_not_folded_are_refused_where_an_engine_serves(here):
    tiny_folder(here / "base")
    adapter("base")
    with pytest.raises(ValueError, match=r"adapter has scales, which no engine applies: add --fold_scales"):
        export_to_vocab("adapter", "served")
    with pytest.raises(ValueError, match="this adapter has scales, which no engine applies"):
        VllmPrompts(Router.from_pretrained("adapter"))
    assert not Path("served").exists()


def test_an_adapter_without_scales_cannot_be_folded(here):
    tiny_folder(here / "base")
    model = AutoModelForCausalLM.from_pretrained("base")
    get_peft_model(model, IDPConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).save_pretrained("adapter")
    for export in (export_folded, lambda *where: export_to_vocab(*where, fold_scales=True)):
        with pytest.raises(ValueError, match="adapter has no scales to fold"):
            export("adapter", "folded")
    assert not Path("folded").exists()


def test_an_interrupted_export_leaves_nothing(here, monkeypatch):
    tiny_folder(here / "base")
    adapter("base")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("idp_peft.serving.export.write_adapter", interrupted)
    monkeypatch.setattr("idp_peft.serving.folded_weights._times", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_folded("adapter", "folded")
    assert sorted(path.name for path in here.iterdir()) == ["adapter", "base"]


def test_the_command_folds_with_the_vocabulary_or_alone(here, capsys):
    tiny_folder(here / "base")
    adapter("base")
    main(["export", "--adapter", "adapter", "--output_dir", "folded", "--fold_scales"])
    main(["export", "--adapter", "adapter", "--output_dir", "served", "--fold_scales", "--to-vocab"])
    assert capsys.readouterr().out.splitlines() == ["model in folded", "model in served"]
    assert not Path("folded/idp_prompts.json").exists()
    assert Path("served/idp_prompts.json").is_file()


def test_layers_that_a_checkpoint_keeps_together_are_refused(here):
    from safetensors.torch import save_file

    tiny_folder(here / "base")
    adapter("base")
    weights = load_file("base/model.safetensors")
    weights["model.layers.0.self_attn.qkv.weight"] = torch.cat(
        [weights.pop(f"model.layers.0.self_attn.{part}_proj.weight") for part in "qkv"]
    )
    save_file(weights, "base/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"layer 'model\.layers\.0\.self_attn\.q_proj' of the base is not among the tensors"
    ):
        export_folded("adapter", "folded")


@pytest.mark.skipif(not installed("llmcompressor"), reason="llm-compressor is not installed")
@pytest.mark.parametrize(
    ("symmetric", "config"),
    [(False, {"prompts": "key_values"}), (True, {"prompts": "key_values"}), (True, {"scale_group_size": 16})],
)
@pytest.mark.parametrize("recipe", ["gptq-3bit", "gptq-4bit", "sparsegpt-50"])
def test_packed_words_and_zeros_keep_every_bit(here, recipe, symmetric, config):
    from idp_peft.compression import compress
    from idp_peft.models.loading import load_model

    tiny_folder(here / "dense")
    settings = {"group_size": 16, "symmetric": symmetric} if "gptq" in recipe else {}
    compress("dense", recipe, "base", tiny_texts(), calibration_samples=16, calibration_tokens=24, **settings)
    model = scaled(load_model("base"), **config)
    model.save_pretrained("adapter")
    expected = logits(model)
    export_folded("adapter", "folded", "base")
    before, after = load_file("base/model.safetensors"), load_file("folded/model.safetensors")
    changed = {key.rpartition(".")[2] for key in before if not torch.equal(before[key], after[key])}
    assert changed == ({"weight_scale"} if "gptq" in recipe else {"weight"})
    for key, tensor in before.items():
        assert torch.equal(tensor == 0, after[key] == 0), key
    assert (
        difference(logits(PeftModel.from_pretrained(load_model("folded"), "folded/idp_adapter").eval()), expected)
        <= FLOAT32
    )
    words = {name: t.clone() for name, t in model.get_base_model().state_dict().items() if "packed" in name}
    model.fold_scales()
    assert difference(logits(model), expected) <= FLOAT32
    state = model.get_base_model().state_dict()
    assert all(torch.equal(state[name], word) for name, word in words.items())
