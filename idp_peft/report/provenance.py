"""Who made the numbers: seeds, commit, versions, hardware, items; differences between files are shown, not hidden."""

from __future__ import annotations

_HARDWARE = ("processor", "gpu", "cores", "threads")


def provenance(statistics: dict) -> list[str]:
    """Lines for the foot of a report, from the `settings`, `environment` and `training` of the files."""
    rows = statistics["rows"]
    lines = [
        "Items: " + ", ".join(f"{name} {measured['items']}" for name, measured in _places(statistics)) + ".",
        f"Report: seed {statistics['seed']}, {statistics['draws']:,} bootstrap draws over items, 95 % intervals.",
    ]
    lines += _lines("Evaluation seed", {row["label"]: row["settings"].get("seed") for row in rows})
    lines += [_training(row) for row in rows if row["training"]]
    keys = list(dict.fromkeys(key for row in rows for key in row["environment"]))
    versions = [key for key in keys if key not in (*_HARDWARE, "commit", "uncommitted_changes")]
    lines += _lines("Commit", {row["label"]: _commit(row["environment"]) for row in rows})
    lines += _lines("Versions", {row["label"]: _joined(row["environment"], versions) for row in rows})
    lines += _lines("Hardware", {row["label"]: _joined(row["environment"], _HARDWARE) for row in rows})
    return lines


def _places(statistics: dict) -> list[tuple[str, dict]]:
    return [*statistics["texts"].items(), *statistics["tasks"].items()]


def _lines(name: str, by_label: dict[str, object]) -> list[str]:
    """One line where all files agree, else one that gives each value with the labels that have it."""
    groups: dict[str, list[str]] = {}
    for label, value in by_label.items():
        if value not in (None, ""):
            groups.setdefault(str(value), []).append(label)
    if len(groups) == 1 and len(next(iter(groups.values()))) == len(by_label):
        return [f"{name}: {next(iter(groups))}."]
    return [f"{name} ({', '.join(labels)}): {value}." for value, labels in groups.items()]


def _commit(environment: dict) -> str | None:
    commit = environment.get("commit")
    return f"{commit}, with uncommitted changes" if commit and environment.get("uncommitted_changes") else commit


def _joined(environment: dict, keys) -> str:
    return ", ".join(f"{key} {environment[key]}" for key in keys if _is_short(environment.get(key)))


def _training(row: dict) -> str:
    known = ("method", "objective", "steps", "learning_rate", "seed")
    facts = [f"{key.replace('_', ' ')} {row['training'][key]}" for key in known if _is_short(row["training"].get(key))]
    return f"Training of {row['label']}: {', '.join(facts) or 'no details in the file'}."


def _is_short(value) -> bool:
    return isinstance(value, str | int | float) and value != "" and len(str(value)) <= 120
