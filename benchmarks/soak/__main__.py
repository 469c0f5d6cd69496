"""`python -m benchmarks.soak`: thousands of mixed requests to one model, from threads, and what memory does meanwhile.

Rounds: an adapter is switched on (or all are off), then every thread asks its share of requests: other lengths, batch sizes,
forced and free choices, forward and `generate`, beams, static caches, some that are refused. One request is asked again and
again and must be answered alike. After each round the process's memory and the live tensors are counted.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import random
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
ADAPTERS = {
    "default": {"num_prompts": 4, "num_virtual_tokens": 8},
    "other": {"num_prompts": 3, "num_virtual_tokens": [2, 9, 5]},
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--base", help="folder or hub id (default: a small Llama with random weights)")
    parser.add_argument("--requests", type=int, default=6000)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--per-round", type=int, default=200)
    parser.add_argument("--output", type=Path, default=RESULTS / "soak.json")
    return parser.parse_args(arguments)


def build(base: str | None = None):
    """A model with two adapters, in evaluation mode."""
    import torch
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from idp_peft import IDPConfig
    from idp_peft.models.loading import load_model

    torch.manual_seed(0)
    if base is None:
        shape = dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4)
        network = LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2, max_position_embeddings=256)).eval()
    else:
        network = load_model(base)
    model = get_peft_model(network, IDPConfig(task_type="CAUSAL_LM", **ADAPTERS["default"]))
    model.add_adapter("other", IDPConfig(task_type="CAUSAL_LM", **ADAPTERS["other"]))
    return model.eval()


def ask(model, draw: random.Random, num_prompts: int | None) -> str:
    """One random request; the name of its kind.

    Args:
        num_prompts (`int`, *optional*): M of the adapter in force; `None` while adapters are off.
    """
    import torch

    batch, tokens = draw.choice((1, 1, 2, 5)), draw.randint(1, 40)
    ids = torch.randint(2, model.config.vocab_size, (batch, tokens))
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : draw.randrange(tokens)] = 0
    request = {"input_ids": ids, "attention_mask": mask}
    if num_prompts is not None and draw.random() < 0.4:
        request["prompt_ids"] = torch.tensor([draw.randrange(-1, num_prompts) for _ in range(batch)])
    kind = draw.choice(("forward", "greedy", "greedy", "sample", "beams", "static", "no cache", "refused"))
    if kind == "refused":
        try:
            model(input_ids=ids, attention_mask=mask[:, 1:] if tokens > 1 else mask[:0])
        except (ValueError, RuntimeError, IndexError):
            return kind
        if num_prompts is not None:
            raise RuntimeError("a mask that does not fit was taken")
        return kind
    if kind == "forward":
        model(**request)
        return kind
    how = {
        "greedy": {"do_sample": False},
        "sample": {"do_sample": True},
        "beams": {"num_beams": 2, "do_sample": False},
        "static": {"cache_implementation": "static", "do_sample": False},
        "no cache": {"use_cache": False, "do_sample": False},
    }[kind]
    model.generate(**request, **how, max_new_tokens=draw.randint(1, 6))
    return kind


def memory() -> dict[str, int]:
    """What this process holds: bytes of memory, live tensors, and their bytes."""
    import torch

    gc.collect()
    kinds = (torch.Tensor, torch.nn.Parameter)  # not what a compiler makes of them, which has no size
    tensors = [thing for thing in gc.get_objects() if type(thing) in kinds and not thing.is_meta]
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "resident_bytes": pages * 4096,
        "tensors": len(tensors),
        "tensor_bytes": sum(tensor.nbytes for tensor in tensors),
    }


def soak(model, requests: int, threads: int, per_round: int, on_round=lambda number, found: None) -> list[dict]:
    """Ask `requests` requests and return what each round left: its adapter, kinds of requests, and memory."""
    import torch

    always = {"input_ids": torch.arange(2, 14)[None], "max_new_tokens": 8, "do_sample": False}
    always["attention_mask"] = torch.ones_like(always["input_ids"])
    answers: dict[str | None, torch.Tensor] = {}
    rounds = []

    def work(number: int, thread: int, adapter: str | None) -> list[str]:
        draw = random.Random(f"{number} {thread}")
        prompts = None if adapter is None else model.peft_config[adapter].num_prompts
        with torch.no_grad():
            kinds = [ask(model, draw, prompts) for _ in range(per_round // threads)]
            answer = model.generate(**always)
        if not torch.equal(answer, answers.setdefault(adapter, answer)):
            raise RuntimeError(f"round {number}: the request that is always the same was answered differently")
        return kinds

    with contextlib.ExitStack() as stack:
        # One for each: in a shared pool a quick thread may take two shares, and what threads remember would differ.
        pools = [stack.enter_context(ThreadPoolExecutor(1)) for _ in range(threads)]
        for number in range(requests // per_round):
            adapter = ("default", "other", None)[number % 3]
            if adapter is not None:
                model.set_adapter(adapter)
            (model.base_model.disable_adapter_layers if adapter is None else model.base_model.enable_adapter_layers)()
            shares = [pool.submit(work, number, thread, adapter) for thread, pool in enumerate(pools)]
            kinds = [kind for share in shares for kind in share.result()]
            vars(model.get_base_model()).pop("_cache", None)  # the latest static one, which transformers 5.0 keeps
            found = {"adapter": adapter, "kinds": {kind: kinds.count(kind) for kind in sorted(set(kinds))}, **memory()}
            rounds.append(found)
            on_round(number, found)
    model.base_model.enable_adapter_layers()
    return rounds


def growth(rounds: list[dict], what: str) -> int:
    """By how much the median of a count over the last third of the rounds exceeds that over the middle third."""
    third = len(rounds) // 3
    middle, last = (statistics.median(r[what] for r in part) for part in (rounds[third : 2 * third], rounds[-third:]))
    return int(last - middle)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    import transformers
    from tqdm.auto import tqdm

    from idp_peft.evaluation import environment

    transformers.utils.logging.set_verbosity_error()
    model = build(options.base)
    bar = tqdm(total=options.requests, desc="requests")
    rounds = soak(
        model, options.requests, options.threads, options.per_round, lambda number, found: bar.update(options.per_round)
    )
    names = ("resident_bytes", "tensors", "tensor_bytes")
    result = {
        "settings": {"base": options.base, "requests": options.requests, "threads": options.threads},
        "environment": environment(),
        "growth": {what: growth(rounds, what) for what in names},
        "rounds": rounds,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=0) + "\n")
    first, last = rounds[len(rounds) // 3], rounds[-1]
    print(
        f"{options.requests} requests from {options.threads} threads: resident memory {first['resident_bytes'] / 1e6:.1f} MB "
        f"after a third of them, {last['resident_bytes'] / 1e6:.1f} MB at the end; tensors {first['tensors']} and "
        f"{last['tensors']}"
    )


if __name__ == "__main__":
    main()
