"""`python -m benchmarks.profile`: where the time of a training step and of a first token goes, and what the hooks cost per token.

Operators by their own CPU time, from torch's profiler, on the packaged 135M model; and the Python of IDP's hooks at each token,
on a small random Llama, where nothing else hides it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
TOP = 8


def operators(run) -> dict:
    """Seconds of one call of `run`, and the share of each of its largest operators."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    shares = {event.key: round(event.self_cpu_time_total / total, 4) for event in events[:TOP]}
    return {"seconds": total / 1e6, "shares": shares, "calls": {event.key: event.count for event in events[:TOP]}}


def training_steps(base) -> dict:
    from benchmarks.training.__main__ import SHAPE, Training, contestants

    found = {}
    for name in ("IDP, selected", "IDP, uniform", "prompt tuning"):
        training = Training(base, SHAPE, contestants()[name])
        training.step()
        found[name] = operators(training.step)
    return found


def first_tokens(base) -> dict:
    import torch

    from benchmarks.common.contestants import with_method

    found = {}
    asked = {
        "base alone": {"method": "base alone"},
        "IDP, M = 4": {"method": "IDP"},
        "IDP, M = 64": {"method": "IDP", "num_prompts": 64},
    }
    for batch in (1, 8):
        ids = torch.randint(10, base.config.vocab_size, (batch, 128), generator=torch.Generator().manual_seed(0))
        request = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 1, "do_sample": False}
        for name, settings in asked.items():
            model = with_method(base, **settings)
            with torch.inference_mode():
                model.generate(**request)
                found[f"{name}, batch {batch}"] = operators(
                    lambda model=model, request=request: model.generate(**request)
                )
    return found


def hooks_per_token(tokens: int = 64, requests: int = 5) -> dict[str, float]:
    """Median microseconds of each of IDP's hooks while tokens are generated."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.common.contestants import with_method

    torch.manual_seed(0)
    shape = dict(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4)
    model = with_method(LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2)).eval(), "IDP")
    base, spent = model.get_base_model(), {}

    def timed(hook):
        def run(*args, **kwargs):
            began = time.perf_counter()
            result = hook(*args, **kwargs)
            spent.setdefault(hook.__qualname__, []).append(time.perf_counter() - began)
            return result

        return run

    for module in (base, base.get_decoder()):
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in hooks.items():
                hooks[key] = timed(hook)
    ids = torch.arange(2, 34)[None]
    request = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": tokens, "do_sample": False}
    with torch.inference_mode():
        for _ in range(requests):
            model.generate(**request, min_new_tokens=tokens)
    return {name: round(1e6 * statistics.median(seconds), 1) for name, seconds in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.add_argument("--base", default="default")
    parser.add_argument("--output", type=Path, default=RESULTS / "profile.json")
    options = parser.parse_args()
    import transformers

    from benchmarks.common.contestants import load_base
    from idp_peft.evaluation import environment

    transformers.utils.logging.set_verbosity_error()
    base = load_base(options.base)
    result = {
        "environment": environment(),
        "hooks_microseconds_per_token": hooks_per_token(),
        "first_token": first_tokens(base),
        "training_step": training_steps(base),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
