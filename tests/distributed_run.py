"""Two processes of `tests.distributed_job`, as torchrun or `accelerate launch` start them, with gloo on one CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from idp_peft.hosting.checkpoint import bank_tensors
from tests import distributed_job
from tests.patience import PATIENCE
from tests.tiny import tiny

# What `accelerate launch` sets from an accelerate config with `distributed_type: FSDP`.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}
# And from one with `distributed_type: DEEPSPEED`. Its default clips gradients to a norm of 1, which Trainer does and a plain
# loop does not.
ZERO3 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    "ACCELERATE_GRADIENT_CLIPPING": "1e9",
    "ACCELERATE_USE_CPU": "false",
    "DS_ACCELERATOR": "cpu",
}


def skip_without_fsdp2_on_a_cpu(settings: dict[str, str]) -> None:
    """Skip a test whose settings ask for what torch 2.6 has on GPUs alone."""
    if "FSDP_VERSION" in settings and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip(f"torch {torch.__version__} has no FSDP2 on a CPU")


def in_two_processes(folder: Path, jobs: list[str], settings: dict[str, str] | None = None) -> dict[str, list[dict]]:
    """Run jobs in two processes; `{job: [what process 0 saw, what process 1 saw]}`."""
    skip_without_fsdp2_on_a_cpu(settings or {})
    folder.mkdir(exist_ok=True)
    tiny("llama").save_pretrained(folder / "base")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", **(settings or {})}
    run = subprocess.run(
        [*launcher, "-m", "tests.distributed_job", str(folder), *jobs],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=PATIENCE,  # gloo itself would wait for half an hour for a process that never comes
    )
    if run.returncode:
        first = [line for line in run.stderr.splitlines() if line.startswith("[rank0]")]
        raise AssertionError("two processes failed:\n" + ("\n".join(first[-40:]) or run.stderr[-6000:]))
    return {job: json.loads((folder / f"{job}.json").read_text()) for job in jobs}


def in_one_process(folder: Path, jobs: list[str]) -> dict[str, dict]:
    """The same jobs here, with the whole batch."""
    folder.mkdir(exist_ok=True)
    tiny("llama").save_pretrained(folder / "base")
    results = {}
    for job in jobs:
        AcceleratorState._reset_state(reset_partial_state=True)
        results[job] = distributed_job.JOBS[job](folder / job, str(folder / "base"))
    AcceleratorState._reset_state(reset_partial_state=True)
    return results


def prompts_in(folder: Path) -> torch.Tensor:
    return saved_in(folder)["weight"]


def saved_in(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a saved bank, by its own names."""
    return bank_tensors(load_file(folder / "adapter_model.safetensors"))


def close(found, expected, tolerance: float) -> bool:
    return torch.allclose(torch.as_tensor(found), torch.as_tensor(expected), rtol=tolerance, atol=tolerance)
