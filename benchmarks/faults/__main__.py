"""Counts what becomes of runs that are killed, starved or tampered with. Some minutes on two cores.

python -m benchmarks.faults kills|imports|disks|files|pairs|exports
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.common.markdown import head, row

RESULTS = Path(__file__).parent / "results"
WHAT = {
    "kills": "killed up to three times at random moments",
    "imports": "killed at a random moment, imports included",
    "disks": "on a disk of every size, then with room",
    "files": "one file missing, empty, cut or changed",
    "pairs": "two runs in one folder",
    "exports": "exports killed at random moments",
}
_COUNTS = {"kills": 450, "imports": 50, "pairs": 30, "exports": 50}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=list(WHAT))
    parser.add_argument("--count", type=int, default=None, help="tries, where they are random")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args(arguments)
    output = options.output or RESULTS / f"{options.experiment}.json"
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        records = list(_records(options, Path(folder)))
    write(output, options.experiment, records)
    print(f"{output}\n{table([output])}")


def _records(options: argparse.Namespace, folder: Path):
    import torch
    from tqdm import tqdm

    import idp_peft.recover.run
    import idp_peft.serving.export  # noqa: F401  (what a fork then need not import)
    from benchmarks.faults import experiments

    torch.set_num_threads(1)  # a fork has no other threads
    tqdm.monitor_interval = 0  # nor the lock that a thread of the progress bar may hold at that moment
    place, count = experiments.Place(folder), options.count or _COUNTS.get(options.experiment)
    tries = {
        "kills": lambda: experiments.kills(place, count, processes=False),
        "imports": lambda: experiments.kills(place, count, processes=True),
        "disks": lambda: experiments.disks(place),
        "files": lambda: experiments.files(place),
        "pairs": lambda: experiments.pairs(place, count),
        "exports": lambda: experiments.exports(place, count),
    }
    yield from tqdm(tries[options.experiment](), total=count, desc=options.experiment)


def write(output: Path, experiment: str, records: list[dict]) -> None:
    from idp_peft.evaluation import environment
    from idp_peft.files.whole_file import write_whole

    lines = ",\n".join(f"  {json.dumps(record)}" for record in records)
    head = json.dumps({"experiment": experiment, "environment": environment()})[:-1]
    write_whole(output, f'{head}, "tries": [\n{lines}\n]}}\n')


def table(paths: list[Path]) -> str:
    """Tried, same, refused and lost, one row per result file, in Markdown."""
    rows = head(["what was done", "tried", "same adapter", "refused in one line", "lost"])
    for path in paths:
        content = json.loads(path.read_text())
        found = Counter(one["outcome"] for one in content["tries"])
        numbers = [len(content["tries"]), *(found[name] for name in ("same", "refused", "lost"))]
        rows.append(row([WHAT[content["experiment"]], *map(str, numbers)]))
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
