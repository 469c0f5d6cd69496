"""Mixed requests from several threads leave nothing behind (`python -m benchmarks.soak` asks thousands)."""

from __future__ import annotations

import pytest
import torch

from benchmarks.soak.__main__ import build, growth, soak


@pytest.mark.slow
def test_requests_of_every_kind_from_threads_leave_no_tensor_behind():
    rounds = soak(build(), requests=96, threads=4, per_round=8)
    assert {kind for found in rounds for kind in found["kinds"]} >= {"forward", "greedy", "sample", "beams", "static"}
    assert {found["adapter"] for found in rounds} == {"default", "other", None}
    settled = rounds[3:]  # by then each adapter has its prompt cache, and each thread its last choice
    assert len({found["tensors"] for found in settled}) == 1
    sizes = [found["tensor_bytes"] for found in settled]
    assert max(sizes) - min(sizes) < 2048, "a last choice is as long as its batch; nothing else may differ"


@pytest.mark.slow
def test_a_tensor_that_is_left_behind_is_seen():
    left = []
    rounds = soak(build(), 24, threads=2, per_round=4, on_round=lambda *_: left.append(torch.zeros(3)))
    assert growth(rounds, "tensors") > 0
