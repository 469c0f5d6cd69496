"""`python -m benchmarks.biographies.tables`: `report.md` and `recall.png`, from the JSON files of a results folder alone."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.biographies import tuning
from benchmarks.biographies.people import CHANCE
from benchmarks.biographies.repair import STEPS
from benchmarks.biographies.summary import DENSE, NAMES, Cell, Summary, comparisons, key, read_cells
from benchmarks.biographies.tuning import chosen, pilot_damage, tried
from benchmarks.common.cells import Cells, all_cells
from benchmarks.common.markdown import head, row
from idp_peft.report.formatting import number, p_value

RESULTS = Path(__file__).parent / "results"
GROUPS = ("held-out", "repaired-on", "calibration", "unknown")
OTHER_MEASURES = {
    ("kept_back", "answer"): "Recall in the template kept back: no text ever stated this fact of this person in it",
    ("seen", "among"): "Recall among the 40 values of the fact: the likeliest of them is the right one",
    ("seen", "kind"): "Answers of the right kind: the likeliest word is one of the 40 values",
    ("seen", "rank"): "Mean rank of the value among the 40, 1 to 40; 20.5 by chance",
    ("seen", "nats"): "Mean -log p(value), nats",
}


class Report:
    """What all tables share: the cells, their strengths in order of damage, and the repairs of each objective."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cells = complete(read_cells(folder))
        if not self.cells:
            raise SystemExit(f"{folder} holds no seed with results: run python -m benchmarks.biographies")
        self.summaries = {}
        held_out = self.summary("held-out")
        self.seeds = held_out.seeds
        pairs = [pair for pair in held_out.all.points if pair[0] != DENSE]
        strengths = {pair[0] for pair in pairs}
        self.strengths = sorted(strengths, key=lambda name: -held_out.all.points[name, None])
        repairs = {pair[1] for pair in pairs if pair[1] is not None}
        order = list(NAMES)
        self.repairs = sorted(repairs, key=lambda repair: (repair[1] != "language modelling", order.index(repair[0])))

    def summary(self, group: str, measure: tuple[str, str] = ("seen", "answer")) -> Summary:
        if (group, measure) not in self.summaries:
            self.summaries[group, measure] = Summary(self.cells, group, measure)
        return self.summaries[group, measure]

    def repairs_of(self, objective: str) -> list[tuple[str, str]]:
        return [repair for repair in self.repairs if repair[1] == objective]

    @property
    def objectives(self) -> list[str]:
        return list(dict.fromkeys(repair[1] for repair in self.repairs))


def complete(cells: list[Cell]) -> list[Cell]:
    """The seeds that have every cell which any seed has: a run that is not over shows only what is whole."""
    wanted = {key(cell) for cell in cells}
    have: dict[int, set] = {}
    for cell in cells:
        have.setdefault(cell.seed, set()).add(key(cell))
    return [cell for cell in cells if have[cell.seed] == wanted]


def recall_table(
    report: Report, group: str, measure=("seen", "answer"), digits: int = 1, scale: float = 100
) -> list[str]:
    """Means over the seeds, one row per strength."""
    points = report.summary(group, measure).all.points
    columns = [None, *report.repairs]
    rows = head(["", *[_title(repair, report) for repair in columns]])
    for strength in (DENSE, *report.strengths):
        cells = [
            number(scale * points[strength, repair], digits) if (strength, repair) in points else ""
            for repair in columns
        ]
        rows.append(row([strength, *cells]))
    return rows


def recovery_table(report: Report, group: str, measure: tuple[str, str] = ("seen", "answer")) -> list[str]:
    """(recovered - compressed) / (dense - compressed), with its interval and every seed's own value."""
    summary = report.summary(group, measure)
    rows = head(["", *[_title(repair, report) for repair in report.repairs]])
    for strength in report.strengths:
        cells = []
        for repair in report.repairs:
            seeds = " ".join(_percent(one) for one in summary.recoveries(strength, repair))
            cells.append(f"{_recovery(summary.recovery(strength, repair))} ({seeds})")
        rows.append(row([strength, *cells]))
    return rows


