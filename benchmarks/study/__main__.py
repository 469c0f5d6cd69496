"""`python -m benchmarks.study CONFIG`: run the matrix, cell by cell; what is there already is kept. See README.md."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import logging
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common.cells import Cells

_HERE = Path(__file__).parent
logger = logging.getLogger("benchmarks.study")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    parser.add_argument("config", type=Path, help="YAML: which cells, and how (configs/)")
    parser.add_argument(
        "--results", type=Path, default=_HERE / "results", help="run.json, and one file of cells per contender"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="adapters and checkpoints")
    parser.add_argument("--only", default="", help="contenders whose path contains this, e.g. gptq-3bit/idp")
    parser.add_argument("--measure", default="", help="cells whose name contains this, e.g. text_ or arc")
    parser.add_argument("--list", action="store_true", help="say what is done and what is not, and stop")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO)

    from benchmarks.study.contenders import NotReady
    from benchmarks.study.matrix import Matrix

    matrix = Matrix(options.config)
    for one in matrix.contenders:
        if options.only not in str(one.path):
            continue
        cells = Cells(options.results / matrix.name, one.path)
        wanted = [name for name in matrix.measures(one) if options.measure in name]
        done = cells.read()
        missing = [name for name in wanted if name not in done]
        if options.list or not missing:
            logger.info("%-40s %d of %d cells", one.path, len(wanted) - len(missing), len(wanted))
        else:
            with _alone(options.runs / matrix.name / one.path) as alone:
                if alone:
                    try:
                        run(matrix, one, cells, missing, options.runs)
                    except NotReady as reason:
                        logger.warning("%s", reason)


def run(matrix, one, cells: Cells, missing: list[str], runs: Path) -> None:
    """Measure a contender's missing cells, each written as it is done."""
    import torch

    from benchmarks.study import contenders, measure
    from idp_peft.evaluation import environment

    began = time.time()
    adapter = contenders.prepare(matrix, one, runs)
    model, tokenizer = contenders.load(matrix, one, adapter)
    about = {
        "format": 1,
        "cell": {"base": matrix.base, **vars(one)},
        "evaluation": matrix.evaluation,
        **contenders.describe(matrix, one, model, adapter),
        "environment": environment(),
    }
    logger.info("%s: ready after %.0f s", one.path, time.time() - began)
    autocast = matrix.evaluation.get("autocast")
    for name in missing:
        started = time.time()
        with torch.autocast(model.device.type, getattr(torch, autocast or "bfloat16"), enabled=autocast is not None):
            if name.startswith("text_"):
                text = name.removeprefix("text_")
                scores = measure.score_text(model, tokenizer, text, matrix.texts[text], matrix.evaluation)
            else:
                scores = measure.score_task(model, tokenizer, name, matrix.evaluation, matrix.wants_each_prompt(one))
        seconds = round(time.time() - started, 1)
        cell = {**about, "cell": {**about["cell"], "task": name}, "seconds": seconds, **scores}
        cells.add(name, cell)
        logger.info("%s %s: %.1f s", one.path, name, seconds)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Whether no other process works on this contender: several can share one matrix. The lock goes with the process."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


if __name__ == "__main__":
    main()
