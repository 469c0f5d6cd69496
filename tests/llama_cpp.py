"""An unmodified llama.cpp, as a server on this machine."""

from __future__ import annotations

import json
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")

from benchmarks.serving.engines import llama_cpp


class LlamaServer:
    """llama.cpp's own server on a GGUF file, on one thread; it ends with the object.

    Args:
        file (`Path`): the file.
        slots (`int`, defaults to `1`): requests at once.
        context (`int`, defaults to `64`): tokens of each.
    """

    def __init__(self, file: Path, slots: int = 1, context: int = 64) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.served = llama_cpp(file, Path(self.folder.name, "log"), slots, context)
        self.url = self.served.url

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
