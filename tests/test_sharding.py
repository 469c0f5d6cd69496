"""What one process can see of running among several."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from idp_peft.hosting.sharding import place_in_batch
from tests.tiny import tiny


@pytest.mark.parametrize(("share", "place"), [(None, (5, 8)), (1, (5, 8)), (2, (2, 4)), (8, (0, 1))])
def test_processes_that_share_an_example_have_one_place(monkeypatch, share, place):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 5)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 8)
    config = None if share is None else SimpleNamespace(non_data_parallel_size=share)
    monkeypatch.setattr(AcceleratorState, "_shared_state", {"parallelism_config": config})
    assert place_in_batch() == place


def test_a_single_process_has_the_whole_batch():
    assert place_in_batch() == (0, 1)


def test_weights_that_are_replaced_can_go(make):
    """Sharding replaces them; a list of the old ones would keep the whole base on every process."""
    model = make("llama")
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    old = weakref.ref(layer.weight)
    layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    gc.collect()
    assert old() is None


def test_unloading_makes_trainable_again_what_was(make):
    before = {name: parameter.requires_grad for name, parameter in tiny("llama").named_parameters()}
    base = make("llama").unload()
    assert {name: parameter.requires_grad for name, parameter in base.named_parameters()} == before
    assert all(before.values())
