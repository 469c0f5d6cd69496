"""The proxy: each request gets its prompt, the engine's answer comes back as it is, and what goes wrong is said properly."""

from __future__ import annotations

import concurrent.futures
import json
import socket
from urllib.parse import quote

import pytest
import torch

pytest.importorskip("starlette", reason="the proxy's web framework is in the extra 'serving'")
pytest.importorskip("uvicorn", reason="the proxy's server is in the extra 'serving'")

from transformers import AutoModelForCausalLM, AutoTokenizer

from idp_peft.serving import ExportedModel, Router, export_to_vocab, proxy_app
from idp_peft.serving.prompted_request import RequestPrompter
from idp_peft.serving.proxy import ProxySettings
from idp_peft.serving.run_proxy import run_proxy
from idp_peft_cli import main
from tests.loopback import Engine, Server, client
from tests.patience import PATIENCE
from tests.raw_http import post
from tests.tiny import VOCAB
from tests.tiny_chats import chat_tokenizer
from tests.tiny_folder import tiny_texts
from tests.tiny_proxy import error_of, starting
from tests.tiny_serving import saved

CHAT = [{"role": "user", "content": "w5 w11 w7 w30"}]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return saved(
        tmp_path_factory.mktemp("proxy"), num_prompts=4, num_virtual_tokens=4, prompt_names=["a", "b", "c", "d"]
    )


@pytest.fixture(scope="module")
def exported(one):
    return ExportedModel.from_folder(export_to_vocab(one.adapter, one.base.parent / "exported", one.base))


@pytest.fixture(scope="module")
def prompter(exported):
    return RequestPrompter(Router.from_pretrained(exported.folder), exported)


@pytest.fixture(scope="module")
def unasked(prompter):
    """An engine that no request may reach, and clients of a proxy in front of it, without and with a bearer token."""
    engine = Engine()
    with starting(prompter) as start:
        yield engine, start(engine), start(engine, api_key="right")
    assert engine.headers == []


def chosen_by(one, ids: list[int]) -> int:
    with torch.no_grad():
        one.model(input_ids=torch.tensor([ids]))
    return int(one.model.last_selection.prompt_ids[0])


# ---------------------------------------------------------------------- the promise


def test_an_answer_is_what_the_adapters_own_choice_generates(serve, one, exported):
    plain = AutoModelForCausalLM.from_pretrained(exported.folder).eval()
    proxy = serve(Engine(plain, AutoTokenizer.from_pretrained(exported.folder)))
    tokenizer, chosen = chat_tokenizer(), set()
    for text in tiny_texts(8, words=6):
        ids = tokenizer(text)["input_ids"]
        expected = one.model.generate(input_ids=torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :]
        for prompt in (text, ids):
            answer = proxy.post("/v1/completions", json={"prompt": prompt, "temperature": 0, "max_tokens": 8})
            assert answer.json()["choices"][0]["token_ids"] == expected.tolist()
            assert answer.headers["x-idp-prompt"] == str(chosen_by(one, ids))
        chosen.add(answer.headers["x-idp-prompt"])
    assert len(chosen) > 1, "else any prompt would do"


def test_a_chat_is_answered_behind_the_prompt_it_chooses(serve, one, exported):
    plain = AutoModelForCausalLM.from_pretrained(exported.folder).eval()
    proxy = serve(Engine(plain, AutoTokenizer.from_pretrained(exported.folder)))
    chats = [CHAT, [{"role": "user", "content": [{"type": "text", "text": "w9 w8"}, {"type": "text", "text": "w7"}]}]]
    for chat, content in zip(chats, ["w5 w11 w7 w30", "w9 w8 w7"], strict=True):
        as_text = [{"role": "user", "content": content}]
        rendered = chat_tokenizer().apply_chat_template(as_text, tokenize=False, add_generation_prompt=True)
        ids = chat_tokenizer()(rendered, add_special_tokens=False)["input_ids"]
        expected = one.model.generate(input_ids=torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :]
        answer = proxy.post("/v1/chat/completions", json={"messages": chat, "temperature": 0})
        assert answer.json()["choices"][0]["token_ids"] == expected.tolist()
        assert answer.headers["x-idp-prompt"] == str(chosen_by(one, ids))


