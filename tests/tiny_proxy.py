"""A proxy for a tiny model, in front of engines on this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from idp_peft.serving import ExportedModel, Router, export_to_vocab, proxy_app
from idp_peft.serving.client_connections import connections
from idp_peft.serving.prompted_request import RequestPrompter
from idp_peft.serving.proxy import ProxySettings
from tests.loopback import Engine, Server, client
from tests.tiny_serving import saved


def tiny_prompter(folder: Path, **limits) -> RequestPrompter:
    """Four prompts of four tokens, for a model of 97 tokens and 64 positions."""
    one = saved(folder, num_prompts=4, num_virtual_tokens=4, prompt_names=["a", "b", "c", "d"])
    exported = ExportedModel.from_folder(export_to_vocab(one.adapter, folder / "exported", one.base))
    return RequestPrompter(Router.from_pretrained(exported.folder), exported, **limits)


@contextlib.contextmanager
def starting(prompter: RequestPrompter, **connection_limits) -> Iterator[Callable]:
    """Gives start(engine, **settings) -> a client of a proxy in front of the engine; ends them all."""
    prompter.texts.token_ids(["w5"])  # started by now, however long that takes on a busy machine
    with contextlib.ExitStack() as stack:

        def start(engine: Engine | str, **settings):
            if isinstance(engine, Engine):
                engine = stack.enter_context(Server(engine.app)).url
            app = proxy_app(prompter, ProxySettings(engine, "tiny", **settings))
            server = stack.enter_context(Server(app, **connections(**connection_limits)))
            return stack.enter_context(client(server.url))

        yield start


def error_of(response, status: int) -> dict:
    """The error of an answer, which must have this status and OpenAI's shape."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error
