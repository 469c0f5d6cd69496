"""Tables of serving are made from result files alone, and a LoRA of a GGUF file is one that llama.cpp reads."""

from __future__ import annotations

import json
import socket

import pytest

from benchmarks.common.reserved_port import reserved_port
from benchmarks.latency.tables import by_case
from benchmarks.serving.tables import to_base, write_tables

ENVIRONMENT = {"processor": "a", "torch": "1", "transformers": "2", "commit": "c"}


def record(tmp_path, turns: list[dict], what: str = "llama.cpp"):
    path = tmp_path / "it.json"
    path.write_text(
        json.dumps({"settings": {"what": what, "tokens_out": 32}, "environment": ENVIRONMENT, "turns": turns})
    )
    write_tables(path)
    return path


def test_ratios_are_those_of_the_same_turn(tmp_path):
    pytest.importorskip("matplotlib")
    cell, turns = {"at_once": 8, "tokens_in": 64}, []
    for turn, slow in enumerate((1.0, 3.0, 2.0)):  # a machine that is not quiet
        for way, factor in (("base alone", 1.0), ("IDP, the proxy chooses", 1.25)):
            measured = {
                "seconds": 8 * slow * factor,
                "requests": 8,
                "latencies": [slow * factor] * 8,
                "cached_tokens": 64,
            }
            turns.append({"case": cell, "contestant": way, "repetition": turn, **measured})
    for turn in range(2):
        for way, seconds in (("base alone", 0.2), ("IDP, the proxy chooses", 0.1)):
            turns.append(
                {"case": {"first token of": 64}, "contestant": way, "repetition": turn, "seconds": seconds * (turn + 1)}
            )
    turns.append(
        {"case": "process", "contestant": "base alone", "repetition": 0, "start_seconds": [1.0], "bytes": [5e8]}
    )
    path = record(tmp_path, turns)
    ((_, ways), *_) = by_case(turns)
    assert to_base(ways, "IDP, the proxy chooses") == pytest.approx(0.8)
    text = path.with_suffix(".md").read_text()
    assert "| IDP, the proxy chooses | 0.40 | 0.80 | 2.50 s | 3.75 s | 8 |" in text
    assert "| IDP, the proxy chooses | 150 ms (0.50) |" in text
    assert "| base alone | 1.0 s | 500 MB |" in text
    assert path.with_suffix(".png").stat().st_size > 1000


def test_choices_are_tabled(tmp_path):
    case = {"tokens_in": 512, "how": "`idp-peft route`"}
    turns = [
        {"case": case, "contestant": "centroids", "repetition": turn, "seconds_per_text": seconds, "tokenising": 2e-4}
        for turn, seconds in enumerate((4e-4, 5e-4, 9e-4))
    ]
    text = record(tmp_path, turns, "route").with_suffix(".md").read_text()
    assert "| centroids, 512 tokens, `idp-peft route` | 0.50 | 0.20 | 2,000 |" in text


def test_a_lora_of_a_file_changes_what_llama_cpp_says(tmp_path):
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    pytest.importorskip("gguf", reason="GGUF files need the package gguf")
    from benchmarks.serving.engines import llama_cpp
    from benchmarks.serving.load import load, post, seconds_to_first_token
    from benchmarks.serving.subjects import write_lora
    from tests.tiny import tiny
    from tests.tiny_gguf import tiny_gguf

    file, body = (
        tiny_gguf(tmp_path / "base.gguf"),
        {"prompt": [5, 6, 7, 8], "max_tokens": 6, "temperature": 0, "ignore_eos": True},
    )
    said = {}
    for size in (0.0, 3.0):
        write_lora(tmp_path / "lora.gguf", tiny("llama"), "all-linear", 4, size)
        server = llama_cpp(file, tmp_path / "log", 2, 64, (tmp_path / "lora.gguf",))
        said[size] = post(server.url, body)["choices"][0]["text"]
        assert server.resident_bytes() > 1e6
    plain = llama_cpp(file, tmp_path / "log", 1, 64)
    assert said[0.0] == post(plain.url, body)["choices"][0]["text"]
    assert said[3.0] != said[0.0]
    found = load(server.url, [body] * 3, 2)
    assert (found["requests"], len(found["latencies"])) == (3, 3)
    assert seconds_to_first_token(server.url, body) > 0
    with pytest.raises(RuntimeError, match=r"^4"):
        post(server.url, {"prompt": 5})


def test_a_port_on_its_way_to_a_server_is_given_to_nobody_else():
    port, holder = reserved_port()
    with holder, socket.socket() as late, socket.socket() as server:
        with pytest.raises(OSError, match="in use"):
            late.bind(("127.0.0.1", port))  # before the server listens
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", port))  # as uvicorn does
        server.listen()
        with socket.create_connection(("127.0.0.1", port), timeout=10), server.accept()[0]:
            pass  # the holder does not take the server's requests
        with pytest.raises(OSError, match="in use"):
            late.bind(("127.0.0.1", port))
