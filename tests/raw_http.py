"""Requests written by hand, as no client would write them, and an engine that writes down all that it gets."""

from __future__ import annotations

import json
import socket


def say(port: int, data: bytes, timeout: float = 20.0) -> bytes:
    """What comes back on a connection of its own, until it is closed."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as connection:
        connection.sendall(data)
        return until_closed(connection)


def until_closed(connection: socket.socket) -> bytes:
    received = bytearray()
    try:
        while part := connection.recv(65536):
            received += part
    except ConnectionResetError:
        pass
    return bytes(received)


def post(path: bytes, body: dict | bytes, *headers: bytes, host: bytes | None = b"x") -> bytes:
    """A request that asks for the connection to be closed."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [b"POST " + path + b" HTTP/1.1", *headers, b"content-length: %d" % len(body), b"connection: close"]
    if host is not None:
        lines.insert(1, b"host: " + host)
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def status(answer: bytes) -> int:
    """0 where there was none."""
    answer = answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


class Recorder:
    """An engine, as an ASGI application, that answers everything and keeps (method, path, query, headers, body)."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bytes, bytes, dict[bytes, bytes], bytes]] = []

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.seen.append((scope["method"], scope["raw_path"], scope["query_string"], dict(scope["headers"]), body))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": b'{"choices": []}'})
