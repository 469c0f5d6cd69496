"""What the attacks on the proxy need: a tiny exported model with a stranger's chat template, an engine, and the proxy itself."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common.reserved_port import reserved_port

VOCAB = 97
# A message says what the template does.
TEMPLATES = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops over a text": "{% for a in 'a' * 10**6 %}{% for b in 'a' * 10**6 %}{% endfor %}{% endfor %}",
    "10^10 characters": "{% set n = 10**10 %}{{ 'a' * n }}",
    "10^10 characters in parts": "{% for a in range(99999) %}{{ 'a' * (messages|length * 10**5) }}{% endfor %}",
    "a wide number": "{% set n = 10**9 %}{{ ('%' ~ n ~ 'd') % 5 }}",
    "a long list": "{% set n = 10**9 %}{{ ([1] * n)|length }}",
    "a great number": "{% set n = 10**8 %}{{ (7 ** n) is even }}",
    "recursion": "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "an error": "{{ raise_exception('not so') }}",
    "a way out": "{{ messages.__class__.__mro__ }}",
}
_ENGINE_MODES = ("answer", "large", "bomb", "endless", "hang", "cut", "stream")


def exported_model(folder: Path) -> Path:
    """A Llama of random weights with four prompts, exported to its vocabulary."""
    import torch
    from peft import get_peft_model
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from idp_peft import IDPConfig
    from idp_peft.serving import export_to_vocab

    torch.manual_seed(0)
    shape = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=64)).save_pretrained(folder / "base")
    words = Tokenizer(WordLevel({f"w{index}": index for index in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    attacks = "".join(
        f"{{% if messages[0]['content'] == {json.dumps(name)} %}}{template}{{% endif %}}"
        for name, template in TEMPLATES.items()
    )
    tokenizer.chat_template = attacks + "{% for message in messages %}w2 {{ message['content'] }} w3 {% endfor %}"
    tokenizer.save_pretrained(folder / "base")
    base = LlamaForCausalLM.from_pretrained(folder / "base")
    config = IDPConfig(task_type="CAUSAL_LM", num_prompts=4, num_virtual_tokens=4, tokenizer_name_or_path=None)
    get_peft_model(base, config).save_pretrained(folder / "adapter")
    return export_to_vocab(folder / "adapter", folder / "exported", folder / "base")


class FaultyEngine:
    """An engine, as an ASGI application: what a request says in `user` is how it behaves, and what it gives back.

    Attributes:
        seen (`list`): method, path, query, headers and body of each request.
        open (`int`): requests that have not ended.
    """

    large = 400 * 2**20  # bytes of an answer

    def __init__(self) -> None:
        self.seen, self.open = [], 0
        self._bomb = gzip.compress(bytes(2**24)) * 25

    async def __call__(self, scope, receive, send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.seen.append((scope["method"], scope["raw_path"], scope["query_string"], dict(scope["headers"]), body))
        user = json.loads(body).get("user", "") if body else ""
        mode = user if user in _ENGINE_MODES else "answer"
        self.open += 1
        work = asyncio.ensure_future(self._answer(mode, user, send))
        left = asyncio.ensure_future(receive())
        try:
            await asyncio.wait((work, left), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.open -= 1
            for task in (work, left):
                task.cancel()

    async def _answer(self, mode: str, user: str, send) -> None:
        kind = b"text/event-stream" if mode == "stream" else b"application/json"
        headers = [(b"content-type", kind)] + [(b"content-encoding", b"gzip")] * (mode == "bomb")
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for part in self._parts(mode, user):
            await send({"type": "http.response.body", "body": part, "more_body": True})
            await asyncio.sleep(0)
        if mode != "cut":
            await send({"type": "http.response.body", "body": b""})

    async def _parts(self, mode: str, user: str):
        if mode == "large":
            for _ in range(self.large // 2**20):
                yield b"x" * 2**20
        while mode == "endless":
            yield b"x" * 2**20
        while mode in ("hang", "stream"):
            await asyncio.sleep(0.02)
            if mode == "stream":
                yield b'data: {"choices": []}\n\n'
        if mode == "bomb":
            yield self._bomb
        if mode == "cut":
            yield b"x" * 2**20
        if mode == "answer":
            yield json.dumps({"choices": [{"text": user}]}).encode()


@contextlib.contextmanager
def running_engine(engine: FaultyEngine) -> Iterator[str]:
    """Its address."""
    import uvicorn

    server = uvicorn.Server(
        uvicorn.Config(
            engine, host="127.0.0.1", port=0, log_level="critical", lifespan="off", timeout_graceful_shutdown=1
        )
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


class RunningProxy:
    """`idp-peft proxy` as a process of its own, for a `with`.

    Args:
        model (`Path`): what it serves.
        engine (`str`): address.
        log (`Path`): what it says.
        flags: of the command.
    """

    def __init__(self, model: Path, engine: str, log: Path, *flags: str) -> None:
        self.port, self._port_holder = reserved_port()
        self.log = log
        self.command = [
            *(sys.executable, "-m", "idp_peft_cli", "proxy", "--model", str(model), "--engine", engine),
            *("--served_model_name", "tiny", "--port", str(self.port), *flags),
        ]

    def __enter__(self) -> RunningProxy:
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(f"the proxy did not start:\n{self.log.read_text()}")
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return self
            time.sleep(0.1)

    def __exit__(self, *_) -> None:
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.process.kill()

    def memory(self, which: str) -> int | None:
        """MiB: `"VmRSS"`, what it holds now, or `"VmHWM"`, the most that it held. Linux alone tells."""
        file = Path(f"/proc/{self.process.pid}/status")
        found = re.search(rf"{which}:\s+(\d+) kB", file.read_text()) if file.is_file() else None
        return int(found[1]) // 1024 if found else None

    @property
    def tracebacks(self) -> int:
        return self.log.read_text().count("Traceback (most recent call last)")
