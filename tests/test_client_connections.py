"""Connections of clients that do not do their part: they are closed, and others are served meanwhile."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("starlette", reason="the proxy's web framework is in the extra 'serving'")
pytest.importorskip("uvicorn", reason="the proxy's server is in the extra 'serving'")

import anyio
import h11
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from uvicorn.server import ServerState

from idp_peft.serving.client_connections import connections
from tests.loopback import Server, client
from tests.raw_http import say, status, until_closed

GET = b"GET /short HTTP/1.1\r\nhost: x\r\n\r\n"
POST = b"POST /body HTTP/1.1\r\nhost: x\r\n"


class Application:
    """`/short` answers at once, `/body` once the body is there, `/long` never ends, `/early` answers before the body."""

    def __init__(self) -> None:
        self.left, self.held = threading.Event(), threading.Event()
        self.app = Starlette(
            routes=[
                Route("/short", self.short),
                Route("/early", self.short, methods=["POST"]),
                Route("/body", self.body, methods=["POST"]),
                Route("/long", self.long),
                Route("/slow", self.slow),
            ]
        )

    async def short(self, request):
        return JSONResponse({})

    async def body(self, request):
        return JSONResponse({"bytes": len(await request.body())})

    async def slow(self, request):
        await anyio.to_thread.run_sync(self.held.wait, 60)
        return JSONResponse({})

    async def long(self, request):
        async def parts():
            try:
                while True:
                    yield b"x" * 65536
                    await anyio.sleep(0)
            finally:
                self.left.set()

        return StreamingResponse(parts())


@contextlib.contextmanager
def serving(**limits):
    application = Application()
    with Server(application.app, **connections(**limits)) as server:
        server.application = application
        yield server


@pytest.fixture(scope="module")
def impatient():
    with serving(client_timeout=0.3) as server:
        yield server


@pytest.fixture(scope="module")
def patient():
    with serving() as server:
        yield server


def open_to(server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=60)


UNFINISHED = {
    "nothing": b"",
    "half a line": b"POST /bo",
    "half the headers": b"POST /body HTTP/1.1\r\nhost: x\r\n",
    "no body": POST + b"content-length: 10\r\n\r\n",
    "half a body": POST + b"content-length: 10\r\n\r\n01234",
    "half a chunk": POST + b"transfer-encoding: chunked\r\n\r\n5\r\n01",
    "no last chunk": POST + b"transfer-encoding: chunked\r\n\r\n5\r\n01234\r\n",
    "a body that is asked for": POST + b"expect: 100-continue\r\ncontent-length: 10\r\n\r\n",
    "half of a second request": GET + b"GET /sho",
    "a second request without a body": GET + POST + b"content-length: 10\r\n\r\n",
    "the rest of a body that was not waited for": b"POST /early HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n",
}


@pytest.mark.parametrize("name", UNFINISHED)
def test_a_request_that_does_not_come_whole_is_closed(impatient, name):
    is_told = name not in ("nothing", "the rest of a body that was not waited for")
    for _ in range(20):  # on a busy machine, all that there is to say may come too late
        answer = say(impatient.port, UNFINISHED[name], timeout=60)
        answers = answer.split(b"HTTP/1.1 ")[1:]
        last = int(answers[-1][:3]) if answers else 0
        if (last == 408) == is_told:
            break
    assert last == 408 if is_told else last in (0, 200)
    if is_told:
        error = json.loads(answer.rpartition(b"\r\n\r\n")[2])["error"]
        assert error["message"] == "the request did not arrive within 0.3 seconds"


def test_one_that_trickles_is_closed_as_well(impatient):
    """However many bytes come, one by one: what counts is the whole request."""
    with open_to(impatient) as connection, contextlib.suppress(OSError):
        connection.sendall(b"POST /body HTTP/1.1\r\nx: ")
        until = time.monotonic() + 60
        while time.monotonic() < until:
            connection.sendall(b"x")
            time.sleep(0.02)
    assert time.monotonic() < until


def test_an_answer_that_is_not_read_is_closed(impatient):
    with open_to(impatient) as connection:
        connection.sendall(b"GET /long HTTP/1.1\r\nhost: x\r\n\r\n")
        assert impatient.application.left.wait(60)


# ---------------------------------------------------------------------- with a clock of our own


class Loop:
    """The time stands still until it is told to pass; requests are taken up and never answered."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, []

    def time(self) -> float:
        return self.now

    def call_later(self, delay, call):
        self.calls.append(handle := SimpleNamespace(at=self.now + delay, call=call, cancel=None))
        handle.cancel = lambda: handle in self.calls and self.calls.remove(handle)
        return handle

    def create_task(self, coroutine, **_):
        coroutine.close()
        return Task()

    def sleep(self, seconds: float) -> None:
        until = self.now + seconds
        while due := [handle for handle in self.calls if handle.at <= until]:
            first = min(due, key=lambda handle: handle.at)
            self.calls.remove(first)
            self.now = first.at
            first.call()
        self.now = until


class Task:
    def add_done_callback(self, call) -> None:
        pass


class Transport:
    def __init__(self) -> None:
        self.written, self.state = b"", "open"

    def get_extra_info(self, name):
        return None

    def is_closing(self) -> bool:
        return self.state != "open"

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.state = "closed" if self.state == "open" else self.state

    def abort(self) -> None:
        self.state = "aborted"

    def pause_reading(self) -> None:
        pass

    resume_reading = pause_reading


