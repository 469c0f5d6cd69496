"""Hundreds of requests at once, the engine killed and started again in the middle: each request ends, properly."""

from __future__ import annotations

import collections
import concurrent.futures
import json
import logging
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

REQUESTS, WORKERS = 500, 100
PAUSE = 50  # seconds at most before each request once the engine was killed
SERVED = ("answered", "streamed")
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
        done, killed = threading.Semaphore(0), threading.Event()

        def run(index: int) -> None:
            if killed.is_set():
                time.sleep(PAUSE * draw.random())  # else all that are left would end before the engine is back
            ending, took = ask(http, index, texts)
            assert took < LONGEST
            endings[ending] += 1
            done.release()

        with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
            asked = [pool.submit(run, index) for index in range(REQUESTS)]
            for _ in range(40):
                done.acquire()
            engine.kill()
            killed.set()
            engine.start()
            engine.wait()
            back = endings.copy()
            for request in asked:
                request.result(timeout=LONGEST)
    logging.getLogger(__name__).info("%s; when the engine was back: %s", dict(endings), dict(back))
    assert sum(endings.values()) == REQUESTS
    assert set(endings) <= {*SERVED, "502 engine_unreachable", "502 engine_failed", "stream engine_failed"}, endings
    assert sum(back[ending] for ending in SERVED) >= 40
    assert sum(back.values()) < REQUESTS - 20, "too few were left for the engine that came back"
    assert sum(back.values()) > sum(back[ending] for ending in SERVED), "the engine was killed too late to matter"
    after = endings - back
    assert sum(after[ending] for ending in SERVED) >= 20, "the same proxy serves on when the engine is back"
