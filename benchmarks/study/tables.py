"""`python -m benchmarks.study.tables CONFIG`: `report.md` and `statistics.json` of a matrix, from its cells alone."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from benchmarks.common.markdown import head, marked, row
from benchmarks.study.cells import ATTENTION, LEAST_LOSS, USES, Entry, read_entries, values
from benchmarks.study.claims import claims
from benchmarks.study.estimates import Compared, Table
from benchmarks.study.matrix import NO_COMPRESSION, Matrix
from benchmarks.study.studies import Study, as_dict, read_studies
from idp_peft.report.choices import ORACLE, RANDOM, SINGLE
from idp_peft.report.formatting import NONE, estimate, number, recovery
from idp_peft.report.statistics import mcnemar

_HERE = Path(__file__).parent
_USE_NAMES = dict(zip(USES, ("attention", "least loss", "random", "best single", "oracle"), strict=True))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study.tables", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--results", type=Path, default=_HERE / "results")
    options = parser.parse_args(arguments)
    matrix = Matrix(options.config)
    studies = read_studies(matrix, options.results)
    folder = options.results / matrix.name
    (folder / "report.md").write_text(report(matrix, studies, options.results))
    (folder / "statistics.json").write_text(json.dumps({s.compression: as_dict(s) for s in studies}, indent=1) + "\n")
    print(f"{folder / 'report.md'}, {folder / 'statistics.json'}")


def report(matrix: Matrix, studies: list[Study], results: Path) -> str:
    parts = [f"# {matrix.name}\n"]
    for study in studies:
        parts += [f"## {study.compression}\n", headline(study), comparisons(study)]
        if any(entry.chooses for entry in study.entries):
            parts.append(choices(study))
        if study.accuracy.measures:
            parts.append(tasks(study))
    if control := _control(matrix, results):
        parts.append(control)
    if studies:
        parts += ["## The paper's claims\n", claims(studies)]
    return "\n".join(parts)


def headline(study: Study) -> str:
    """Every method with its intervals."""
    rows = []
    for entry in study.entries:
        seeds = f" ({len(entry.seeds)} seeds)" if len(entry.seeds) > 1 else ""
        line = [entry.label + seeds, f"{entry.extra_parameters:,}"]
        line += [_recovered(study, table, entry) for table in study.texts.values()]
        rows.append([*line, _points(study, study.accuracy, entry)])
        if entry is study.get("idp"):
            for use in (RANDOM, LEAST_LOSS, ORACLE):
                bound = " (bound)" if use == ORACLE else ""
                line = [f"- its {_USE_NAMES[use]} choice{bound}", ""]
                line += [_recovered(study, table, entry, use) for table in study.texts.values()]
                rows.append([*line, _points(study, study.accuracy, entry, use)])
    damage = {name: table.difference(study.compressed, study.dense) for name, table in study.texts.items()}
    said = "; ".join(f"{name} {estimate(asdict(one.estimate), 3, signed=True)}" for name, one in damage.items())
    columns = ["model", "parameters", *(f"recovery, {name}" for name in study.texts)]
    columns.append(f"accuracy over {len(study.accuracy.measures)} tasks, points")
    return f"Damage in nats per token: {said}.\n\n" + _table(columns, rows, f"headline {study.compression}")


def _points(study: Study, table: Table, entry: Entry, use: str = ATTENTION) -> str:
    """Points to the compressed model, with their interval; a dash where the tasks were not measured."""
    if entry is study.compressed:
        return "0"
    gap = table.difference(entry, study.compressed, (use, ATTENTION))
    return estimate(gap and asdict(gap.estimate), 1, 100, signed=True)


def _recovered(study: Study, table: Table, entry: Entry, use: str = ATTENTION) -> str:
    if entry in (study.dense, study.compressed):
        return NONE
    found = table.recovery(entry, study.compressed, study.dense, use)
    return recovery(found and asdict(found))


def comparisons(study: Study) -> str:
    """Against the compressed model and against IDP, seed by seed; Holm within each of the two families of a text."""
    rows = []
    for name, table in study.tables.items():
        is_text = name in study.texts
        digits, scale = (4, 1) if is_text else (1, 100)
        for one in [*study.against_compressed(table), *study.against_idp(table)]:
            by_seed = " / ".join(number(scale * gap, digits, signed=True) for gap in one.by_seed)
            p = NONE if one.p_holm is None else f"{one.p_holm:.2g}"
            verdict = _verdict(one, higher_is_better=not is_text)
            rows.append(
                [
                    name,
                    one.left,
                    one.right,
                    estimate(asdict(one.estimate), digits, scale, signed=True),
                    by_seed,
                    p,
                    verdict,
                ]
            )
    columns = ["measure", "left", "right", "left minus right", "each seed", "p (Holm)", "left is"]
    return _table(columns, rows, f"comparisons {study.compression}")


def _verdict(one: Compared, higher_is_better: bool) -> str:
    if not one.seen:
        return "no difference seen"
    return "better" if (one.estimate.value > 0) == higher_is_better else "worse"


def choices(study: Study) -> str:
    """What each way of choosing among one bank's prompts is worth."""
    rows = []
    for entry in (entry for entry in study.entries if entry.chooses):
        for name, table in study.tables.items():
            line = [entry.label, name]
            for use in USES:
                seeds = table.seeds(entry, use)
                common = table.seeds(entry, SINGLE)  # the same seeds for every use, so that a row compares
                if not seeds or not common:
                    line.append(NONE)
                elif name in study.texts:
                    found = [
                        r
                        for s, r in zip(
                            seeds, table.recovery_by_seed(entry, study.compressed, study.dense, use), strict=True
                        )
                        if s in common
                    ]
                    line.append(NONE if None in found else f"{number(100 * sum(found) / len(found), 1)} %")
                else:
                    of_seed = [table.means.points[entry.label, use, seed] for seed in common]
                    line.append(number(100 * sum(of_seed) / len(of_seed), 1))
            if line[2] != NONE:
                rows.append([*line, _taken(entry, table)])
    columns = ["bank", "measure", *_USE_NAMES.values(), "prompts taken by attention"]
    return _table(columns, rows, f"choices {study.compression}")


