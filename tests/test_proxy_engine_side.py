"""What of a request reaches the engine, and what of an engine's answer reaches the client."""

from __future__ import annotations

import contextlib
import gzip
import json
import threading

import pytest

pytest.importorskip("starlette", reason="the proxy's web framework is in the extra 'serving'")
pytest.importorskip("uvicorn", reason="the proxy's server is in the extra 'serving'")

from idp_peft.serving import proxy_app
from idp_peft.serving.client_connections import connections
from idp_peft.serving.proxy import ProxySettings
from tests.loopback import Server, client
from tests.raw_http import Recorder, post, say, status
from tests.tiny_proxy import error_of, tiny_prompter

BODY = {"prompt": [5, 6], "temperature": 0}
CHAT = {"messages": [{"role": "user", "content": "w5"}], "temperature": 0}


@pytest.fixture(scope="module")
def prompter(tmp_path_factory):
    return tiny_prompter(tmp_path_factory.mktemp("engine"))


@contextlib.contextmanager
def in_front_of(prompter, engine, **settings):
    """The server of a proxy in front of an engine, which is an ASGI application."""
    with (
        Server(engine, lifespan="off") as behind,
        Server(proxy_app(prompter, ProxySettings(behind.url, "tiny", **settings)), **connections()) as proxy,
    ):
        yield proxy


@pytest.fixture(scope="module")
def recorder():
    return Recorder()


@pytest.fixture(scope="module")
def proxy(prompter, recorder):
    with in_front_of(prompter, recorder, engine_api_key="engine's own") as server:
        yield server


@pytest.fixture(autouse=True)
def forget(recorder):
    recorder.seen.clear()


# ---------------------------------------------------------------------- requests

HOSTS = [
    b"x/shutdown?",
    b"x/shutdown#",
    b"x/shutdown?a=",
    b"x/shutdown;",
    b"x/../shutdown?",
    b"x\\shutdown?",
    b"user@x/shutdown?",
    b"x:80/shutdown?",
    b"x:99999999",
    b"x:port",
    b"[::1",
    b"http://x/shutdown?",
    b"/shutdown?",
    b"?",
    b"#",
    b"",
    b"\xff\xfe/shutdown?",
    b"x%2fshutdown?",
    b"x y",
    None,
]


@pytest.mark.parametrize("host", HOSTS)
def test_the_host_that_a_request_names_picks_no_path(proxy, recorder, host):
    for path, body in ((b"/v1/completions", BODY), (b"/v1/chat/completions", CHAT)):
        answer = say(proxy.port, post(path, body, host=host))
        seen = [(method, raw, query) for method, raw, query, _, _ in recorder.seen]
        if status(answer) == 200:
            assert seen == [("POST", path, b"")]
        else:
            assert status(answer) == 400
            assert seen == []
        recorder.seen.clear()


@pytest.mark.parametrize(
    "path",
    [
        b"/v1/completions/",
        b"//v1/completions",
        b"//x/v1/completions",
        b"/v1/completions%2f..%2f..%2fshutdown",
        b"/v1/completions/../../shutdown",
        b"/v1//completions",
        b"/v1/completions;/shutdown",
        b"/v1/completions%00",
        b"/v1/completions%0a/shutdown",
        b"/v1/../shutdown",
        b"/shutdown",
        b"/V1/completions",
        b"http://x/shutdown",
        b"*",
        b"/" + b"a" * 10_000,
    ],
)
def test_no_other_path_reaches_the_engine_nor_is_redirected(proxy, recorder, path):
    answer = say(proxy.port, post(path, BODY, host=b"stranger"))
    assert status(answer) in (400, 404)
    assert b"location:" not in answer.lower()
    assert recorder.seen == []


@pytest.mark.parametrize("behind", [b"?a=/shutdown&b", b"?", b"?\xff", b"%0a"])
def test_what_stands_behind_a_path_ends_at_the_proxy(proxy, recorder, behind):
    """Starlette takes a line break at the end for none."""
    answer = say(proxy.port, post(b"/v1/completions" + behind, BODY))
    if status(answer) == 400:  # not even HTTP
        return
    assert status(answer) == 200
    assert [(raw, query) for _, raw, query, _, _ in recorder.seen] == [(b"/v1/completions", b"")]


