"""Tables and a plot of serving, from a result file alone."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from benchmarks.common.markdown import head, row
from benchmarks.latency.tables import by_case, ratio

BASE = "base alone"


def write_tables(path: Path) -> None:
    """Write `<name>.md` and, of an engine, `<name>.png` beside a result file."""
    record = json.loads(path.read_text(encoding="utf-8"))
    cases = by_case(record["turns"])
    environment = record["environment"]
    lines = [
        f"{record['settings']['what']}. {environment['processor']}; torch {environment['torch']}, transformers "
        f"{environment['transformers']}, commit {environment['commit']}."
    ]
    lines += (
        _choosing(cases) if record["settings"]["what"] == "route" else _serving(cases, record["settings"]["tokens_out"])
    )
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if record["settings"]["what"] != "route":
        _plot(cases, path.with_suffix(".png"))


def to_base(ways: dict[str, list[dict]], way: str) -> float:
    """Requests per second of a way in those of the base alone: the median over turns, each turn's own ratio."""
    return ratio(ways[BASE], ways[way], "seconds")


def _serving(cases, tokens_out: int) -> list[str]:
    lines = []
    for case, ways in cases:
        if isinstance(case, dict) and "at_once" in case:
            turns = len(next(iter(ways.values())))
            title = f"{case['at_once']} at once, {case['tokens_in']} tokens in, {tokens_out} out, {turns} turns"
            lines += ["", f"**{title}**", ""]
            lines += head(
                [
                    "",
                    "requests per second",
                    "in those of the base",
                    "median latency",
                    "p99",
                    "tokens found in the cache, per request",
                ]
            )
            for way, found in ways.items():
                latencies = sorted(seconds for turn in found for seconds in turn["latencies"])
                rate = statistics.median(turn["requests"] / turn["seconds"] for turn in found)
                cached = sum(turn["cached_tokens"] for turn in found) / len(latencies)
                p99 = latencies[min(len(latencies) - 1, round(0.99 * len(latencies)))]
                cells = [
                    f"{rate:.2f}",
                    f"{to_base(ways, way):.2f}",
                    f"{statistics.median(latencies):.2f} s",
                    f"{p99:.2f} s",
                    f"{cached:.0f}",
                ]
                lines.append(row([way, *cells]))
    lines += _first_tokens(cases)
    for case, ways in cases:
        if case == "process":
            lines += ["", "**Start and memory**, after one request; of the proxy and of its engine", ""]
            lines += head(["", "start", "memory"])
            for way, (turn,) in ways.items():
                starts = " + ".join(f"{seconds:.1f} s" for seconds in turn["start_seconds"])
                lines.append(row([way, starts, " + ".join(f"{count / 1e6:,.0f} MB" for count in turn["bytes"])]))
    return lines


def _first_tokens(cases) -> list[str]:
    """The first of a way's requests has to compute its soft prompt; later ones find it in the engine's cache."""
    found = {
        case["first token of"]: ways for case, ways in cases if isinstance(case, dict) and "first token of" in case
    }
    if not found:
        return []
    lines = [
        "",
        "**Time to the first token**, one request at a time, texts that the engine has not seen (ratio to the base, median of turns)",
        "",
    ]
    lines += head(["", *(f"{tokens} tokens in" for tokens in found)])
    for way in next(iter(found.values())):
        cells = []
        for ways in found.values():
            to_alone = ratio(ways[way], ways[BASE], "seconds")
            cells.append(f"{1000 * statistics.median(turn['seconds'] for turn in ways[way]):.0f} ms ({to_alone:.2f})")
        lines.append(row([way, *cells]))
    return lines


def _choosing(cases) -> list[str]:
    lines = ["", *head(["", "milliseconds a text", "of it tokenising", "texts per second"])]
    for case, ways in cases:
        for way, turns in ways.items():
            each, tokenising = (
                statistics.median(turn[what] for turn in turns) for what in ("seconds_per_text", "tokenising")
            )
            lines.append(
                row(
                    [
                        f"{way}, {case['tokens_in']} tokens, {case['how']}",
                        f"{1000 * each:.2f}",
                        f"{1000 * tokenising:.2f}",
                        f"{1 / each:,.0f}",
                    ]
                )
            )
    return lines


def _plot(cases, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = [(case, ways) for case, ways in cases if isinstance(case, dict) and "at_once" in case]
    if not cells:
        return
    names = [way for way in cells[0][1] if way != BASE]
    figure, axis = pyplot.subplots(figsize=(7.5, 3.2), dpi=110, layout="constrained")
    for number, way in enumerate(names):
        places = [place + 0.14 * (number - (len(names) - 1) / 2) for place in range(len(cells))]
        axis.bar(places, [to_base(ways, way) for _, ways in cells], 0.13, label=way)
    axis.axhline(1, color="0.4", linewidth=1)
    axis.set_xticks(
        range(len(cells)), [f"{case['at_once']} at once\n{case['tokens_in']} in" for case, _ in cells], fontsize=8
    )
    axis.set_ylabel("requests per second,\nin those of the base")
    axis.legend(fontsize=7, ncols=3, loc="lower center")
    figure.savefig(path)
    pyplot.close(figure)
