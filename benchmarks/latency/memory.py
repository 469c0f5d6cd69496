"""What a contestant weighs: its file, its peak memory and how long it takes to load, each in a process of its own."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def measure_memory(options: argparse.Namespace, record) -> None:
    """Measure every contestant once per repetition (three of them), batch 8, 128 tokens in."""
    from benchmarks.common.contestants import METHODS

    case = {"part": "memory", "batch": 8, "tokens_in": 128, "tokens_out": 8}
    for repetition in range(3):
        for method in METHODS:
            if record.has(case=case, contestant=method, repetition=repetition):
                continue
            request = {
                "base": options.base,
                "method": method,
                "num_prompts": options.num_prompts,
                "num_virtual_tokens": options.num_virtual_tokens,
                **{name: case[name] for name in ("batch", "tokens_in", "tokens_out")},
            }
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.latency.memory", json.dumps(request)],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise SystemExit(f"measuring {method} failed:\n{done.stderr[-2000:]}")
            record.add(case=case, contestant=method, repetition=repetition, **json.loads(done.stdout.splitlines()[-1]))


def measure(
    base: str, method: str, num_prompts: int, num_virtual_tokens: int, batch: int, tokens_in: int, tokens_out: int
) -> dict:
    """`adapter_bytes`, `load_seconds` (the adapter on a loaded base, to its first answer of one token), `peak_bytes` of the
    process or the GPU, and IDP's `prompt_cache_bytes` with what the formula says."""
    import torch
    from peft import PeftModel

    from benchmarks.common.contestants import PeakMemory, load_base, with_method

    model, found = load_base(base), {"adapter_bytes": 0, "load_seconds": 0.0}
    ids = torch.randint(10, model.config.vocab_size, (batch, tokens_in)).to(model.device)
    generate = dict(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        if method != "base alone":
            with_method(model, method, num_prompts, num_virtual_tokens).save_pretrained(folder)
            found["adapter_bytes"] = Path(folder, "adapter_model.safetensors").stat().st_size
            model.generate(**generate, max_new_tokens=1)
            began = time.perf_counter()
            model = PeftModel.from_pretrained(model, folder).eval()
            found["load_seconds"] = time.perf_counter() - began
        peak = PeakMemory()
        model.generate(**generate, max_new_tokens=tokens_out, min_new_tokens=tokens_out)
        found["peak_bytes"] = peak.read()
    if method == "IDP":
        found |= _prompt_cache(model, num_prompts, num_virtual_tokens)
    return found


def _prompt_cache(model, num_prompts: int, num_virtual_tokens: int) -> dict:
    config, cache = model.config, model.base_model.layer.prompt_cache()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * heads * width * cache.keys[0].element_size()
    return {"prompt_cache_bytes": cache.nbytes, "prompt_cache_formula": per_token * num_prompts * num_virtual_tokens}


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
