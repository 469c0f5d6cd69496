"""An unmodified llama.cpp, as a server on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
import weakref
from pathlib import Path

import pytest

pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
# In a process of its own, which can be ended at any time.
_SERVE = """
import sys, xllamacpp
file, slots, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
parameters = xllamacpp.CommonParams()
parameters.model.path = file
parameters.n_ctx, parameters.n_parallel = context * slots, slots
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
parameters.warmup = parameters.fit_params = False
parameters.verbosity = -1
server = xllamacpp.Server(parameters)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


class LlamaServer:
    """llama.cpp's own server on a GGUF file, on one thread; it ends with the object.

    Args:
        file (`Path`): the file.
        slots (`int`, defaults to `1`): requests at once.
        context (`int`, defaults to `64`): tokens of each.
    """

    def __init__(self, file: Path, slots: int = 1, context: int = 64) -> None:
        command = [sys.executable, "-c", _SERVE, str(file), str(slots), str(context)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, **pipes)
        weakref.finalize(self, _end, process)
        self.url = process.stdout.readline().strip()
        assert self.url.startswith("http"), process.stderr.read()

    def post(self, path: str, **body) -> dict:
        request = urllib.request.Request(
            f"{self.url}{path}", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{error.code}: {error.read().decode()}") from error

    def says(self, token_ids: list[int], tokens: int = 8, **body) -> list[int]:
        """The token ids that it says behind some token ids, greedily by default."""
        body = {"temperature": 0, "cache_prompt": False, "ignore_eos": True, **body}
        return self.post("/completion", prompt=token_ids, n_predict=tokens, return_tokens=True, **body)["tokens"]


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()
