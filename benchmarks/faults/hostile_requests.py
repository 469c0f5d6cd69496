"""Requests as strangers could send them, drawn from a seed, and what an engine must never be sent."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

ROUTES = ("/v1/completions", "/v1/chat/completions")
# Fields that some engine reads, served or not.
FIELDS = [
    name
    for line in (
        "add_generation_prompt add_special_tokens allowed_token_ids audio bad_words best_of cache_prompt cache_salt",
        "chat_template chat_template_kwargs continue_final_message custom_logit_processor details documents",
        "dynatemp_range early_stopping ebnf echo extra_args frequency_penalty function_call functions grammar",
        "guided_choice guided_grammar guided_json guided_regex id_slot idp_prompt ignore_eos image_data include_reasoning",
        "include_stop_str_in_output input_embeds input_extra input_ids json_schema kv_transfer_params length_penalty",
        "logit_bias logits_processors logprob_start_len logprobs lora lora_path max_completion_tokens max_tokens",
        "media_io_kwargs messages metadata min_p min_tokens mirostat mm_processor_kwargs modalities model n n_discard",
        "n_keep n_predict n_probs parallel_tool_calls post_sampling_probs prediction presence_penalty priority prompt",
        "prompt_cache_key prompt_embeds prompt_logprobs prompt_token_ids reasoning_effort regex repeat_penalty",
        "repetition_penalty request_id response_format return_hidden_states return_token_ids return_tokens",
        "return_tokens_as_token_ids rid safety_identifier samplers seed service_tier session_params skip_special_tokens",
        "spaces_between_special_tokens stop stop_token_ids store stream stream_options structural_tag structured_outputs",
        "suffix temperature token_ids_logprob tool_choice tools top_k top_logprobs top_p truncate_prompt_tokens typical_p",
        "use_beam_search user verbose verbosity vllm_xargs web_search_options xtc_probability",
    )
    for name in line.split()
]
# What a client may well send, and what is a step beside it.
LIKELY = {
    "temperature": (0, 0.0, 1, 2.5, False, "0", -1),
    "logit_bias": ({"5": 1}, {"98": -100}, {"98": 100}, {" 5": 1}, {"5": -100, "97": 0}, {}),
    "repetition_penalty": (1, 1.2, 0.1, -2),
    "presence_penalty": (0, -2, -20),
    "stop": ("w5", ["w5", "w6"], ["<|idp:0:01|>"], [5]),
    "stop_token_ids": ([5], [98], []),
    "n": (1, 3, 10**6),
    "max_tokens": (1, 16, -1, 1e9),
    "response_format": ({"type": "text"}, {"type": "json_object"}, {"type": "structural_tag"}),
    "structured_outputs": ({"choice": ["w5"]}, {"regex": "w."}, {"grammar": "root ::= x"}),
    "idp_prompt": (0, 3, -1, "a", "auto", 4, [1], [0, 1], "z", 1.5, True, 10**30),
    "model": ("tiny", "other", 5, ["tiny"]),
    "prompt_logprobs": (None, 0, False, 1),
    "return_token_ids": (None, False, True),
    "echo": (False, True),
    "user": ("a", "\x00", "\u202e" * 500),
    "stream": (True, False),
    "top_p": (0.5, 1, 2),
    "seed": (0, -5, 2**70),
    "chat_template_kwargs": (
        {},
        {"a": "b"},
        {"idp_prompt": 0},
        {"chat_template": "x"},
        {"messages": []},
        {"bos_token": "x"},
    ),
    "tools": ([], [{"type": "function", "function": {"name": "f"}}], ["<|idp:0:01|>"], [[[]]]),
}
HOSTS = (
    "x/shutdown?",
    "x/shutdown#",
    "user@x/a?",
    "[::1",
    "x:99999",
    "",
    "?",
    "#",
    "x y",
    "http://x/a?",
    "\xff",
    "x\x1b[2J",
)
PATHS = (
    *ROUTES,
    *(route + end for route in ROUTES for end in ("/", "?a=/shutdown", "%0a", "%00", "/../../shutdown", ";x", "%2f..")),
    *(
        "//x/v1/completions",
        "/shutdown",
        "/v1/models",
        "/health",
        "/v1",
        "*",
        "http://x/shutdown",
        "/" + "a" * 3000,
        "/%",
    ),
)
HEADERS = (
    *("expect: 100-continue", "expect: x", "connection: upgrade", "upgrade: websocket", "transfer-encoding: gzip"),
    *("content-encoding: gzip", "accept-encoding: gzip", "te: trailers", "x: " + "y" * 20_000, "x : y", ": y", "x"),
    *("content-length: 5", "content-length: -1", "content-length: 1e3", "content-length: " + "9" * 30),
    *(
        "transfer-encoding: chunked",
        "transfer-encoding: chunked, chunked",
        "authorization: Bearer \xff",
        "accept: \xff",
    ),
    *(
        "cookie: a=b",
        "x-forwarded-host: x",
        "forwarded: host=x",
        "x-request-id: a",
        "traceparent: \x7f",
        "origin: null",
    ),
)
PIECES = (
    *(
        "w5",
        "w96",
        " ",
        "\n",
        "<s>",
        "<|idp:0:00|>",
        "<|idp:1:02|>",
        "<|idp:",
        "|>",
        "\x00",
        "\x1b[2J",
        "\u202e",
        "\ufffe",
    ),
    *("\ud800", "\U0001f600", "e\u0301" * 50, "w7 " * 70, "{{ 7 * 7 }}", "{% for a in b %}", "\\u0000", "a" * 5000),
)
NUMBERS = (0, 1, -1, 2, 5, 96, 97, 98, 128, 2**31, 2**63, 10**30, -0.0, 0.5, 1e308, -100, 100, 1e-300)


class Hostile(NamedTuple):
    """A request.

    Args:
        kind (`str`): what is wrong with it, if anything is.
        data (`bytes`): as it goes over the wire.
    """

    kind: str
    data: bytes


def hostile_requests(count: int, seed: int = 0) -> list[Hostile]:
    """So many requests, of all kinds in turn.

    Args:
        seed (`int`, defaults to `0`): the same requests each time.
    """
    draw = random.Random(seed)
    kinds = list(_KINDS)
    return [Hostile(kind, _KINDS[kind](draw)) for kind in (kinds[index % len(kinds)] for index in range(count))]


def what_is_wrong(
    method: str, path: bytes, query: bytes, headers: Collection[bytes], body: bytes, vocab_size: int, prompts: list
) -> str | None:
    """What an engine should not have been sent; `None` where all is well.

    Args:
        headers (`Collection[bytes]`): their names.
        vocab_size (`int`): token ids from there on are soft prompts' own.
        prompts (`list[list[int]]`): the token ids of each.
    """
    if (method, path) not in _SENT or query:
        return f"{method} {path!r} with the query {query!r}"
    if extra := set(headers) - _HEADERS_SENT:
        return f"the headers {sorted(extra)}"
    if method == "GET":
        return None
    content = json.loads(body)
    if extra := set(content) & _NEVER_SENT:
        return f"the fields {sorted(extra)}"
    if content.get("temperature") != 0 and not all(
        content["logit_bias"].get(str(token)) == -100 for row in prompts for token in row
    ):
        return "no bias against soft prompts' tokens"
    if path == ROUTES[1].encode():
        return "a soft prompt's name" if "<|idp:0:00|>" in json.dumps(content["messages"]) else None
    rows = content["prompt"] if isinstance(content["prompt"][0], list) else [content["prompt"]]
    for row in rows:
        front = [token for token in row if token >= vocab_size]
        if front and (front not in prompts or row[: len(front)] != front):
            return f"a soft prompt's tokens within a text: {row[:50]}"
    return None


_SENT = {("POST", ROUTES[0].encode()), ("POST", ROUTES[1].encode()), ("GET", b"/v1/models"), ("GET", b"/health")}
_HEADERS_SENT = {
    *(b"accept", b"accept-encoding", b"authorization", b"connection", b"content-length", b"content-type", b"host"),
    *(b"traceparent", b"tracestate", b"user-agent"),
}
_NEVER_SENT = {
    *(
        "allowed_token_ids",
        "bad_words",
        "chat_template",
        "custom_logit_processor",
        "details",
        "echo",
        "grammar",
        "id_slot",
    ),
    *("input_embeds", "input_ids", "kv_transfer_params", "logits_processors", "n_keep", "n_probs", "prompt_embeds"),
    *("prompt_logprobs", "prompt_token_ids", "return_hidden_states", "return_token_ids", "return_tokens", "samplers"),
    *("structural_tag", "suffix", "truncate_prompt_tokens", "use_beam_search", "vllm_xargs"),
}


def _value(draw: random.Random, depth: int = 0) -> Any:
    """Some JSON."""
    kind = draw.randrange(8 if depth < 4 else 5)
    if kind == 0:
        return draw.choice((None, True, False))
    if kind in (1, 2):
        return draw.choice(NUMBERS)
    if kind in (3, 4):
        return _text(draw)
    if kind == 5:
        return [_value(draw, depth + 1) for _ in range(draw.randrange(5))]
    names = [draw.choice(("type", "role", "content", "text", "5", "98", "json", *PIECES[:6])) for _ in range(4)]
    return {name: _value(draw, depth + 1) for name in names[: draw.randrange(5)]}


def _text(draw: random.Random) -> str:
    return "".join(draw.choice(PIECES) for _ in range(draw.randrange(4)))


def _valid(draw: random.Random) -> tuple[str, dict]:
    path = draw.choice(ROUTES)
    if path == ROUTES[0]:
        body = {"prompt": draw.choice(("w5 w6", [5, 6], ["w5", "w6 w7"], [[5], [6, 7]]))}
    else:
        body = {"messages": [{"role": "user", "content": "w5 w6"}]}
    return path, {**body, **draw.choice(({}, {"temperature": 0}, {"temperature": 1, "stream": True}))}


def _sent(path: str, body: bytes, *lines: str, method: str = "POST", host: str = "x") -> bytes:
    head = [f"{method} {path} HTTP/1.1", f"host: {host}", f"content-length: {len(body)}", "connection: close", *lines]
    return "\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + body


def _json(body: Any) -> bytes:
    return json.dumps(body).encode()


def _fields(draw: random.Random) -> bytes:
    path, body = _valid(draw)
    likely = draw.sample(list(LIKELY), draw.randrange(3))
    more = {name: draw.choice(LIKELY[name]) for name in likely}
    if draw.randrange(2):
        more[draw.choice(FIELDS)] = _value(draw)
    return _sent(path, _json({**body, **more}))


def _texts(draw: random.Random) -> bytes:
    path, body = _valid(draw)
    if "prompt" in body:
        body["prompt"] = draw.choice(
            (_text(draw), [_text(draw) for _ in range(3)], [draw.choice(NUMBERS) for _ in range(3)])
        )
    else:
        message = {"role": draw.choice(("user", "assistant", "system", "idp", _text(draw))), "content": _text(draw)}
        body["messages"] = [{**message, **draw.choice(({}, {"tool_calls": _value(draw)}, {"name": _value(draw)}))}] * 2
    return _sent(path, _json(body))


def _structure(draw: random.Random) -> bytes:
    path, body = _valid(draw)
    depth = draw.choice((10, 100, 900, 5000))
    content = draw.choice(
        (
            _json(_value(draw)),
            _json({name: _value(draw) for name in body}),
            b"[" * depth + b"]" * depth,
            b'{"messages": ' + b"[" * depth + b"1" + b"]" * depth + b"}",
            b'{"prompt": [5], "metadata": ' + b'{"a":' * depth + b"1" + b"}" * depth + b"}",
            b'{"prompt": "w5", "top_p": ' + draw.choice((b"NaN", b"1e999", b"-Infinity", b"1" * 5000)) + b"}",
            _json({"prompt": ["w5"] * draw.choice((257, 5000))}),
            _json({"prompt": [[5] * 64] * 600}),
            _json({**body, "metadata": {"a": [0] * 30_000}}),
        )
    )
    return _sent(path, content)


def _bytes(draw: random.Random) -> bytes:
    path, body = _valid(draw)
    content = bytearray(_json({**body, "user": "abcdefghijklmnopqrstuvwxyz"}))
    for _ in range(draw.randrange(1, 4)):
        place = draw.randrange(len(content))
        draw.choice(
            (
                lambda at: content.__setitem__(at, draw.randrange(256)),
                lambda at: content.insert(at, draw.choice(b'{}[]",:\\\x00\xff0')),
                lambda at: content.__delitem__(slice(at, min(len(content) - 1, at + 5))),
            )
        )(place)
    return _sent(path, bytes(content))


def _head(draw: random.Random) -> bytes:
    _, body = _valid(draw)
    lines = [draw.choice(HEADERS) for _ in range(draw.randrange(3))]
    method = draw.choice(("POST", "POST", "POST", "GET", "PUT", "OPTIONS", "CONNECT", "X" * 100))
    host = draw.choice(("x", draw.choice(HOSTS)))
    return _sent(draw.choice((draw.choice(ROUTES), draw.choice(PATHS))), _json(body), *lines, method=method, host=host)


def _framing(draw: random.Random) -> bytes:
    path, body = _valid(draw)
    content = _json(body)
    whole = _sent(path, content)
    chunked = _sent(path, b"", "transfer-encoding: chunked").replace(b"content-length: 0\r\n", b"")
    parts = b"".join(b"%x\r\n%s\r\n" % (1, content[at : at + 1]) for at in range(len(content)))
    return draw.choice(
        (
            whole[: draw.randrange(len(whole))],
            whole.replace(b"content-length: ", b"content-length: 9"),
            whole.replace(b"connection: close\r\n", b"") + whole,
            whole + b"\x00" * 1000,
            chunked + parts + b"0\r\n\r\n",
            chunked + parts + b"0\r\nx: y\r\n\r\n",
            chunked + parts,
            chunked + b"fffffffffffffffff\r\n" + content,
            chunked + b"-1\r\n" + content,
            chunked.replace(b"chunked", b"chunked\r\ncontent-length: 5") + parts + b"0\r\n\r\n",
            draw.randbytes(200),
        )
    )


_KINDS: dict[str, Callable[[random.Random], bytes]] = {
    "fields": _fields,
    "texts": _texts,
    "structure": _structure,
    "bytes": _bytes,
    "head": _head,
    "framing": _framing,
}
