"""Hundreds of requests at once, the engine killed and started again in the middle: each request ends, properly."""

from __future__ import annotations

import collections
import concurrent.futures
import json
import logging
import random
import threading

import pytest

pytest.importorskip("vllm", reason="`make test-serving` makes an environment with it")

from idp_peft.serving import Router, proxy_app
from idp_peft.serving.prompted_request import RequestPrompter
from idp_peft.serving.proxy import ProxySettings
from tests.loopback import Server, client
from tests.patience import PATIENCE
from tests.serving.vllm_server import VllmServer, subject

REQUESTS, WORKERS = 500, 100
EARLY, LATE = 100, 150  # requests of which the engine is killed, and requests that are kept for when it is back
SERVED = ("answered", "streamed")
BODY = {"model": "idp", "temperature": 0, "max_tokens": 48, "ignore_eos": True}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return subject("tiny", tmp_path_factory.mktemp("load"))


def ask(http, index: int, texts: list[str]) -> str:
    """How one request ended."""
    body = {**BODY, "prompt": texts[index % len(texts)], "stream": index % 2 == 0}
    if not body["stream"]:
        response = http.post("/v1/completions", json=body)
        return _ending(response.status_code, response.json())
    with http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            return _ending(response.status_code, json.loads(response.read()))
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    if events[-1] == "[DONE]":
        return "streamed"
    return f"stream {json.loads(events[-1])['error']['code']}"


def _ending(status: int, body: dict) -> str:
    if status == 200:
        return "answered" if body["choices"][0]["text"] else "empty"
    return f"{status} {body['error']['code']}"


def test_every_request_ends_with_an_answer_or_a_proper_error(one, tmp_path):
    draw = random.Random(0)
    texts = [" ".join(f"w{draw.randrange(5, 97)}" for _ in range(draw.randrange(2, 40))) for _ in range(50)]
    prompter = RequestPrompter(Router.from_pretrained(one.exported.folder), one.exported)
    engine = VllmServer(one.exported.folder, tmp_path / "log")
    settings = ProxySettings(engine.url, "idp", timeout=PATIENCE)
    endings, counting = collections.Counter(), threading.Lock()
    with engine, Server(proxy_app(prompter, settings)) as server, client(server.url) as http:
        done, killed, returned = threading.Semaphore(0), threading.Event(), threading.Event()

        def run(index: int) -> None:
            if index >= EARLY:
                killed.wait()
            if index >= REQUESTS - LATE:
                returned.wait()
            ending = ask(http, index, texts)
            with counting:
                endings[ending] += 1
            done.release()

        with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
            asked = [pool.submit(run, index) for index in range(REQUESTS)]
            try:
                for _ in range(40):
                    assert done.acquire(timeout=PATIENCE)
                engine.kill()
                killed.set()
                engine.start()
                engine.wait()
                with counting:
                    back = endings.copy()
            finally:  # requests that waited on would keep the pool from closing
                killed.set()
                returned.set()
            for request in asked:
                request.result(timeout=PATIENCE)
    logging.getLogger(__name__).info("%s; when the engine was back: %s", dict(endings), dict(back))
    assert sum(endings.values()) == REQUESTS
    assert set(endings) <= {*SERVED, "502 engine_unreachable", "502 engine_failed", "stream engine_failed"}, endings
    assert sum(back[ending] for ending in SERVED) >= 40
    assert sum(back.values()) > sum(back[ending] for ending in SERVED), "the engine was killed too late to matter"
    after = endings - back
    assert sum(after[ending] for ending in SERVED) >= LATE, "the same proxy serves on when the engine is back"
