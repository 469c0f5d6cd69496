"""`compress`: what comes out is what the recipe promised, and loads as any model does."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from idp_peft.compression import RECIPES, compress
from idp_peft.compression.calibration import calibration_chunks
from idp_peft.compression.measure import check_result
from idp_peft.models.gradient_probe import probe_gradients
from tests.tiny_folder import tiny_folder, tiny_texts, tiny_tokenizer

FEW = {"calibration_samples": 16, "calibration_tokens": 24, "group_size": 16}


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


needs_llmcompressor = pytest.mark.skipif(not installed("llmcompressor"), reason="llm-compressor is not installed")
needs_torchao = pytest.mark.skipif(not installed("torchao"), reason="torchao is not installed")
needs_gptqmodel = pytest.mark.skipif(not installed("gptqmodel"), reason="gptqmodel is not installed")


@pytest.fixture
def dense(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tiny_folder(tmp_path / "llama")
    tiny_folder(tmp_path / "opt", "opt")
    return tmp_path


def layers(model) -> dict[str, torch.Tensor]:
    head = model.get_output_embeddings()
    found = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    return {
        name: m.weight.dequantize() if hasattr(m.weight, "__tensor_flatten__") else m.weight.detach()
        for name, m in found.items()
    }


def levels(weight: torch.Tensor, group: int) -> int:
    return max(len(row.unique()) for row in weight.reshape(-1, group))


@needs_llmcompressor
@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("recipe", "bits"), [("gptq-3bit", 3), ("gptq-4bit", 4)])
def test_gptq_leaves_few_levels_and_loads_plainly(dense, name, recipe, bits, symmetric):
    group = 8 if name == "opt" else 16
    note = compress(name, recipe, "out", tiny_texts(), **{**FEW, "group_size": group}, symmetric=symmetric)
    model = AutoModelForCausalLM.from_pretrained("out").eval()
    before = layers(AutoModelForCausalLM.from_pretrained(name))
    found = layers(model)
    assert found.keys() == before.keys()
    for layer, weight in found.items():
        assert levels(weight, group) <= 2**bits, layer
        assert levels(before[layer], group) == group, "the dense layer has a value of its own for each weight"
        assert not torch.equal(weight, before[layer])
    assert note["measured"]["most_levels_in_a_group"] <= 2**bits
    assert json.loads(Path("out/compression.json").read_text()) == note
    assert note["recipe"] == recipe
    assert note["calibration"] == {"texts": 40, "samples": 16, "tokens_per_sample": 24}
    assert note["versions"]["llmcompressor"]
    assert note["seconds"] > 0
    assert any("weight_packed" in key for key in _keys("out"))
    assert AutoTokenizer.from_pretrained("out")("w5 w6")["input_ids"] == [5, 6]
    assert probe_gradients(model).trainable
    assert sorted(path.name for path in dense.iterdir()) == ["llama", "opt", "out"], "nothing beside the output"
    assert "INFO" in Path("out/compression.log").read_text()


def _keys(folder: str) -> list[str]:
    from safetensors import safe_open

    with safe_open(f"{folder}/model.safetensors", "pt") as file:
        return list(file.keys())


@needs_llmcompressor
@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("recipe", ["sparsegpt-50", "sparsegpt-2:4"])
def test_sparsegpt_prunes_half_of_every_layer(dense, name, recipe):
    note = compress(name, recipe, "out", tiny_texts(), **FEW)
    model = AutoModelForCausalLM.from_pretrained("out").eval()
    for layer, weight in layers(model).items():
        assert (weight == 0).float().mean() == pytest.approx(0.5, abs=0.02), layer
        if recipe.endswith("2:4"):
            assert ((weight.reshape(-1, 4) == 0).sum(-1) >= 2).all(), layer
    assert note["measured"]["sparsity"] == pytest.approx(0.5, abs=0.02)
    assert probe_gradients(model).trainable


@needs_llmcompressor
def test_the_folder_computes_what_was_compressed(dense):
    """Loaded plainly, and by `load_model`: the same logits, near the dense model's."""
    from idp_peft.models.loading import load_model

    compress("llama", "gptq-4bit", "out", tiny_texts(), **FEW)
    ids = torch.randint(2, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain, ours = (model(ids).logits for model in (AutoModelForCausalLM.from_pretrained("out"), load_model("out")))
        dense_logits = load_model("llama")(ids).logits
    assert torch.equal(plain, ours)
    damage = (plain - dense_logits).norm() / dense_logits.norm()
    assert 0 < damage < 0.5


@needs_llmcompressor
def test_zeros_survive_rounding_and_gptq_refuses_a_sparse_model(dense):
    compress("llama", "sparsegpt-2:4", "sparse", tiny_texts(), **FEW)
    with pytest.raises(ValueError, match=r"zeros, which GPTQ does not keep: .* or take the recipe rtn-4bit"):
        compress("sparse", "gptq-4bit", "out", tiny_texts(), **FEW)
    note = compress("sparse", "rtn-4bit", "out", **FEW)
    assert note["earlier"]["recipe"] == "sparsegpt-2:4"
    both = layers(AutoModelForCausalLM.from_pretrained("out"))
    for layer, weight in layers(AutoModelForCausalLM.from_pretrained("sparse")).items():
        assert (both[layer][weight == 0] == 0).all(), layer


@needs_llmcompressor
def test_the_same_seed_gives_the_same_words_and_the_random_state_is_left_alone(dense):
    state = torch.get_rng_state()
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        compress("llama", "gptq-3bit", folder, tiny_texts(), **FEW, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    files = [Path(folder, "model.safetensors").read_bytes() for folder in "abc"]
    assert files[0] == files[1]
    assert files[0] != files[2]


@needs_llmcompressor
def test_a_backend_that_pruned_nothing_is_found_out(dense, monkeypatch):
    from llmcompressor.modifiers.pruning import SparseGPTModifier

    from idp_peft.compression import llmcompressor_backend

    # What llm-compressor does with a string for its targets: no error, no zeros.
    monkeypatch.setattr(
        llmcompressor_backend,
        "_modifier",
        lambda recipe, *_: SparseGPTModifier(sparsity=recipe.sparsity, mask_structure=recipe.mask, targets="Linear"),
    )
    with pytest.raises(RuntimeError, match="the backend pruned nothing, or not everywhere"):
        compress("llama", "sparsegpt-50", "out", tiny_texts(), **FEW)
    assert sorted(path.name for path in dense.iterdir()) == ["llama", "opt"]


@needs_llmcompressor
def test_nothing_half_written_is_left_by_a_failure(dense, monkeypatch):
    from idp_peft.compression import llmcompressor_backend

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(llmcompressor_backend, "_unpack_on_loading", fail)
    with pytest.raises(KeyboardInterrupt):
        compress("llama", "gptq-4bit", "out", tiny_texts(), **FEW)
    assert sorted(path.name for path in dense.iterdir()) == ["llama", "opt"]


@needs_torchao
def test_rounding_through_torchao_needs_no_text_and_loads_plainly(dense):
    compress("llama", "rtn-3bit", "out", group_size=16, backend="torchao")
    model = AutoModelForCausalLM.from_pretrained("out").eval()
    for layer, weight in layers(model).items():
        assert levels(weight, 16) <= 8, layer
    assert probe_gradients(model).trainable


@needs_gptqmodel
@pytest.mark.parametrize("bits", [3, 4])
def test_gptqmodel_writes_packed_gptq_files_that_train_only_when_loaded_for_it(dense, bits):
    from transformers import LlamaForCausalLM

    from idp_peft.models.loading import load_model
    from tests.tiny import tiny

    # It packs blocks of 32.
    config = tiny("llama").config
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained("wide")
    tiny_tokenizer().save_pretrained("wide")
    note = compress("wide", f"gptq-{bits}bit", "out", tiny_texts(), **{**FEW, "group_size": 32}, backend="gptqmodel")
    assert note["measured"]["most_levels_in_a_group"] <= 2**bits
    assert any(key.endswith("qweight") for key in _keys("out"))
    assert sorted(path.name for path in dense.iterdir()) == ["llama", "opt", "out", "wide"]
    assert probe_gradients(load_model("out", for_training=True)).trainable


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"recipe": "gptq-5bit"}, "`recipe` must be one of gptq-3bit, .* got 'gptq-5bit'"),
        ({"backend": "magic"}, "`backend` must be one of llmcompressor, gptqmodel, torchao, got 'magic'"),
        (
            {"backend": "torchao"},
            "`backend` for the recipe gptq-3bit must be one of llmcompressor, gptqmodel, got 'torchao'",
        ),
        ({"output_dir": "llama"}, "`output_dir` must be new or empty, got .*llama, which has files in it"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_is_done(dense, changes, text):
    arguments = {"model": "llama", "recipe": "gptq-3bit", "output_dir": "out", "texts": tiny_texts(), **FEW}
    with pytest.raises(ValueError, match=text):
        compress(**{**arguments, **changes})
    assert not Path("out").exists()


@needs_llmcompressor
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"group_size": 24},
            "`group_size` must divide the width of every layer, but 24 does not divide the 32 values that "
            r"model.layers.0.self_attn.q_proj reads; 16 does$",
        ),
        ({"group_size": 0}, "`group_size` must be at least 1, got 0"),
        (
            {"texts": ["w2 w3"]},
            "16 calibration samples of 24 tokens need 384 tokens, but the 1 texts have 3: give more text, or lower "
            "`calibration_samples` or `calibration_tokens`",
        ),
        ({"calibration_samples": 0}, "`calibration_samples` must be at least 1 and .* got 0 and 24"),
    ],
)
def test_what_does_not_fit_the_model_or_the_text_is_named(dense, changes, text):
    arguments = {"model": "llama", "recipe": "gptq-3bit", "output_dir": "out", "texts": tiny_texts(), **FEW}
    with pytest.raises(ValueError, match=text):
        compress(**{**arguments, **changes})
    assert not Path("out").exists()


