"""`python -m benchmarks.faults.proxy`: strangers against a proxy, and how each attempt ended.

An attempt **survived** where it was answered as it should be, was **refused** where it was answered with an error that says why, or
was closed; anything else is **lost**: an error of the proxy itself, no end at all, another's answer, a request that the engine
must not be sent, or an engine that computes on for nobody.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.faults.hostile_requests import ROUTES, hostile_requests, what_is_wrong
from benchmarks.faults.served_model import (
    TEMPLATES,
    VOCAB,
    FaultyEngine,
    RunningProxy,
    exported_model,
    running_engine,
)

RESULTS = Path(__file__).parent / "results"
CLIENT_TIMEOUT = 10
SURVIVED, REFUSED, LOST = "survived", "refused", "lost"
_REFUSALS = {400, 401, 404, 405, 408, 413, 501, 503}
_PATIENCE = 120  # seconds for anything
UNFINISHED = (
    b"",
    b"POST /v1/comp",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n",
    b'POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n{"prompt": ',
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{",
)


class Attack:
    """The parties, and what attempts on them have in common."""

    def __init__(self, proxy: RunningProxy, engine: FaultyEngine, prompts: list[list[int]]) -> None:
        self.proxy, self.engine, self.prompts = proxy, engine, prompts

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.proxy.port), timeout=_PATIENCE)

    def ask(self, data: bytes) -> bytes:
        """What comes back until the connection is closed."""
        with self.connect() as connection, contextlib.suppress(ConnectionError):
            connection.sendall(data)
            return _all_of(connection)
        return b""

    def post(self, body: dict, route: str = ROUTES[0]) -> tuple[int, bytes]:
        """Status and body of an ordinary request's answer."""
        content = json.dumps(body).encode()
        head = f"POST {route} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\nconnection: close\r\n\r\n"
        return _split(self.ask(head.encode() + content))

    def ordinary(self, name: str = "somebody") -> str:
        """How an ordinary request ends, which must survive whatever others do."""
        status, body = self.post({"prompt": "w5 w6", "user": name})
        return SURVIVED if status == 200 and json.loads(body)["choices"][0]["text"] == name else LOST


def hostile(attack: Attack, count: int) -> Iterator[str]:
    """Requests drawn at random."""
    requests = hostile_requests(count)
    attack.engine.seen.clear()
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda request: attack.ask(request.data), requests))
    for request, answer in zip(requests, answers, strict=True):
        yield _end_of(answer, may_be_closed=request.kind in ("head", "framing"))
    yield from (LOST for sent in attack.engine.seen if what_is_wrong(*sent, VOCAB, attack.prompts))


def half_open(attack: Attack, count: int) -> Iterator[str]:
    """Connections that never send a whole request, all at once, and ordinary requests meanwhile."""
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(attack.connect()) for _ in range(count)]
        for index, connection in enumerate(connections):
            with contextlib.suppress(ConnectionError):
                connection.sendall(UNFINISHED[index % len(UNFINISHED)])
        yield from (attack.ordinary() for _ in range(20))
        for connection in connections:
            try:
                yield _end_of(_all_of(connection), may_be_closed=True)
            except TimeoutError:
                yield LOST


