"""A page to try a served adapter in a browser: a chat beside the same chat without a prompt."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib import resources

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

PAGE = "/playground"
_FILES = {
    "": ("index.html", "text/html"),
    "/script.js": ("script.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
}
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def playground_routes(
    model: str, config, has_chats: bool, needs_key: bool, choice: Callable[[Request], Awaitable[Response]]
) -> list[Route]:
    """The page, what it has to know, and the scores of a choice. The page itself needs no token; what it asks for does.

    Args:
        model (`str`): the name that requests give.
        config (`IDPConfig`): the adapter's.
        has_chats (`bool`): whether its tokenizer has a chat template.
        needs_key (`bool`): whether requests must carry a bearer token.
        choice (`Callable`): answers `POST /playground/choice`.
    """
    names = config.prompt_names or [str(number) for number in range(config.num_prompts)]
    info = {"model": model, "prompts": names, "selection": config.selection, "chat": has_chats, "needs_key": needs_key}
    routes = [Route(f"{PAGE}{path}", _static(*file), methods=["GET"]) for path, file in _FILES.items()]

    async def tell(_request: Request) -> Response:
        return JSONResponse(info, headers=_HEADERS)

    return [*routes, Route(f"{PAGE}/info", tell, methods=["GET"]), Route(f"{PAGE}/choice", choice, methods=["POST"])]


def _static(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    content = resources.files(__name__).joinpath(name).read_bytes()

    async def serve(_request: Request) -> Response:
        return Response(content, media_type=kind, headers=_HEADERS)

    return serve
