"""A small OpenAI-compatible proxy: it routes each request and forwards it to an engine that serves the exported model."""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from idp_peft.serving.browser_origins import AllowedOrigins
from idp_peft.serving.openai_errors import RequestError
from idp_peft.serving.prompted_request import RequestPrompter

try:
    import httpx2 as httpx
except ImportError:
    import httpx  # its predecessor, with the same interface

logger = logging.getLogger(__name__)

CHOSEN = "x-idp-prompt"  # response header: the prompt of each text
_CONNECT_SECONDS = 5
# What belongs to one connection, or is made anew; and what must not be handed on. (The engine answers the proxy, not a
# web page: where the page is from is no matter of its own, and neither is who may read the answer.)
_ABOUT_PAGES = "access-control-"
_NOT_FORWARDED = {
    "host",
    "content-length",
    "content-type",
    "connection",
    "transfer-encoding",
    "accept-encoding",
    "expect",
    "origin",
}
_NOT_RETURNED = {
    "content-length",
    "connection",
    "transfer-encoding",
    "content-encoding",
    "server",
    "date",
    "keep-alive",
}


@dataclass(frozen=True)
class ProxySettings:
    """Where the engine is and what the proxy accepts.

    Args:
        engine (`str`): the engine's address: `http://127.0.0.1:8000`.
        model (`str`): the name that requests give, and the engine knows.
        api_key (`str`, *optional*): bearer token that requests must carry.
        engine_api_key (`str`, *optional*): bearer token that the engine wants. Without it and without `api_key`, the
            request's own is handed on.
        max_body (`int`, defaults to 4 MiB): bytes of a request.
        timeout (`float`, defaults to `600`): seconds that the engine may be silent.
        allow_origins (`tuple[str]`, defaults to none): origins of the web pages that may call from a browser, `("*",)` for
            all.
    """

    engine: str
    model: str
    api_key: str | None = None
    engine_api_key: str | None = None
    max_body: int = 4 * 2**20
    timeout: float = 600.0
    allow_origins: tuple[str, ...] = ()


def proxy_app(prompter: RequestPrompter, settings: ProxySettings) -> ASGIApp:
    """The proxy as an ASGI application.

    Routes: `POST /v1/completions`, `POST /v1/chat/completions`, `GET /v1/models`, `GET /health`.

    Args:
        prompter (`RequestPrompter`): who chooses prompts.
        settings (`ProxySettings`): see there.
    """
    proxy = _Proxy(prompter, settings)
    app = Starlette(
        routes=[
            Route("/v1/completions", proxy.completions, methods=["POST"]),
            Route("/v1/chat/completions", proxy.chat, methods=["POST"]),
            Route("/v1/models", proxy.models, methods=["GET"]),
            Route("/health", proxy.health, methods=["GET"]),
        ],
        lifespan=proxy.lifespan,
        exception_handlers={RequestError: _answer_error, HTTPException: _answer_http, Exception: _answer_unexpected},
    )
    return AllowedOrigins(app, settings.allow_origins) if settings.allow_origins else app