def big_requests(attack: Attack, count: int) -> Iterator[str]:
    """Bodies that are long, or cost much, each with an ordinary request beside it."""
    bodies = [
        json.dumps({"prompt": ["w5"] * 150_000}).encode(),
        json.dumps({"prompt": "w5 " * 300_000}).encode(),
        json.dumps({"prompt": [5] * 300_000}).encode(),
        json.dumps({"prompt": [[5] * 64] * 3000}).encode(),
        json.dumps({"prompt": [5], "logit_bias": {str(token): 1 for token in range(60_000)}}).encode(),
        json.dumps({"messages": [{"role": "user", "content": "w5"}] * 25_000}).encode(),
        b'{"prompt": ' + b"[" * 900_000 + b"}",
        b'{"prompt": "w5", "metadata": {"a": [' + b"[]," * 300_000 + b"[]]}}",
        b'{"prompt": "' + b"\\ud83d\\ude00" * 80_000 + b'"}',
        b"x" * 8 * 2**20,
    ]
    chunked = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
    for index in range(count):
        body = bodies[index % len(bodies)]
        head = b"POST %s HTTP/1.1\r\nhost: x\r\nconnection: close\r\n" % ROUTES[b"messages" in body[:20]].encode()
        data = head + b"content-length: %d\r\n\r\n" % len(body) + body
        if index % 3 == 2:
            data = chunked + b"".join(b"1\r\n%c\r\n" % byte for byte in body[: 2**19]) + b"0\r\n\r\n"
        with ThreadPoolExecutor(1) as pool:
            big = pool.submit(attack.ask, data)
            yield attack.ordinary()
            # Of what is refused while it is still being sent, a reset may be all that arrives.
            yield _end_of(big.result(), may_be_closed=len(body) > 2**20 or index % 3 == 2)


def engine_answers(attack: Attack, count: int) -> Iterator[str]:
    """Answers of 400 MB, gzip bombs, answers that never end and that break off."""
    for index in range(count):
        mode = ("large", "bomb", "endless", "cut")[index % 4]
        with attack.connect() as connection:
            content = json.dumps({"prompt": [5], "user": mode}).encode()
            head = (
                f"POST {ROUTES[0]} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\nconnection: close\r\n\r\n"
            )
            connection.sendall(head.encode() + content)
            if mode == "endless":  # nobody reads
                yield attack.ordinary()
                yield SURVIVED
            elif mode == "large":
                length = sum(map(len, iter(lambda: connection.recv(2**20), b"")))
                yield SURVIVED if length > attack.engine.large else LOST
            else:
                answer = _all_of(connection)
                status, whole = _split(answer)[0], answer.endswith(b"0\r\n\r\n")
                yield REFUSED if (status == 502 if mode == "bomb" else not whole) else LOST
        yield attack.ordinary()
    yield _all_let_go(attack)


def disconnects(attack: Attack, count: int) -> Iterator[str]:
    """Clients that leave at any moment, of long choices, of an engine that hangs, and of streams."""
    draw = random.Random(0)

    def leave(mode: str, seconds: float) -> str:
        prompt = [[5, 6, 7]] * 256 if mode == "choice" else [5]
        content = json.dumps({"prompt": prompt, "user": "hang" if mode == "choice" else mode}).encode()
        with attack.connect() as connection:
            head = f"POST {ROUTES[0]} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n"
            connection.sendall(head.encode() + content)
            time.sleep(seconds)
        return SURVIVED

    with ThreadPoolExecutor(20) as pool:
        ends = [pool.submit(leave, draw.choice(("choice", "hang", "stream")), draw.random() / 2) for _ in range(count)]
        yield attack.ordinary()
        yield from (end.result() for end in ends)
    yield _all_let_go(attack)
    yield attack.ordinary()


def templates(attack: Attack, count: int) -> Iterator[str]:
    """Chats that make a stranger's template take for ever, or all memory, with ordinary requests meanwhile."""

    def chat(content: str) -> tuple[int, bytes]:
        return attack.post({"messages": [{"role": "user", "content": content}], "user": "x"}, ROUTES[1])

    with ThreadPoolExecutor(8) as pool:
        names = list(TEMPLATES)
        hanging = [pool.submit(chat, names[index % len(names)]) for index in range(count)]
        yield from (attack.ordinary() for _ in range(20))
        for answer in hanging:
            status, body = answer.result()
            yield REFUSED if status == 400 and b"the chat template refuses" in body else LOST
    yield SURVIVED if chat("w5")[0] == 200 else LOST


