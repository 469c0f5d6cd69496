"""How long a choice takes outside the engine: the router in this process, and `idp-peft route`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TEXTS, FILE_TEXTS = 64, 4000


def measure(options: argparse.Namespace, record) -> None:
    """Measure choices by centroids and by attention, of texts of each length, in turns."""
    from benchmarks.common.contestants import with_method
    from benchmarks.serving.load import Texts
    from idp_peft.models.loading import load_model, place_of
    from idp_peft.serving import Router

    network, routers = load_model("default"), {}
    for name, method in (("centroids", "IDP by centroid"), ("attention", "IDP")):
        folder = options.folder / name
        with_method(network, method).save_pretrained(folder)
        routers[name] = Router.from_pretrained(folder, place_of("default"))
    texts = Texts(routers["centroids"])
    for tokens in options.inputs:
        case = {"tokens_in": tokens, "how": "router, one at a time"}
        for turn in range(options.turns):
            given = [texts.next(tokens) for _ in range(TEXTS)]
            for name, router in routers.items():
                if record.has(case=case, contestant=name, repetition=turn):
                    continue
                router.route(given[:1])
                began = time.perf_counter()
                rows = [router.token_ids(text) for text in given]
                tokenising = (time.perf_counter() - began) / TEXTS
                began = time.perf_counter()
                for row in rows:
                    router.route([row])
                seconds = (time.perf_counter() - began) / TEXTS + tokenising
                record.add(case=case, contestant=name, repetition=turn, seconds_per_text=seconds, tokenising=tokenising)
    for tokens in options.inputs:
        case = {"tokens_in": tokens, "how": "`idp-peft route`"}
        for turn in range(options.turns):
            for name in routers:
                if not record.has(case=case, contestant=name, repetition=turn):
                    count = FILE_TEXTS if name == "centroids" else FILE_TEXTS // 20
                    found = _by_command(options.folder / name, [texts.next(tokens) for _ in range(64)], count)
                    record.add(case=case, contestant=name, repetition=turn, **found)


def _by_command(adapter: Path, texts: list[str], count: int) -> dict:
    """Seconds per text of the command, without its start: a file of `count` texts against one of a single text."""
    from idp_peft.models.loading import load_tokenizer, place_of

    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for number in (1, count):
            given = [texts[index % len(texts)] for index in range(number)]
            lines = Path(folder, f"{number}.jsonl")
            lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in given), encoding="utf-8")
            command = [
                sys.executable,
                "-m",
                "idp_peft_cli",
                "route",
                "--adapter",
                str(adapter),
                "--model",
                place_of("default"),
            ]
            began = time.perf_counter()
            subprocess.run(
                [*command, "--input", str(lines), "--output", str(lines.with_suffix(".out"))],
                check=True,
                capture_output=True,
            )
            seconds.append(time.perf_counter() - began)
    tokenizer = load_tokenizer("default")
    began = time.perf_counter()
    for text in texts:
        tokenizer(text)
    return {
        "seconds_per_text": (seconds[1] - seconds[0]) / (count - 1),
        "tokenising": (time.perf_counter() - began) / len(texts),
    }
