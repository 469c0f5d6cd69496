"""A small OpenAI-compatible proxy: it routes each request and forwards it to an engine that serves the exported model."""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
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
from idp_peft.serving.prompted_request import Pieces, RequestPrompter

try:
    import httpx2 as httpx
except ImportError:
    import httpx  # its predecessor, with the same interface

logger = logging.getLogger(__name__)

CHOSEN = "x-idp-prompt"  # response header: the prompt of each text
COMPLETIONS, CHAT, MODELS, HEALTH = "/v1/completions", "/v1/chat/completions", "/v1/models", "/health"
# How many pieces of work of each kind run at once: see `Piece`.
_LANES = {"chat": 2, "short": 1, "middle": 1, "long": 1}
_CONNECT_SECONDS = 5
_HELD = 256 * 2**10  # bytes of an answer that are waited for; of a longer one, each part is sent as it comes
# Of a request's headers and an answer's, only these are handed on.
_FORWARDED = ("accept", "traceparent", "tracestate")
_RETURNED = ("content-type", "cache-control", "retry-after", "x-request-id")


@dataclass(frozen=True)
class ProxySettings:
    """Where the engine is and what the proxy accepts.

    Args:
        engine (`str`): the engine's address: `http://127.0.0.1:8000`.
        model (`str`): the name that requests give, and the engine knows.
        api_key (`str`, *optional*): bearer token that requests must carry.
        engine_api_key (`str`, *optional*): bearer token that the engine wants. Without it and without `api_key`, the
            request's own is handed on.
        max_body (`int`, defaults to 1 MiB): bytes of a request.
        timeout (`float`, defaults to `600`): seconds that the engine may be silent.
        allow_origins (`tuple[str]`, defaults to none): origins of the web pages that may call from a browser, `("*",)` for
            all.
        max_requests (`int`, defaults to `256`): requests that are worked on at once.
        playground (`bool`, defaults to `False`): serve a page to try it, at `/playground`.
        engine_kind (`str`, defaults to `"openai"`): `"ollama"` has a model per prompt, `MODEL-2` of prompt 2 and `MODEL` of none: a
            chat goes to the model of its prompt as it came, and there are no completions.
    """

    engine: str
    model: str
    api_key: str | None = None
    engine_api_key: str | None = None
    max_body: int = 2**20
    timeout: float = 600.0
    allow_origins: tuple[str, ...] = ()
    max_requests: int = 256
    playground: bool = False
    engine_kind: str = "openai"


def proxy_app(prompter: RequestPrompter, settings: ProxySettings) -> ASGIApp:
    """The proxy as an ASGI application.

    Routes: `POST /v1/completions`, `POST /v1/chat/completions`, `GET /v1/models`, `GET /v1/models/NAME`, `GET /health`.

    Args:
        prompter (`RequestPrompter`): who chooses prompts.
        settings (`ProxySettings`): see there.
    """
    proxy, page = _Proxy(prompter, settings), []
    if settings.playground:
        from idp_peft.serving.playground import playground_routes

        has_chats, needs_key = bool(prompter.router.tokenizer.chat_template), settings.api_key is not None
        page = playground_routes(settings.model, prompter.router.config, has_chats, needs_key, proxy.choice)
    app = Starlette(
        routes=[
            Route(COMPLETIONS, proxy.completions, methods=["POST"]),
            Route(CHAT, proxy.chat, methods=["POST"]),
            Route(MODELS, proxy.models, methods=["GET"]),
            Route(f"{MODELS}/{{name:path}}", proxy.model, methods=["GET"]),
            Route(HEALTH, proxy.health, methods=["GET"]),
            *page,
        ],
        lifespan=proxy.lifespan,
        exception_handlers={RequestError: _answer_error, HTTPException: _answer_http, Exception: _answer_unexpected},
    )
    app.router.redirect_slashes = False  # it would redirect to the host that the request names
    return AllowedOrigins(app, settings.allow_origins) if settings.allow_origins else app