# ---------------------------------------------------------------------- what the engine is sent


def test_the_engine_gets_token_ids_with_the_prompt_in_front_and_all_other_fields(serve, exported):
    engine = Engine()
    proxy = serve(engine)
    texts = tiny_texts(3, words=5)
    answer = proxy.post(
        "/v1/completions", json={"model": "tiny", "prompt": texts, "n": 2, "stop": ["x"], "temperature": 0}
    )
    prompts = [int(chosen) for chosen in answer.headers["x-idp-prompt"].split(",")]
    rows = [exported.token_ids[p] + chat_tokenizer()(text)["input_ids"] for p, text in zip(prompts, texts, strict=True)]
    assert engine.seen == [{"model": "tiny", "prompt": rows, "n": 2, "stop": ["x"], "temperature": 0}]


@pytest.mark.parametrize(("forced", "number"), [(2, 2), ("d", 3), (-1, -1), (None, None)])
def test_a_request_can_force_its_prompt(serve, exported, one, forced, number):
    engine = Engine()
    proxy = serve(engine)
    ids = [5, 11, 7]
    number = chosen_by(one, ids) if number is None else number
    answer = proxy.post("/v1/completions", json={"prompt": ids, "temperature": 0, "idp_prompt": forced})
    assert answer.headers["x-idp-prompt"] == str(number)
    assert engine.seen[-1]["prompt"] == (exported.token_ids[number] if number >= 0 else []) + ids
    proxy.post("/v1/chat/completions", json={"messages": CHAT, "idp_prompt": -1, "temperature": 0})
    assert engine.seen[-1] == {"messages": CHAT, "temperature": 0, "model": "tiny"}


def test_sampling_requests_are_told_never_to_pick_a_prompts_token(serve, exported):
    engine = Engine()
    proxy = serve(engine)
    for body in ({"prompt": "w5"}, {"prompt": "w5", "temperature": 0.7, "logit_bias": {"5": 3, "97": -100}}):
        proxy.post("/v1/completions", json=body)
        expected = {str(token): -100.0 for token in range(VOCAB, 128)}
        assert engine.seen[-1]["logit_bias"] == {**({"5": 3} if "logit_bias" in body else {}), **expected}
    proxy.post("/v1/completions", json={"prompt": "w5", "temperature": 0})
    assert "logit_bias" not in engine.seen[-1], "an untied model's greedy decoding cannot"


def test_a_tied_models_greedy_requests_are_told_as_well(tmp_path):
    other = saved(tmp_path, tied=True)
    tied = ExportedModel.from_folder(export_to_vocab(other.adapter, tmp_path / "exported", other.base, keep_tied=True))
    body, _ = RequestPrompter(Router.from_pretrained(tied.folder), tied).completion({"prompt": "w5", "temperature": 0})
    assert body["logit_bias"] == tied.logit_bias


def test_variables_of_the_chat_template_reach_the_engine_and_the_choice(serve, prompter):
    engine = Engine()
    tokenizer = prompter.router.tokenizer
    template = tokenizer.chat_template
    tokenizer.chat_template = template + "{% if loud is defined %}{{ loud }}{% endif %}"
    try:
        body = {"messages": CHAT, "temperature": 0, "chat_template_kwargs": {"loud": "w90 w91 w92"}}
        answer = serve(engine).post("/v1/chat/completions", json=body)
        text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True, loud="w90 w91 w92")
    finally:
        tokenizer.chat_template = template
    chosen = int(answer.headers["x-idp-prompt"])
    assert engine.seen[-1]["chat_template_kwargs"] == {"loud": "w90 w91 w92", "idp_prompt": chosen}
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[-3:] == [90, 91, 92]
    assert chosen == int(prompter.router.route([ids]).prompt_ids[0])


def test_the_clients_own_token_goes_to_the_engine_unless_the_proxy_has_one(serve):
    engine = Engine()
    own = {"authorization": "Bearer mine"}
    serve(engine).post("/v1/completions", json={"prompt": "w5"}, headers=own)
    assert engine.headers[-1]["authorization"] == "Bearer mine"
    serve(engine, api_key="mine").post("/v1/completions", json={"prompt": "w5"}, headers=own)
    assert "authorization" not in engine.headers[-1]
    serve(engine, api_key="mine", engine_api_key="its").get("/v1/models", headers=own)
    assert engine.headers[-1]["authorization"] == "Bearer its"


