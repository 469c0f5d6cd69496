"""The demo's one table, and the record it is written from."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from idp_peft import __version__
from idp_peft.evaluation import ChunkScores

RANDOM, ORACLE = "random choice (expected)", "oracle choice (bound)"
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "torchao")


def reference_choices(single: list[ChunkScores]) -> dict[str, ChunkScores]:
    """What other ways to choose would score, from the scores of each prompt forced on every chunk.

    A random choice is given in expectation, which is the mean over prompts. The oracle takes each chunk's best prompt
    by the scored tokens themselves: no honest choice can beat it.
    """
    nats = torch.stack([scores.nats for scores in single])  # [M, chunks]
    best, prompt_ids = nats.min(0)
    tokens = single[0].tokens
    return {RANDOM: ChunkScores(nats.mean(0), tokens), ORACLE: ChunkScores(best, tokens, prompt_ids)}


def summary(rows: dict[str, ChunkScores]) -> dict[str, dict]:
    """The numbers of each row of the table."""
    dense, compressed = rows["dense"], rows["compressed"]
    gap = compressed.mean_nats - dense.mean_nats
    prompts = sum(name.startswith("prompt ") for name in rows)
    result = {}
    for name, scores in rows.items():
        change, error = scores.difference(compressed)
        chosen = None
        if scores.prompt_ids is not None and not name.startswith("prompt "):
            chosen = torch.bincount(scores.prompt_ids, minlength=prompts).tolist()
        result[name] = {
            "perplexity": scores.perplexity,
            "nats_above_dense": scores.mean_nats - dense.mean_nats,
            "nats_to_compressed": change,
            "standard_error": error,
            "recovery": -change / gap if gap else None,
            "chosen": chosen,
        }
    return result


def comparisons(rows: dict[str, ChunkScores]) -> dict[str, tuple[float, float]]:
    """Does choosing help? IDP's nats per token minus those of other uses of its prompts, and the standard error."""
    idp = rows["IDP (free choice)"]
    best = min((name for name in rows if name.startswith("prompt ")), key=lambda name: rows[name].mean_nats)
    return {f"{name}": idp.difference(rows[name]) for name in (best, RANDOM)}


def table(rows: dict[str, ChunkScores]) -> str:
    """The table as text."""
    lines = [f"{'':<26}{'ppl':>8}{'nats above':>12}{'change from':>13}{'SE':>9}{'recovery':>10}   chunks per prompt"]
    lines += [f"{'':<26}{'':>8}{'dense':>12}{'compressed':>13}"]
    for name, row in summary(rows).items():
        recovery = "" if row["recovery"] is None or name in ("dense", "compressed") else f"{row['recovery']:.1%}"
        lines.append(
            f"{name:<26}{row['perplexity']:>8.3f}{row['nats_above_dense']:>12.4f}{row['nats_to_compressed']:>13.4f}"
            f"{row['standard_error']:>9.4f}{recovery:>10}   {'' if row['chosen'] is None else row['chosen']}".rstrip()
        )
    tokens = rows["dense"].tokens
    lines.append(
        f"{len(tokens)} held-out chunks, {int(tokens.sum())} scored tokens; differences and SE are in nats per token, "
        "paired by chunk"
    )
    for name, (change, error) in comparisons(rows).items():
        better = "better than" if change < -2 * error else "worse than" if change > 2 * error else "no different from"
        lines.append(f"The free choice is {better} {name}: {change:+.4f} nats (SE {error:.4f})")
    return "\n".join(lines)


def write(
    options: argparse.Namespace,
    rows: dict[str, ChunkScores],
    checks: dict,
    history: list,
    seconds: float,
    tokens: dict[str, int],
) -> None:
    """Write settings, environment and every chunk's nats as JSON, and beside it the table as Markdown."""
    record = {
        "settings": {name: value for name, value in vars(options).items() if not isinstance(value, Path)},
        "tokens_per_chunk": tokens,
        "environment": environment(),
        "seconds": seconds,
        "checks": checks,
        "summary": summary(rows),
        "comparisons": comparisons(rows),
        "chunks": {name: _per_chunk(scores) for name, scores in rows.items()},
        "training": history,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    made_with = record["environment"]
    threads = f"{made_with['threads']} threads" if made_with["gpu"] is None else made_with["gpu"]
    options.output.with_suffix(".md").write_text(
        f"```\n{table(rows)}\n```\n\n`python -m benchmarks.demo`, damage {options.damage}, seed {options.seed}, "
        f"{threads} of {made_with['processor']}, {seconds / 60:.1f} minutes.\n",
        encoding="utf-8",
    )


def environment() -> dict:
    """What the numbers were made with."""
    return {
        "idp_peft": __version__,
        **{name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _per_chunk(scores: ChunkScores) -> dict:
    prompt_ids = None if scores.prompt_ids is None else scores.prompt_ids.tolist()
    return {"nats": [round(x, 6) for x in scores.nats.tolist()], "prompt_ids": prompt_ids}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
