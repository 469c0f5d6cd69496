"""The paper's headline claims, each with what was measured and a verdict by a rule fixed here.

as good as LoRA or better   not reproduced where IDP is worse on a text with every seed; reproduced where it is not
                                    and its accuracy is at most one point lower with 95 % confidence; else not testable
21 times fewer parameters           a count
60 % lower latency                  reproduced from 50 % on
+1.24 points over the tasks         reproduced where the interval is above 0 and reaches 1.24, not where it ends below
                                    1.24; not testable where it holds both 0 and 1.24
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from benchmarks.common.markdown import head, marked, row

_LATENCY = Path(__file__).parent.parent / "latency" / "results" / "dense.json"
_CASE = {"part": "requests", "batch": 1, "tokens_in": 128, "tokens_out": 32}
POINTS = 1.24
REPRODUCED, NOT_REPRODUCED, NOT_TESTABLE = "reproduced", "not reproduced", "not testable here"


def claims(studies: list) -> str:
    """Tables in Markdown: the claims on the first compression, and what the others say of those that depend on it."""
    first, *others = studies
    tables = [_table("claims", [*_of_one(first), _parameters(first), _latency()])]
    if rows := [cells for study in others for cells in _of_one(study)]:
        tables.append(_table("claims elsewhere", rows))
    return "\n".join(tables)


def _of_one(study) -> list:
    rows = [_against_lora(study, name) for name in ("lora_budget", "lora_16")]
    return rows + [_points(study, other) for other in (study.compressed, study.get("one_prompt_100"))]


def _table(name: str, rows: list) -> str:
    made = [row(cells) for cells in rows if cells is not None]
    return marked(name, [*head(["claim", "measured", "verdict"], numbers=False), *made])


def _against_lora(study, name: str) -> list[str] | None:
    idp, lora = study.get("idp"), study.get(name)
    if idp is None or lora is None:
        return None
    measured, worse = [], []
    for text, table in study.texts.items():
        one = next(c for c in study.against_idp(table) if c.right == lora.label)
        measured.append(f"{text} {one.estimate.value:+.3f} ({_p(one)})")
        worse.append(one.seen and one.estimate.value > 0)
    seeds = len(one.by_seed)
    measured = [f"nats per token, {seeds} seed{'s' if seeds > 1 else ''}: {', '.join(measured)}"]
    low = None
    if (accuracy := study.accuracy.difference(idp, lora)) is not None:
        measured.append(f"accuracy {_of_accuracy(accuracy.estimate)}")
        low = accuracy.estimate.interval and 100 * accuracy.estimate.interval[0]
    verdict = lora_verdict(any(worse), low)
    return [
        f"as good as LoRA or better ({study.compression}, {lora.label.removeprefix('LoRA, ')})",
        "; ".join(measured),
        verdict,
    ]


def lora_verdict(worse_on_a_text: bool, lowest_points: float | None) -> str:
    """Args:
    worse_on_a_text: IDP seen to be worse on a text.
    lowest_points: lower end of the interval of IDP's accuracy minus LoRA's, in points.
    """
    if worse_on_a_text:
        return NOT_REPRODUCED
    return REPRODUCED if lowest_points is not None and lowest_points >= -1 else NOT_TESTABLE


def _points(study, other) -> list[str] | None:
    idp = study.get("idp")
    if idp is None or other is None:
        return None
    found = study.accuracy.difference(idp, other)
    if found is None or (found := found.estimate).interval is None:
        return None
    return [
        f"+{POINTS} points over nine tasks ({study.compression}, {len(study.accuracy.measures)} tasks)",
        f"over {other.label}: {_of_accuracy(found)}",
        points_verdict(tuple(100 * end for end in found.interval)),
    ]


def points_verdict(interval: tuple[float, float]) -> str:
    """By the 95 % interval of the gain, in points."""
    low, high = interval
    if high < POINTS:
        return NOT_REPRODUCED
    return REPRODUCED if low > 0 else NOT_TESTABLE


def _parameters(study) -> list[str] | None:
    idp, lora = study.get("idp"), study.get("lora_16")
    if idp is None or lora is None:
        return None
    ratio = lora.extra_parameters / idp.extra_parameters
    verdict = "reproduced, as a count" if ratio >= 21 else NOT_REPRODUCED
    return [
        "21 times fewer parameters",
        f"{ratio:.0f} times fewer than LoRA of rank 16",
        verdict,
    ]


def _latency() -> list[str]:
    found: dict[str, dict[int, float]] = {}
    for turn in json.loads(_LATENCY.read_text())["turns"]:
        if turn["case"] == _CASE and "whole" in turn:
            found.setdefault(turn["contestant"], {})[turn["repetition"]] = turn["whole"]
    idp, lora = found["IDP"], found["LoRA, rank 16"]
    saved = 1 - statistics.median(idp[turn] / lora[turn] for turn in idp)
    verdict = REPRODUCED if saved >= 0.5 else NOT_REPRODUCED
    return ["60 % lower latency than LoRA", f"{100 * saved:.0f} % of a whole request", verdict]


def _of_accuracy(found) -> str:
    text = f"{100 * found.value:+.1f} points"
    return (
        text if found.interval is None else f"{text} [{100 * found.interval[0]:+.1f}, {100 * found.interval[1]:+.1f}]"
    )


def _p(one) -> str:
    return "not tested" if one.p_holm is None else f"p = {one.p_holm:.2g}"