# ---------------------------------------------------------------------- wrong requests


@pytest.mark.parametrize(
    ("body", "param", "text"),
    [
        (b"{not json", None, "the body is not JSON"),
        (b"[" * 100_000, None, "the body is not JSON"),
        (b"\xff\xfe", None, "the body is not JSON"),
        (b"[1, 2]", None, "the body must be a JSON object, got list"),
        (b"", None, "the body is not JSON"),
        ({}, "prompt", "`prompt` must be a text, a list of token ids, or a list of either"),
        ({"prompt": []}, "prompt", "`prompt` must be a text"),
        ({"prompt": {"a": 1}}, "prompt", "`prompt` must be a text"),
        ({"prompt": ["w5", [5]]}, "prompt", "`prompt` must be a text"),
        ({"prompt": ""}, "prompt", "`prompt` must not be empty"),
        ({"prompt": [[]]}, "prompt", "`prompt` must not be empty"),
        ({"prompt": [5, True]}, "prompt", "`prompt` must hold token ids from 0 to 96"),
        ({"prompt": [5, 1.5]}, "prompt", "`prompt` must hold token ids from 0 to 96"),
        ({"prompt": [5, VOCAB]}, "prompt", "the rest are soft prompts' own"),
        ({"prompt": "w5 <|idp:1:02|> w6"}, "prompt", "the rest are soft prompts' own"),
        ({"prompt": [5] * 65}, "prompt", "`prompt` has 65 tokens, at most 64 are served"),
        ({"prompt": "\ud800"}, "prompt", "`prompt` is no valid text"),
        ({"prompt": "w5", "idp_prompt": 4}, "idp_prompt", "`idp_prompt` must be between -1 (no prompt) and 3"),
        ({"prompt": "w5", "idp_prompt": "z"}, "idp_prompt", "no prompt of this adapter"),
        ({"prompt": "w5", "idp_prompt": [0, 1]}, "idp_prompt", "`idp_prompt` must be integers of shape [1]"),
        ({"prompt": "w5", "idp_prompt": {}}, "idp_prompt", "`idp_prompt` must"),
        ({"prompt": "w5", "echo": True}, "echo", "`echo` is not served with soft prompts"),
        ({"prompt": "w5", "prompt_logprobs": 1}, "prompt_logprobs", "is not served with soft prompts"),
        ({"prompt": "w5", "truncate_prompt_tokens": 3}, "truncate_prompt_tokens", "would cut the soft prompt off"),
        ({"prompt": "w5", "logit_bias": [1]}, "logit_bias", "`logit_bias` must be an object"),
    ],
)
def test_a_bad_completion_is_a_400_that_says_why(unasked, body, param, text):
    engine, proxy, _ = unasked
    content = body if isinstance(body, bytes) else json.dumps(body)
    error = error_of(proxy.post("/v1/completions", content=content), 400)
    assert text in error["message"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert engine.seen == []


@pytest.mark.parametrize(
    ("body", "param", "text"),
    [
        ({}, "messages", "`messages` must be a list of at least one message"),
        ({"messages": []}, "messages", "`messages` must be a list of at least one message"),
        ({"messages": ["w5"]}, "messages", "`messages` must be a list of at least one message"),
        ({"messages": CHAT, "continue_final_message": True}, "messages", "the chat template refuses these messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages", "the `content` of a message must be a text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "messages",
            "`messages` may hold text alone",
        ),
        (
            {"messages": [{"role": "user", "content": "w5 <|idp:0:01|>"}]},
            "messages",
            "must not hold the names of soft prompt tokens",
        ),
        ({"messages": CHAT, "chat_template": "{{ messages }}"}, "chat_template", "is not served with soft prompts"),
        (
            {"messages": CHAT, "chat_template_kwargs": {"idp_prompt": 1}},
            "chat_template_kwargs",
            "without ['idp_prompt']",
        ),
        (
            {"messages": CHAT, "chat_template_kwargs": {"chat_template": "w5"}},
            "chat_template_kwargs",
            "['chat_template']",
        ),
        (
            {"messages": CHAT, "chat_template_kwargs": {"tokenize": True}},
            "chat_template_kwargs",
            "without ['tokenize']",
        ),
        ({"messages": CHAT, "chat_template_kwargs": 5}, "chat_template_kwargs", "must be an object"),
        ({"messages": CHAT, "add_special_tokens": True}, "add_special_tokens", "a token in front of the prompt"),
    ],
)
def test_a_bad_chat_is_a_400_that_says_why(unasked, body, param, text):
    engine, proxy, _ = unasked
    error = error_of(proxy.post("/v1/chat/completions", json=body), 400)
    assert text in error["message"]
    assert error["param"] == param
    assert engine.seen == []


def test_a_tokenizer_that_reads_text_behind_a_prompt_differently_serves_no_chats(prompter, monkeypatch):
    from idp_peft.serving.openai_errors import RequestError

    real = prompter.texts.token_ids

    def other(texts, *settings):
        """As those that put a space in front of a text's first word alone."""
        rows = real(texts, *settings)
        return [
            [*row[:4], 9, *row[4:]] if text.startswith("<|idp") else row for text, row in zip(texts, rows, strict=True)
        ]

    monkeypatch.setattr(prompter.texts, "token_ids", other)
    with pytest.raises(RequestError, match="reads text behind a soft prompt in another way") as caught:
        prompter.chat({"messages": CHAT})
    assert caught.value.status == 501


def test_an_unknown_model_is_named_in_openais_words(serve):
    proxy = serve(Engine())
    for path in ("/v1/completions", "/v1/chat/completions"):
        error = error_of(proxy.post(path, json={"model": "other", "prompt": "w5", "messages": CHAT}), 404)
        assert error["message"] == "the model 'other' does not exist: this serves 'tiny'"
        assert error["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/responses"),
        ("GET", "/v1/responses/resp_1"),
        ("POST", "/v1/embeddings"),
        ("POST", "/v1/moderations"),
        ("GET", "/v1/files"),
        ("POST", "/v1/audio/speech"),
        ("POST", "/v1/images/generations"),
        ("POST", "/chat/completions"),
        ("POST", "/v1/v1/chat/completions"),
        ("GET", "/"),
    ],
)
def test_a_path_that_is_not_served_is_a_404_that_says_what_is(unasked, method, path):
    engine, proxy, _ = unasked
    error = error_of(proxy.request(method, path, content=b"{}" if method == "POST" else None), 404)
    assert error["type"] == "not_found_error"
    assert error["message"] == (
        f"Not Found: {method} {path}. This serves POST /v1/completions, POST /v1/chat/completions, GET /v1/models, "
        "GET /v1/models/{name}, GET /health"
    )
    assert engine.headers == []


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/completions", {"POST"}),
        ("DELETE", "/v1/chat/completions", {"POST"}),
        ("GET", "/v1/chat/completions", {"POST"}),
        ("POST", "/v1/models", {"GET", "HEAD"}),
        ("DELETE", "/v1/models/tiny", {"GET", "HEAD"}),
        ("PUT", "/health", {"GET", "HEAD"}),
    ],
)
def test_another_method_is_a_405_that_says_which_are_allowed(unasked, method, path, allowed):
    _, proxy, _ = unasked
    response = proxy.request(method, path)
    assert f"Method Not Allowed: {method} {path}" in error_of(response, 405)["message"]
    assert set(response.headers["allow"].split(", ")) == allowed


