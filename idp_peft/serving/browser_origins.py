"""Which web pages may call the proxy from a browser (CORS)."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send


class AllowedOrigins(CORSMiddleware):
    """Answers a browser's preflight, and marks every answer to an allowed page as one that the page may read.

    It stands around the whole application, so that errors are marked too. All other requests pass as if it were not there.

    Args:
        app (`ASGIApp`): the application.
        origins (`Sequence[str]`): the pages' origins, `https://chat.example.org`; `"*"` for all.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        super().__init__(
            app, allow_origins=origins, allow_methods=("GET", "POST"), allow_headers=("*",), expose_headers=("*",)
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        origin = Headers(scope=scope).get("origin") if scope["type"] == "http" else None
        if origin is not None and self.is_allowed_origin(origin):
            await super().__call__(scope, receive, send)
        else:
            await self.app(scope, receive, send)
