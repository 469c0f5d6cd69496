"""Everything that is measured for one seed, in order: dense, compressed, every repair of each, and the control."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.biographies import compressing, memorise, recall
from benchmarks.biographies.cells import cell
from benchmarks.biographies.people import Person, people
from benchmarks.biographies.text import PER_FACT
from benchmarks.common.cells import Cells
from idp_peft.files.whole_file import write_whole

DENSE = "dense"
MEASURED = ("calibration", "repaired-on", "held-out", "unknown")


@dataclass
class Seed:
    """The people, models and cells of one seed.

    Args:
        number (`int`): decides everything: people, facts, groups, initialisation, order of training.
        results (`Path`): folder of the cells.
        runs (`Path`): folder of the models.
        measured (`tuple`): the groups that are asked.
        per_person (`bool`): keep everybody's answers in the cells, not only the means.
    """

    number: int
    results: Path
    runs: Path
    measured: tuple[str, ...] = MEASURED
    per_person: bool = True

    @cached_property
    def everyone(self) -> list[Person]:
        return people(self.number, PER_FACT)

    def of(self, *groups: str) -> list[Person]:
        return [person for person in self.everyone if person.group in groups]

    @cached_property
    def repair_texts(self) -> list[str]:
        from benchmarks.biographies.repair import repair_texts

        return repair_texts(self.everyone, self.number)

    def model(self, strength: str) -> Path:
        return self.runs / f"seed-{self.number}" / strength

    def base(self, strength: str) -> dict:
        """The dense model or a compressed one: made where it is missing, then measured."""
        settings = {"seed": self.number, "strength": strength, "method": None}
        return cell(self.cells(strength), "base", settings, lambda: self._base(strength))

    def cells(self, strength: str) -> Cells:
        return Cells(self.results, Path(f"seed-{self.number}", strength))

    def make(self, strength: str) -> dict:
        """Make the model where it is missing; what is known of its making, which lies beside it."""
        folder = self.model(strength)
        note = folder / "made.json"
        if not note.exists():
            write_whole(note, json.dumps(self._made(strength, folder), indent=1) + "\n")
        return json.loads(note.read_text(encoding="utf-8"))

    def _made(self, strength: str, folder: Path) -> dict:
        shutil.rmtree(folder, ignore_errors=True)
        if strength == DENSE:
            known = [person for person in self.everyone if person.group != "unknown"]
            return memorise.memorise(known, self.number, folder)
        self.make(DENSE)
        texts = compressing.calibration_texts(self.everyone, self.number)
        return compressing.compress(self.model(DENSE), strength, folder, texts, self.number)

    def repaired(
        self,
        strength: str,
        method: str,
        objective: str,
        learning_rate: float,
        name: str | None = None,
        steps: int | None = None,
    ) -> dict:
        """One repair of one model, measured; `steps` `None`: as many as every repair has."""
        settings = {
            "seed": self.number,
            "strength": strength,
            "method": method,
            "objective": objective,
            "learning_rate": learning_rate,
            **({} if steps is None else {"steps": steps}),
        }
        name = name or f"{method}-{objective.replace(' ', '-')}"
        return cell(
            self.cells(strength),
            name,
            settings,
            lambda: self._repaired(strength, method, objective, learning_rate, steps),
        )

    def _base(self, strength: str) -> dict:
        from idp_peft.models.loading import load_model

        made = self.make(strength)
        return self._measured(load_model(str(self.model(strength))), {"made": made})

    def _repaired(self, strength: str, method: str, objective: str, learning_rate: float, steps: int | None) -> dict:
        from benchmarks.biographies.repair import repair

        self.make(strength)
        began = time.perf_counter()
        teacher = self.model(DENSE) if objective == "distillation" else None
        model, record = repair(
            self.model(strength), method, self.repair_texts, learning_rate, self.number, teacher, steps
        )
        record["seconds"] = round(time.perf_counter() - began, 1)
        return self._measured(model, {"training": record})

    def _measured(self, model, facts: dict) -> dict:
        from idp_peft.evaluation import environment
        from idp_peft.models.loading import load_tokenizer

        asked = self.of(*self.measured)
        answers = recall.measure(model, load_tokenizer(str(self.model(DENSE))), asked)
        shown = {group: round(recall.mean_recall(answers, group), 4) for group in self.measured}
        kept = {"people": answers} if self.per_person else {}
        return {**facts, "environment": environment(), "recall": shown, **kept}
