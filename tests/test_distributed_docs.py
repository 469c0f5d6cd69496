"""What docs/distributed.md says: its numbers are computed again, its configs are read by accelerate."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from idp_peft.hosting.sharding import is_spread

DOCS = Path(__file__).parents[1] / "docs"
CONFIGS = sorted((DOCS / "distributed").glob("*.yaml"))


@pytest.fixture(scope="module")
def memory():
    import sys

    spec = importlib.util.spec_from_file_location("memory_of_docs", DOCS / "distributed" / "memory.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_memory_is_what_its_arithmetic_gives(memory):
    page, setup = (DOCS / "distributed.md").read_text(), memory.Setup()
    assert memory.markdown(setup) in page
    assert f"{setup.layers * setup.layer_weights + setup.other_weights:,}" in page
    assert f"{memory.prompt_cache_bytes(setup):,} bytes" in page
    assert f"{setup.prompt_parameters:,} parameters" in page


def test_the_arithmetic_counts_what_a_model_has(make, memory):
    model = make("llama", num_prompts=4, num_virtual_tokens=4)
    base, config = model.get_base_model(), model.get_base_model().config
    setup = replace(
        memory.Setup(),
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        intermediate=config.intermediate_size,
        vocabulary=config.vocab_size,
        prompts=4,
        prompt_tokens=4,
    )
    weights = sum(p.numel() for name, p in base.named_parameters() if "idp" not in name)
    assert setup.layers * setup.layer_weights + setup.other_weights == weights
    assert setup.prompt_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        assert memory.prompt_cache_bytes(setup, element=4) == model.base_model.layer.prompt_cache().nbytes


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_the_config(path):
    config = load_config_from_file(str(path))
    assert str(config.distributed_type.value) == {"ddp": "MULTI_GPU", "zero3": "DEEPSPEED"}.get(path.stem, "FSDP")
    assert path.name in (DOCS / "distributed.md").read_text()


def test_a_model_in_one_process_is_whole(make):
    assert not is_spread(make("llama"))