# ---------------------------------------------------------------------- the model


@pytest.mark.parametrize("name", ["tiny", "org/tiny", "/models/served", "a b?c=%2F&\u00fc"])
@pytest.mark.parametrize("known", [True, False])
def test_the_model_is_shown_under_the_name_that_is_served(prompter, name, known):
    """Whatever else the engine has, and whatever it calls this one."""
    entry = {
        "id": name if known else "model.gguf",
        "object": "model",
        "created": 5,
        "owned_by": "me",
        "max_model_len": 64,
    }
    other = {"id": "other", "object": "model"}
    with (
        Server(answering({"object": "list", "data": [other, entry], "models": [{}]}), lifespan="off") as engine,
        Server(proxy_app(prompter, ProxySettings(engine.url, name))) as server,
        client(server.url) as proxy,
    ):
        listed = proxy.get("/v1/models").json()
        for quoted in (quote(name), quote(name, safe="")):
            assert proxy.get(f"/v1/models/{quoted}").json() == listed["data"][0]
        error = error_of(proxy.get("/v1/models/other"), 404)
        assert (error["message"], error["code"]) == (
            f"the model 'other' does not exist: this serves {name!r}",
            "model_not_found",
        )
    assert listed == {"object": "list", "data": [entry if known else listed["data"][0]]}
    assert set(listed["data"][0]) >= {"id", "object", "created", "owned_by"}
    assert (listed["data"][0]["id"], type(listed["data"][0]["created"])) == (name, int)