def control_table(report: Report) -> list[str]:
    """What the same training does to the dense model, in percentage points of recall."""
    rows = head(["", *[_title(repair, report) for repair in report.repairs]])
    for group in GROUPS:
        means = report.summary(group).all
        cells = [_difference(means.difference((DENSE, repair), (DENSE, None))) for repair in report.repairs]
        rows.append(row([group, *cells]))
    return rows


def comparison_table(report: Report, objective: str) -> list[str]:
    """Held-out recall: every repair against the compressed model, and IDP against the others."""
    repairs = report.repairs_of(objective)
    made = comparisons(report.summary("held-out"), report.strengths, repairs, ("idp", objective))
    rows = ["| strength | | points of recall | p (Holm) |", "|---|---|---:|---:|"]
    for one in made:
        right = NAMES[one["right"] and one["right"][0]]
        pair = f"{NAMES[one['left'][0]]} - {right}"
        rows.append(row([one["strength"], pair, _difference(one["difference"]), p_value(one["p_holm"])]))
    return rows


def tuning_table(folder: Path) -> list[str]:
    """Every learning rate tried, and the one taken."""
    best, by_setting = chosen(folder), {}
    for trial in tried(folder):
        setting = (trial["method"], trial["objective"], trial["learning_rate"])
        by_setting.setdefault(setting, {})[trial["strength"]] = trial["recall"]
    strengths = list(dict.fromkeys(name for found in by_setting.values() for name in found))
    rows = head(["method", "objective", "learning rate", *strengths, ""])
    for method, objective, rate in sorted(
        by_setting, key=lambda s: (s[1] != "language modelling", list(NAMES).index(s[0]), s[2])
    ):
        found = by_setting[method, objective, rate]
        cells = [
            f"{100 * found[name]['validation']:.1f} / {100 * found[name]['repaired-on']:.1f}" for name in strengths
        ]
        rows.append(
            row([NAMES[method], objective, f"{rate:g}", *cells, "taken" if best[method, objective] == rate else ""])
        )
    return rows


def longer_table(folder: Path) -> list[str]:
    """The learning rate that was taken, with the usual steps and with more."""
    usual = {
        (trial["method"], trial["objective"], trial["strength"], trial["learning_rate"]): trial
        for trial in tried(folder)
    }
    rows = head(["method", "model", f"{STEPS} steps", f"{tuning.LONGER} steps"])
    for trial in tuning.longer(folder):
        before = usual[trial["method"], trial["objective"], trial["strength"], trial["learning_rate"]]
        cells = [
            f"{100 * one['recall']['validation']:.1f} / {100 * one['recall']['repaired-on']:.1f}"
            for one in (before, trial)
        ]
        rows.append(row([NAMES[trial["method"]], trial["strength"], *cells]))
    return rows


def markdown(folder: Path) -> str:
    """The whole report."""
    report = Report(folder)
    count = {group: sum(means.items for means in report.summary(group).per_seed.values()) for group in GROUPS}
    lines = ["# Displaced or forgotten: recall of facts about synthetic people", ""]
    lines += [
        _made_with(report),
        "",
        f"People: {', '.join(f'{count[group]} {group}' for group in GROUPS)}; five facts each.",
    ]
    lines += [
        f"Chance is {100 * CHANCE:.1f} %. Intervals are 95 %, from drawing people again; brackets hold each seed's own value."
    ]
    for group in ("held-out", "repaired-on"):
        lines += ["", f"## Recovery of the recall of {group} people", "", *recovery_table(report, group)]
        lines += ["", f"## The same of recall among the 40 values of the fact ({group})", ""]
        lines += recovery_table(report, group, ("seen", "among"))
    for group in GROUPS:
        lines += ["", f"## Recall of {group} people, %", "", *recall_table(report, group)]
    lines += ["", _unknown(report)]
    lines += [
        "",
        "## The same training on the dense model: points of recall gained or lost",
        "",
        *control_table(report),
    ]
    for objective in report.objectives:
        lines += ["", f"## Held-out recall, paired ({objective})", "", *comparison_table(report, objective)]
    for measure, title in OTHER_MEASURES.items():
        for group in ("held-out", "repaired-on", "unknown"):
            digits, scale = {"nats": (2, 1), "rank": (1, 1)}.get(measure[1], (1, 100))
            unit = "" if scale == 1 else ", %"
            lines += ["", f"## {title} ({group}{unit})", "", *recall_table(report, group, measure, digits, scale)]
    lines += ["", "## The pilot: recall of compressed models, %", "", *_pilot_rows(folder)]
    lines += [
        "",
        "## The pilot: learning rates (recall of validation / repaired-on people, %)",
        "",
        *tuning_table(folder),
    ]
    lines += ["", f"## The pilot: {tuning.LONGER} steps instead of {STEPS} (validation / repaired-on people, %)", ""]
    lines += longer_table(folder)
    return "\n".join(lines) + "\n"