class _Proxy:
    def __init__(self, prompter: RequestPrompter, settings: ProxySettings) -> None:
        self.prompter, self.settings = prompter, settings
        self.running = 0
        self.description = {
            "id": settings.model,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "idp-peft",
        }

    @contextlib.asynccontextmanager
    async def lifespan(self, _app) -> AsyncIterator[None]:
        timeout = httpx.Timeout(self.settings.timeout, connect=_CONNECT_SECONDS, pool=None)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
        self.lanes = {lane: anyio.CapacityLimiter(pieces) for lane, pieces in _LANES.items()}
        # `trust_env=False`: a machine's own HTTP proxy has no place between this one and its engine.
        async with httpx.AsyncClient(
            base_url=self.settings.engine, timeout=timeout, limits=limits, trust_env=False
        ) as self.client:
            yield

    def _for_ollama(self, body: dict, chosen: list[int]) -> dict:
        """A chat for the model of its prompt, whose template puts that in front. Ollama reads no bias and no variables."""
        if "messages" not in body:
            raise RequestError(400, "Ollama renders every text as a chat: send `/v1/chat/completions`", "prompt")
        own = {name: value for name, value in body.items() if name not in ("chat_template_kwargs", "logit_bias")}
        return {**own, "model": self.settings.model if chosen[0] < 0 else f"{self.settings.model}-{chosen[0]}"}

    async def completions(self, request: Request) -> Response:
        return await self._post(request, COMPLETIONS, self.prompter.completion_pieces)

    async def chat(self, request: Request) -> Response:
        return await self._post(request, CHAT, self.prompter.chat_pieces)

    async def choice(self, request: Request) -> Response:
        """Which prompt a request would get, and the scores; the engine is not asked."""
        body = await self._body(request)

        async def choose() -> Response:
            chosen = await self._in_turns(self.prompter.choice_pieces(body))
            scores = None if chosen.scores is None else chosen.scores[0].tolist()
            return JSONResponse({"prompt": int(chosen.prompt_ids[0]), "scores": scores})

        with self._place():
            return await _while_connected(request, choose)

    async def models(self, request: Request) -> Response:
        """A list of the model that is served, and no other that the engine may have."""
        return await self._described(request, lambda model: {"object": "list", "data": [model]})

    async def model(self, request: Request) -> Response:
        return await self._described(request, lambda model: model, request.path_params["name"])

    async def _described(self, request: Request, shape: Callable[[dict], dict], name: str | None = None) -> Response:
        """The model, with what the engine says of it, if it knows it by this name (llama.cpp answers to any)."""
        self._check_token(request)
        self._check_model({"model": name})
        answer = await self._get(request, MODELS, self._headers(request))
        if answer.status_code != 200:
            return answer
        if isinstance(answer, _Stream):  # longer than any list of models, or events
            await _let_go(answer.engine)
        return JSONResponse(shape({**self.description, **_entry(answer, self.settings.model)}))

    async def health(self, request: Request) -> Response:
        return await self._get(request, HEALTH, {})

    async def _get(self, request: Request, path: str, headers: dict) -> Response:
        message = self._message("GET", path, headers)
        return await _while_connected(request, lambda: self._ask(message))

    async def _body(self, request: Request) -> dict:
        """What a request with the right token asks of the served model."""
        self._check_token(request)
        body = _parsed(await self._read(request))
        self._check_model(body)
        return body

    async def _post(self, request: Request, path: str, pieces: Callable[[dict], Pieces]) -> Response:
        body = await self._body(request)

        async def prompt_and_ask() -> Response:
            prompted, chosen = await self._in_turns(pieces(body))
            if self.settings.engine_kind == "ollama":
                prompted = self._for_ollama(prompted, chosen)
            headers = {**self._headers(request), "content-type": "application/json"}
            response = await self._ask(self._message("POST", path, headers, json.dumps(prompted).encode()))
            response.headers[CHOSEN] = ",".join(map(str, chosen))
            return response

        with contextlib.ExitStack() as stack:
            stack.enter_context(self._place())
            response = await _while_connected(request, prompt_and_ask)
            if isinstance(response, _Stream):
                response.when_done = stack.pop_all()
        return response

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        if self.running >= self.settings.max_requests:
            raise RequestError(
                503, f"{self.running} requests are worked on, which is as many as there may be", code="overloaded"
            )
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    async def _in_turns(self, pieces: Generator):
        """All pieces, each in a thread. In between others have their turn, and nothing is begun for a client that left."""
        result = None
        while True:
            try:
                piece = pieces.send(result)
            except StopIteration as done:
                return done.value
            result = await anyio.to_thread.run_sync(piece.work, limiter=self.lanes[piece.lane])

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
            shown = repr(name) if isinstance(name, str) else f"of type {type(name).__name__}"
            raise RequestError(
                404,
                f"the model {shown} does not exist: this serves {self.settings.model!r}",
                "model",
                "model_not_found",
            )

    async def _read(self, request: Request) -> bytes:
        """The request's body, read up to its limit."""
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

    def _headers(self, request: Request) -> dict[str, str | bytes]:
        headers = {name: request.headers[name].encode("latin-1") for name in _FORWARDED if name in request.headers}
        if self.settings.engine_api_key is not None:
            headers["authorization"] = f"Bearer {self.settings.engine_api_key}"
        elif self.settings.api_key is None and "authorization" in request.headers:
            headers["authorization"] = request.headers["authorization"].encode("latin-1")
        return headers

    def _message(self, method: str, path: str, headers: dict, content: bytes | None = None) -> httpx.Request:
        # Not compressed: a few bytes can be made to grow into gigabytes.
        headers = {**headers, "accept-encoding": "identity"}
        return self.client.build_request(method, path, headers=headers, content=content)

    async def _ask(self, message: httpx.Request) -> Response:
        try:
            engine = await self.client.send(message, stream=True)
            try:
                answer = await _answer_of(engine)
            except BaseException:
                await _let_go(engine)
                raise
        except httpx.HTTPError as error:
            raise _engine_error(error) from error
        if not isinstance(answer, _Stream):
            await _let_go(engine)
        return answer


