"""`python -m benchmarks.training`: training tokens per second and peak memory, side by side on one machine.

A step is forward, backward and AdamW on the same batch; tokens are those of the input. Contestants share the base's weights
and take turns; peak memory is measured in a process per contestant.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.common.markdown import head, row

RESULTS = Path(__file__).parent / "results"
# Whose memory is measured in every case; the others' in the first alone.
_COMPARED = ("IDP, selected", "IDP, uniform", "prompt tuning")
SHAPE = {"batch": 8, "tokens": 128, "num_prompts": 4, "num_virtual_tokens": 100}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    from benchmarks.common.contestants import parse_with_common

    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8], help="sweep of the batch size")
    parser.add_argument("--lengths", nargs="*", type=int, default=[10, 32, 100], help="sweep of k")
    parser.add_argument("--banks", nargs="*", type=int, default=[1, 4, 16], help="sweep of M")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory, a process each")
    return parse_with_common(parser, arguments, RESULTS, repetitions=5)


def cases(options: argparse.Namespace) -> list[dict]:
    """What is measured: `SHAPE` first, then with one number changed at a time."""
    changed = [{"batch": batch} for batch in options.batches]
    changed += [{"num_virtual_tokens": k} for k in options.lengths]
    changed += [{"num_prompts": m} for m in options.banks]
    found: list[dict] = []
    for case in [{}, *changed]:
        case = {**SHAPE, **case}
        if case not in found:
            found.append(case)
    return found


def contestants() -> dict[str, dict]:
    """Name -> arguments of `benchmarks.common.contestants.with_method`. Three ways to assign prompts to examples."""
    from benchmarks.common.contestants import METHODS

    idp = {
        "IDP, selected": {"method": "IDP", "assignment": "selected"},
        "IDP, uniform": {"method": "IDP", "assignment": "uniform"},
    }
    others = [name for name in METHODS if name not in ("base alone", "IDP") and "folded" not in name]
    return idp | {name: {"method": name} for name in others}


class Training:
    """A contestant in training: `step()` is one whole step on the case's batch."""

    def __init__(self, base, case: dict, settings: dict) -> None:
        import torch

        from benchmarks.common.contestants import with_method

        bank = {name: case[name] for name in ("num_prompts", "num_virtual_tokens")}
        self.model = with_method(base, **settings, **bank).train()
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(10, base.config.vocab_size, (case["batch"], case["tokens"]), generator=generator)
        ids = ids.to(base.device)
        labels = ids.clone()
        labels[:, : case["tokens"] // 4] = -100  # the context, by which IDP chooses
        self.batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step(self) -> None:
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(options: argparse.Namespace, record) -> None:
    """Steps in turns, then peak memory."""
    import torch
    from tqdm.auto import tqdm

    from benchmarks.common.contestants import load_base
    from benchmarks.latency.__main__ import now

    base = load_base(options.base)
    for case in cases(options):
        names = contestants()
        missing = [
            r
            for r in range(options.repetitions)
            if not all(record.has(case=case, contestant=c, repetition=r) for c in names)
        ]
        if not missing:
            continue
        running = {name: Training(base, case, settings) for name, settings in names.items()}
        for training in running.values():
            training.step()
        case_began = now()
        for repetition in tqdm(missing, desc=", ".join(f"{name} {value}" for name, value in case.items())):
            if repetition >= 2 and now() - case_began > options.seconds:
                break
            order = list(running)[repetition % len(running) :] + list(running)[: repetition % len(running)]
            for name in order:
                if not record.has(case=case, contestant=name, repetition=repetition):
                    began = now()
                    running[name].step()
                    record.add(case=case, contestant=name, repetition=repetition, seconds=now() - began)
        del running
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    for number, case in enumerate([] if options.no_memory else cases(options)):
        for name, settings in contestants().items():
            everyone = number == 0 or name in _COMPARED
            if everyone and not record.has(case=case, contestant=name, repetition="memory"):
                peak = _in_a_process({"base": options.base, "case": case, "settings": settings})
                record.add(case=case, contestant=name, repetition="memory", **peak)


def _in_a_process(request: dict) -> dict:
    command = [sys.executable, "-m", "benchmarks.training", "--memory-of", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"measuring memory failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def memory_of(request: dict) -> dict[str, int]:
    """Peak bytes of a process (or the GPU): with the loaded model alone, and during one step."""
    from benchmarks.common.contestants import PeakMemory, load_base

    base = load_base(request["base"])
    loaded = PeakMemory().read()
    training = Training(base, request["case"], request["settings"])
    peak = PeakMemory()
    training.step()
    return {"loaded_bytes": loaded, "peak_bytes": peak.read()}


def markdown(record: dict) -> str:
    """Tables of a result file: medians of tokens per second, and ratios to prompt tuning turn by turn."""
    environment, turns = record["environment"], record["turns"]
    where = environment["gpu"] or f"{environment['processor']}, {environment['threads']} threads"
    lines = [
        f"Base: {record['settings']['label']}. {where}; torch {environment['torch']}, commit {environment['commit']}."
    ]
    for case in list({json.dumps(turn["case"]): turn["case"] for turn in turns}.values()):
        lines += ["", "**" + ", ".join(f"{name} {value}" for name, value in case.items()) + "**", ""]
        lines += head(["", "tokens per second", "ratio to prompt tuning", "peak memory", "ratio"])
        seconds, peaks = {}, {}
        for turn in turns:
            if turn["case"] == case and turn["repetition"] == "memory":
                peaks[turn["contestant"]] = turn["peak_bytes"]
            elif turn["case"] == case:
                seconds.setdefault(turn["contestant"], {})[turn["repetition"]] = turn["seconds"]
        other = seconds["prompt tuning"]
        for name in contestants():
            own = seconds[name]
            speed = case["batch"] * case["tokens"] / statistics.median(own.values())
            faster = statistics.median(other[repetition] / own[repetition] for repetition in own)
            memory = ["", ""]
            if name in peaks:
                memory = [f"{peaks[name] / 1e6:,.0f} MB", f"{peaks[name] / peaks['prompt tuning']:.2f}"]
            lines.append(row([name, f"{speed:.0f}", f"{faster:.2f}", *memory]))
    return "\n".join(lines) + "\n"


def main() -> None:
    if sys.argv[1:2] == ["--memory-of"]:
        print(json.dumps(memory_of(json.loads(sys.argv[2]))))
        return
    options = parse()
    import transformers

    from benchmarks.common.contestants import Record

    transformers.utils.logging.set_verbosity_error()
    record = Record(options.output, {"base": options.base, "label": options.label})
    measure(options, record)
    options.output.with_suffix(".md").write_text(markdown(record.content), encoding="utf-8")


if __name__ == "__main__":
    main()
