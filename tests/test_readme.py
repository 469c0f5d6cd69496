"""The README's tables are the ones the result files hold, and it stays short."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
STUDY = ROOT / "benchmarks/study/README.md"
REPORT = (ROOT / "benchmarks/study/results/smollm2-135m/report.md").read_text()


def marked(name: str, text: str) -> str:
    return re.search(rf"<!-- {name}: begin -->\n(.*?)<!-- {name}: end -->", text, re.DOTALL).group(1)


@pytest.mark.parametrize("name", ["headline gptq-3bit", "claims"])
def test_a_table_of_the_study_is_the_one_in_its_report(name):
    found = marked(name, STUDY.read_text())
    assert len(found) > 150
    assert found == marked(name, REPORT)


def test_the_rows_of_the_readme_are_rows_of_the_report():
    head, line, *rows = marked("short gptq-3bit", README).splitlines()
    report = marked("headline gptq-3bit", REPORT).splitlines()
    assert [head, line] == report[:2]
    assert 5 <= len(rows) <= 6
    assert set(rows) <= set(report)


def test_the_figure_shows_the_numbers_of_the_table_and_of_the_latency():
    from benchmarks.study.figure import POINTS, points

    found = points()
    assert list(found) == list(POINTS)
    assert found["compressed"][:2] == (1.0, 0.0)
    shown = {row.split("|")[1].strip(): row.split("|")[3].strip() for row in marked("repair", README).splitlines()[2:]}
    for name, (_cost, repaired, (low, high)) in found.items():
        if name != "compressed":
            assert shown[name] == f"{repaired} %"
            assert low <= repaired <= high
    latency = (ROOT / "benchmarks/latency/results/dense.md").read_text()
    assert f"({found['token prompt of 32'][0]:.2f}) |" in latency.split("| IDP by centroid |")[1].splitlines()[0]
    assert f"({found['LoRA of rank 16'][0]:.2f}) |" in latency.split("| LoRA, rank 16 |")[1].splitlines()[0]


def test_the_ratios_of_training_are_those_measured():
    record = json.loads((ROOT / "benchmarks/training/results/dense-one-core.json").read_text())
    case = {"batch": 8, "tokens": 128, "num_prompts": 4, "num_virtual_tokens": 100}
    turns = [turn for turn in record["turns"] if turn["case"] == case]
    found = {(turn["contestant"], turn["repetition"]): turn for turn in turns}
    repetitions = sorted({turn["repetition"] for turn in turns if "seconds" in turn})

    def ratios(name: str) -> tuple[float, float]:
        faster = [found["prompt tuning", r]["seconds"] / found[name, r]["seconds"] for r in repetitions]
        peaks = [found[other, "memory"]["peak_bytes"] for other in (name, "prompt tuning")]
        return statistics.median(faster), peaks[0] / peaks[1]

    (speed, memory), (speed_uniform, memory_uniform) = ratios("IDP, selected"), ratios("IDP, uniform")
    sentence = (
        f"{speed:.2f} times the tokens per second of PEFT's prompt tuning in {memory:.2f} of its memory (with "
        f'`assignment="uniform"`: {speed_uniform:.2f} times, {memory_uniform:.2f})'
    )
    assert sentence in " ".join((ROOT / "benchmarks/training/README.md").read_text().split())


def test_every_file_the_readme_names_exists():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
    for name in re.findall(r"\b(\w+\.py)\b", README):
        assert (ROOT / "idp_peft" / name).exists(), name
    for path in (ROOT / "idp_peft").glob("*.py"):
        assert path.name in README or path.name == "__init__.py", f"{path.name} is not in the README's tree"
    for path in (ROOT / "idp_peft").glob("*/__init__.py"):
        assert f"{path.parent.name}/" in README, f"{path.parent.name} is not in the README's tree"


def test_the_readme_is_under_eight_kilobytes():
    assert len(README.encode()) < 8192
