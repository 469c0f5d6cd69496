"""Compressed bases are served as they are: packed words and zeros are copied byte for byte, and the router reads them too."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import get_peft_model

pytest.importorskip("llmcompressor", reason="llm-compressor is not installed")

from idp_peft import IDPConfig
from idp_peft.compression import compress
from idp_peft.models.loading import load_model
from idp_peft.serving import ExportedModel, Router, export_to_vocab
from idp_peft.serving.tensor_files import read_header
from tests.test_compression import FEW
from tests.tiny_folder import tiny_folder, tiny_texts
from tests.tiny_serving import Saved, say

TEXT = [5, 11, 7, 30, 2, 64, 9]
TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def stored(path) -> dict[str, bytes]:
    content, tensors = path.read_bytes(), read_header(path)[0]
    pieces = {name: tensor.pieces[0] for name, tensor in tensors.items() if name not in TABLES}
    return {name: content[piece.start : piece.start + piece.length] for name, piece in pieces.items()}


@pytest.mark.parametrize("recipe", ["gptq-3bit", "gptq-4bit", "sparsegpt-50"])
def test_a_compressed_base_is_exported_and_routed_as_it_is(tmp_path, monkeypatch, recipe):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    compress(tiny_folder(tmp_path / "dense"), recipe, tmp_path / "base", tiny_texts(), **FEW)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = IDPConfig(task_type="CAUSAL_LM", num_prompts=3, num_virtual_tokens=4)
        model = get_peft_model(load_model(tmp_path / "base"), config).eval()
    model.save_pretrained(tmp_path / "adapter")
    one = Saved(model, tmp_path / "base", tmp_path / "adapter")
    exported = ExportedModel.from_folder(export_to_vocab(one.adapter, tmp_path / "exported", one.base))
    before, after = (stored(tmp_path / part / "model.safetensors") for part in ("base", "exported"))
    assert after == before
    assert any("weight_packed" in name for name in before) == recipe.startswith("gptq")
    plain = load_model(exported.folder)
    for prompt in range(3):
        assert say(plain, exported.token_ids[prompt] + TEXT) == one.generate(TEXT, prompt)
    for router in (Router.from_pretrained(one.adapter, one.base), Router.from_pretrained(exported.folder)):
        with torch.no_grad():
            model(input_ids=torch.tensor([TEXT]))
        assert torch.equal(router.select(torch.tensor([TEXT])).scores, model.last_selection.scores)
