"""uvicorn's connections with deadlines for slow clients and a limit on their number."""

from __future__ import annotations

import asyncio
import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from idp_peft.serving.openai_errors import RequestError

MAX_CONNECTIONS, CLIENT_TIMEOUT = 512, 30.0
_READ = 16 * 2**10  # bytes; in chunks of one, 256 KiB (asyncio's own limit) are a quarter of a second without others


def connections(max_connections: int = MAX_CONNECTIONS, client_timeout: float = CLIENT_TIMEOUT) -> dict:
    """Settings for `uvicorn.run` and `uvicorn.Config`.

    Args:
        max_connections (`int`, defaults to `512`): connections at once. Above it, the one that has owed a request for
            longest is closed; where none owes one, the new one is.
        client_timeout (`float`, defaults to `30`): seconds within which a request must arrive whole, headers and body, from
            the connection or the last answer on; and that a client may leave an answer unread.
    """

    class Connection(_Connection):
        limit, patience = max_connections, client_timeout

    # Headers that say who was forwarded would reach the log; websockets have no use here.
    return {"http": Connection, "loop": "asyncio", "ws": "none", "proxy_headers": False, "server_header": False}


class _Connection(H11Protocol):
    limit: int
    patience: float

    def connection_made(self, transport: asyncio.Transport) -> None:
        transport.max_size = _READ
        super().connection_made(transport)
        self._since = self.loop.time()
        self._look_again()
        alive = [one for one in self.connections if not one.transport.is_closing()]
        if len(alive) > self.limit:
            # Those whose headers have not come go first, then those whose bodies have not, and of each the oldest.
            owing = (one for one in alive if one is not self and one._owes_request())
            first = min(owing, key=lambda one: (one.conn.their_state is not h11.IDLE, one._since), default=self)
            first.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._since = self.loop.time()  # the next request's time begins
        super().on_response_complete()

    def resume_writing(self) -> None:
        self._since = self.loop.time()  # slow, but reading
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's answer to what is no HTTP, in the shape of all other errors."""
        self._refuse(RequestError(400, msg))

    def _owes_request(self) -> bool:
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY)

    def _look_again(self) -> None:
        self._timer = self.loop.call_later(min(1.0, self.patience / 4), self._look)

    def _look(self) -> None:
        """Checks the deadlines every second, until the connection is closed."""
        now = self.loop.time()
        unread = self.flow.write_paused or self.transport.is_closing()
        if not unread and not self._owes_request():
            self._since = now
        elif now - self._since > self.patience:
            self._give_up(unread)
        self._look_again()

    def _give_up(self, unread: bool) -> None:
        began = self.conn.their_state is h11.SEND_BODY or self.conn.trailing_data[0]
        if unread or not began:
            self.transport.abort()
        else:
            self._since = self.loop.time()
            self._refuse(RequestError(408, f"the request did not arrive within {self.patience:g} seconds"))

    def _refuse(self, error: RequestError) -> None:
        """Answer without the application, and close."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer is on its way
            self.transport.abort()
            return
        body = json.dumps(error.body).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (h11.Response(status_code=error.status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()