async def _answer_of(engine: httpx.Response) -> Response:
    """The engine's answer: whole if it is short, else a stream."""
    if not 200 <= engine.status_code < 600 or engine.headers.get("content-encoding", "identity") != "identity":
        raise RequestError(502, "the engine's answer cannot be read", code="engine_failed")
    headers = {name: engine.headers[name] for name in _RETURNED if name in engine.headers}
    chunks, start = engine.aiter_raw(), bytearray()
    if not _is_events(engine):
        async for chunk in chunks:
            start += chunk
            if len(start) > _HELD:
                break
        else:
            return Response(bytes(start), status_code=engine.status_code, headers=headers)
    return _Stream(engine, bytes(start), chunks, headers)


async def _while_connected(request: Request, work: Callable[[], Awaitable[Response]]) -> Response:
    """The result of some work; cancelled when the client disconnects."""
    answer: list[Response] = []
    async with anyio.create_task_group() as group:

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        async def do() -> None:
            try:
                answer.append(await work())
            except RequestError as error:
                answer.append(_error_response(error))
            group.cancel_scope.cancel()

        group.start_soon(watch)
        group.start_soon(do)
    # Nobody is there to read the other one.
    return answer[0] if answer else Response(status_code=499)


class _BrokenOff(Exception):
    """The engine broke off within an answer that is not a stream of events."""


class _Stream(StreamingResponse):
    """The engine's answer as it comes. Where the engine dies, events end with one that says so, and anything else without
    its end, so that nobody takes it for whole. However it ends, the engine is let go."""

    def __init__(self, engine: httpx.Response, start: bytes, rest: AsyncIterator[bytes], headers: dict) -> None:
        self.engine, self.start, self.rest = engine, start, rest
        self.when_done = contextlib.ExitStack()
        super().__init__(self._chunks(), status_code=engine.status_code, headers=headers)

    async def _chunks(self) -> AsyncIterator[bytes]:
        if self.start:
            yield self.start
        try:
            async for chunk in self.rest:
                yield chunk
        except httpx.HTTPError as error:
            failed = _engine_error(error)
            if not _is_events(self.engine):
                raise _BrokenOff from error
            yield f"\n\ndata: {json.dumps(failed.body)}\n\n".encode()

    async def __call__(self, scope, receive, send) -> None:
        with self.when_done:
            try:
                await super().__call__(scope, receive, send)
            except _BrokenOff:
                pass
            finally:
                await _let_go(self.engine)


async def _let_go(engine: httpx.Response) -> None:
    with anyio.CancelScope(shield=True):
        await engine.aclose()


def _is_events(engine: httpx.Response) -> bool:
    return "text/event-stream" in engine.headers.get("content-type", "")


def _engine_error(error: httpx.HTTPError) -> RequestError:
    """The error for an engine that cannot be reached or does not answer."""
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


def _entry(models: Response, name: str) -> dict:
    """What an engine's list of models says of one of them: nothing where it is not there."""
    try:
        return next((entry for entry in json.loads(models.body)["data"] if entry["id"] == name), {})
    except (AttributeError, ValueError, RecursionError, LookupError, TypeError) as error:
        raise RequestError(502, "the engine's list of models cannot be read", code="engine_failed") from error


def _error_response(error: RequestError) -> JSONResponse:
    headers = {401: {"www-authenticate": "Bearer"}, 503: {"retry-after": "1"}}.get(error.status)
    return JSONResponse(error.body, status_code=error.status, headers=headers)


async def _answer_error(_request: Request, error: Exception) -> JSONResponse:
    return _error_response(error)


async def _answer_http(request: Request, error: Exception) -> JSONResponse:
    """An unknown path or method."""
    routes = [(method, route.path_format) for route in request.app.routes for method in route.methods - {"HEAD"}]
    served = ", ".join(f"{method} {path}" for method, path in routes)
    message = f"{error.detail}: {request.method} {request.scope['path']}. This serves {served}"
    response = _error_response(RequestError(error.status_code, message))
    response.headers.update(error.headers or {})  # which methods a path allows
    return response


async def _answer_unexpected(request: Request, error: Exception) -> JSONResponse:
    logger.error("%s %r failed", request.method, request.scope["path"], exc_info=error)
    return _error_response(RequestError(500, "the proxy failed: see its log"))