@pytest.mark.parametrize("method", [b"PUT", b"DELETE", b"PATCH", b"TRACE", b"CONNECT", b"OPTIONS", b"POSTS", b"post"])
def test_no_other_method_reaches_the_engine(proxy, recorder, method):
    for path in (b"/v1/completions", b"/v1/models"):
        answer = say(proxy.port, method + post(path, BODY)[len(b"POST") :])
        assert status(answer) in (400, 404, 405)
    assert recorder.seen == []


def test_of_the_headers_only_those_that_are_listed_reach_the_engine(proxy, recorder):
    headers = {
        "accept": "text/plain",
        "traceparent": "00-1-2-01",
        "tracestate": "a=b",
        "authorization": "Bearer the client's",
        "cookie": "a=b",
        "x-request-id": "of somebody else",
        "x-data-parallel-rank": "3",
        "x-forwarded-for": "127.0.0.1",
        "forwarded": "for=127.0.0.1",
        "proxy-authorization": "x",
        "te": "trailers",
        "accept-encoding": "gzip",
        "content-type": "text/plain",
        "expect": "nothing",
        "user-agent": "a stranger",
        "x-anything": "\u00ff",
    }
    lines = [f"{name}: {value}".encode("latin-1") for name, value in headers.items()]
    assert status(say(proxy.port, post(b"/v1/completions", BODY, *lines))) == 200
    ((_, _, _, seen, body),) = recorder.seen
    assert seen.pop(b"content-length") == str(len(body)).encode()
    assert seen.pop(b"host").startswith(b"127.0.0.1:")
    assert seen.pop(b"user-agent").startswith(b"python-httpx")
    assert seen == {
        b"accept": b"text/plain",
        b"accept-encoding": b"identity",
        b"authorization": b"Bearer engine's own",
        b"connection": b"keep-alive",
        b"content-type": b"application/json",
        b"traceparent": b"00-1-2-01",
        b"tracestate": b"a=b",
    }


@pytest.mark.parametrize("name", [b"accept", b"authorization", b"traceparent"])
def test_a_header_that_is_not_ascii_is_no_error_of_the_proxy(prompter, recorder, name):
    with in_front_of(prompter, recorder) as server:
        assert status(say(server.port, post(b"/v1/completions", BODY, name + b": \xff\xfe"))) == 200
    assert recorder.seen[0][3][name] == b"\xff\xfe"


def test_a_body_reaches_the_engine_as_it_was_understood(proxy, recorder):
    """A field that stands twice, or is written in another way, is not read in another way behind the proxy."""
    body = b'{"prompt_logprobs": 1, "prompt": [98], "prompt": [5], "prompt_logprobs": null, "n": 1, "\\u006e": 2}'
    assert status(say(proxy.port, post(b"/v1/completions", body))) == 200
    ((_, _, _, _, seen),) = recorder.seen
    assert set(json.loads(seen)) == {"prompt", "n", "model", "logit_bias"}
    assert json.loads(seen)["n"] == 2
    assert seen.count(b'"prompt"') == 1


# ---------------------------------------------------------------------- answers


class Answer:
    """An engine that answers with a status, headers and parts; `None` among the parts: it breaks off."""

    def __init__(self, parts, status: int = 200, **headers: str) -> None:
        self.parts, self.status = parts, status
        self.headers = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        self.ended = threading.Event()

    async def __call__(self, scope, receive, send) -> None:
        import anyio

        while (await receive()).get("more_body"):
            pass
        try:
            await send({"type": "http.response.start", "status": self.status, "headers": self.headers})
            for part in self.parts:
                if part is None:
                    return
                if callable(part):
                    part = await anyio.to_thread.run_sync(part)
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            self.ended.set()


def test_a_long_answer_passes_through_in_parts(prompter):
    begun = threading.Event()

    def rest() -> bytes:
        assert begun.wait(60), "the proxy waits for the whole answer"
        return b"the end"

    engine = Answer([b"x" * 2**20, rest], content_type="application/json")
    with (
        in_front_of(prompter, engine) as server,
        client(server.url) as http,
        http.stream("POST", "/v1/completions", json=BODY) as answer,
    ):
        parts = answer.iter_bytes()
        first = next(parts)
        begun.set()
        assert first + b"".join(parts) == b"x" * 2**20 + b"the end"
        assert answer.headers["content-type"] == "application/json"
        assert "x-idp-prompt" in answer.headers


