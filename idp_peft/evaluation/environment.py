"""What a result was made with: versions, commit and machine, for every result file."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from idp_peft import __version__

_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "torchao",
    "llmcompressor",
    "compressed-tensors",
    "gptqmodel",
    "bitsandbytes",
    "lm_eval",
    "datasets",
)


def environment() -> dict:
    """Versions (`None`: not installed), commit of this code, processor, GPU and threads."""
    return {
        "idp_peft": __version__,
        **{name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