@pytest.fixture
def connection():
    """A connection of 10 seconds' patience."""
    settings = connections(client_timeout=10)
    state = ServerState()
    config = uvicorn.Config(Application().app, log_level="critical", **settings)
    connection = settings["http"](config=config, server_state=state, app_state={}, _loop=Loop())
    connection.connection_made(Transport())
    return connection


def answer(connection) -> None:
    """As the application would."""
    for event in (h11.Response(status_code=200, headers=[("content-length", "0")]), h11.EndOfMessage()):
        connection.transport.write(connection.conn.send(event))
    connection.cycle.response_complete = True
    connection.on_response_complete()


def test_a_request_that_is_worked_on_has_all_its_time(connection):
    connection.data_received(GET)
    connection.loop.sleep(100_000)
    assert connection.transport.state == "open"


def test_the_time_of_a_request_begins_with_the_connection(connection):
    for _ in range(9):
        connection.loop.sleep(1)
        connection.data_received(b"x")
    assert connection.transport.state == "open"
    connection.loop.sleep(3)
    assert connection.transport.state == "closed"
    assert connection.transport.written.startswith(b"HTTP/1.1 408")


def test_the_time_of_the_next_one_begins_with_the_answer(connection):
    for _ in range(20):
        connection.loop.sleep(4)  # uvicorn's own limit, 5, is for connections that say nothing
        connection.data_received(GET)
        connection.loop.sleep(60)
        answer(connection)
    assert connection.transport.state == "open"
    connection.data_received(b"GET")
    connection.loop.sleep(12)
    assert connection.transport.state == "closed"


def test_an_answer_that_is_read_slowly_is_not_closed(connection):
    connection.data_received(GET)
    for _ in range(20):
        connection.pause_writing()
        connection.loop.sleep(8)
        connection.resume_writing()
    assert connection.transport.state == "open"
    connection.pause_writing()
    connection.loop.sleep(12)
    assert connection.transport.state == "aborted"


def test_what_is_closed_and_not_taken_up_is_aborted(connection):
    connection.data_received(b"\x00\r\n\r\n")
    assert connection.transport.state == "closed"
    connection.loop.sleep(12)
    assert connection.transport.state == "aborted"


def test_a_connection_that_is_gone_is_not_looked_at(connection):
    connection.data_received(GET)
    connection.connection_lost(None)
    assert connection.loop.calls == []


# ---------------------------------------------------------------------- the limit


def count(server) -> int:
    return len(server.server.server_state.connections)


def wait_until(holds) -> None:
    until = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def is_closed(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


@pytest.mark.parametrize("sent", [b"", b"POST /bo", POST + b"content-length: 10\r\n\r\n"])
def test_above_the_limit_those_that_owe_a_request_go(sent):
    with serving(max_connections=8, client_timeout=600) as server, contextlib.ExitStack() as stack:
        opened = []
        for _ in range(30):
            opened.append(stack.enter_context(open_to(server)))
            opened[-1].sendall(sent)
        wait_until(lambda: sum(map(is_closed, opened)) == 22)  # which of those that came at once is the kernel's choice
        with client(server.url) as http:
            for _ in range(20):
                assert http.get("/short").status_code == 200


def test_above_the_limit_no_request_that_is_worked_on_goes():
    with serving(max_connections=4) as server, contextlib.ExitStack() as stack:
        working = [stack.enter_context(open_to(server)) for _ in range(4)]
        for connection in working:
            connection.sendall(b"GET /slow HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        wait_until(lambda: len(server.server.server_state.tasks) == 4)
        for _ in range(10):
            assert say(server.port, GET) == b""
        server.application.held.set()
        assert [status(until_closed(connection)) for connection in working] == [200] * 4
        assert status(say(server.port, GET.replace(b"host", b"connection: close\r\nhost"))) == 200


@pytest.mark.parametrize(
    "data",
    [
        b"\x00" * 100,
        b"GET /short HTTP/9.9\r\n\r\n",
        b"GET  /short HTTP/1.1\r\n\r\n",
        b"GET /short HTTP/1.1\r\na b: c\r\n\r\n",
        b"GET /short HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n",
        b"GET /short HTTP/1.1\r\nhost: x\r\na: " + b"x" * 100_000,
        b"GET /" + b"x" * 100_000,
        b"\r\n" * 50_000,
        POST + b"content-length: -1\r\n\r\n",
        POST + b"content-length: 1\r\ncontent-length: 2\r\n\r\n",
        POST + b"transfer-encoding: gzip\r\n\r\n",
        POST + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
        POST + b"transfer-encoding: chunked\r\n\r\n" + b"1" * 100,
        GET + b"\x00\x01\x02",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_what_is_no_http_is_an_error_in_openais_shape_or_closed(impatient, patient, data, caplog):
    answer = say(impatient.port, data, timeout=60)
    last = answer.split(b"HTTP/1.1 ")[-1]
    if last[:3] == b"400":
        error = json.loads(last.rpartition(b"\r\n\r\n")[2])["error"]
        assert set(error) == {"message", "type", "param", "code"}
    assert last[:3] in (b"", b"200", b"400", b"404", b"408")
    assert "Traceback" not in caplog.text
    assert status(say(patient.port, GET.replace(b"host", b"connection: close\r\nhost"))) == 200


def test_a_websocket_is_not_opened(patient):
    ask = b"GET /short HTTP/1.1\r\nhost: x\r\nconnection: upgrade, close\r\nupgrade: websocket\r\n"
    more = b"sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    assert status(say(patient.port, ask + more)) == 200, "answered as any other request"
