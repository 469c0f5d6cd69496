"""Hundreds of requests at once, the engine killed in the middle and started again: each request ends, properly."""

from __future__ import annotations

import collections
import concurrent.futures
import json
import random
import threading
import time

import pytest

pytest.importorskip("vllm", reason="`make test-serving` makes an environment with it")

from idp_peft.serving import Router, proxy_app
from idp_peft.serving.prompted_request import RequestPrompter
from idp_peft.serving.proxy import ProxySettings
from tests.loopback import Server, client
from tests.serving.vllm_server import VllmServer, subject

REQUESTS, WORKERS = 400, 100
LONGEST = 240  # seconds that any one request may take
BODY = {"model": "idp", "temperature": 0, "max_tokens": 48, "ignore_eos": True}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return subject("tiny", tmp_path_factory.mktemp("load"))


def ask(http, index: int, texts: list[str]) -> tuple[str, float]:
    """How one request ended, and how long it took."""
    began = time.monotonic()
    body = {**BODY, "prompt": texts[index % len(texts)], "stream": index % 2 == 0}
    if not body["stream"]:
        response = http.post("/v1/completions", json=body)
        return _ending(response.status_code, response.json()), time.monotonic() - began
    with http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            return _ending(response.status_code, json.loads(response.read())), time.monotonic() - began
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    took = time.monotonic() - began
    if events[-1] == "[DONE]":
        return "streamed", took
    return f"stream {json.loads(events[-1])['error']['code']}", took


def _ending(status: int, body: dict) -> str:
    if status == 200:
        return "answered" if body["choices"][0]["text"] else "empty"
    return f"{status} {body['error']['code']}"


def test_every_request_ends_with_an_answer_or_a_proper_error(one, tmp_path):
    draw = random.Random(0)
    texts = [" ".join(f"w{draw.randrange(5, 97)}" for _ in range(draw.randrange(2, 40))) for _ in range(50)]
    prompter = RequestPrompter(Router.from_pretrained(one.exported.folder), one.exported)
    engine = VllmServer(one.exported.folder, tmp_path / "log")
    settings = ProxySettings(engine.url, "idp", timeout=60)
    endings: collections.Counter = collections.Counter()
    with engine, Server(proxy_app(prompter, settings)) as server, client(server.url, timeout=LONGEST) as http:
        done = threading.Semaphore(0)

        def run(index: int) -> None:
            ending, took = ask(http, index, texts)
            assert took < LONGEST
            endings[ending] += 1
            done.release()

        with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
            asked = [pool.submit(run, index) for index in range(REQUESTS)]
            for _ in range(40):
                done.acquire()
            engine.kill()
            for request in asked:
                request.result(timeout=LONGEST)
        assert sum(endings.values()) == REQUESTS
        served = endings["answered"] + endings["streamed"]
        assert served >= 40
        proper = {"answered", "streamed", "502 engine_unreachable", "502 engine_failed", "stream engine_failed"}
        assert set(endings) <= proper, endings
        assert served < REQUESTS, "the engine was killed too late to matter"

        engine.start()
        engine.wait()
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            after = [ending for ending, _ in pool.map(lambda index: ask(http, index, texts), range(40))]
        assert set(after) == {"answered", "streamed"}, "the same proxy serves on when the engine is back"
