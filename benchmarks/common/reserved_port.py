"""A port of this machine that a child process will listen on, and that nobody else is given meanwhile."""

from __future__ import annotations

import socket


def reserved_port() -> tuple[int, socket.socket]:
    """A free port on loopback, and the socket that holds it: keep that one open as long as the port is used.

    A port that is looked up and let go may be given to a second process before the first one listens. Two servers that
    set `SO_REUSEPORT`, as llama.cpp's and vLLM's do, then share it, and each answers some requests of the other. The
    socket is bound but does not listen: it allows a server to bind the port, and the system gives it to nobody who asks
    for any free port.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "SO_REUSEPORT"):
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    holder.bind(("127.0.0.1", 0))
    return holder.getsockname()[1], holder