@pytest.mark.parametrize(
    "body", [[], {}, {"data": 5}, {"data": [{}]}, {"data": ["tiny"]}, {"data": [{"id": "x" * 2**19}]}]
)
def test_a_list_of_models_that_cannot_be_read_is_a_502(prompter, body):
    with Server(answering(body), lifespan="off") as engine, starting(prompter) as start:
        for path in ("/v1/models", "/v1/models/tiny"):
            assert error_of(start(engine.url).get(path), 502)["message"] == "the engine's list of models cannot be read"


def test_what_the_engine_says_against_showing_its_models_comes_back(prompter):
    with (
        Server(answering({"error": {"message": "no"}}, status=401), lifespan="off") as engine,
        starting(prompter) as start,
    ):
        for path in ("/v1/models", "/v1/models/tiny"):
            response = start(engine.url).get(path)
            assert (response.status_code, response.json()) == (401, {"error": {"message": "no"}})


def answering(body, status: int = 200):
    """An engine that answers everything with the same JSON."""
    from starlette.responses import JSONResponse

    return JSONResponse(body, status_code=status)


# ---------------------------------------------------------------------- bodies and tokens


def test_a_body_that_is_too_long_is_a_413_however_it_comes(serve):
    engine = Engine()
    proxy = serve(engine, max_body=1000)
    content = json.dumps({"prompt": "w5", "user": "x" * 2000}).encode()
    assert (
        "must not be longer than 1000 bytes" in error_of(proxy.post("/v1/completions", content=content), 413)["message"]
    )
    in_pieces = (content[start : start + 100] for start in range(0, len(content), 100))  # no length is stated
    error_of(proxy.post("/v1/completions", content=in_pieces), 413)
    assert engine.seen == []
    assert proxy.post("/v1/completions", json={"prompt": "w5"}).status_code == 200


def test_a_body_that_says_it_is_too_long_is_a_413_at_once(serve):
    proxy = serve(Engine(), max_body=1000)
    with socket.create_connection(("127.0.0.1", proxy.base_url.port), timeout=PATIENCE) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1001\r\n\r\n{")
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "given", [None, "Bearer wrong", "Bearer", "Basic right", "right", "Bearer r\u00efght", "Bearer rightt"]
)
def test_a_wrong_token_is_a_401(unasked, given):
    engine, _, proxy = unasked
    headers = {} if given is None else {"authorization": given.encode("latin-1")}
    for response in (
        proxy.post("/v1/completions", content=b"{not json", headers=headers),
        proxy.get("/v1/models", headers=headers),
        proxy.get("/v1/models/tiny", headers=headers),
        proxy.get("/v1/models/other", headers=headers),
    ):
        assert error_of(response, 401)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    assert engine.headers == []


def test_the_right_token_opens(serve):
    proxy = serve(Engine(), api_key="right")
    assert (
        proxy.post("/v1/completions", json={"prompt": "w5"}, headers={"authorization": "Bearer right"}).status_code
        == 200
    )
    assert proxy.get("/health").status_code == 200, "a health check needs none"


def test_an_error_of_the_proxy_itself_is_a_500_that_gives_nothing_away(serve, prompter, monkeypatch):
    def fail(body):
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(prompter, "completion_pieces", fail)
    error = error_of(serve(Engine()).post("/v1/completions", json={"prompt": "w5"}), 500)
    assert error["message"] == "the proxy failed: see its log"


