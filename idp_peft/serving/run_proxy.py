"""The proxy as a process."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from idp_peft.files.error_reason import missing
from idp_peft.serving.exported import ExportedModel
from idp_peft.serving.prompted_request import FIRST_TURN, MAX_TEXTS, RequestPrompter
from idp_peft.serving.request_fields import REFUSED
from idp_peft.serving.router import Router

logger = logging.getLogger(__name__)

API_KEY, ENGINE_API_KEY = "IDP_PROXY_API_KEY", "IDP_ENGINE_API_KEY"


def run_proxy(
    model: str,
    engine: str,
    *,
    served_model_name: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8100,
    max_body_bytes: int = 2**20,
    max_tokens: int | None = None,
    max_texts: int = MAX_TEXTS,
    max_request_tokens: int | None = None,
    max_characters: int | None = None,
    max_requests: int = 256,
    max_connections: int = 512,
    client_timeout: float = 30.0,
    timeout: float = 600.0,
    allow_origins: Sequence[str] | None = None,
    engine_fields: Sequence[str] = (),
    playground: bool = False,
    engine_kind: str = "openai",
    chat_choice: str = FIRST_TURN,
) -> None:
    """Serve until interrupted. Bearer tokens come from `$IDP_PROXY_API_KEY` (what requests must carry) and
    `$IDP_ENGINE_API_KEY` (what the engine wants), so that they stand in no process list.

    Args:
        model (`str`): a folder that `idp-peft export` wrote.
        engine (`str`): address of the engine that serves it.
        served_model_name (`str`, *optional*, defaults to `model`): the name the engine serves it under.
        host (`str`, defaults to `"127.0.0.1"`): where to listen.
        port (`int`, defaults to `8100`): of it.
        max_body_bytes (`int`, defaults to 1 MiB): of a request.
        max_tokens (`int`, *optional*), max_texts (`int`, defaults to `256`), max_request_tokens (`int`, *optional*),
            max_characters (`int`, *optional*): of a text, and of a request; see [`RequestPrompter`].
        max_requests (`int`, defaults to `256`): that are worked on at once.
        max_connections (`int`, defaults to `512`), client_timeout (`float`, defaults to `30`): see
            [`client_connections.connections`].
        timeout (`float`, defaults to `600`): seconds that the engine may be silent.
        allow_origins (`Sequence[str]`, *optional*, defaults to none): origins of the web pages that may call from a
            browser, `"*"` for all.
        engine_fields (`Sequence[str]`): fields of the engine's own that requests may hold.
        playground (`bool`, defaults to `False`): serve a page to try it, at `/playground`.
        engine_kind (`str`, defaults to `"openai"`): `"ollama"` for Ollama, which has a model per prompt; see [`ProxySettings`].
        chat_choice (`str`, defaults to `"first_turn"`): what of a chat chooses its prompt; see [`RequestPrompter`].

    Raises:
        `ValueError`: for a folder, an address or an origin that is none.
        `ImportError`: where starlette or uvicorn are missing.
    """
    address = urlsplit(engine)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise ValueError(f"`engine` must be an address like http://127.0.0.1:8000, got {engine!r}")
    if engine_kind not in ("openai", "ollama"):
        raise ValueError(f"`engine_kind` must be 'openai' or 'ollama', got {engine_kind!r}")
    if not 0 < port < 2**16:
        raise ValueError(f"`port` must be between 1 and {2**16 - 1}, got {port}")
    limits = {
        "max_body_bytes": max_body_bytes,
        "max_tokens": max_tokens,
        "max_texts": max_texts,
        "max_request_tokens": max_request_tokens,
        "max_characters": max_characters,
        "max_requests": max_requests,
        "max_connections": max_connections,
        "client_timeout": client_timeout,
        "timeout": timeout,
    }
    for name, value in limits.items():
        if value is not None and value <= 0:
            raise ValueError(f"`{name}` must be positive, got {value}")
    origins = tuple(map(_origin, allow_origins or ()))
    if refused := sorted(set(engine_fields) & set(REFUSED)):
        raise ValueError(f"`engine_fields` must not hold {refused[0]!r}: {REFUSED[refused[0]]}")
    try:
        import uvicorn

        from idp_peft.serving.client_connections import connections
        from idp_peft.serving.proxy import ProxySettings, proxy_app
    except ImportError as error:
        raise missing('the proxy needs a web framework: pip install "idp-peft[serving]"', error) from error
    exported = ExportedModel.from_folder(model)
    settings = ProxySettings(
        engine.rstrip("/"),
        served_model_name or model,
        os.environ.get(API_KEY) or None,
        os.environ.get(ENGINE_API_KEY) or None,
        max_body=max_body_bytes,
        timeout=timeout,
        max_requests=max_requests,
        allow_origins=origins,
        playground=playground,
        engine_kind=engine_kind,
    )
    prompter = RequestPrompter(
        Router.from_pretrained(model),
        exported,
        max_tokens,
        max_texts,
        max_request_tokens,
        max_characters,
        engine_fields,
        chat_choice,
    )
    if settings.api_key is None and host not in ("127.0.0.1", "::1", "localhost"):
        logger.warning("listening on %s without a bearer token: set $%s to ask for one", host, API_KEY)
    if settings.api_key is None and "*" in origins:
        logger.warning("any web page can send requests without a bearer token: set $%s to ask for one", API_KEY)
    uvicorn.run(
        proxy_app(prompter, settings),
        host=host,
        port=port,
        log_level="info",
        **connections(max_connections, client_timeout),
    )


def _origin(text: str) -> str:
    """An origin as a browser sends it: in small letters, without the scheme's usual port."""
    if text != "*" and not re.fullmatch(r"https?://[^/?#@\s]+", text, re.IGNORECASE):
        raise ValueError(
            "`allow_origins` must hold origins like https://chat.example.org (a scheme, a host and perhaps a port, nothing "
            f"behind them), or '*' for all, got {text!r}"
        )
    text = text.lower()
    return text.removesuffix(":443" if text.startswith("https:") else ":80")
