"""Processes that serve: llama.cpp, vLLM, and the proxy in front of one. Each has a `url`, and ends with the object."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import weakref
from pathlib import Path

from benchmarks.common.reserved_port import reserved_port

_PATIENCE = 600  # seconds that a start may take
# In a process of its own, which can be ended at any time.
_LLAMA_CPP = """
import sys, xllamacpp
file, port, slots, context, *loras = sys.argv[1:]
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.port = file, int(port)
parameters.n_ctx, parameters.n_parallel = int(context) * int(slots), int(slots)
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
parameters.warmup = parameters.fit_params = False
parameters.verbosity = -1
parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in loras]
server = xllamacpp.Server(parameters)
sys.stdin.read()
"""
VLLM_BLOCK = 32  # tokens of a cache block; the CPU backend wants a multiple of 32
_VLLM = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}


class Served:
    """A process that answers HTTP on loopback.

    Args:
        command (`list[str]`): what runs; `{port}` in it is a port that is free.
        log (`Path`): where its output goes.
        environment (`dict`): beside this process's own.
    """

    def __init__(self, command: list[str], log: Path, environment: dict[str, str] | None = None) -> None:
        port, self._port_holder = reserved_port()
        self.url = f"http://127.0.0.1:{port}"
        began = time.perf_counter()
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [part.replace("{port}", str(port)) for part in command],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        weakref.finalize(self, _end, self.process)
        while not _answers(self.url):
            if self.process.poll() is not None or time.perf_counter() - began > _PATIENCE:
                raise RuntimeError(f"it did not start:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.05)
        self.start_seconds = time.perf_counter() - began

    def resident_bytes(self) -> int:
        """Memory of the process and of those that it started."""
        family = {self.process.pid}
        parents = {int(path.name): _parent(path) for path in Path("/proc").iterdir() if path.name.isdecimal()}
        while more := {pid for pid, parent in parents.items() if parent in family} - family:
            family |= more
        return sum(_resident(pid) for pid in family)


def llama_cpp(file: Path, log: Path, slots: int, context: int, loras: tuple[Path, ...] = ()) -> Served:
    """llama.cpp's own server on one thread, with so many requests at once, of so many tokens each."""
    return Served([sys.executable, "-c", _LLAMA_CPP, *map(str, (file, "{port}", slots, context, *loras))], log)


def vllm(model: Path, log: Path, slots: int, context: int, flags: tuple[str, ...] = ()) -> Served:
    """vLLM's OpenAI server on the CPU."""
    return Served(vllm_command(model, "{port}", slots, context, flags), log, vllm_environment())


def vllm_command(model: Path, port: int | str, slots: int, context: int, flags: tuple[str, ...] = ()) -> list[str]:
    """What runs vLLM's OpenAI server, with so many requests at once, of so many tokens each."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--served-model-name", "idp", "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", str(context), "--max-num-seqs", str(slots), "--block-size", str(VLLM_BLOCK), *flags]
    return command


def vllm_environment() -> dict[str, str]:
    """For vLLM on the cores that this process may use: it binds its threads itself."""
    return {**_VLLM, "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))))}


def proxy(served: Path, engine: Served, log: Path) -> Served:
    """`idp-peft proxy` in front of an engine."""
    command = [sys.executable, "-m", "idp_peft_cli", "proxy", "--model", str(served), "--engine", engine.url]
    return Served([*command, "--port", "{port}", "--served_model_name", "idp"], log)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _parent(process: Path) -> int | None:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
