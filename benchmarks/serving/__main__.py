"""`python -m benchmarks.serving llama.cpp|vllm|route`: what each way of serving an adapter costs, beside the base in the same engine.

All ways stand side by side and take turns: every cell (requests at once, tokens in) is measured for each of them before the
next one. Texts differ in every request, so that an engine's cache can hold nothing of them but the soft prompt.
"""

from __future__ import annotations

import argparse
import itertools
import signal
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("what", choices=["llama.cpp", "vllm", "route"])
    parser.add_argument("--at-once", nargs="+", type=int, default=[1, 8, 32], help="requests at once")
    parser.add_argument("--inputs", nargs="+", type=int, default=[64, 512], help="tokens in")
    parser.add_argument("--tokens-out", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--routes", nargs="+", help="by the beginnings of their names (default: all)")
    parser.add_argument("--folder", type=Path, help="where models are made (default: runs/serving/<what>)")
    parser.add_argument("--output", type=Path, help="default: results/<what>.json")
    options = parser.parse_args(arguments)
    options.folder = options.folder or Path("runs/serving") / options.what
    options.output = options.output or RESULTS / f"{options.what}.json"
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that engines end with it
    from benchmarks.common.contestants import Record
    from benchmarks.serving.tables import write_tables

    options.output.parent.mkdir(parents=True, exist_ok=True)
    record = Record(options.output, {"what": options.what, "tokens_out": options.tokens_out})
    if options.what == "route":
        from benchmarks.serving.choosing import measure

        measure(options, record)
    else:
        serve(options, record)
    write_tables(options.output)


def serve(options: argparse.Namespace, record) -> None:
    """Start every way of serving, and let them take turns."""
    from tqdm.auto import tqdm

    from benchmarks.serving.load import Texts, load, post, seconds_to_first_token
    from benchmarks.serving.subjects import ROUTES, Routes, make

    make(options.what, options.folder)
    names = [
        name
        for name in ROUTES[options.what]
        if options.routes is None or any(name.startswith(start) for start in options.routes)
    ]
    routes = Routes(options.what, options.folder, names)
    for name in names:
        if not record.has(case="process", contestant=name, repetition=0):
            post(routes.processes[name][0].url, routes.body(name, "A first request.", 2))
            found = [(one.start_seconds, one.resident_bytes()) for one in routes.processes[name]]
            record.add(
                case="process",
                contestant=name,
                repetition=0,
                start_seconds=[s for s, _ in found],
                bytes=[b for _, b in found],
            )
    texts = Texts(routes.router)
    cells = [{"at_once": at_once, "tokens_in": tokens} for tokens in options.inputs for at_once in options.at_once]
    for cell, turn in tqdm(list(itertools.product(cells, range(options.turns)))):
        given = [texts.next(cell["tokens_in"]) for _ in range(max(8, cell["at_once"]))]
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if not record.has(case=cell, contestant=name, repetition=turn):
                bodies = [routes.body(name, text, options.tokens_out) for text in given]
                record.add(
                    case=cell,
                    contestant=name,
                    repetition=turn,
                    **load(routes.processes[name][0].url, bodies, cell["at_once"]),
                )
    for tokens, turn in tqdm(list(itertools.product(options.inputs, range(8)))):
        text = texts.next(tokens)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if not record.has(case={"first token of": tokens}, contestant=name, repetition=turn):
                seconds = seconds_to_first_token(routes.processes[name][0].url, routes.body(name, text, 2))
                record.add(case={"first token of": tokens}, contestant=name, repetition=turn, seconds=seconds)


if __name__ == "__main__":
    main()