def concurrent(attack: Attack, count: int) -> Iterator[str]:
    """Ordinary requests from 50 threads, every tenth one hostile, each of which must get its own answer."""
    others = hostile_requests(count // 10, seed=1)

    def one(index: int) -> str:
        if index % 10 == 9:
            request = others[index // 10]
            return _end_of(attack.ask(request.data), may_be_closed=request.kind in ("head", "framing"))
        return attack.ordinary(f"client {index}")

    with ThreadPoolExecutor(50) as pool:
        yield from pool.map(one, range(count))


ATTACKS: dict[str, tuple[Callable[[Attack, int], Iterator[str]], int]] = {
    "hostile requests": (hostile, 1500),
    "half-open connections": (half_open, 1000),
    "big requests": (big_requests, 30),
    "engine's answers": (engine_answers, 12),
    "clients that leave": (disconnects, 200),
    "chat templates": (templates, 20),
    "requests at once": (concurrent, 2000),
}


def _all_of(connection: socket.socket) -> bytes:
    received = bytearray()
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(2**20):
            received += part
    return bytes(received)


def _split(answer: bytes) -> tuple[int, bytes]:
    """Status and body of an answer; 0 where there is none."""
    answer = answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    return (int(head.split(b" ", 2)[1]) if head.startswith(b"HTTP/1.1 ") else 0), body


def _end_of(answer: bytes, may_be_closed: bool) -> str:
    status, _ = _split(answer)
    if status == 200:
        return SURVIVED
    return REFUSED if status in _REFUSALS or (may_be_closed and not answer) else LOST


def _all_let_go(attack: Attack) -> str:
    """Whether the engine is asked for nothing any more."""
    until = time.monotonic() + _PATIENCE
    while attack.engine.open and time.monotonic() < until:
        time.sleep(0.05)
    return LOST if attack.engine.open else SURVIVED


def count_all(scale: float = 1.0, only: str | None = None, on_attack=lambda name: None) -> dict:
    """Every attack in turn on one proxy, and what its process held at most.

    Args:
        scale (`float`): of the number of attempts.
        only (`str`, *optional*): the name of one attack.
    """
    engine, found = FaultyEngine(), {}
    with tempfile.TemporaryDirectory() as folder, running_engine(engine) as url:
        model = exported_model(Path(folder))
        prompts = [row["token_ids"] for row in json.loads((model / "idp_prompts.json").read_text())["prompts"]]
        flags = ("--client_timeout", str(CLIENT_TIMEOUT))
        with RunningProxy(model, url, Path(folder) / "log", *flags) as proxy:
            attack = Attack(proxy, engine, prompts)
            first = attack.ordinary()
            before = proxy.memory("VmRSS")
            for name, (run, count) in ATTACKS.items():
                if only in (None, name):
                    on_attack(name)
                    began = time.monotonic()
                    ends = list(run(attack, max(1, int(count * scale))))
                    found[name] = {"tried": len(ends), **{end: ends.count(end) for end in (SURVIVED, REFUSED, LOST)}}
                    found[name]["seconds"] = round(time.monotonic() - began, 1)
            ends = [first, attack.ordinary()]
            found["before and after"] = {"tried": 2, **{end: ends.count(end) for end in (SURVIVED, REFUSED, LOST)}}
            memory = {"before": before, "most": proxy.memory("VmHWM"), "after": proxy.memory("VmRSS")}
            return {"attacks": found, "memory_mib": memory, "tracebacks": proxy.tracebacks}


def table(result: dict) -> list[str]:
    from benchmarks.common.markdown import head, row

    lines = head(["attack", "tried", SURVIVED, REFUSED, LOST])
    for name, counts in result["attacks"].items():
        lines.append(row([name, *(str(counts[column]) for column in ("tried", SURVIVED, REFUSED, LOST))]))
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults.proxy", description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of attempts")
    parser.add_argument("--only", choices=ATTACKS, help="one attack alone")
    parser.add_argument("--output", type=Path, default=RESULTS / "proxy.json")
    options = parser.parse_args(arguments)
    from idp_peft.evaluation import environment

    result = count_all(options.scale, options.only, lambda name: print(f"{name} ...", flush=True))
    result["environment"] = environment()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(table(result)))
    print(f"memory of the proxy, MiB: {result['memory_mib']}; tracebacks in its log: {result['tracebacks']}")
    return int(result["tracebacks"] > 0 or any(counts[LOST] for counts in result["attacks"].values()))


if __name__ == "__main__":
    raise SystemExit(main())