class _Proxy:
    def __init__(self, prompter: RequestPrompter, settings: ProxySettings) -> None:
        self.prompter, self.settings = prompter, settings

    @contextlib.asynccontextmanager
    async def lifespan(self, _app) -> AsyncIterator[None]:
        timeout = httpx.Timeout(self.settings.timeout, connect=_CONNECT_SECONDS, pool=None)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
        self.routing = anyio.CapacityLimiter(1)  # one at a time: routing is computing
        # `trust_env=False`: a machine's own HTTP proxy has no place between this one and its engine.
        async with httpx.AsyncClient(
            base_url=self.settings.engine, timeout=timeout, limits=limits, trust_env=False
        ) as self.client:
            yield

    async def completions(self, request: Request) -> Response:
        return await self._post(request, self.prompter.completion)

    async def chat(self, request: Request) -> Response:
        return await self._post(request, self.prompter.chat)

    async def models(self, request: Request) -> Response:
        self._check_token(request)
        return await self._forward(
            request, self.client.build_request("GET", "/v1/models", headers=self._headers(request))
        )

    async def health(self, request: Request) -> Response:
        return await self._forward(request, self.client.build_request("GET", "/health"))

    async def _post(self, request: Request, prompted: Callable[[dict], tuple[dict, list[int]]]) -> Response:
        self._check_token(request)
        body = _parsed(await self._read(request))
        self._check_model(body)
        body, chosen = await anyio.to_thread.run_sync(prompted, body, limiter=self.routing)
        message = self.client.build_request(
            "POST",
            request.url.path,
            content=json.dumps(body).encode(),
            headers={**self._headers(request), "content-type": "application/json"},
        )
        response = await self._forward(request, message)
        response.headers[CHOSEN] = ",".join(map(str, chosen))
        return response

    def _check_token(self, request: Request) -> None:
        if self.settings.api_key is None:
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if (
            not hmac.compare_digest(token.strip().encode(), self.settings.api_key.encode())
            or scheme.lower() != "bearer"
        ):
            raise RequestError(401, "the bearer token is missing or wrong", code="invalid_api_key")

    def _check_model(self, body: dict) -> None:
        name = body.get("model")
        if name is None:
            body["model"] = self.settings.model
        elif name != self.settings.model:
            raise RequestError(
                404,
                f"the model {name!r} does not exist: this serves {self.settings.model!r}",
                "model",
                "model_not_found",
            )

    async def _read(self, request: Request) -> bytes:
        """The body, read no further than it may be long."""
        too_large = RequestError(413, f"the body must not be longer than {self.settings.max_body} bytes")
        stated = request.headers.get("content-length", "")
        if stated.isdecimal() and int(stated) > self.settings.max_body:
            raise too_large
        body = bytearray()
        try:
            async for chunk in request.stream():
                body += chunk
                if len(body) > self.settings.max_body:
                    raise too_large
        except ClientDisconnect as error:
            raise RequestError(400, "the body is incomplete") from error
        return bytes(body)

    def _headers(self, request: Request) -> dict[str, str]:
        headers = _without(_NOT_FORWARDED, request.headers)
        if self.settings.api_key is not None or self.settings.engine_api_key is not None:
            headers.pop("authorization", None)
        if self.settings.engine_api_key is not None:
            headers["authorization"] = f"Bearer {self.settings.engine_api_key}"
        return headers

    async def _forward(self, request: Request, message: httpx.Request) -> Response:
        """The engine's answer; given up where the client goes away."""
        answer: list[Response] = []
        async with anyio.create_task_group() as group:

            async def watch() -> None:
                while (await request.receive())["type"] != "http.disconnect":
                    pass
                group.cancel_scope.cancel()

            async def ask() -> None:
                answer.append(await self._ask(message))
                group.cancel_scope.cancel()

            group.start_soon(watch)
            group.start_soon(ask)
        # Nobody is there to read the other one.
        return answer[0] if answer else Response(status_code=499)

    async def _ask(self, message: httpx.Request) -> Response:
        try:
            response = await self.client.send(message, stream=True)
            headers = _without(_NOT_RETURNED, response.headers)
            if "text/event-stream" in response.headers.get("content-type", ""):
                return _Stream(response, headers)
            try:
                return Response(await response.aread(), status_code=response.status_code, headers=headers)
            finally:
                await response.aclose()
        except httpx.HTTPError as error:
            return _error_response(_engine_error(error))


class _Stream(StreamingResponse):
    """The engine's events as they come; where it dies, one more that says so. However it ends, the engine is let go."""

    def __init__(self, engine: httpx.Response, headers: dict[str, str]) -> None:
        self.engine = engine
        super().__init__(self._events(), status_code=engine.status_code, headers=headers)

    async def _events(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self.engine.aiter_bytes():
                yield chunk
        except httpx.HTTPError as error:
            yield f"\n\ndata: {json.dumps(_engine_error(error).body)}\n\n".encode()

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self.engine.aclose()


def _without(names: set[str], headers: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in headers.items()
        if name.lower() not in names and not name.lower().startswith(_ABOUT_PAGES)
    }


def _engine_error(error: httpx.HTTPError) -> RequestError:
    """What to say of an engine that could not be asked, or did not answer."""
    logger.warning("the engine failed: %s", repr(error))
    if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
        return RequestError(504, "the engine did not answer in time", code="engine_timeout")
    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
        return RequestError(502, "the engine cannot be reached", code="engine_unreachable")
    return RequestError(502, "the engine broke off", code="engine_failed")


def _parsed(body: bytes) -> dict:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise RequestError(400, f"the body must be a JSON object, got {type(content).__name__}")
    return content


def _error_response(error: RequestError) -> JSONResponse:
    headers = {"www-authenticate": "Bearer"} if error.status == 401 else None
    return JSONResponse(error.body, status_code=error.status, headers=headers)


async def _answer_error(_request: Request, error: Exception) -> JSONResponse:
    return _error_response(error)


async def _answer_http(request: Request, error: Exception) -> JSONResponse:
    """An unknown path or method."""
    return _error_response(RequestError(error.status_code, f"{error.detail}: {request.method} {request.url.path}"))


async def _answer_unexpected(request: Request, error: Exception) -> JSONResponse:
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _error_response(RequestError(500, "the proxy failed: see its log"))
