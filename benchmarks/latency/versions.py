"""`python -m benchmarks.latency.versions BEFORE AFTER`: is one tree of this package slower than another?

One process per tree; they measure in turns, so that what the machine does meanwhile falls on both. Random weights, no download.
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
SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
}
CASES = ("forward with labels", "generate 32 tokens", "forced generate", "second turn", "training step")
CALLS = {"tiny": 10, "135M": 1}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency.versions", description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, help="folder of a checkout")
    parser.add_argument("after", type=Path, help="folder of another")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS / "versions.json")
    options = parser.parse_args(arguments)
    from idp_peft.evaluation import environment
    from idp_peft.files.whole_file import write_whole

    record = {"environment": environment(), "turns": options.turns, "ratios": {}}
    for size in SIZES:
        workers = [_Worker(folder, size) for folder in (options.before, options.after)]
        for case in CASES:
            seconds = [[worker.measure(case) for worker in workers] for _ in range(options.turns + 1)][1:]
            ratios = [after / before for before, after in seconds]
            low, _, high = statistics.quantiles(ratios, n=4)
            record["ratios"][f"{size}: {case}"] = [round(x, 4) for x in (statistics.median(ratios), low, high)]
            print(size, case, record["ratios"][f"{size}: {case}"], flush=True)
        for worker in workers:
            worker.process.terminate()
    write_whole(options.output, json.dumps(record, indent=1) + "\n")


class _Worker:
    """A process that measures one tree, one case at a time."""

    def __init__(self, folder: Path, size: str) -> None:
        code = f"from runpy import run_path; run_path({__file__!r})['work']({size!r})"
        environment = {**os.environ, "PYTHONPATH": str(folder.absolute())}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code],
            stdin=pipe,
            stdout=pipe,
            text=True,
            env=environment,
            cwd=folder,
        )

    def measure(self, case: str) -> float:
        self.process.stdin.write(case + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def work(size: str) -> None:
    """Answer each case's name on stdin with the seconds that it takes."""
    import torch
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from idp_peft import IDPConfig

    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=4096, num_key_value_heads=1, **SIZES[size]))
    model = get_peft_model(base, IDPConfig(task_type="CAUSAL_LM", num_prompts=4, num_virtual_tokens=32)).eval()
    ids = torch.randint(1, 4096, (2, 128))
    mask = torch.ones_like(ids)
    mask[0, :40] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    greedy = {**batch, "do_sample": False, "max_new_tokens": 32, "min_new_tokens": 32, "pad_token_id": 0}

    def turns() -> None:
        first = model.generate(**greedy, return_dict_in_generate=True)
        tokens = torch.cat([first.sequences, ids[:, :16]], dim=1)
        more = torch.ones(2, tokens.shape[1] - mask.shape[1], dtype=mask.dtype)
        again = {**greedy, "input_ids": tokens, "attention_mask": torch.cat([mask, more], dim=1)}
        model.generate(**again, past_key_values=first.past_key_values)

    def train() -> None:
        model.train()
        model(**batch, labels=ids).loss.backward()
        model.eval()

    with_labels = {**batch, "labels": ids.masked_fill(torch.arange(128) < 64, -100)}
    cases = {
        "forward with labels": torch.no_grad()(lambda: model(**with_labels)),
        "generate 32 tokens": lambda: model.generate(**greedy),
        "forced generate": lambda: model.generate(**greedy, prompt_ids=torch.tensor([0, 3])),
        "second turn": turns,
        "training step": train,
    }
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(CALLS[size]):
            cases[line.strip()]()
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
