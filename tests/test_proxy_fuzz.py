"""Requests drawn at random, the same each time: each ends properly, and the engine is sent nothing that it must not be."""

from __future__ import annotations

import collections
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("starlette", reason="the proxy's web framework is in the extra 'serving'")
pytest.importorskip("uvicorn", reason="the proxy's server is in the extra 'serving'")

from benchmarks.faults.hostile_requests import hostile_requests, what_is_wrong
from idp_peft.serving import proxy_app
from idp_peft.serving.client_connections import connections
from idp_peft.serving.proxy import ProxySettings
from tests.loopback import Server
from tests.raw_http import Recorder, post, say, status
from tests.tiny_proxy import tiny_prompter

COUNT, CLIENT_TIMEOUT = 600, 1.0
ORDERLY = {200, 400, 404, 405, 408, 413, 501}


def ask(port: int, data: bytes) -> bytes:
    """What comes back; nothing, where the connection is closed before all is sent."""
    try:
        return say(port, data, timeout=60)
    except ConnectionError:
        return b""


def test_every_request_ends_properly_and_the_engine_is_sent_only_what_it_may_be(tmp_path, caplog):
    prompter, engine = tiny_prompter(tmp_path), Recorder()
    requests = hostile_requests(COUNT)
    with (
        Server(engine, lifespan="off") as behind,
        Server(
            proxy_app(prompter, ProxySettings(behind.url, "tiny")), **connections(client_timeout=CLIENT_TIMEOUT)
        ) as proxy,
    ):
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda request: ask(proxy.port, request.data), requests))
        ordinary = post(b"/v1/completions", {"prompt": "w5"})
        assert any(status(ask(proxy.port, ordinary)) == 200 for _ in range(20)), "408 on a machine that is very busy"
    ends = collections.Counter()
    for request, answer in zip(requests, answers, strict=True):
        ends[request.kind, status(answer)] += 1
        may_be_closed = request.kind in ("head", "framing")
        assert status(answer) in ORDERLY or (may_be_closed and answer == b""), request
        if status(answer) >= 400 and not request.data.startswith(b"HEAD"):
            assert set(json.loads(answer.rpartition(b"\r\n\r\n")[2])) == {"error"}, request
    known = prompter.exported
    for seen in engine.seen:
        assert what_is_wrong(*seen, known.vocab_size, known.token_ids) is None
    for kind in ("fields", "texts", "bytes", "head", "framing"):
        assert ends[kind, 200] > 5, f"else this says little: {ends}"
        assert ends[kind, 400] > 5, ends
    assert "Traceback" not in caplog.text


def test_what_an_engine_must_not_be_sent_is_seen():
    """The check of the test above can fail."""
    headers = {b"host": b"x"}
    good = {"prompt": [97, 98, 5], "temperature": 0}

    def found(method="POST", path=b"/v1/completions", query=b"", headers=headers, **change):
        return what_is_wrong(method, path, query, headers, json.dumps({**good, **change}).encode(), 97, [[97, 98]])

    assert found() is None
    assert "'/shutdown'" in found(path=b"/shutdown")
    assert "the query" in found(query=b"a")
    assert "the headers" in found(headers={b"cookie": b"x"})
    assert "the fields" in found(prompt_logprobs=0)
    assert "no bias" in found(temperature=1, logit_bias={"97": -100})
    assert "within a text" in found(prompt=[97, 98, 5, 97])
    assert "within a text" in found(prompt=[97, 5])
    assert "name" in found(path=b"/v1/chat/completions", messages=[{"content": "<|idp:0:00|>"}])
