from __future__ import annotations

import os
import warnings

import pytest
import torch
from peft import get_peft_model

import idp_peft  # noqa: F401  (registers the method)
from idp_peft import IDPConfig
from tests.tiny import ARCHITECTURES_AND_MORE, SEED, tiny

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start, too
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


# `make test` asks the contract of every architecture, and what else is asked of each of those that differ most. `make test-all`
# asks everything of all. What takes longest is marked `slow` where it stands.
_OF_ALL = {"test_contract.py", "test_models.py"}
_OF_FEW = {  # where each architecture is asked two dozen questions
    "test_one_choice.py": {"llama", "gpt2", "gemma2", "bloom", "phi3_longrope", "qwen2_5_vl"},
}
_DIFFERENT = {
    *("llama", "mistral_small_window", "gemma2", "phi3", "opt", "gpt2", "bloom", "mpt", "mixtral", "gemma3n"),
    *("gemma4_multimodal", "qwen2_5_vl", "phi3_longrope", "llama_dynamic"),
}


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        given = getattr(item, "callspec", None)
        asked = {str(value).partition(" by ")[0] for value in given.params.values()} if given else set()
        alike = asked & set(ARCHITECTURES_AND_MORE)
        if alike and item.path.name not in _OF_ALL and not alike & _OF_FEW.get(item.path.name, _DIFFERENT):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _same_random_numbers_in_any_order():
    torch.manual_seed(SEED)


@pytest.fixture
def serve(prompter):
    """serve(engine, **settings) -> a client of a proxy that asks a module's `prompter`."""
    from tests.tiny_proxy import starting

    with starting(prompter) as start:
        yield start


@pytest.fixture
def make():
    """make(name, **config) -> a tiny IDP model in evaluation mode, with prompts large enough to matter."""

    def build(name: str, attention: str = "sdpa", dtype=torch.float32, seed: int = 0, **config):
        base = tiny(name, attention, seed=seed, dtype=dtype)
        config = {"num_prompts": 4, "num_virtual_tokens": 4, **config}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(base, IDPConfig(task_type="CAUSAL_LM", **config))
        return model.eval()

    return build
