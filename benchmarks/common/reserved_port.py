"""A port of this machine that a child process will listen on, and that nobody else is given meanwhile."""

from __future__ import annotations

import socket


def reserved_port() -> tuple[int, socket.socket]:
    """A free port on loopback, and the socket that holds it: keep that one open as long as the port is used.

    A port that is looked up and let go may be given to two processes. The first one listens, the second one fails, and
    whoever waits for the second one to answer is answered by the first. The socket here is bound but does not listen: a
    server that sets `SO_REUSEADDR`, as all do, can bind the port, and the system gives it to nobody who asks for any free
    port.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    return holder.getsockname()[1], holder
