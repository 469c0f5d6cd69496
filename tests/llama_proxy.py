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
CHAT = [{"role": "system", "content": "abc"}, {"role": "user", "content": "hello"}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
# A model that knows nothing calls a tool where its call's first token is the likeliest.
CALLING = {
    "tools": TOOLS,
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "logit_bias": {"3": 100},
    "max_tokens": 200,
}
# Calls are written as Hermes and Qwen write them, whom llama.cpp knows.
TEMPLATE = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content or '' }}{% for call in m.tool_calls or [] %}"
    '<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>'
    "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


@contextlib.contextmanager
def llama_proxy(folder: Path, **settings) -> Iterator[str]:
    """The address of a proxy that wants a token, in front of a tiny model with three prompts; further `ProxySettings`."""
    one = on_file(folder, positions=2048, chat_template=TEMPLATE, tool_call=True, prompts={"selection": "centroid"})
    exported = one.export(folder / "served")
    engine = LlamaServer(folder / "served" / "model.gguf", slots=2, context=2048)
    prompter = RequestPrompter(Router.from_pretrained(folder / "served"), exported)
    app = proxy_app(prompter, ProxySettings(engine.url, MODEL, api_key=KEY, **settings))
    with Server(app, **connections()) as server:
        yield f"{server.url}/v1"
