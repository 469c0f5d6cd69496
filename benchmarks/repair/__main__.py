"""`python -m benchmarks.repair MODEL`: what repairs most of the damage, at how many steps?

Every contender is trained by `recover`'s own parts (distillation from the dense model, 4 blocks of 256 tokens a step) at
several numbers of steps, each with a schedule of its own, and measured on held-out blocks. One cell per contender, steps and
seed; a run goes on where it was. `--tune` chooses learning rates on validation text first.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from itertools import product
from pathlib import Path

from benchmarks.repair.contenders import LIKE, RATES, STUDIES
from benchmarks.repair.tables import RESULTS


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.repair", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="compressed model")
    parser.add_argument("--teacher", default="default", help="dense model")
    parser.add_argument("--texts", nargs="+", default=["wiki"], choices=list(STUDIES))
    parser.add_argument("--contenders", nargs="+", help="by the beginnings of their names (default: all)")
    parser.add_argument("--steps", nargs="+", type=int, default=[100])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--blocks", type=int, default=64, help="held-out blocks per text (of six kinds: in all)")
    parser.add_argument("--tune", action="store_true", help="try learning rates, on validation text, and keep the best")
    parser.add_argument("--workers", type=int, default=1, help="processes at once")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no cell after so many")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    began = time.time()
    cells = tuning(options) if options.tune else planned(options)
    from benchmarks.repair.bench import work

    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    for cell in cells:
        queue.put(cell)
    for _ in range(options.workers):
        queue.put(None)
    deadline = began + 60 * options.minutes
    given = (options.model, options.teacher, options.blocks, options.results, queue, deadline)
    workers = [context.Process(target=work, args=given) for _ in range(options.workers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise SystemExit("a worker failed: its error stands above; what was measured is kept")
    from benchmarks.repair.tables import best_rates, write

    if options.tune:
        best_rates(options.results)
    else:
        write(options.results)


def planned(options: argparse.Namespace) -> list[dict]:
    """The cells to measure: few steps first, and of these all seeds."""
    from benchmarks.common.cells import Cells
    from benchmarks.repair.tables import slug

    rates_file = options.results / "rates.json"
    rates = json.loads(rates_file.read_text(encoding="utf-8")) if rates_file.is_file() else {}
    cells = []
    for steps, text, seed in product(options.steps, options.texts, options.seeds):
        for contender, settings in STUDIES[text].items():
            name = f"steps{steps}.seed{seed}"
            if (
                _is_wanted(contender, options)
                and name not in Cells(options.results, f"{text}/{slug(contender)}").read()
            ):
                rate = rates.get(LIKE.get(contender, contender))
                cell = {"text": text, "contender": contender, "settings": settings, "steps": steps, "seed": seed}
                cells.append({**cell, "name": name, "rate": rate, "split": "held_out"})
    return cells


def tuning(options: argparse.Namespace) -> list[dict]:
    """Every learning rate of every contender that has its own, on the validation part of wiki."""
    from benchmarks.common.cells import Cells
    from benchmarks.repair.tables import slug

    cells = []
    for (contender, rates), steps in product(RATES.items(), options.steps):
        if not _is_wanted(contender, options):
            continue
        done = Cells(options.results, f"tuning/{slug(contender)}").read()
        settings = STUDIES["wiki"][contender]
        for rate in rates:
            rate = list(rate) if isinstance(rate, tuple) else [rate, None]
            cell = {"text": "tuning", "contender": contender, "settings": settings, "steps": steps, "seed": 0}
            cells.append({**cell, "name": f"steps{steps}.rates{rate}", "rate": rate, "split": "validation"})
        cells = [cell for cell in cells if cell["contender"] != contender or cell["name"] not in done]
    return cells


def _is_wanted(contender: str, options: argparse.Namespace) -> bool:
    return options.contenders is None or any(contender.startswith(name) for name in options.contenders)


if __name__ == "__main__":
    main()
