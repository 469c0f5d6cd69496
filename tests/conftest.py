from __future__ import annotations

import os
import warnings

import pytest
import torch
from peft import get_peft_model

import idp_peft  # noqa: F401  (registers the method)
from idp_peft import IDPConfig
from tests.tiny import SEED, tiny

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start, too
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def _same_random_numbers_in_any_order():
    torch.manual_seed(SEED)


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
