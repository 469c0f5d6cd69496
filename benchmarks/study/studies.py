"""The entries of one compression and what is compared with what; `tables` and `claims` only show it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from benchmarks.study.cells import ATTENTION, USES, Entry, read_entries
from benchmarks.study.estimates import Compared, Table, correct
from benchmarks.study.matrix import Matrix


class Study:
    """Everything computed of one compression.

    Args:
        entries (`list[Entry]`): dense, compressed and every method that has cells.
    """

    def __init__(self, matrix: Matrix, compression: str, entries: list[Entry]) -> None:
        self.matrix, self.compression, self.entries = matrix, compression, entries
        self.by_name = {(e.one.method, e.one.objective): e for e in entries}
        self.dense, self.compressed = self.by_name["dense", None], self.by_name["compressed", None]
        self.texts = {name: Table(entries, [f"text_{name}"], "nats") for name in matrix.texts}
        answered = [entry for entry in entries if all(entry.measured(task) for task in matrix.tasks)]
        answered = answered if self.compressed in answered else []
        self.accuracy = Table(answered, matrix.tasks, "score")
        self.probability = Table(answered, matrix.tasks, "probability")

    @property
    def tables(self) -> dict[str, Table]:
        """By what is measured: the texts' nats, then accuracy and probability over the tasks."""
        return {**self.texts, "accuracy": self.accuracy, "probability": self.probability}

    def repaired(self) -> list[Entry]:
        return [entry for entry in self.entries if entry not in (self.dense, self.compressed)]

    def get(self, method: str, objective: str | None = "lm") -> Entry | None:
        return self.by_name.get((method, objective))

    def against_compressed(self, table: Table) -> list[Compared]:
        return correct([table.difference(entry, self.compressed) for entry in self.repaired()])

    def against_idp(self, table: Table) -> list[Compared]:
        """IDP against every other repair, and against other uses of its own prompts."""
        idp = self.get("idp")
        if idp is None:
            return []
        family = [table.difference(idp, other) for other in self.repaired() if other is not idp]
        family += [table.difference(idp, idp, (ATTENTION, use)) for use in USES[1:-1]]
        return correct(family)


def read_studies(matrix: Matrix, results: Path) -> list[Study]:
    """One for each compression of which the dense and the compressed model are measured."""
    studies = []
    for compression in matrix.compressions:
        entries = read_entries(matrix, results, compression)
        if {"dense", "compressed"} <= {entry.one.method for entry in entries}:
            studies.append(Study(matrix, compression, entries))
    return studies


def as_dict(study: Study) -> dict:
    """The comparisons and means behind the tables, for programs."""
    return {
        f"text {name}" if name in study.texts else name: {
            "means": {entry.label: asdict(table.mean(entry)) for entry in table.entries},
            "comparisons": [
                asdict(one) | {"seen": bool(one.seen)}
                for one in [*study.against_compressed(table), *study.against_idp(table)]
            ],
        }
        for name, table in study.tables.items()
    }
