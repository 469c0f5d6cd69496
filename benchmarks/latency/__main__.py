"""`python -m benchmarks.latency`: what an adapter adds to a request, side by side on one machine.

All contestants sit on the same weights and take turns, so that noise hits them alike. Each turn is one `generate`, timed
token by token; every turn goes into the result file, and the tables and plots are made from that file alone.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PARTS = ("requests", "prompts", "lengths", "compiled", "memory")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    from benchmarks.common.contestants import parse_with_common

    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=__doc__)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--inputs", nargs="+", type=int, default=[32, 128, 512], help="tokens in")
    parser.add_argument("--tokens-out", type=int, default=32)
    parser.add_argument("--banks", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64], help="M of part 'prompts'")
    parser.add_argument("--idp", nargs="+", default=["IDP"], help="ways of IDP whose M is raised in part 'prompts'")
    parser.add_argument("--lengths", nargs="+", type=int, default=[8, 32, 128], help="k of part 'lengths'")
    parser.add_argument("--num-prompts", type=int, default=4)
    parser.add_argument("--num-virtual-tokens", type=int, default=32)
    return parse_with_common(parser, arguments, RESULTS, repetitions=9)


def cases(options: argparse.Namespace) -> list[dict]:
    """What is measured, part by part: `{part, batch, tokens_in, tokens_out, contestants}`."""
    from benchmarks.common.contestants import METHODS

    shape = {"tokens_out": options.tokens_out}
    bank = {"num_prompts": options.num_prompts, "num_virtual_tokens": options.num_virtual_tokens}
    everyone = {method: {"method": method, **bank} for method in METHODS}
    base, one = {"base alone": {"method": "base alone"}}, {"batch": 1, "tokens_in": 128, **shape}
    banks = {f"{idp}, M = {m}": {"method": idp, **bank, "num_prompts": m} for m in options.banks for idp in options.idp}
    lengths = {
        f"{method}, k = {k}": {"method": method, **bank, "num_virtual_tokens": k}
        for k in options.lengths
        for method in ("IDP", "prompt tuning")
    }
    compiled = base | {
        "base alone, compiled": {"method": "base alone", "compiled": True},
        "IDP, compiled": {"method": "IDP", **bank, "compiled": True},
    }
    found = {
        "requests": [
            {"part": "requests", "batch": batch, "tokens_in": tokens, **shape, "contestants": everyone}
            for tokens in options.inputs
            for batch in options.batches
        ],
        "prompts": [{"part": "prompts", **one, "contestants": base | banks}],
        "lengths": [{"part": "lengths", **one, "contestants": base | lengths}],
        "compiled": [{"part": "compiled", **one, "contestants": compiled}],
    }
    return [case for part in options.parts for case in found.get(part, [])]


def timed(model, ids, tokens_out: int, **arguments) -> dict[str, float]:
    """Seconds of one `generate` of exactly `tokens_out` tokens: to the first of them, to the end, and per further one."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Clock(StoppingCriteria):
        """Asked after every token; never stops."""

        def __init__(self) -> None:
            self.ticks: list[float] = []

        def __call__(self, input_ids, scores, **kwargs):
            self.ticks.append(now())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    clock, began = Clock(), now()
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens_out,
        min_new_tokens=tokens_out,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([clock]),
        **arguments,
    )
    ended = now()
    further = (clock.ticks[-1] - clock.ticks[0]) / max(1, tokens_out - 1)
    return {"first": clock.ticks[0] - began, "further": further, "whole": ended - began}


def now() -> float:
    """The time, once a GPU has done all that it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Contestant:
    """A model under one method, asked in turns.

    Args:
        compiled (`bool`): whether its decoder goes through `torch.compile`, with a static cache.
        method: arguments of `benchmarks.common.contestants.with_method`.
    """

    def __init__(self, base, compiled: bool = False, **method) -> None:
        import torch

        from benchmarks.common.contestants import with_method

        self.model, self.compiled = with_method(base, **method), compiled
        self.prompts = method.get("num_prompts") if method["method"].startswith("IDP") else None
        if compiled:
            decoder = self.model.get_decoder()
            decoder.forward = torch.compile(decoder.forward)

    def turn(self, ids, tokens_out: int, repetition: int) -> dict[str, float]:
        """One `generate`; a compiled IDP model is given another prompt each time, and says what it compiled for it."""
        from torch._dynamo.utils import counters

        if not self.compiled:
            return timed(self.model, ids, tokens_out)
        graphs = counters["stats"]["unique_graphs"]
        other = {} if self.prompts is None else {"prompt_ids": repetition % self.prompts}
        measured = timed(self.model, ids, tokens_out, cache_implementation="static", **other)
        return {**measured, "new_graphs": counters["stats"]["unique_graphs"] - graphs}


def run(case: dict, base, record, repetitions: int, seconds: float) -> None:
    """Let all contestants of a case take turns."""
    import torch
    from tqdm.auto import tqdm

    key = {name: value for name, value in case.items() if name != "contestants"}
    if all(record.has(case=key, contestant=c, repetition=r) for c in case["contestants"] for r in range(repetitions)):
        return
    models = {name: Contestant(base, **settings) for name, settings in case["contestants"].items()}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, base.config.vocab_size, (case["batch"], case["tokens_in"]), generator=generator)
    ids = ids.to(base.device)
    with torch.inference_mode():
        for model in models.values():
            # Warms up: IDP computes its prompt cache there, once, and compilers compile.
            model.turn(ids, case["tokens_out"] if model.compiled else 2, 0)
        began = now()
        bar = tqdm(range(repetitions), desc=", ".join(f"{name} {value}" for name, value in key.items()))
        for repetition in bar:
            if repetition >= 2 and now() - began > seconds:
                break
            names = list(models)
            for name in names[repetition % len(names) :] + names[: repetition % len(names)]:
                if not record.has(case=key, contestant=name, repetition=repetition):
                    measured = models[name].turn(ids, case["tokens_out"], repetition)
                    record.add(case=key, contestant=name, repetition=repetition, **measured)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    import transformers

    from benchmarks.common.contestants import Record, load_base
    from benchmarks.latency.memory import measure_memory
    from benchmarks.latency.tables import write_tables

    transformers.utils.logging.set_verbosity_error()
    not_settings = ("output", "parts", "batches", "inputs", "banks", "lengths", "idp", "repetitions", "seconds")
    settings = {name: value for name, value in vars(options).items() if name not in not_settings}
    record = Record(options.output, settings)
    base = load_base(options.base)
    for case in cases(options):
        run(case, base, record, options.repetitions, options.seconds)
    if "memory" in options.parts:
        measure_memory(options, record)
    write_tables(options.output)


if __name__ == "__main__":
    main()