# ---------------------------------------------------------------------- engines that fail, clients that leave


def test_an_engine_that_is_down_is_a_502(serve):
    with Server(Engine().app) as engine:
        url = engine.url
    proxy = serve(url)
    for response in (
        proxy.post("/v1/completions", json={"prompt": "w5"}),
        proxy.get("/v1/models"),
        proxy.get("/health"),
    ):
        assert error_of(response, 502)["code"] == "engine_unreachable"
    with Server(Engine().app, port=int(url.rpartition(":")[2])):
        assert proxy.post("/v1/completions", json={"prompt": "w5"}).status_code == 200, "it is back"


def test_an_engine_that_is_silent_is_a_504(serve):
    engine = Engine()
    engine.mode = "hang"
    error = error_of(serve(engine, timeout=0.2).post("/v1/completions", json={"prompt": "w5"}), 504)
    assert error["code"] == "engine_timeout"
    assert engine.abandoned.wait(PATIENCE), "the engine is not left to compute for nobody"


def test_what_the_engine_answers_comes_back_with_its_status(serve):
    engine = Engine()
    engine.mode = "refuse"
    response = serve(engine).post("/v1/completions", json={"prompt": "w5"})
    assert (response.status_code, response.json()) == (429, {"error": {"message": "too busy", "code": 429}})


def test_a_stream_passes_through_as_it_comes(serve):
    engine = Engine()
    engine.mode = "lockstep"  # the next event leaves it when the one before was read
    proxy = serve(engine)
    with proxy.stream("POST", "/v1/completions", json={"prompt": "w5", "stream": True, "max_tokens": 20}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert "x-idp-prompt" in response.headers
        events = []
        for line in response.iter_lines():
            if line:
                events.append(line)
                engine.read.release()
    assert events == [*(f'data: {{"choices": [{{"text": "w{index}"}}]}}' for index in range(20)), "data: [DONE]"]


def test_an_engine_that_dies_in_a_stream_ends_it_with_an_error_event(serve):
    engine = Engine()
    engine.mode = "die"
    with serve(engine).stream("POST", "/v1/completions", json={"prompt": "w5", "stream": True}) as response:
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert [json.loads(event)["choices"][0]["text"] for event in events[:-1]] == ["w0", "w1"]
    assert json.loads(events[-1])["error"]["code"] == "engine_failed"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_lets_the_engine_stop(serve, stream):
    engine = Engine()
    engine.mode = "answer" if stream else "hang"
    proxy = serve(engine)
    body = {"prompt": "w5", "stream": stream, "max_tokens": 100_000}
    with socket.create_connection(("127.0.0.1", proxy.base_url.port)) as hasty:
        hasty.sendall(post(b"/v1/completions", body))
        assert engine.running.wait(PATIENCE)
        if stream:
            assert hasty.recv(100).startswith(b"HTTP/1.1 200 ")
    assert engine.abandoned.wait(PATIENCE)
    engine.mode = "answer"
    assert proxy.post("/v1/completions", json={"prompt": "w5"}).status_code == 200


def test_many_requests_at_once_get_each_their_own_answer(serve, one):
    engine = Engine()
    proxy = serve(engine)
    texts = tiny_texts(60, words=5)
    router = Router.from_pretrained(one.adapter, one.base)
    expected = [str(chosen) for chosen in router.route(texts).prompt_ids.tolist()]

    def ask(index: int) -> tuple[str, str]:
        answer = proxy.post("/v1/completions", json={"prompt": texts[index], "user": str(index)})
        return answer.headers["x-idp-prompt"], answer.json()["choices"][0]["text"]

    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        found = list(pool.map(ask, range(60)))
    assert [prompt for prompt, _ in found] == expected
    assert [user for _, user in found] == [str(index) for index in range(60)]


# ---------------------------------------------------------------------- web pages

PAGE, OTHER = "https://chat.example.org", "https://elsewhere.example.org"
PREFLIGHT = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-os",
}


def about_pages(response) -> dict[str, str]:
    """The headers by which a server tells a browser what a page may do."""
    return {name: value for name, value in response.headers.items() if name.startswith("access-control-")}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/org/tiny"])
