"""Strangers' templates and tokenizers: what takes too much is ended, and the next text is read as if nothing had been."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tokenizers import Regex, normalizers, pre_tokenizers

from idp_peft.serving.text_process import TextError, TextProcess
from tests.tiny_chats import chat_tokenizer
from tests.tiny_folder import tiny_texts

MESSAGES = [{"role": "user", "content": "w5 w11"}]
TOO_MUCH = r"^it needs more than 0\.3 seconds of a processor, or 512 MiB of memory$"
HOSTILE = {
    "nested loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", TOO_MUCH),
    "loops over a text": (
        "{% set x = 'a' * 10**6 %}{% for a in x %}{% for b in x %}{% endfor %}{% endfor %}",
        TOO_MUCH,
    ),
    "a long text": ("{{ 'a' * 10**10 }}", TOO_MUCH),
    "a long text in parts": ("{% for a in range(99999) %}{{ 'a' * 10**5 }}{% endfor %}", TOO_MUCH),
    "a long text by format": ("{{ '%1000000000d' % 5 }}", TOO_MUCH),
    "a long text by replacing": ("{% set x = 'a' * 10**5 %}{{ (x|replace('a', x))|length }}", TOO_MUCH),
    "a long list": ("{% set x = [1] * 10**9 %}", TOO_MUCH),
    "a great number": ("{% set x = 7 ** (10 ** 8) %}", TOO_MUCH),
    "recursion": ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "maximum recursion depth"),
    "deep nesting": ("{{ " + "(" * 10_000 + "1" + ")" * 10_000 + " }}", "."),
    "no end": ("{% for a in", "unexpected"),
    "a way out of the sandbox": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "an error": ("{{ raise_exception('not so') }}", "not so"),
    "a long answer": ("{{ 'a' * 5000 }}", "it makes 5000 characters of them, at most 1000 are served"),
}


@pytest.fixture(scope="module")
def texts():
    return TextProcess(chat_tokenizer(), seconds=0.3)


def chat(template: str | None = None) -> dict:
    return {"conversation": MESSAGES, "chat_template": template or chat_tokenizer().chat_template}


def still_works(texts: TextProcess) -> bool:
    return texts.token_ids(["w5 w6", "w7"]) == [[5, 6], [7]] and texts.rendered(chat(), 1000) == "w2 w5 w11 w3 "


def test_it_reads_as_the_tokenizer_does(texts):
    tokenizer, many = chat_tokenizer(), tiny_texts(20)
    assert texts.token_ids(many) == tokenizer(many)["input_ids"]
    settings = {"add_generation_prompt": True, "tools": [{"type": "function"}]}
    assert texts.rendered({**chat(), **settings}, 1000) == tokenizer.apply_chat_template(
        MESSAGES, tokenize=False, **settings
    )


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_refused_in_one_line(texts, name):
    template, said = HOSTILE[name]
    with pytest.raises(TextError, match=said) as caught:
        texts.rendered(chat(template), 1000)
    assert "Traceback" not in str(caught.value)
    assert still_works(texts)


def with_pattern(tokenizer) -> None:
    """One that tries everything."""
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(x+x+)+y"), "isolated")


def with_growth(tokenizer) -> None:
    """An alphabet that makes thousands of millions of letters of one."""
    rules = [normalizers.Replace(old, new * 1000) for old, new in ("ab", "ba", "ab")]
    tokenizer.normalizer = normalizers.Sequence(rules)


@pytest.mark.parametrize(("change", "text", "said"), [(with_pattern, "x" * 3000, "Onig"), (with_growth, "a", TOO_MUCH)])
def test_a_hostile_tokenizer_is_refused_in_one_line(change, text, said):
    tokenizer = chat_tokenizer()
    change(tokenizer.backend_tokenizer)
    with pytest.raises(TextError, match=said):
        TextProcess(tokenizer, seconds=0.3).token_ids([text])


def test_a_text_that_is_no_text_is_an_error_with_the_tokenizers_words(texts):
    with pytest.raises(TextError, match=r"\w+"):
        texts.token_ids(["\ud800"])
    assert still_works(texts)


def test_too_many_tokens_come_back_as_their_number(texts):
    assert texts.token_ids(["w5 " * 10, "w6"], max_tokens=9) == [10, [6]]


def test_threads_read_at_once(texts):
    many = tiny_texts(40)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda text: texts.token_ids([text])[0], many)) == chat_tokenizer()(many)["input_ids"]


def test_a_busy_machine_refuses_nothing(texts):
    """Time is that of a processor: what only waits is not ended."""
    endless, _ = HOSTILE["nested loops"]
    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(texts.rendered, chat(endless), 10) for _ in range(6)]
        assert still_works(texts)
    assert all(isinstance(other.exception(), TextError) for other in others)


def test_processes_that_are_killed_are_replaced():
    texts = TextProcess(chat_tokenizer())
    assert still_works(texts)
    for pid in (*children(texts.pid), texts.pid):
        os.kill(pid, signal.SIGKILL)
        wait_for_end(pid)
        assert still_works(texts)


def test_they_end_with_their_owner_and_know_no_secret(monkeypatch):
    monkeypatch.setenv("IDP_PROXY_API_KEY", "a secret")
    monkeypatch.setenv("IDP_ENGINE_API_KEY", "also a secret")
    texts = TextProcess(chat_tokenizer())
    assert still_works(texts)
    pids = [texts.pid, *children(texts.pid)]
    assert len(pids) == 2
    for pid in pids:
        assert b"a secret" not in Path(f"/proc/{pid}/environ").read_bytes()
    del texts
    gc.collect()
    for pid in pids:
        wait_for_end(pid)


def children(pid: int) -> list[int]:
    """Linux tells; elsewhere there is nothing to look at."""
    file = Path(f"/proc/{pid}/task/{pid}/children")
    if not file.is_file():
        pytest.skip(f"{sys.platform} does not list a process's children")
    return [int(child) for child in file.read_text().split()]


def wait_for_end(pid: int) -> None:
    until = time.monotonic() + 60
    while Path(f"/proc/{pid}").is_dir() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]:
        assert time.monotonic() < until, "it goes on"
        time.sleep(0.01)