def _taken(entry: Entry, table: Table) -> str:
    """How often each prompt was chosen, per seed: items, over all measures of the table."""
    found = []
    for seed in table.seeds(entry, SINGLE):
        items = [item for measure in table.measures for item in entry.cells[seed][measure]["items"]]
        count = entry.cells[seed][table.measures[0]]["num_prompts"]
        found.append(" ".join(str(sum(item["prompt"] == i for item in items)) for i in range(count)))
    return " / ".join(found)


def tasks(study: Study) -> str:
    """Accuracy on each task with the first seed, and their mean; under it McNemar's exact test over all questions."""
    columns = ["task (metric, questions)", "chance", *(entry.label for entry in study.accuracy.entries)]
    rows = []
    for task in study.accuracy.measures:
        table = Table(study.entries, [task], "score")
        cell = next(iter(study.compressed.cells.values()))[task]
        line = [f"{task.removeprefix('local_')} ({cell['metric']}, {len(cell['items'])})"]
        line.append(number(100 * (cell["chance"] or 0), 0))
        rows.append([*line, *(number(100 * table.mean(entry).value, 0) for entry in study.accuracy.entries)])
    for name, table in (("mean", study.accuracy), ("probability of the right choice", study.probability)):
        means = (number(100 * table.mean(entry).value, 1) for entry in study.accuracy.entries)
        rows.append([f"{name} ({len(table.measures)} tasks)", NONE, *means])
    gaps = (_points(study, study.probability, entry) for entry in study.accuracy.entries)
    rows.append(["the same, points to compressed", NONE, *gaps])
    lines = [
        f"McNemar's exact test over all {count} questions, {entry.label} against {other.label}: "
        + " / ".join(f"p = {p:.2g}" for p in found)
        for entry, other, found, count in _mcnemar(study)
    ]
    return _table(columns, rows, f"tasks {study.compression}") + "\n".join(f"* {line}" for line in lines) + "\n"


def _mcnemar(study: Study) -> list[tuple[Entry, Entry, list[float], int]]:
    import numpy as np

    pairs = [(entry, study.compressed) for entry in study.repaired() if entry in study.accuracy.entries]
    if (idp := study.get("idp")) is not None:
        pairs += [
            (idp, other) for name in ("lora_budget", "lora_16") if (other := study.get(name)) in study.accuracy.entries
        ]
    found = []
    for left, right in pairs:
        p, count = [], 0
        for seed in left.measured(study.accuracy.measures[0]):
            of_right = seed if seed in right.seeds else None
            if of_right not in right.measured(study.accuracy.measures[0]):
                continue
            sides = [
                np.concatenate([values(entry.cells[s][task], "score", ATTENTION) for task in study.accuracy.measures])
                for entry, s in ((left, seed), (right, of_right))
            ]
            p.append(mcnemar(*sides))
            count = len(sides[0])
        found.append((left, right, p, count))
    return found


def _control(matrix: Matrix, results: Path) -> str | None:
    """What the same training does to the dense model: what of a gain is getting used to the text."""
    entries = read_entries(matrix, results, NO_COMPRESSION)
    dense = next((entry for entry in entries if entry.one.method == "dense"), None)
    trained = [entry for entry in entries if entry is not dense]
    if dense is None or not trained:
        return None
    rows = []
    for entry in trained:
        line = [entry.label]
        for name in matrix.texts:
            table = Table(entries, [f"text_{name}"], "nats")
            gap = table.difference(entry, dense)
            line.append(estimate(asdict(gap.estimate), 4, signed=True))
        rows.append(line)
    columns = ["trained on the dense model", *(f"nats per token, {name}" for name in matrix.texts)]
    return "## Control: the same training on the dense model\n\n" + _table(columns, rows, "control")


def _table(columns: list[str], rows: list[list[str]], name: str) -> str:
    return marked(name, [*head(columns), *map(row, rows)])


if __name__ == "__main__":
    main()
