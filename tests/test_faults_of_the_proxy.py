"""`python -m benchmarks.faults.proxy` counts what it says, and its page shows what it counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the proxy's web framework is in the extra 'serving'")
pytest.importorskip("uvicorn", reason="the proxy's server is in the extra 'serving'")

from benchmarks.common.markdown import marked
from benchmarks.faults import proxy as faults

FOLDER = Path(faults.__file__).parent
RESULT = json.loads((FOLDER / "results" / "proxy.json").read_text(encoding="utf-8"))


def test_the_page_shows_the_table_of_the_results():
    assert marked("proxy", faults.table(RESULT)) in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_the_results_are_of_the_whole_run_and_nothing_was_lost():
    assert list(RESULT["attacks"]) == [*faults.ATTACKS, "before and after"]
    for name, counts in RESULT["attacks"].items():
        assert counts["tried"] == counts["survived"] + counts["refused"]
        assert counts["lost"] == 0
        assert name == "before and after" or counts["tried"] >= faults.ATTACKS[name][1]
    assert RESULT["tracebacks"] == 0


@pytest.mark.slow
def test_a_small_run_of_all_attacks_loses_nothing():
    result = faults.count_all(scale=0.01)
    assert list(result["attacks"]) == list(RESULT["attacks"])
    assert [name for name, counts in result["attacks"].items() if counts["lost"]] == [], result
    assert result["tracebacks"] == 0


@pytest.mark.parametrize(
    ("answer", "may_be_closed", "end"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", False, "survived"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", False, "refused"),
        (b"HTTP/1.1 500 Internal Server Error\r\n\r\n", True, "lost"),
        (b"HTTP/1.1 502 Bad Gateway\r\n\r\n", True, "lost"),
        (b"", True, "refused"),
        (b"", False, "lost"),
        (b"half", True, "lost"),
    ],
)
def test_how_an_attempt_ended(answer, may_be_closed, end):
    assert faults._end_of(answer, may_be_closed) == end


def test_anothers_answer_is_lost():
    attack = faults.Attack(None, None, [])
    attack.ask = lambda data: b'HTTP/1.1 200 OK\r\n\r\n{"choices": [{"text": "other"}]}'
    assert attack.ordinary("mine") == "lost"
    assert attack.ordinary("other") == "survived"
