"""`python -m benchmarks.choice.tables`: `report.md` and `choice.png`, from the result files alone."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.choice.analysis import BY_ANY_LAYER, BY_CONTEXT, BY_LAYER_0, Analysis, Row, analyse
from benchmarks.choice.order_tables import naive_table, order_sentence
from benchmarks.choice.records import Bank, read_groups
from benchmarks.common.markdown import head, row
from idp_peft.report.choices import ORACLE, RANDOM, SINGLE
from idp_peft.report.formatting import number, p_value
from idp_peft.report.statistics import LEVEL, holm

_RESULTS = Path(__file__).parent / "results"
_USES = (RANDOM, SINGLE, BY_LAYER_0, BY_ANY_LAYER, BY_CONTEXT, ORACLE)
_TESTED = (BY_LAYER_0, BY_ANY_LAYER, BY_CONTEXT)


def main(arguments: list[str] | None = None) -> None:
    from benchmarks.choice.figure import draw

    parser = argparse.ArgumentParser(prog="python -m benchmarks.choice.tables", description=__doc__)
    parser.add_argument("--results", type=Path, default=_RESULTS)
    folder = parser.parse_args(arguments).results
    groups = read_groups(folder)
    if not groups:
        raise SystemExit(f"--results must hold result files of `python -m benchmarks.choice`, got {folder}")
    analyses = {name: analyses_of(banks) for name, banks in groups.items()}
    (folder / "report.md").write_text(markdown(groups, analyses), encoding="utf-8")
    draw(groups, analyses, folder / "choice.png")


def analyses_of(banks: list[Bank]) -> dict[str, Analysis]:
    """Reduction -> analysis; where all prompts are of one length, the two reductions are one."""
    reductions = ("mean", "sum") if len(set(banks[0].lengths)) > 1 else ("mean",)
    return {reduction: analyse(banks, reduction) for reduction in reductions}


def markdown(groups: dict[str, list[Bank]], analyses: dict[str, dict[str, Analysis]]) -> str:
    """All tables."""
    parts = ["# Does the attention score pick the prompt that helps?"]
    for name, banks in groups.items():
        parts += [f"## {name}", _made_with(banks)]
        for reduction, analysis in analyses[name].items():
            title = reduction if len(analyses[name]) > 1 else "mean or sum, which are one here"
            parts += [f"**Choosing** (score: {title})", use_table(analysis)]
            parts += [f"**Layer by layer** (score: {title})", layer_table(analysis, len(banks) > 1)]
        if len(banks) > 1:
            parts += ["**Seed by seed**", seed_table(banks)]
        parts += ["**Other orders of the bank**", order_sentence(banks), naive_table(banks)]
    return "\n\n".join(parts) + "\n"


def _made_with(banks: list[Bank]) -> str:
    record = banks[0].record
    settings, where, adapter = (record[part] for part in ("settings", "environment", "adapter"))
    lengths = " + ".join(map(str, banks[0].lengths))
    minutes = ", ".join(f"{sum(bank.record['cpu_seconds'].values()) / 60:.1f}" for bank in banks)
    return (
        f"{', '.join(bank.name for bank in banks)}: prompts of {lengths} tokens on {record['model']}, assignment "
        f"`{adapter['assignment']}`. {settings['blocks']} held-out blocks of {settings['block_tokens']} tokens; a choice "
        f"reads the first {settings['context_tokens']}, nats are those of the rest. {where['processor']}, "
        f"{where['threads']} thread(s), {minutes} processor minutes; torch {where['torch']}, transformers {where['transformers']}, "
        f"commit {where['commit'][:7]}."
    )


def use_table(analysis: Analysis) -> str:
    """Nats per token of each use of the prompts; p after Holm's correction over the six tests of the table."""
    tests = [(use, other) for use in _TESTED for other in (RANDOM, SINGLE)]
    corrected = dict(zip(tests, holm([analysis.uses.difference(*test).p for test in tests]), strict=True))
    lines = head(["", "nats per token", "minus random", "", "minus best single prompt", ""])
    for use in _USES:
        cells = [number(analysis.uses.points[use], 4)]
        for other in (RANDOM, SINGLE):
            same = use == other
            cells.append("" if same else _interval(analysis.uses.difference(use, other), 4))
            cells.append(p_value(corrected[use, other]) if (use, other) in corrected else "")
        lines.append(row([use, *cells]))
    return "\n".join(lines)


def layer_table(analysis: Analysis, pooled: bool) -> str:
    """One row a layer. Stars mark p below 5 % after Holm's correction over the layers."""
    columns = ["layer", "rank correlation within items", "two-way correlation", "choice minus random"]
    columns += ["minus best single prompt"] + ([] if pooled else ["two-way of each prompt"])
    lines = head([*columns, "entropy, bits"] + ([] if pooled else ["chosen"]))
    rows = [(str(number_of), layer) for number_of, layer in enumerate(analysis.layers)] + [
        ("context's loss", analysis.context)
    ]
    for name, layer in rows:
        cells = [_interval(layer.within, 2), *_tested(layer)]
        cells += [] if pooled else [_signed(layer.between[0])]
        cells += [number(layer.entropy, 2)]
        cells += [] if pooled else [" ".join(map(str, layer.counts[0]))]
        lines.append(row([name, *cells]))
    return "\n".join(lines)


def seed_table(banks: list[Bank]) -> str:
    """What differs between training seeds."""
    lines = head(
        [
            "",
            "rank correlation, layer 0",
            "two-way, layer 0",
            "of each prompt",
            "two-way, strongest layer",
            "layer 0 minus random",
            "cross-fitted layer minus random",
            "oracle minus random",
            "chosen, layer 0",
        ]
    )
    for bank in banks:
        alone = analyse([bank], "mean")
        first, uses = alone.layers[0], alone.uses
        strongest = max(range(len(alone.layers)), key=lambda layer: abs(alone.layers[layer].two_way.value))
        most = alone.layers[strongest]
        cells = [
            number(first.within.value, 2),
            number(first.two_way.value, 2),
            _signed(first.between[0]),
            f"{number(most.two_way.value, 2)} (layer {strongest}, {p_value(most.holm['two_way'])})",
            *(_interval(uses.difference(use, RANDOM), 4) for use in (BY_LAYER_0, BY_ANY_LAYER, ORACLE)),
            " ".join(map(str, first.counts[0])),
        ]
        lines.append(row([bank.name, *cells]))
    return "\n".join(lines)


def _tested(row: Row) -> list[str]:
    found = []
    for name, digits in (("two_way", 2), ("over_random", 4), ("over_single", 4)):
        star = " *" if row.holm.get(name, 1.0) < 1 - LEVEL else ""
        found.append(_interval(getattr(row, name), digits) + star)
    return found


def _signed(values: list[float]) -> str:
    return " ".join(number(value, 2, signed=True) for value in values)


def _interval(estimate, digits: int) -> str:
    low, high = (number(end, digits, signed=True) for end in estimate.interval)
    return f"{number(estimate.value, digits, signed=True)} [{low}, {high}]"


if __name__ == "__main__":
    main()
