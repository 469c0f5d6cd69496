"""Texts that nobody has seen, requests with them to a server, so many at once, and what they took."""

from __future__ import annotations

import http.client
import itertools
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

_PATH = "/v1/completions"


def post(url: str, body: dict) -> dict:
    """One request; raises for any answer but 200."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=600)
    try:
        connection.request("POST", _PATH, json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {content[:500].decode(errors='replace')}")
        return json.loads(content)
    finally:
        connection.close()


def seconds_to_first_token(url: str, body: dict) -> float:
    """Until a stream's first event with text; the stream is read to its end."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=600)
    began, first = time.perf_counter(), None
    try:
        connection.request("POST", _PATH, json.dumps({**body, "stream": True}), {"content-type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {answer.read()[:500].decode(errors='replace')}")
        for line in answer:
            if first is None and line.startswith(b"data: {"):
                first = time.perf_counter() - began
        return first
    finally:
        connection.close()


def load(url: str, bodies: list[dict], at_once: int) -> dict:
    """All requests, so many at once: seconds in all, of each, and tokens that the engine found in its cache."""

    def ask(body: dict) -> tuple[float, int]:
        began = time.perf_counter()
        usage = post(url, body)["usage"]
        details = usage.get("prompt_tokens_details") or {}
        return time.perf_counter() - began, details.get("cached_tokens") or 0

    began = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        answers = list(pool.map(ask, bodies))
    return {
        "seconds": time.perf_counter() - began,
        "requests": len(bodies),
        "latencies": [round(seconds, 5) for seconds, _ in answers],
        "cached_tokens": sum(cached for _, cached in answers),
    }


class Texts:
    """Pieces of real text of a number of tokens, none of them twice."""

    def __init__(self, router) -> None:
        self.tokenizer, self.ids = router.tokenizer, self._tokens()

    def _tokens(self) -> Iterator[int]:
        from idp_peft.texts.data import load_texts

        for text in itertools.chain(load_texts("wiki", "train"), load_texts("kinds", "train")):
            yield from self.tokenizer(text)["input_ids"]

    def next(self, tokens: int) -> str:
        return self.tokenizer.decode(list(itertools.islice(self.ids, tokens)))
