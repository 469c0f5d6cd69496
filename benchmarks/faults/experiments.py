"""What is done to a run, and what comes of it: kills, full disks, damaged files, two runs in one folder, killed exports.

Each experiment yields one record per try: `outcome` is "same" (the adapter of a run that nothing happened to), "refused"
(one line, exit code 2), or "lost" (another adapter, a traceback, or anything else).
"""

from __future__ import annotations

import hashlib
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.faults.child import Ended, Forked, Started

_FLAGS = {
    "model": "model",
    "dataset": "text.jsonl",
    "max_steps": 8,
    "save_steps": 2,
    "save_total_limit": 2,
    "block_tokens": 16,
    "context_tokens": 4,
    "min_tokens": 4,
    "num_prompts": 3,
    "num_virtual_tokens": 4,
    "learning_rate": 0.05,
    "assignment": "uniform",
    "disable_tqdm": True,
    "use_cpu": True,
}


class Place:
    """A folder with a tiny model and text, and the adapter of a run that nothing happened to.

    Args:
        folder (`Path`): an empty folder.
    """

    def __init__(self, folder: Path) -> None:
        from tests.tiny_folder import tiny_folder, tiny_texts

        self.folder = folder
        tiny_folder(folder / "model")
        (folder / "text.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in tiny_texts()))
        began = time.monotonic()
        ended = self.forked("whole").wait()
        self.seconds = time.monotonic() - began
        if ended.code:
            raise SystemExit(f"the run that nothing happens to fails:\n{ended.errors}")
        self.expected = self.adapter("whole")

    def arguments(self, run: str) -> list[str]:
        return ["recover", *(f"--{name}={value}" for name, value in _FLAGS.items()), f"--output_dir={run}"]

    def forked(self, run: str) -> Forked:
        return Forked(self.arguments(run), self.folder)

    def started(self, run: str) -> Started:
        return Started(self.arguments(run), self.folder)

    def adapter(self, run: str) -> str | None:
        """A digest of a run's adapter; `None` where there is none."""
        file = self.folder / run / "adapter" / "adapter_model.safetensors"
        return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None

    def outcome(self, run: str, ended: Ended) -> str:
        if ended.code == 0 and self.adapter(run) == self.expected:
            return "same"
        return "refused" if ended.said_one_line else "lost"


def kills(place: Place, count: int, processes: bool, seed: int = 0) -> Iterator[dict]:
    """SIGKILL at a random moment, up to three times, then the same command once more.

    Args:
        processes (`bool`): kill processes of their own, imports included, instead of forks.
    """
    draw = random.Random(f"{seed}{processes}")
    start = place.started if processes else place.forked
    length = place.seconds + (8 if processes else 0)
    for number in range(count):
        run, moments = f"kill{number}", []
        for _ in range(draw.randint(1, 1 if processes else 3)):
            moment = draw.uniform(0, length)
            child = start(run)
            time.sleep(moment)
            child.signal(signal.SIGKILL)
            moments.append({"seconds": round(moment, 3), "killed": child.wait().code == -signal.SIGKILL})
        ended = place.forked(run).wait()
        yield {"moments": moments, "outcome": place.outcome(run, ended), **_words(place, run, ended)}
        shutil.rmtree(place.folder / run, ignore_errors=True)


def disks(place: Place, step: int = 4, most: int = 160) -> Iterator[dict]:
    """A disk of every size from nothing to enough; then the same command with room. Needs the right to mount."""
    for size in range(0, most + 1, step):
        disk = place.folder / "disk"
        disk.mkdir(exist_ok=True)
        # A size of 0 means no limit at all to the kernel.
        options = f"size={size}k" if size else "size=4k,nr_inodes=1"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], check=True)
        try:
            full = place.forked("disk/run").wait()
            then = place.outcome("disk/run", full)
            subprocess.run(["mount", "-o", "remount,size=4m,nr_inodes=1000", disk], check=True)
            ended = place.forked("disk/run").wait()
            outcome = place.outcome("disk/run", ended)
            record = {"kilobytes": size, "on the full disk": then, "outcome": "lost" if then == "lost" else outcome}
            yield {**record, **_words(place, "disk/run", full if then == "lost" else ended)}
        finally:
            subprocess.run(["umount", disk], check=True)


def files(place: Place) -> Iterator[dict]:
    """Every file of a run that was killed after its last checkpoint: missing, empty, cut, or with one bit changed."""
    source = place.folder / "stopped"
    shutil.copytree(place.folder / "whole", source)
    shutil.rmtree(source / "adapter")
    record = (source / "run.json").read_text()
    (source / "run.json").write_text(record.replace('"status": "complete"', '"status": "running"'))
    names = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
    for name in names:
        for harm in ("missing", "empty", "cut", "changed"):
            shutil.copytree(source, place.folder / "harmed")
            _harm(place.folder / "harmed" / name, harm)
            ended = place.forked("harmed").wait()
            yield {
                "file": name,
                "harm": harm,
                "outcome": place.outcome("harmed", ended),
                **_words(place, "harmed", ended),
            }
            shutil.rmtree(place.folder / "harmed")


def pairs(place: Place, count: int, seed: int = 0) -> Iterator[dict]:
    """Two of the same command in one folder, the second a random moment after the first."""
    draw = random.Random(seed)
    for number in range(count):
        run, delay = f"pair{number}", draw.uniform(0, place.seconds)
        first = place.forked(run)
        time.sleep(delay)
        second = place.forked(run)
        ended = [first.wait(), second.wait()]
        outcomes = [place.outcome(run, one) for one in ended]
        fine = "same" in outcomes and "lost" not in outcomes
        record = {"seconds": round(delay, 3), "each": outcomes, "outcome": "same" if fine else "lost"}
        yield {**record, **({} if fine else {"said": [one.errors[-500:] for one in ended]})}
        shutil.rmtree(place.folder / run, ignore_errors=True)


def exports(place: Place, count: int, seed: int = 0) -> Iterator[dict]:
    """An export killed at a random moment; the next one is whole and sweeps what was left."""
    draw = random.Random(seed)
    arguments = ["export", "--to-vocab", "--adapter=whole/adapter", "--model=model", "--output_dir=served/model"]
    began = time.monotonic()
    ended = Forked(arguments, place.folder).wait()
    length, expected = time.monotonic() - began, _content(place.folder / "served")
    if ended.code:
        raise SystemExit(f"the export that nothing happens to fails:\n{ended.errors}")
    for _ in range(count):
        shutil.rmtree(place.folder / "served")
        moment = draw.uniform(0, length)
        child = Forked(arguments, place.folder)
        time.sleep(moment)
        child.signal(signal.SIGKILL)
        killed = child.wait().code == -signal.SIGKILL
        was_whole = (place.folder / "served" / "model").is_dir()
        ended = Forked(arguments, place.folder).wait()
        fine = _content(place.folder / "served") == expected and (
            ended.code == 0 or (was_whole and ended.said_one_line)
        )
        record = {"seconds": round(moment, 3), "killed": killed, "outcome": "same" if fine else "lost"}
        yield {**record, **({} if fine else {"said": ended.errors[-500:]})}


def _content(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _harm(path: Path, harm: str) -> None:
    content = bytearray(path.read_bytes())
    if harm == "missing":
        path.unlink()
        return
    if harm == "changed" and content:
        content[len(content) // 2] ^= 1
    path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "changed": content}[harm])


def _words(place: Place, run: str, ended: Ended) -> dict:
    """What was said, where the adapter is not the same."""
    return {} if place.outcome(run, ended) == "same" else {"code": ended.code, "said": ended.errors[-500:]}
