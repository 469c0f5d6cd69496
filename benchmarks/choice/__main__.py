"""`python -m benchmarks.choice MODEL --adapter NAME=PATH`: does the attention score pick the prompt that helps? See README.md.

One file per adapter; an adapter whose file is there, made with the same settings, is not measured again.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choice", description=__doc__)
    parser.add_argument("model", help="folder or name of the model that the adapters were trained on")
    parser.add_argument(
        "--adapter",
        action="append",
        required=True,
        type=named,
        metavar="NAME=PATH",
        help="a folder of an IDP adapter; names that differ in a last `.seedN` alone are pooled",
    )
    parser.add_argument("--blocks", type=int, default=60, help="held-out blocks, one per article (default: 60)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def named(text: str) -> tuple[str, str]:
    """`NAME=PATH` in two."""
    name, separator, path = text.partition("=")
    if not separator or not path or not re.fullmatch(r"[\w.-]+", name):
        raise argparse.ArgumentTypeError(
            f"must be NAME=PATH, with a name of letters, digits, '.', '_', '-'; got {text!r}"
        )
    return name, path


def main(arguments: list[str] | None = None) -> None:
    from benchmarks.choice.measure import Settings
    from idp_peft.files.whole_file import write_whole

    options = parse(arguments)
    settings = Settings(blocks=options.blocks)
    base, blocks = None, None
    for name, path in options.adapter:
        output = options.output / f"{name}.json"
        if is_done(output, settings):
            continue
        if base is None:
            base, blocks = _base(options.model), _blocks(options.model, settings)
        began = time.perf_counter()
        record, base = _measured(base, path, blocks, settings)
        record = {"name": name, "model": Path(options.model).name, **record}
        write_whole(output, json.dumps(record) + "\n")
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)


def is_done(output: Path, settings) -> bool:
    from dataclasses import asdict

    return output.exists() and json.loads(output.read_text())["settings"] == asdict(settings)


def _measured(base, path: str, blocks, settings) -> tuple[dict, object]:
    """What was measured of an adapter, and the base without it."""
    from peft import PeftModel

    import idp_peft  # noqa: F401  (registers the method)
    from benchmarks.choice.measure import measure
    from idp_peft.evaluation.environment import environment

    model = PeftModel.from_pretrained(base, path)
    record = {"environment": environment(), **measure(model, blocks, settings)}
    return record, model.unload()


def _base(name: str):
    import torch

    from idp_peft.models.loading import load_model

    return load_model(name, dtype=torch.float32).eval()


def _blocks(name: str, settings):
    """The first block of each held-out article that is long enough, int64 `[blocks, n]`."""
    import torch

    from idp_peft.models.loading import load_tokenizer
    from idp_peft.texts.data import load_texts, token_blocks

    length = settings.block_tokens
    found = token_blocks(
        load_tokenizer(name), load_texts("wiki", "held_out"), length, min_tokens=length, per_document=1
    )
    if len(found) < settings.blocks:
        raise SystemExit(
            f"--blocks must be at most {len(found)}, the long articles of the held-out text, got {settings.blocks}"
        )
    return torch.tensor(found[: settings.blocks])


if __name__ == "__main__":
    main()
