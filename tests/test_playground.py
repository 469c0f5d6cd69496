"""`idp-peft proxy --playground`: a page to try a served adapter. Off unless it is asked for; it shows what a request would get."""

from __future__ import annotations

import re
from importlib import resources

import pytest

pytest.importorskip("starlette", reason="the proxy's web framework is in the extra 'serving'")
pytest.importorskip("uvicorn", reason="the proxy's server is in the extra 'serving'")

from tests.loopback import Engine
from tests.tiny_folder import tiny_texts
from tests.tiny_proxy import error_of, tiny_prompter

PATHS = ("/playground", "/playground/script.js", "/playground/style.css", "/playground/info")


@pytest.fixture(scope="module")
def prompter(tmp_path_factory):
    return tiny_prompter(tmp_path_factory.mktemp("playground"))


def test_it_is_off_unless_it_is_asked_for(serve):
    http = serve(Engine())
    for path in PATHS:
        error_of(http.get(path), 404)
    error_of(http.post("/playground/choice", json={"prompt": "w5"}), 404)


def test_the_page_asks_nothing_of_other_places_and_lets_nobody_put_code_into_it(serve):
    http = serve(Engine(), playground=True)
    kinds = {}
    for path in PATHS:
        answer = http.get(path)
        assert answer.status_code == 200
        kinds[path] = answer.headers["content-type"].partition(";")[0]
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"(https?:)?//[a-z]", answer.text), "a reference to another place"
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", answer.text)
    assert kinds == dict(zip(PATHS, ("text/html", "text/javascript", "text/css", "application/json"), strict=True))
    page = http.get("/playground").text
    assert not re.search(r"<script(?![^>]*src=)|<style|\son\w+=", page), "code within the page"
    assert {path.name for path in resources.files("idp_peft.serving.playground").iterdir()} >= {
        "index.html",
        "script.js",
        "style.css",
    }


def test_it_says_what_the_page_has_to_know(serve):
    info = serve(Engine(), playground=True).get("/playground/info").json()
    assert info["prompts"] == ["a", "b", "c", "d"]
    assert (info["model"], info["selection"], info["needs_key"]) == ("tiny", "attention", False)
    assert serve(Engine(), playground=True, api_key="right").get("/playground/info").json()["needs_key"]


def test_the_choice_that_it_shows_is_that_of_the_request(serve):
    engine = Engine()
    http, chosen = serve(engine, playground=True), set()
    for text in tiny_texts(6, words=6):
        chat = [
            {"role": "user", "content": text},
            {"role": "assistant", "content": "w9"},
            {"role": "user", "content": "w11"},
        ]
        for path, body in (("/v1/completions", {"prompt": text}), ("/v1/chat/completions", {"messages": chat})):
            asked = len(engine.seen)
            shown = http.post("/playground/choice", json={**body, "stream": True, "idp_prompt": 3})
            assert shown.status_code == 200, shown.text
            assert len(engine.seen) == asked, "the engine is not asked"
            shown = shown.json()
            assert http.post(path, json=body).headers["x-idp-prompt"] == str(shown["prompt"])
            assert shown["scores"].index(max(shown["scores"])) == shown["prompt"]
            assert len(shown["scores"]) == 4
            chosen.add(shown["prompt"])
    assert len(chosen) > 1


def test_a_choice_keeps_the_rules_of_requests(serve):
    http = serve(Engine(), playground=True, api_key="right", max_body=200)
    error_of(http.post("/playground/choice", json={"prompt": "w5"}), 401)
    right = {"authorization": "Bearer right"}
    assert http.post("/playground/choice", json={"prompt": "w5"}, headers=right).status_code == 200
    error_of(http.post("/playground/choice", json={"prompt": "w5 " * 200}, headers=right), 413)
    error_of(http.post("/playground/choice", json={"prompt": ""}, headers=right), 400)
    error_of(http.post("/playground/choice", json={"prompt": "w5", "echo": True}, headers=right), 400)
    error_of(http.post("/playground/choice", json={"prompt": "w5", "model": "other"}, headers=right), 404)
    error_of(http.post("/playground/choice", content=b"{", headers=right), 400)
