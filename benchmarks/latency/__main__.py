"""`python -m benchmarks.latency`: what an adapter adds to a request, side by side on one machine.

All contestants sit on copies of the same base and take turns, so that noise hits them alike; results are medians and their
ratios to the base alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

CONTESTANTS = ("base alone", "IDP", "PEFT prompt tuning", "PEFT LoRA, rank 16")
RESULTS = Path(__file__).parent / "results"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=__doc__)
    parser.add_argument("--model", help="folder or hub id (default: SmolLM2-135M-Instruct, fetched)")
    parser.add_argument("--tokens-in", type=int, default=128)
    parser.add_argument("--tokens-out", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--num-prompts", type=int, default=4)
    parser.add_argument("--num-virtual-tokens", type=int, default=32)
    parser.add_argument("--output", type=Path, default=RESULTS / "latency.json")
    return parser.parse_args()


def contestant(name: str, folder, options: argparse.Namespace):
    """One model with its method, in evaluation mode."""
    import torch
    from peft import LoraConfig, PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from idp_peft import IDPConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    tokens = options.num_virtual_tokens
    configs = {
        "IDP": IDPConfig(task_type="CAUSAL_LM", num_prompts=options.num_prompts, num_virtual_tokens=tokens),
        "PEFT prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens),
        "PEFT LoRA, rank 16": LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"),
    }
    return (get_peft_model(base, configs[name]) if name in configs else base).eval()


def timed(model, ids, tokens: int) -> float:
    """Seconds of one `generate` of exactly `tokens` tokens."""
    import torch

    began = time.perf_counter()
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
    )
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def table(medians: dict[str, dict[str, float]]) -> str:
    lines = ["| | time to first token | whole generate | per further token |", "|---|---|---|---|"]
    for name, times in medians.items():
        cells = [
            f"{1000 * seconds:.1f} ms ({seconds / medians['base alone'][of]:.2f})" for of, seconds in times.items()
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    options = parse()
    import torch
    import transformers
    from tqdm.auto import tqdm

    from benchmarks.demo.report import environment
    from idp_peft import assets

    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    folder = options.model or assets.default_model()
    models = {name: contestant(name, folder, options) for name in CONTESTANTS}
    vocabulary = models["base alone"].config.vocab_size
    ids = torch.randint(10, vocabulary, (options.batch, options.tokens_in)).to(models["base alone"].device)
    times = {name: {"first": [], "whole": []} for name in CONTESTANTS}
    with torch.inference_mode():
        for repetition in tqdm(range(options.repetitions + 1), desc="repetitions"):
            for name, model in models.items():
                first, whole = timed(model, ids, 1), timed(model, ids, options.tokens_out)
                if repetition:  # the first turn warms up: IDP computes its prompt cache there, once
                    times[name]["first"].append(first)
                    times[name]["whole"].append(whole)
    medians = {}
    for name, measured in times.items():
        first, whole = (statistics.median(measured[part]) for part in ("first", "whole"))
        medians[name] = {"first": first, "whole": whole, "further": (whole - first) / (options.tokens_out - 1)}
    settings = {name: value for name, value in vars(options).items() if not isinstance(value, Path)}
    record = {"settings": settings, "environment": environment(), "medians": medians, "times": times}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    options.output.with_suffix(".md").write_text(table(medians))
    print(table(medians))


if __name__ == "__main__":
    main()
