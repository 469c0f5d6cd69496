"""The README's tables are the ones the result files hold, and it stays short."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TABLES = {
    "headline gptq-3bit": "benchmarks/study/results/smollm2-135m/report.md",
    "claims": "benchmarks/study/results/smollm2-135m/report.md",
}


@pytest.mark.parametrize("name", list(TABLES))
def test_a_table_is_the_one_in_its_result_file(name):
    found = re.search(rf"<!-- {name}: begin -->\n(.*?)<!-- {name}: end -->", README, re.DOTALL).group(1)
    assert len(found) > 150
    assert found in (ROOT / TABLES[name]).read_text()


def test_the_ratios_of_latency_are_those_measured():
    rows = (ROOT / "benchmarks/latency/results/dense.md").read_text().splitlines()
    ratios = {
        row.split("|")[1].strip(): row.split("|")[3].strip() for row in rows if row.count("|") == 5 and ":" in row
    }
    of = {name: ratios[name] for name in ratios if "IDP" in name}
    text = " ".join(README.split())
    whole, first = of["whole generate, IDP / base alone"], of["time to first token, IDP / base alone"]
    assert f"IDP takes {whole} of the base's time (first token {first}, further tokens " in text
    assert f"further tokens {of['per further token, IDP / base alone']}; 64 prompts instead of 2: " in text
    assert f"64 prompts instead of 2: {of['whole generate, IDP, M = 64 / IDP, M = 2']})" in text
    assert f"{of['whole generate, IDP / LoRA, rank 16']} of what a LoRA of rank 16 takes" in text
    assert f"its first token takes {of['time to first token, IDP / prompt tuning']} of prompt tuning's" in text


def test_the_numbers_of_the_biographies_and_of_the_control_are_those_measured():
    text = " ".join(README.split())
    recovered = (ROOT / "benchmarks/biographies/results/report.md").read_text().split("## ")[1]
    rows = [row.split("|") for row in recovered.splitlines() if row.startswith("| sparsegpt")]
    assert len(rows) == 4
    for name, column in (("a LoRA brings back", 4), ("IDP", 2)):
        of = [row[column].split("%")[0].strip() for row in rows]
        assert f"{name} {', '.join(of[:-1])} and {of[-1]} %" in text
    report = (ROOT / TABLES["claims"]).read_text()

    def nats(start: str, column: int) -> str:
        row = next(row for row in report.splitlines() if row.startswith(start))
        return f"{-float(row.split('|')[column].split('[')[0]):.3f}"

    control = [nats(start, 2) for start in ("| IDP, 4 x 32 | -", "| LoRA, budget-matched | -")]
    gained = [nats(f"| wiki | {name} | compressed |", 4) for name in ("IDP, 4 x 32", "LoRA, budget-matched")]
    assert f"{control[0]} (IDP) and {control[1]} nats (LoRA) off the *dense* model" in text
    assert f"where it takes {gained[0]} and {gained[1]} off the compressed one" in text


def test_the_minutes_of_the_demo_are_those_measured():
    total = json.loads((ROOT / "benchmarks/demo/results/seconds.json").read_text())["total"]
    assert f"does all this on two CPU cores in {total / 60:.1f} minutes, downloads included" in README


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


def test_the_counts_of_the_compatibility_matrix_are_its():
    rows = (ROOT / "benchmarks/compatibility/results/matrix.md").read_text().splitlines()[2:]
    idp, prompt_tuning = ([row.split("|")[column].strip() for row in rows] for column in (3, 4))
    right, refused = prompt_tuning.count("right"), prompt_tuning.count("error")
    sentence = (
        f"Of the {len(rows)} features of forward and `generate` in the [matrix](benchmarks/compatibility/results/matrix.md), "
        f"IDP gets {idp.count('right')} right; PEFT's prompt tuning gets {right} right, refuses {refused} and differs from "
        f"the definition on {len(rows) - right - refused}"
    )
    assert sentence in " ".join(README.split())


def test_every_file_the_readme_names_exists():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
    for name in re.findall(r"\b(\w+\.py)\b", README):
        assert (ROOT / "idp_peft" / name).exists(), name
    for module in (ROOT / "idp_peft").glob("*.py"):
        assert module.name in README or module.name == "__init__.py", f"{module.name} is not in the README's tree"


def test_the_readme_is_under_ten_kilobytes():
    assert len(README.encode()) < 10_240