@needs_llmcompressor
def test_a_missing_model_is_one_line(dense):
    with pytest.raises(FileNotFoundError, match=r"^there is no model at ./nowhere$"):
        compress("./nowhere", "gptq-3bit", "out", tiny_texts(), **FEW)


@needs_llmcompressor
def test_a_quantised_model_is_not_compressed_again(dense):
    compress("llama", "rtn-4bit", "out", group_size=16)
    with pytest.raises(ValueError, match=r"out is quantised already \(compressed-tensors\)"):
        compress("out", "gptq-3bit", "again", tiny_texts(), **FEW)


@pytest.mark.parametrize("backend", ["llmcompressor", "gptqmodel", "torchao"])
def test_a_missing_backend_names_its_extra(dense, monkeypatch, backend):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == backend else find(name, *a))
    monkeypatch.delitem(sys.modules, backend, raising=False)
    recipe = "rtn-4bit" if backend == "torchao" else "gptq-4bit"
    with pytest.raises(ImportError, match=rf'pip install "idp-peft\[{backend}\]"'):
        compress("llama", recipe, "out", tiny_texts(), backend=backend, **FEW)


def test_weights_that_are_not_what_the_recipe_says_are_refused():
    torch.manual_seed(0)
    weight = {"layer": torch.randn(8, 16)}
    with pytest.raises(RuntimeError, match="the backend pruned nothing, or not everywhere"):
        check_result(weight, RECIPES["sparsegpt-50"], 16)
    with pytest.raises(RuntimeError, match="at most 8 levels in a group of 16, found 16"):
        check_result(weight, RECIPES["gptq-3bit"], 16)
    half = {"layer": torch.cat([torch.zeros(8, 8), torch.ones(8, 8)], 1)}
    with pytest.raises(RuntimeError, match="no 2:4 pattern"):
        check_result(half, RECIPES["sparsegpt-2:4"], 16)
    assert check_result(half, RECIPES["sparsegpt-50"], 16)["sparsity"] == 0.5


def test_calibration_chunks_are_drawn_by_the_seed_from_short_texts_too():
    tokenizer, texts = tiny_tokenizer(), tiny_texts(200, words=5)
    chunks = calibration_chunks(tokenizer, texts, samples=8, length=12, seed=0)
    assert [len(chunk) for chunk in chunks] == [12] * 8
    assert chunks == calibration_chunks(tokenizer, texts, samples=8, length=12, seed=0)
    assert chunks != calibration_chunks(tokenizer, texts, samples=8, length=12, seed=1)
    # Texts are whole and in order inside a chunk, with the end-of-text token between them.
    words = [tokenizer(text)["input_ids"] for text in texts]
    inside = " ".join(map(str, chunks[0]))
    assert sum(" ".join(map(str, one)) in inside for one in words) >= 1
    assert all(1 in chunk for chunk in chunks)


def test_one_long_text_does_not_fill_all_chunks():
    texts = [" ".join(["w2"] * 300), *[" ".join(["w3"] * 30)] * 20]
    kinds = {chunk[5] for chunk in calibration_chunks(tiny_tokenizer(), texts, samples=10, length=20, seed=0)}
    assert kinds == {2, 3}
