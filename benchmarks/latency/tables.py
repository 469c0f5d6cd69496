"""Tables and plots of latency, from a result file alone: medians, and the median of each turn's ratio to the base."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from benchmarks.common.markdown import head, row

MEASURES = {"first": "time to first token", "further": "per further token", "whole": "whole generate"}
_REQUEST = {"part": "requests", "batch": 1, "tokens_in": 128, "tokens_out": 32}
_BANKS = {**_REQUEST, "part": "prompts"}
# What was set out to be reached: measure, case, contestant, whose it is divided by, most that the ratio may be.
TARGETS = [
    ("whole", _REQUEST, "IDP", "base alone", 1.05),
    ("first", _REQUEST, "IDP", "base alone", 1.10),
    ("further", _REQUEST, "IDP", "base alone", 1.02),
    ("whole", _BANKS, "IDP, M = 64", "IDP, M = 2", 1.05),
    ("first", {**_REQUEST, "tokens_in": 32}, "IDP", "prompt tuning", 0.75),
    ("whole", _REQUEST, "IDP", "LoRA, rank 16", None),
    ("first", _REQUEST, "IDP by centroid", "base alone", 1.03),
    ("first", _REQUEST, "prefix tuning", "base alone", None),
    ("further", _REQUEST, "IDP by centroid", "base alone", 1.01),
    ("further", _REQUEST, "prefix tuning", "base alone", None),
    ("whole", _BANKS, "IDP by centroid, M = 64", "IDP by centroid, M = 2", 1.02),
]


def write_tables(path: Path) -> None:
    """Write `<name>.md` and `<name>.png` beside a result file."""
    record = json.loads(path.read_text())
    cases = by_case(record["turns"])
    path.with_suffix(".md").write_text(markdown(record, cases), encoding="utf-8")
    _plot(cases, path.with_suffix(".png"))


def by_case(turns: list[dict]) -> list[tuple[dict, dict[str, list[dict]]]]:
    """`(case, contestant -> its turns in order)` in the order they were measured in."""
    found: dict[str, tuple[dict, dict]] = {}
    for turn in turns:
        _case, contestants = found.setdefault(json.dumps(turn["case"], sort_keys=True), (turn["case"], {}))
        contestants.setdefault(turn["contestant"], []).append(turn)
    return [(case, _sorted(contestants)) for case, contestants in found.values()]


def _sorted(contestants: dict[str, list[dict]]) -> dict[str, list[dict]]:
    first = list(contestants)  # the first repetition begins with the first contestant
    return {name: sorted(contestants[name], key=lambda turn: turn["repetition"]) for name in first}


def ratio(turns: list[dict], to: list[dict], measure: str) -> float:
    """Median over repetitions of a contestant's time over another's in the same repetition."""
    return statistics.median(a[measure] / b[measure] for a, b in zip(turns, to, strict=True))


def markdown(record: dict, cases) -> str:
    """All tables of a result file."""
    environment = record["environment"]
    where = environment["gpu"] or f"{environment['processor']}, {environment['threads']} threads"
    lines = [
        f"Base: {record['settings']['label']}. {where}; torch {environment['torch']}, transformers "
        f"{environment['transformers']}, peft {environment['peft']}, commit {environment['commit']}.",
        "Medians; in brackets the median over turns of the ratio to the base alone in the same turn.",
    ]
    lines += _target_rows(cases)
    for case, contestants in cases:
        rows = _memory_rows(contestants) if case["part"] == "memory" else _time_rows(contestants)
        turns = len(next(iter(contestants.values())))
        title = f"{case['part']}: batch {case['batch']}, {case['tokens_in']} tokens in, {case['tokens_out']} out, {turns} turns"
        lines += ["", f"**{title}**", "", *rows]
    return "\n".join(lines) + "\n"


def _target_rows(cases) -> list[str]:
    """The ratios that matter most, those that a record has."""
    found = {json.dumps(case, sort_keys=True): contestants for case, contestants in cases}
    rows = []
    for measure, case, name, other, most in TARGETS:
        contestants = found.get(json.dumps(case, sort_keys=True), {})
        if name not in contestants or other not in contestants:
            continue
        measured = ratio(contestants[name], contestants[other], measure)
        shape = f"{case['tokens_in']} : {case['tokens_out']}"
        target = "" if most is None else f"at most {most:.2f}"
        rows.append(row([f"{MEASURES[measure]}, {name} / {other}", shape, f"{measured:.3f}", target]))
    return ["", "| | in : out | ratio | target |", "|---|---|---:|---:|", *rows] if rows else []


def _time_rows(contestants: dict[str, list[dict]]) -> list[str]:
    rows = head(["", *MEASURES.values()])
    for name, turns in contestants.items():
        cells = []
        for measure in MEASURES:
            milliseconds = 1000 * statistics.median(turn[measure] for turn in turns)
            cells.append(f"{milliseconds:.1f} ms ({ratio(turns, contestants['base alone'], measure):.2f})")
        rows.append(row([name, *cells]))
    compiled = {
        name: sum(turn["new_graphs"] for turn in turns)
        for name, turns in contestants.items()
        if "new_graphs" in turns[0]
    }
    if compiled:
        counts = ", ".join(f"{name} {count}" for name, count in compiled.items())
        rows += ["", f"Graphs compiled after the first request (each one of IDP's took another prompt): {counts}."]
    return rows


def _memory_rows(contestants: dict[str, list[dict]]) -> list[str]:
    rows = head(["", "adapter file", "loading it", "peak memory", "prompt cache"])
    for name, turns in contestants.items():
        seconds, peak = (statistics.median(turn[what] for turn in turns) for what in ("load_seconds", "peak_bytes"))
        cells = [f"{turns[0]['adapter_bytes'] / 1e3:,.1f} kB", f"{1000 * seconds:.0f} ms", f"{peak / 1e6:,.0f} MB"]
        cache, formula = turns[0].get("prompt_cache_bytes"), turns[0].get("prompt_cache_formula")
        cells.append("" if cache is None else f"{cache:,} bytes (formula: {formula:,})")
        rows.append(row([name, *cells]))
    return rows


def _plot(cases, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = [(case, contestants) for case, contestants in cases if case["part"] == "requests"]
    if not cases:
        return
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 0.7 + 0.5 * len(cases)), sharey=True)
    labels = [f"{case['batch']} x {case['tokens_in']} tokens" for case, _ in cases]
    names = [name for name in cases[0][1] if name != "base alone"]
    for axis, measure in zip(axes, ("first", "whole"), strict=True):
        for number, name in enumerate(names):
            ratios = [ratio(found[name], found["base alone"], measure) for _, found in cases]
            heights = [row + 0.12 * (number - (len(names) - 1) / 2) for row in range(len(cases))]
            axis.plot(ratios, heights, "os^Dv"[number % 5], label=name, markersize=6)
        axis.axvline(1, color="0.4", linewidth=1)
        axis.set_xlabel(f"{MEASURES[measure]}, ratio to the base alone")
        axis.grid(axis="x", color="0.9")
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].invert_yaxis()
    axes[1].legend(loc="best", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
