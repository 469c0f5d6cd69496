"""Learning rates, on a seed that is in no table, by the recall of `validation`: people who are in no repair text either.

The same people as held-out ones in everything but the name, so each method is set to bring back the most of what its text
does not tell.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.biographies.compressing import STRENGTHS
from benchmarks.biographies.plan import DENSE, Seed
from benchmarks.common.cells import all_cells

PILOT_SEED = 100
MEASURED = ("repaired-on", "validation", "unknown")
DAMAGED = ("sparsegpt-60",)  # in the middle of the axis: much is lost, and much is left to build on
LONGER = 800  # steps
GRID = {
    "idp": (3e-3, 1e-2, 3e-2, 1e-1),
    "one-prompt": (3e-3, 1e-2, 3e-2, 1e-1),
    "lora-same-size": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "lora-rank-16": (3e-4, 1e-3, 3e-3, 1e-2),
}


def pilot(results: Path, runs: Path) -> Seed:
    return Seed(PILOT_SEED, results / "tuning", runs, MEASURED, per_person=False)


def tune(results: Path, runs: Path, objectives: list[str]) -> None:
    """Measure the damage of every strength, and every learning rate of the grid, on the pilot seed."""
    seed = pilot(results, runs)
    for strength in (DENSE, *STRENGTHS):
        print(f"pilot {strength}: {seed.base(strength)['recall']}", flush=True)
    for objective in objectives:
        for strength in DAMAGED:
            for method, rates in GRID.items():
                for rate in rates:
                    name = f"{method}-{objective.replace(' ', '-')}-{rate:g}"
                    found = seed.repaired(strength, method, objective, rate, name)["recall"]
                    print(f"pilot {strength}, {name}: {found}", flush=True)


def try_longer(results: Path, runs: Path) -> None:
    """Whether more steps would change the picture: the learning rate taken, for prompts and for a LoRA of their size."""
    seed, rates = pilot(results, runs), chosen(results)
    for strength in DAMAGED:
        for method in ("idp", "lora-same-size"):
            rate, objective = rates[method, "language modelling"], "language modelling"
            name = f"{method}-{objective.replace(' ', '-')}-{LONGER}-steps"
            found = seed.repaired(strength, method, objective, rate, name, LONGER)["recall"]
            print(f"pilot {strength}, {name}: {found}", flush=True)


def tried(results: Path) -> list[dict]:
    """Settings and recall of every repair tried with the usual number of steps."""
    return [trial for trial in _trials(results) if "steps" not in trial]


def longer(results: Path) -> list[dict]:
    """The same of those with more steps."""
    return [trial for trial in _trials(results) if "steps" in trial]


def _trials(results: Path) -> list[dict]:
    contents = [content for _, _, content in _cells(results)]
    return [
        {**content["settings"], "recall": content["recall"]} for content in contents if content["settings"]["method"]
    ]


def _cells(results: Path):
    return all_cells(results / "tuning", f"seed-{PILOT_SEED}/*.jsonl")


def chosen(results: Path) -> dict[tuple[str, str], float]:
    """(method, objective) -> the learning rate with the best mean recall of `validation` over the strengths tried."""
    scores: dict[tuple[str, str], dict[float, list[float]]] = {}
    for trial in tried(results):
        rates = scores.setdefault((trial["method"], trial["objective"]), {})
        rates.setdefault(trial["learning_rate"], []).append(trial["recall"]["validation"])
    return {pair: max(rates, key=lambda rate: sum(rates[rate]) / len(rates[rate])) for pair, rates in scores.items()}


def pilot_damage(results: Path) -> dict[str, dict[str, float]]:
    """Strength -> recall of the pilot's groups, dense model included."""
    bases = [content for _, name, content in _cells(results) if name == "base"]
    return {content["settings"]["strength"]: content["recall"] for content in bases}
