"""`make test-peft`: PEFT's own tests of decoders, with `IDPConfig` in the place of its lists of methods.

They are the tests of the installed PEFT version, out of its source distribution: fetched once into `.cache/`, nothing of it
is kept in this repository. They load models of the Hub by their ids; a hub in this process has tiny ones under these ids.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import peft
import pytest

from idp_peft import IDPConfig
from tests.hub_server import HubServer, only_hub
from tests.tiny import tiny
from tests.tiny_folder import tiny_texts, tiny_tokenizer

datasets = pytest.importorskip("datasets")

SETTINGS = [
    {},
    {"num_prompts": 2, "num_virtual_tokens": [3, 5], "selection_layer": 1},
    {"num_prompts": 1, "assignment": "all"},
    {"assignment": "uniform"},
]
MODELS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": "opt",
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": "gpt2",
    "peft-internal-testing/tiny-random-GPTJForCausalLM": "gptj",
    "trl-internal-testing/tiny-random-LlamaForCausalLM": "llama",
    "peft-internal-testing/tiny-dummy-qwen2": "qwen2",
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": "gemma3",
    "hf-internal-testing/tiny-random-gpt2": "gpt2",
    "hf-internal-testing/tiny-random-MistralForCausalLM": "mistral",
}
_PICKLED = "IDP adapters are safetensors files: .* is pickled and could run code when loaded"
# For GPT-J, these tests set `target_modules` on whatever config they are given.
_MERGED = "an IDP adapter cannot be merged|`target_modules` must be None"
# What IDP refuses: these tests must end in this error.
REFUSED = {
    "test_save_pretrained_pickle": _PICKLED,
    "test_save_pretrained_selected_adapters_pickle": _PICKLED,
    "test_merge_layers": _MERGED,
    "test_merge_layers_multi": _MERGED,
    "test_merge_layers_nan": _MERGED,
    "test_merge_layers_fp16": _MERGED,
}
# Not run: these take no config, each tests one method of PEFT's by name.
OF_ONE_METHOD = {
    "test_generate_adalora_no_dropout",
    "test_lora_embed_scale_is_applied",
    "test_lora_embed_scale_is_applied_mixed_batch",
    "test_lora_layer_replication",
    "test_merge_and_unload_fixes_tie_word_embeddings_config",  # LoRA
    "test_prefix_tuning_gemma4_raises_if_all_layers_skipped",
    "test_prefix_tuning_gemma4_warns_if_some_layers_skipped",
    "test_prefix_tuning_gemma4_works",
    "test_prefix_tuning_mistral",
    "test_prefix_tuning_offsets_position_ids_in_forward",
    "test_prefix_tuning_qwen2_with_grouped_query_attention",
    "test_prefix_tuning_qwen3_with_grouped_query_attention",
    "test_prompt_tuning_config_invalid_args",
    "test_prompt_tuning_prepare_inputs_for_generation_4d_attention_mask",
    "test_prompt_tuning_text_tokenizer_kwargs",
    "test_prompt_tuning_trust_remote_code",
    "test_save_pretrained_targeting_lora_to_embedding_layer",
}
_PACKAGE = "peft_decoder_tests"
_FILES = ("test_decoder_models.py", "testing_common.py", "testing_utils.py")


def fetched() -> Path:
    """The folder that has PEFT's tests as the package `peft_decoder_tests`."""
    release = f"peft-{peft.__version__}"
    cache = Path(__file__).parents[2] / ".cache" / release
    package = cache / _PACKAGE
    if not (package / "__init__.py").is_file():
        source = cache / f"{release}.tar.gz"
        if not source.is_file():
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft"]
            subprocess.run([*pip, f"peft=={peft.__version__}", "--dest", str(cache)], check=True)
        package.mkdir(exist_ok=True)
        with tarfile.open(source) as archive:
            for name in _FILES:
                (package / name).write_bytes(archive.extractfile(f"{release}/tests/{name}").read())
        (package / "__init__.py").touch()
    return cache


def theirs() -> types.ModuleType:
    """PEFT's module of decoder tests."""
    if importlib.util.find_spec("diffusers") is None:  # asked only whether a model is one of its pipelines
        stub = types.ModuleType("diffusers")
        stub.__spec__ = importlib.machinery.ModuleSpec("diffusers", None)
        stub.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
        sys.modules["diffusers"] = stub
    sys.path.insert(0, str(fetched()))
    pytest.register_assert_rewrite(_PACKAGE)
    return importlib.import_module(f"{_PACKAGE}.test_decoder_models")


def ends_in(message: str, run):
    @functools.wraps(run)
    def refused(*args, **kwargs):
        with pytest.raises(ValueError, match=message):
            run(*args, **kwargs)

    return refused


def list_of_methods(run) -> list | None:
    """The list of configurations that a test runs over."""
    for mark in getattr(run, "pytestmark", []):
        if mark.name == "parametrize" and mark.args[0] == "config_cls,config_kwargs":
            return mark.args[1]
    return None


PEFT_TESTS = theirs()


class TestDecoderModels(PEFT_TESTS.TestDecoderModels):
    """Those of PEFT's tests that take a config."""


NOT_RUN = set()
for _name in [name for name in dir(TestDecoderModels) if name.startswith("test_")]:
    _run = getattr(TestDecoderModels, _name)
    if (_methods := list_of_methods(_run)) is None:
        NOT_RUN.add(_name)
        setattr(TestDecoderModels, _name, None)
        continue
    _methods[:] = [(IDPConfig, {"task_type": "CAUSAL_LM", **settings}) for settings in SETTINGS]
    if _name in REFUSED:
        setattr(TestDecoderModels, _name, ends_in(REFUSED[_name], _run))


def test_what_is_not_run_is_listed():
    assert NOT_RUN == OF_ONE_METHOD


@pytest.fixture(scope="module", autouse=True)
def hub(tmp_path_factory):
    """The only hub there is: the tiny models. One tokenizer and some texts stand in for those of the Hub."""
    texts = datasets.Dataset.from_dict({"quote": tiny_texts(words=12)})
    tokenizers = types.SimpleNamespace(from_pretrained=lambda model_id: tiny_tokenizer())
    with HubServer() as server, pytest.MonkeyPatch.context() as patch:
        for number, (model_id, architecture) in enumerate(MODELS.items()):
            folder = tmp_path_factory.mktemp(f"{number}")
            tiny(architecture).save_pretrained(folder)
            server.add(model_id, folder)
        only_hub(server, patch, tmp_path_factory.mktemp("cache"))
        patch.setattr(PEFT_TESTS, "AutoTokenizer", tokenizers)
        patch.setattr(PEFT_TESTS, "load_dataset_english_quotes", lambda: datasets.DatasetDict(train=texts))
        yield server