def _unknown(report: Report) -> str:
    """Whether anything tells facts that no text ever told."""
    means = report.summary("unknown").all
    found = {pair: means.mean(pair) for pair in means.points}
    above = [pair for pair, one in found.items() if one.interval[0] > CHANCE]
    return (
        f"Unknown people, all {len(found)} models: from {100 * min(one.value for one in found.values()):.1f} % to "
        f"{100 * max(one.value for one in found.values()):.1f} %; {len(above)} of the intervals lie above chance."
    )


def _pilot_rows(folder: Path) -> list[str]:
    damage = pilot_damage(folder)
    groups = list(next(iter(damage.values())))
    rows = head(["", *groups])
    for strength, found in sorted(damage.items(), key=lambda item: -item[1]["validation"]):
        rows.append(row([strength, *[number(100 * found[group], 1) for group in groups]]))
    return rows


def _made_with(report: Report) -> str:
    environment = Cells(report.folder, f"seed-{report.seeds[0]}/{DENSE}").read()["base"]["environment"]
    return (
        f"Seeds {', '.join(map(str, report.seeds))}. {environment['processor']}, {environment['threads']} thread; torch "
        f"{environment['torch']}, transformers {environment['transformers']}, peft {environment['peft']}, llmcompressor "
        f"{environment['llmcompressor']}. {_time(report)}"
    )


def _time(report: Report) -> str:
    """How long the seeds took: by the clock of a core that others used as well, and on the processor."""
    cells = [cell for seed in report.seeds for _, _, cell in all_cells(report.folder, f"seed-{seed}/*.jsonl")]
    processor, clock = (sum(cell[name] for cell in cells) / 60 for name in ("processor_seconds", "seconds"))
    return f"{len(cells)} measurements took {processor:.0f} minutes on the processor, {clock:.0f} by the clock of a shared core."


def _title(repair: tuple[str, str] | None, report: Report) -> str:
    if repair is None:
        return NAMES[None]
    return NAMES[repair[0]] + (f", {repair[1]}" if len(report.objectives) > 1 else "")


def _recovery(found) -> str:
    if found.value is None:
        return f"n/a, {found.reason}"
    low, high = found.interval
    return f"{number(100 * found.value, 1)} % [{number(100 * low, 1)}, {number(100 * high, 1)}]"


def _percent(found) -> str:
    return "-" if found.value is None else number(100 * found.value, 0)


def _difference(estimate) -> str:
    low, high = estimate.interval
    return f"{number(100 * estimate.value, 1, True)} [{number(100 * low, 1, True)}, {number(100 * high, 1, True)}]"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.biographies.tables", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    folder = parser.parse_args(arguments).results
    (folder / "report.md").write_text(markdown(folder), encoding="utf-8")
    from benchmarks.biographies.figure import draw

    draw(Report(folder), folder / "recall.png")
    print(f"wrote {folder / 'report.md'} and {folder / 'recall.png'}")


if __name__ == "__main__":
    main()