@pytest.mark.parametrize("content_type", ["application/json", "text/event-stream"])
def test_an_answer_without_end_takes_no_memory(prompter, content_type):
    """Nobody reads, so the engine is not read either."""
    sent, many, over = [], threading.Event(), threading.Event()

    def part() -> bytes:
        sent.append(1)
        if len(sent) > 100:  # MiB: more than the buffers of two connections
            many.set()
            over.wait(60)
        return b"x" * 2**20

    engine = Answer([part] * 101 + [b""], content_type=content_type)
    with in_front_of(prompter, engine) as server, client(server.url) as http:
        with http.stream("POST", "/v1/completions", json=BODY) as answer:
            parts = answer.iter_bytes()
            next(parts)
            read_on = many.wait(3)
            over.set()
        assert not read_on
        assert engine.ended.wait(60), "the client has left, and the engine is let go"


@pytest.mark.parametrize("encoding", ["gzip", "br", "zstd", "gzip, gzip", "unknown"])
@pytest.mark.parametrize("content_type", ["application/json", "text/event-stream"])
def test_an_answer_that_is_compressed_is_not_read(prompter, encoding, content_type):
    engine = Answer([gzip.compress(b"0" * 2**20)], content_encoding=encoding, content_type=content_type)
    with in_front_of(prompter, engine) as server, client(server.url) as http:
        for answer in (http.post("/v1/completions", json=BODY), http.get("/v1/models"), http.get("/health")):
            assert error_of(answer, 502)["code"] == "engine_failed"


def test_a_short_answer_that_breaks_off_is_a_502(prompter):
    engine = Answer([b'{"choices":', None], content_type="application/json")
    with in_front_of(prompter, engine) as server, client(server.url) as http:
        assert error_of(http.post("/v1/completions", json=BODY), 502)["code"] == "engine_failed"


def test_a_long_answer_that_breaks_off_has_no_end(prompter):
    """So that no client takes it for whole."""
    engine = Answer([b"x" * 2**20, None], content_type="application/json")
    with in_front_of(prompter, engine) as server:
        answer = say(server.port, post(b"/v1/completions", BODY))
        assert status(answer) == 200
        assert b"transfer-encoding: chunked" in answer.lower()
        assert not answer.endswith(b"0\r\n\r\n")
        assert status(say(server.port, post(b"/v1/completions", BODY))) == 200, "and the next is answered"


@pytest.mark.parametrize("code", [199, 600, 999])
def test_a_status_that_is_none_is_a_502(prompter, code):
    engine = RawEngine(b"HTTP/1.1 %d x\r\ncontent-length: 0\r\n\r\n" % code)
    with engine, in_front_of_url(prompter, engine.url) as server, client(server.url) as http:
        error_of(http.post("/v1/completions", json=BODY), 502)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"not HTTP at all\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 100_000,
        b"HTTP/1.1 200 OK\r\na: " + b"b" * 1_000_000,
        b"HTTP/1.1 " + b"2" * 1_000_000,
    ],
)
def test_an_answer_that_is_no_http_is_a_502(prompter, answer):
    engine = RawEngine(answer)
    with engine, in_front_of_url(prompter, engine.url) as server, client(server.url) as http:
        assert error_of(http.post("/v1/completions", json=BODY), 502)["code"] == "engine_failed"


def test_of_the_answers_headers_only_those_that_are_listed_come_back(prompter):
    given = {
        "content_type": "application/json",
        "retry_after": "7",
        "x_request_id": "a",
        "set_cookie": "a=b",
        "location": "http://inside/",
        "access_control_allow_origin": "*",
        "x_idp_prompt": "9",
        "strict_transport_security": "x",
    }
    with in_front_of(prompter, Answer([b"{}"], status=429, **given)) as server, client(server.url) as http:
        answer = http.post("/v1/completions", json={**BODY, "idp_prompt": 2})
    assert answer.status_code == 429
    headers = {name: value for name, value in answer.headers.items() if name not in ("date", "content-length")}
    assert headers == {
        "content-type": "application/json",
        "retry-after": "7",
        "x-request-id": "a",
        "x-idp-prompt": "2",
    }


class RawEngine:
    """A socket that answers every connection's first bytes with the same bytes, and closes it."""

    def __init__(self, answer: bytes) -> None:
        import socketserver

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                self.request.recv(65536)
                with contextlib.suppress(OSError):
                    self.request.sendall(answer)

        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> None:
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()


@contextlib.contextmanager
def in_front_of_url(prompter, url: str):
    with Server(proxy_app(prompter, ProxySettings(url, "tiny")), **connections()) as server:
        yield server
