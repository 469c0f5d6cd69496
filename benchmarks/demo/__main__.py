"""`python -m benchmarks.demo`: the commands of the demo, one after the other, as a user would type them."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common.processor import has_bfloat16_units

TASKS = ["local_arc_easy", "local_piqa"]
# Chosen by benchmarks/repair; all get the same text, steps and teacher. The LoRA is as large as the largest bank.
TRAINING = ["--teacher", "default", "--max_steps", "20", "--min_tokens", "256"]
KEYS = ["--prompts", "key_values", "--selection", "centroid"]
METHODS = {
    "IDP, keys and values": KEYS,
    "IDP, tokens": ["--selection", "centroid"],
    "one prompt of the bank's length": ["--num_prompts", "1", "--num_virtual_tokens", "128"],
    "LoRA of the bank's size": ["--method", "lora", "--match_budget", *KEYS, "--learning_rate", "4e-3"],
}


def commands(folder: Path, seed: int, limit: int) -> list[list[str]]:
    """The demo, in order."""
    compressed, results = str(folder / "compressed"), folder / "results"
    training = [*TRAINING, "--seed", str(seed), *(["--bf16"] if has_bfloat16_units() else [])]
    measure = ["--tasks", *TASKS, "--limit", str(limit), "--batch_size", "8"]
    steps = [
        ["compress", "--model", "default", "--recipe", "gptq-3bit", "--output_dir", compressed],
        ["evaluate", "--model", "default", *measure, "--output", str(results / "dense.json")],
        ["evaluate", "--model", compressed, *measure, "--output", str(results / "compressed.json")],
    ]
    for label, flags in METHODS.items():
        name = re.sub(r"\W+", "_", label).lower()
        run = str(folder / name)
        steps.append(["recover", "--model", compressed, *flags, *training, "--output_dir", run])
        adapter = ["--adapter", f"{run}/adapter", "--label", label, "--output", str(results / f"{name}.json")]
        steps.append(["evaluate", "--model", compressed, *adapter, *measure])
    steps.append(["report", "--results", str(results), "--output_dir", str(folder / "report")])
    return steps


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/demo"), help="default: %(default)s; goes on where it was"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the training (default: %(default)s)")
    parser.add_argument(
        "--limit", type=int, default=20, help="documents, and questions per task (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    began, seconds = time.perf_counter(), {}
    for command in commands(options.folder, options.seed, options.limit):
        if command[0] == "compress" and (options.folder / "compressed").is_dir():
            continue  # the one sub-command that refuses to find its result there already
        print(f"\n$ idp-peft {shlex.join(command)}", flush=True)
        started = time.perf_counter()
        if code := subprocess.run([sys.executable, "-m", "idp_peft_cli", *command]).returncode:
            raise SystemExit(code)
        seconds[" ".join(command[:1] + [word for word in command if word.startswith(str(options.folder))])] = (
            time.perf_counter() - started
        )
    total = time.perf_counter() - began
    (options.folder / "seconds.json").write_text(json.dumps({"total": total, **seconds}, indent=1) + "\n")
    report = options.folder / "report"
    print(f"\n{(report / 'report.md').read_text()}")
    print(
        f"{total / 60:.1f} minutes; the page is {report / 'report.html'}, every number in {options.folder / 'results'}"
    )


if __name__ == "__main__":
    main()
