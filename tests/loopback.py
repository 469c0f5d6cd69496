"""ASGI applications on ports of this machine, each in a thread, and an engine that pretends to generate."""

from __future__ import annotations

import asyncio
import json
import threading
import time

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from tests.patience import PATIENCE
from tests.tiny_serving import say

try:
    import httpx2 as httpx
except ImportError:
    import httpx


class Server:
    """A server on a free port, for a `with`. Settings go to uvicorn."""

    def __init__(self, app, port: int = 0, **settings) -> None:
        config = uvicorn.Config(
            app, host="127.0.0.1", port=port, log_level="critical", timeout_graceful_shutdown=1, **settings
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self) -> Server:
        self.thread.start()
        until = time.monotonic() + PATIENCE
        while not self.server.started:
            assert time.monotonic() < until, "the server did not start"
            time.sleep(0.005)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=PATIENCE)


def client(url: str, timeout: float = PATIENCE) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=timeout, trust_env=False)


class Engine:
    """An OpenAI-compatible engine as far as the proxy can see. `mode` says how it behaves.

    Args:
        model (*optional*), tokenizer (*optional*): a plain model that it serves; else it answers with what it was sent.
    """

    def __init__(self, model=None, tokenizer=None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.mode, self.seen, self.headers = "answer", [], []
        self.running, self.abandoned = threading.Event(), threading.Event()
        self.read = threading.Semaphore(0)  # in mode "lockstep": released for each event that the client has read
        self.app = Starlette(
            routes=[
                Route("/v1/completions", self.post, methods=["POST"]),
                Route("/v1/chat/completions", self.post, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/health", self.models),
            ]
        )

    async def models(self, request):
        self.headers.append(dict(request.headers))
        return JSONResponse({"data": [{"id": "tiny"}]})

    async def post(self, request):
        body = await request.json()
        self.seen.append(body)
        self.headers.append(dict(request.headers))
        self.running.set()
        if self.mode == "refuse":
            return JSONResponse({"error": {"message": "too busy", "code": 429}}, status_code=429)
        if self.mode == "hang":
            await self._hang(request)
        if body.get("stream"):
            return StreamingResponse(self._events(body), media_type="text/event-stream")
        return JSONResponse(self._answer(body))

    def _answer(self, body: dict) -> dict:
        if self.model is None:
            return {"choices": [{"text": body.get("user")}]}
        if "messages" in body:
            text = self.tokenizer.apply_chat_template(
                body["messages"], tokenize=False, add_generation_prompt=True, **body.get("chat_template_kwargs", {})
            )
            rows = [self.tokenizer(text, add_special_tokens=False)["input_ids"]]
        else:
            rows = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        return {"choices": [{"token_ids": say(self.model, row, body.get("max_tokens", 8))} for row in rows]}

    async def _events(self, body: dict):
        try:
            for index in range(body.get("max_tokens", 4)):
                if self.mode == "die" and index == 2:
                    raise RuntimeError("the engine dies")
                yield f"data: {json.dumps({'choices': [{'text': f'w{index}'}]})}\n\n"
                await asyncio.sleep(0.01)
                while self.mode == "lockstep" and not self.read.acquire(blocking=False):
                    await asyncio.sleep(0.01)
            yield "data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.abandoned.set()
            raise

    async def _hang(self, request) -> None:
        """Until the caller goes away."""
        while not await request.is_disconnected():
            await asyncio.sleep(0.01)
        self.abandoned.set()