@pytest.mark.parametrize(("allowed", "says"), [((PAGE,), PAGE), ((OTHER, PAGE), PAGE), (("*",), "*")])
def test_a_browsers_preflight_is_answered_here_and_asks_no_token(serve, path, allowed, says):
    engine = Engine()
    proxy = serve(engine, api_key="right", allow_origins=allowed)
    response = proxy.options(path, headers={"origin": PAGE, **PREFLIGHT})
    assert response.status_code == 200
    found = about_pages(response)
    assert found["access-control-allow-origin"] == says
    assert {"GET", "POST"} <= set(found["access-control-allow-methods"].split(", "))
    headers = {name.strip() for name in found["access-control-allow-headers"].split(",")}
    assert {"authorization", "content-type", "x-stainless-os"} <= headers
    assert engine.headers == []


ANSWERS = {
    "an answer": ({"prompt": "w5"}, "answer", 200),
    "a stream": ({"prompt": "w5", "stream": True}, "answer", 200),
    "the engine's error": ({"prompt": "w5"}, "refuse", 429),
    "a bad body": ({"prompt": ""}, "answer", 400),
    "another model": ({"prompt": "w5", "model": "other"}, "answer", 404),
    "a body that is too long": ({"prompt": "w5", "user": "x" * 2000}, "answer", 413),
    "a wrong token": ({"prompt": "w5"}, "answer", 401),
    "a bug of the proxy": ({"prompt": "w5"}, "answer", 500),
    "an engine that is silent": ({"prompt": "w5"}, "hang", 504),
}


@pytest.mark.parametrize("kind", list(ANSWERS))
def test_an_allowed_page_may_read_every_answer_and_another_page_none(serve, prompter, monkeypatch, kind):
    body, mode, status = ANSWERS[kind]
    engine = Engine()
    engine.mode = mode
    if status == 500:
        monkeypatch.setattr(prompter, "completion_pieces", lambda body: 1 / 0)
    proxy = serve(engine, api_key="right", allow_origins=(PAGE,), max_body=1000, timeout=0.3 if mode == "hang" else 60)
    token = {"authorization": "Bearer wrong" if status == 401 else "Bearer right"}
    token["connection"] = "close"  # behind a bug the server does so by itself
    for origin in ({"origin": PAGE}, {"origin": OTHER}, {}):
        response = proxy.post("/v1/completions", json=body, headers={**token, **origin})
        assert response.status_code == status
        # "*" is every header, `x-idp-prompt` too, for requests that bring no cookies
        readable = {"access-control-allow-origin": PAGE, "access-control-expose-headers": "*"}
        assert about_pages(response) == (readable if origin == {"origin": PAGE} else {})


@pytest.mark.parametrize("allowed", [(), (OTHER,)])
def test_a_page_that_is_not_allowed_gets_nothing(serve, allowed):
    engine = Engine()
    proxy = serve(engine, allow_origins=allowed)
    response = proxy.options("/v1/completions", headers={"origin": PAGE, **PREFLIGHT})
    assert "OPTIONS /v1/completions" in error_of(response, 405)["message"]
    assert about_pages(response) == {}
    assert engine.headers == []
    assert about_pages(proxy.get("/v1/models", headers={"origin": PAGE})) == {}


@pytest.mark.parametrize("allowed", [(), (PAGE,)])
def test_what_the_engine_says_about_pages_is_not_handed_on(serve, allowed):
    """vLLM lets every page read its answers; other engines turn pages away that they do not know."""
    engine, seen = Engine(), []

    async def open_to_all(scope, receive, send):
        seen.append({name.decode(): value.decode() for name, value in scope.get("headers", [])})

        async def send_marked(message):
            if message["type"] == "http.response.start":
                marks = [(b"access-control-allow-origin", b"*"), (b"access-control-allow-credentials", b"true")]
                message = {**message, "headers": [*message["headers"], *marks]}
            await send(message)

        await engine.app(scope, receive, send_marked)

    with Server(open_to_all) as server:
        response = serve(server.url, allow_origins=allowed).post(
            "/v1/completions", json={"prompt": "w5"}, headers={"origin": PAGE}
        )
    assert response.status_code == 200
    assert about_pages(response).get("access-control-allow-origin") == (PAGE if allowed else None)
    assert "access-control-allow-credentials" not in response.headers
    assert "origin" not in seen[-1]


