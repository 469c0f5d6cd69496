"""`python -m benchmarks.threads`: how fast several threads compute beside other busy processes, by how they wait.

The work is that of GPTQ, which `compress` spends its time on: column after column of a weight is rounded and its error spread over
the columns to the right, thousands of small operations with a barrier behind each; and large matrix products. Every setting runs
in a process of its own, since OpenMP reads them once. The settings take turns, and a ratio is of the same turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
SETTINGS = {
    "1 thread": {"OMP_NUM_THREADS": "1"},
    "2 threads": {"OMP_NUM_THREADS": "2"},
    "2 threads, passive": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"},
    "2 threads, 1000 spins": {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "1000"},
}


def columns(seconds: float) -> float:
    """Columns per second of GPTQ's inner loop on a weight of a 135M model, `[576, 1536]`, in blocks of 128."""
    import torch

    weight, inverse = torch.randn(576, 1536), torch.randn(1536, 1536).triu()
    began, done = time.perf_counter(), 0
    while True:
        for start in range(0, 1536, 128):
            block, errors = weight[:, start : start + 128].clone(), torch.zeros(576, 128)
            for column in range(128):
                values = block[:, column]
                error = values - values.clamp(-3, 3).round()
                block[:, column:] -= 1e-3 * error[:, None].matmul(
                    inverse[start + column, start + column : start + 128][None]
                )
                errors[:, column] = error
                done += 1
                if time.perf_counter() - began > seconds:
                    return done / (time.perf_counter() - began)
            weight[:, start + 128 :] -= 1e-3 * errors.matmul(inverse[start : start + 128, start + 128 :])


def products(seconds: float) -> float:
    """Matrix products per second, `[512, 576] x [576, 1536]`, as in a forward pass of that model."""
    import torch

    states, weight = torch.randn(512, 576), torch.randn(576, 1536)
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        states.matmul(weight)
        done += 1
    return done / (time.perf_counter() - began)


def speeds(settings: dict[str, str], seconds: float) -> dict[str, float]:
    """Units of each kind of work per second, in a fresh process."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "KMP_"))}
    call = [sys.executable, "-m", "benchmarks.threads", "--measure", "--seconds", str(seconds)]
    done = subprocess.run(call, env={**clean, **settings}, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


class Neighbours:
    """Processes that compute without a pause, for a `with`."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __enter__(self) -> None:
        self.processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(self.count)]

    def __exit__(self, *_) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def measure(turns: int, seconds: float, neighbours: list[int]) -> list[dict]:
    """One record per turn, setting and number of busy processes."""
    from tqdm import tqdm

    records = []
    for turn in tqdm(range(turns), desc="turns"):
        for count in neighbours:
            with Neighbours(count):
                for name, settings in SETTINGS.items():
                    place = {"turn": turn, "neighbours": count, "setting": name, "load": os.getloadavg()[0]}
                    records.append({**place, "per_second": speeds(settings, seconds)})
    return records


def write_table(record: dict, path: Path) -> None:
    """Per setting and case, the median ratio to one thread in the same turn, and the smallest one."""
    from benchmarks.common.markdown import head, row

    environment, found = record["environment"], {}
    for turn in record["turns"]:
        for work, per_second in turn["per_second"].items():
            found.setdefault((turn["setting"], work, turn["neighbours"]), []).append(per_second)
    cases = sorted({(work, count) for _, work, count in found})
    lines = [
        f"{environment['processor']}, {environment['cores']} cores; torch {environment['torch']}, commit "
        f"{environment['commit']}. Speed over that of one thread in the same turn: the median, and the smallest.",
        "",
        *head(["setting", *(f"{work}, {count} busy" for work, count in cases)]),
    ]
    for setting in SETTINGS:
        cells = []
        for case in cases:
            ratios = [a / b for a, b in zip(found[(setting, *case)], found[("1 thread", *case)], strict=True)]
            cells.append(f"{statistics.median(ratios):.3f} ({min(ratios):.3f})")
        lines.append(row([setting, *cells]))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.threads", description=__doc__)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one measurement (default: %(default)s)")
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0, 1, 2], help="busy processes beside it")
    parser.add_argument("--output", type=Path, default=RESULTS / "threads.json")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps({work.__name__: work(options.seconds) for work in (columns, products)}))
        return
    from idp_peft.evaluation import environment

    turns = measure(options.turns, options.seconds, options.neighbours)
    record = {"environment": environment(), "seconds": options.seconds, "settings": SETTINGS, "turns": turns}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    write_table(record, options.output.with_suffix(".md"))


if __name__ == "__main__":
    main()
