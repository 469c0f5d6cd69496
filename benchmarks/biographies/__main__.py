"""`python -m benchmarks.biographies`: is knowledge that compression costs displaced or forgotten? See README.md.

Goes on where it was broken off: a result that is there is not made again.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from benchmarks.biographies import tuning
from benchmarks.biographies.compressing import REPAIRED
from benchmarks.biographies.plan import DENSE, Seed
from benchmarks.biographies.repair import METHODS, OBJECTIVES

_HERE = Path(__file__).parent


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.biographies", description=__doc__)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--strengths", nargs="*", default=list(REPAIRED), choices=list(REPAIRED))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--objectives", nargs="*", default=[OBJECTIVES[0]], choices=OBJECTIVES)
    parser.add_argument("--results", type=Path, default=_HERE / "results", help="folder of the JSON files")
    parser.add_argument("--runs", type=Path, default=Path("runs/biographies"), help="folder of the models")
    options = parser.parse_args(arguments)
    if tuning.PILOT_SEED in options.seeds:
        parser.error(f"argument --seeds: {tuning.PILOT_SEED} is the pilot's, by which learning rates are chosen")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tuning.tune(options.results, options.runs, options.objectives)
    if OBJECTIVES[0] in options.objectives:
        tuning.try_longer(options.results, options.runs)
    rates = tuning.chosen(options.results)
    began = time.perf_counter()
    for number in options.seeds:
        seed = Seed(number, options.results, options.runs)
        for strength in (DENSE, *options.strengths):
            _show(began, number, strength, "", seed.base(strength))
            for objective in options.objectives:
                for method in options.methods:
                    cell = seed.repaired(strength, method, objective, rates[method, objective])
                    _show(began, number, strength, f"{method}, {objective}", cell)


def _show(began: float, seed: int, strength: str, repair: str, cell: dict) -> None:
    minutes = (time.perf_counter() - began) / 60
    print(f"{minutes:5.1f} min  seed {seed}  {strength:14} {repair:36} {cell['recall']}", flush=True)


if __name__ == "__main__":
    main()
