"""A proxy in front of an unmodified llama.cpp, for clients that nobody here wrote."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from idp_peft.serving import Router, proxy_app
from idp_peft.serving.client_connections import connections
from idp_peft.serving.prompted_request import RequestPrompter
from idp_peft.serving.proxy import ProxySettings
from tests.llama_cpp import LlamaServer
from tests.loopback import Server
from tests.test_export_gguf import on_file

MODEL, KEY = "org/tiny", "right"
TEMPLATE = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool.function.name }}{% endfor %}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@contextlib.contextmanager
def llama_proxy(folder: Path) -> Iterator[str]:
    """The address of a proxy that wants a token, in front of a tiny model with three prompts."""
    one = on_file(folder, positions=2048, chat_template=TEMPLATE, prompts={"selection": "centroid"})
    exported = one.export(folder / "served")
    engine = LlamaServer(folder / "served" / "model.gguf", slots=2, context=2048)
    prompter = RequestPrompter(Router.from_pretrained(folder / "served"), exported)
    settings = ProxySettings(engine.url, MODEL, api_key=KEY)
    with Server(proxy_app(prompter, settings), **connections()) as server:
        yield f"{server.url}/v1"