def test_the_command_takes_origins_as_browsers_send_them(exported, monkeypatch, caplog):
    import uvicorn

    apps = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **_: apps.append(app))
    start = ["proxy", "--model", str(exported.folder), "--engine", "http://127.0.0.1:9"]
    main(start)
    main([*start, "--allow_origins", "https://Chat.Example.org:443", "http://localhost:3000"])
    assert "any web page" not in caplog.text
    main([*start, "--allow_origins", "*"])
    assert "any web page can send requests without a bearer token" in caplog.text
    assert not hasattr(apps[0], "allow_origins")
    assert [app.allow_origins for app in apps[1:]] == [(PAGE, "http://localhost:3000"), ("*",)]


@pytest.mark.parametrize("origin", [f"{PAGE}/", f"{PAGE}/chat", "chat.example.org", "", "ftp://a", "https://a b/?c"])
def test_what_is_no_origin_is_refused(exported, origin):
    with pytest.raises(ValueError, match=r"`allow_origins` must hold origins like https://chat\.example\.org"):
        run_proxy(str(exported.folder), "http://127.0.0.1:9", allow_origins=[origin])


# ---------------------------------------------------------------------- the command


def test_the_command_listens_on_loopback_unless_told_otherwise(exported, monkeypatch):
    import uvicorn

    calls = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **settings: calls.append(settings))
    main(["proxy", "--model", str(exported.folder), "--engine", "http://127.0.0.1:9"])
    run_proxy(str(exported.folder), "http://127.0.0.1:9")
    flags = ["--host", "0.0.0.0", "--port", "81"]
    main(["proxy", "--model", str(exported.folder), "--engine", "http://127.0.0.1:9", *flags])
    assert [(call["host"], call["port"]) for call in calls] == [("127.0.0.1", 8100)] * 2 + [("0.0.0.0", 81)]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (
            ["--engine", "127.0.0.1:8000"],
            "`engine` must be an address like http://127.0.0.1:8000, got '127.0.0.1:8000'",
        ),
        (["--engine", "http://h", "--port", "0"], "`port` must be between 1 and 65535, got 0"),
        (["--engine", "http://h", "--timeout", "0"], "`timeout` must be positive, got 0.0"),
        (["--engine", "http://h"], "is no model that `idp-peft export` wrote"),
    ],
)
def test_the_command_says_what_is_wrong(one, capsys, flags, text):
    with pytest.raises(SystemExit):
        main(["proxy", "--model", str(one.base), *flags])
    assert text in capsys.readouterr().err


# ---------------------------------------------------------------------- Ollama


def test_a_chat_goes_to_ollamas_model_of_its_prompt(serve):
    engine, models = Engine(), set()
    plain, proxy = serve(Engine()), serve(engine, engine_kind="ollama")
    for text in tiny_texts(6, words=6):
        chat = {
            "messages": [{"role": "user", "content": text}],
            "temperature": 0.5,
            "logit_bias": {"7": 1},
            "stop": ["x"],
        }
        chosen = plain.post("/v1/chat/completions", json=chat).headers["x-idp-prompt"]
        answer = proxy.post("/v1/chat/completions", json=chat)
        assert (answer.status_code, answer.headers["x-idp-prompt"]) == (200, chosen)
        sent = engine.seen[-1]
        assert sent == {"messages": chat["messages"], "temperature": 0.5, "stop": ["x"], "model": f"tiny-{chosen}"}
        models.add(sent["model"])
    assert len(models) > 1
    for forced, model in ((2, "tiny-2"), (-1, "tiny"), ("c", "tiny-2")):
        proxy.post("/v1/chat/completions", json={**chat, "idp_prompt": forced})
        assert engine.seen[-1]["model"] == model
    asked = len(engine.seen)
    assert (
        "Ollama renders every text as a chat"
        in error_of(proxy.post("/v1/completions", json={"prompt": "w5"}), 400)["message"]
    )
    assert len(engine.seen) == asked
    with pytest.raises(ValueError, match="`engine_kind` must be 'openai' or 'ollama', got 'x'"):
        run_proxy("served", "http://127.0.0.1:1", engine_kind="x")
