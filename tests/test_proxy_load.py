"""Many texts, long ones, many requests: bounded before they are worked on, in turns, and ended when nobody waits."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

pytest.importorskip("starlette", reason="the proxy's web framework is in the extra 'serving'")
pytest.importorskip("uvicorn", reason="the proxy's server is in the extra 'serving'")

from idp_peft.serving.openai_errors import RequestError
from idp_peft.serving.prompted_request import RequestPrompter
from tests.loopback import Engine
from tests.raw_http import post
from tests.test_text_process import HOSTILE
from tests.tiny_proxy import error_of, starting, tiny_prompter

CHAT = [{"role": "user", "content": "w5"}]
MANY = [[5, 6, 7]] * 256


@pytest.fixture(scope="module")
def prompter(tmp_path_factory):
    return tiny_prompter(tmp_path_factory.mktemp("load"))


@pytest.fixture
def unread(prompter, monkeypatch):
    """No text may be tokenised."""

    def fail(*_):
        raise AssertionError("a text was read")

    monkeypatch.setattr(prompter.texts, "_ask", fail)


def limited(prompter, **limits) -> RequestPrompter:
    other = RequestPrompter(prompter.router, prompter.exported, **limits)
    other.texts = prompter.texts
    return other


# ---------------------------------------------------------------------- bounds


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (["w5"] * 257, "`prompt` has 257 texts, at most 256 are served"),
        (["w5"] * 200_000, "`prompt` has 200000 texts, at most 256 are served"),
        ([[5]] * 257, "`prompt` has 257 texts, at most 256 are served"),
        ("w5 " * 200_000, "`prompt` has 600000 characters, at most 524288 are served"),
        (["w5 " * 2000] * 100, "`prompt` has 600000 characters, at most 524288 are served"),
        ([5] * 200_000, "`prompt` has 200000 tokens, at most 64 are served"),
        ([[5] * 64] * 200 + [[5] * 65], "`prompt` has 65 tokens, at most 64 are served"),
    ],
)
def test_what_is_too_long_is_refused_before_it_is_read(prompter, unread, prompt, text):
    with pytest.raises(RequestError) as caught:
        prompter.completion({"prompt": prompt})
    assert (caught.value.status, caught.value.message, caught.value.param) == (400, text, "prompt")


def test_a_request_has_so_many_tokens_in_all_its_texts(prompter, unread):
    other = limited(prompter, max_request_tokens=100)
    assert len(other.completion({"prompt": [[5] * 50] * 2})[1]) == 2
    with pytest.raises(RequestError, match="`prompt` has 102 tokens in all its texts, at most 100 are served"):
        other.completion({"prompt": [[5] * 51] * 2})


def test_the_limits_can_be_set(prompter):
    other = limited(prompter, max_tokens=3, max_texts=2, max_characters=30)
    assert len(other.completion({"prompt": ["w5 w6 w7"] * 2})[1]) == 2
    for prompt, text in (
        (["w5"] * 3, "`prompt` has 3 texts, at most 2"),
        (["w5 w6 w7 w8"], "`prompt` has 4 tokens, at most 3"),
        (["w5" + " " * 29], "`prompt` has 31 characters, at most 30"),
    ):
        with pytest.raises(RequestError, match=text):
            other.completion({"prompt": prompt})


def test_a_long_context_is_served_up_to_what_a_choice_can_bear(prompter, monkeypatch):
    for positions, most in ((10**6, 8192), (512, 512), (None, 8192)):
        config = SimpleNamespace(max_position_embeddings=positions)
        monkeypatch.setattr(prompter.router.layer.decoder, "config", config)
        assert limited(prompter).max_tokens == most
        assert limited(prompter, max_tokens=10**5).max_request_tokens == 10**5


def test_what_a_chat_renders_to_is_refused_before_it_is_tokenised(prompter, monkeypatch):
    read = []
    real = prompter.texts.token_ids
    monkeypatch.setattr(prompter.texts, "token_ids", lambda *arguments: read.append(arguments) or real(*arguments))
    with pytest.raises(RequestError, match="it makes 600010 characters of them, at most 524288 are served"):
        prompter.chat({"messages": [{"role": "user", "content": "w5 " * 200_000}]})
    assert read == []


@pytest.mark.parametrize("arguments", ["[" * 100_000, "[" * 200 + "]" * 200, "[" + "1," * 30_000 + "1]", "NaN"])
def test_what_the_arguments_of_a_tool_call_hold_is_bounded_too(prompter, arguments):
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    with pytest.raises(RequestError) as caught:
        prompter.chat({"messages": [*CHAT, {"role": "assistant", "tool_calls": [call]}]})
    assert caught.value.status == 400


# ---------------------------------------------------------------------- turns


class Turns:
    """Stands in for a router: writes down each piece, and holds up those with texts of one length, or all."""

    def __init__(self, router, monkeypatch, held_up: int | None = None) -> None:
        self.pieces: list[list[list[int]]] = []
        self.held_up = held_up
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.real = router.route
        monkeypatch.setattr(router, "route", self.route)

    def route(self, rows):
        self.pieces.append(rows)
        if self.held_up in (None, len(rows[0])):
            self.begun.set()
            assert self.go_on.wait(60)
        return self.real(rows)


def when_called(monkeypatch, prompter, count: int) -> threading.Event:
    """Set when the proxy has taken up that many requests: none of them waits for a thread yet."""
    called, arrived = [], threading.Event()
    real = prompter.completion_pieces

    def pieces(body):
        called.append(body)
        if len(called) == count:
            arrived.set()
        return real(body)

    monkeypatch.setattr(prompter, "completion_pieces", pieces)
    return arrived


def test_others_are_served_between_the_pieces_of_a_long_request(serve, prompter, monkeypatch):
    turns, both = Turns(prompter.router, monkeypatch), when_called(monkeypatch, prompter, 2)
    proxy = serve(Engine())
    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(proxy.post, "/v1/completions", json={"prompt": MANY})
        assert turns.begun.wait(60)
        short = pool.submit(proxy.post, "/v1/completions", json={"prompt": [9]})
        assert both.wait(60)
        turns.go_on.set()
        assert short.result().status_code == long.result().status_code == 200
    assert len(turns.pieces) == 256 // 8 + 1
    assert turns.pieces.index([[9]]) <= 2


@pytest.mark.parametrize(("held_up", "others"), [(4000, (1, 512, 513, 2048)), (1000, (1, 512, 4000))])
def test_texts_of_other_lengths_do_not_stand_in_each_others_way(prompter, monkeypatch, held_up, others):
    turns = Turns(prompter.router, monkeypatch, held_up)
    with starting(limited(prompter, max_tokens=5000)) as start, ThreadPoolExecutor(1) as pool:
        proxy = start(Engine())
        first = pool.submit(proxy.post, "/v1/completions", json={"prompt": [5] * held_up})
        assert turns.begun.wait(60)
        for length in others:
            assert proxy.post("/v1/completions", json={"prompt": [5] * length}).status_code == 200
        assert not first.done()
        turns.go_on.set()
        assert first.result().status_code == 200


def test_a_choice_never_holds_up_what_needs_none(serve, prompter, monkeypatch):
    turns = Turns(prompter.router, monkeypatch)
    proxy = serve(Engine())
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(proxy.post, "/v1/completions", json={"prompt": MANY})
        assert turns.begun.wait(60)
        assert proxy.get("/health").status_code == 200
        assert proxy.get("/v1/models").status_code == 200
        error_of(proxy.post("/v1/completions", json={"id_slot": 1}), 400)
        assert not long.done()
        turns.go_on.set()
        assert long.result().status_code == 200


def test_nothing_more_is_begun_for_a_client_that_left(serve, prompter, monkeypatch):
    turns = Turns(prompter.router, monkeypatch)
    engine = Engine()
    proxy = serve(engine)
    with socket.create_connection(("127.0.0.1", proxy.base_url.port)) as hasty:
        hasty.sendall(post(b"/v1/completions", {"prompt": MANY}))
        assert turns.begun.wait(60)
    assert proxy.get("/health").status_code == 200  # by now the proxy has seen the end of that connection
    turns.go_on.set()
    assert proxy.post("/v1/completions", json={"prompt": [9]}).status_code == 200
    assert turns.pieces == [MANY[:8], [[9]]]
    assert [body["prompt"][-1] for body in engine.seen] == [9]


def test_a_template_that_hangs_holds_up_no_completion(serve, prompter, monkeypatch):
    engine = Engine()
    proxy = serve(engine)
    assert proxy.post("/v1/chat/completions", json={"messages": CHAT}).status_code == 200
    with ThreadPoolExecutor(8) as pool, monkeypatch.context() as patched:
        patched.setattr(prompter.router.tokenizer, "chat_template", HOSTILE["nested loops"][0])
        patched.setattr(prompter.texts, "seconds", 0.3)
        hanging = [pool.submit(proxy.post, "/v1/chat/completions", json={"messages": CHAT}) for _ in range(4)]
        assert proxy.post("/v1/completions", json={"prompt": "w5"}).status_code == 200
        for answer in hanging:
            message = error_of(answer.result(), 400)["message"]
            assert message.startswith("the chat template refuses these messages: it needs more than 0.3 seconds")
    assert proxy.post("/v1/chat/completions", json={"messages": CHAT}).status_code == 200


# ---------------------------------------------------------------------- places


def test_more_requests_than_there_is_room_for_are_a_503(serve):
    engine = Engine()
    engine.mode = "hang"
    proxy = serve(engine, max_requests=1)
    with socket.create_connection(("127.0.0.1", proxy.base_url.port)) as first:
        first.sendall(post(b"/v1/completions", {"prompt": [5]}))
        assert engine.running.wait(60)
        for path, body in (("completions", {"prompt": [5]}), ("chat/completions", {"messages": CHAT})):
            answer = proxy.post(f"/v1/{path}", json=body)
            assert error_of(answer, 503)["code"] == "overloaded"
            assert answer.headers["retry-after"] == "1"
        assert proxy.get("/health").status_code == 200, "alive, if busy"
    assert engine.abandoned.wait(60)
    engine.mode = "answer"
    assert until_there_is_room(proxy).status_code == 200


def test_a_stream_keeps_its_place_until_it_ends(serve):
    engine = Engine()
    proxy = serve(engine, max_requests=1)
    body = {"prompt": [5], "stream": True, "max_tokens": 100_000}
    with proxy.stream("POST", "/v1/completions", json=body) as stream:
        next(lines := stream.iter_lines())
        error_of(proxy.post("/v1/completions", json=body), 503)
        del lines
    assert engine.abandoned.wait(60)
    assert until_there_is_room(proxy).status_code == 200
    for wrong in ({"prompt": ""}, {"id_slot": 1}, {"prompt": [98]}):
        error_of(proxy.post("/v1/completions", json=wrong), 400)
    assert proxy.post("/v1/completions", json={"prompt": [5]}).status_code == 200, "what is refused leaves its place"


def until_there_is_room(proxy):
    """The engine is let go of a moment before the place is."""
    until = time.monotonic() + 60
    while (answer := proxy.post("/v1/completions", json={"prompt": [5]})).status_code == 503:
        assert time.monotonic() < until
        time.sleep(0.01)
    return answer
