"""The matrix: base x compression x method x objective x seed x task, as a configuration file lists it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

OBJECTIVES = {"lm": "language modelling", "distillation": "distillation"}
# Methods that train nothing; the others are `idp_peft.recover`'s, under names of the configuration's own.
DENSE, COMPRESSED, COMPOSED = "dense", "compressed", "composed"
BOS_PREFIX, OWN_BOS_PREFIX = "bos_prefix", "own_bos_prefix"
UNTRAINED = (DENSE, COMPRESSED, BOS_PREFIX, OWN_BOS_PREFIX)
NO_COMPRESSION = "none"


@dataclass(frozen=True)
class Contender:
    """One model that is measured: a method on a compressed (or, as a control, the dense) model.

    Args:
        compression (`str`): its name in the configuration; `"none"` for the dense model.
        method (`str`): its name in the configuration, or one of `UNTRAINED`.
        objective (`str`, *optional*): `"lm"` or `"distillation"`; `None` where nothing is trained.
        seed (`int`, *optional*): of the training.
    """

    compression: str
    method: str
    objective: str | None = None
    seed: int | None = None

    @property
    def name(self) -> str:
        """Of its folder: `"idp.lm.seed0"`, `"compressed"`."""
        return self.method if self.objective is None else f"{self.method}.{self.objective}.seed{self.seed}"

    @property
    def path(self) -> Path:
        return Path(self.compression, self.name)


class Matrix:
    """A configuration file, checked.

    Args:
        file (`Path`): YAML; `configs/smollm2-135m.yaml` explains its fields.

    Raises:
        `ValueError`: for a method, compression or objective that the file does not define.
    """

    def __init__(self, file: str | Path) -> None:
        import yaml

        self.file = Path(file)
        values = yaml.safe_load(self.file.read_text())
        self.name: str = self.file.stem
        self.base: str = values["base"]
        self.compressions: dict[str, str] = values["compressions"]
        self.methods: dict[str, dict] = values["methods"]
        self.training: dict = values["training"]
        self.evaluation: dict = values["evaluation"]
        self.texts: dict[str, int] = values["texts"]
        self.tasks: list[str] = values["tasks"]
        self.task_seeds: list[int] | None = values.get("task_seeds")
        self.each_prompt: list[str] = values.get("each_prompt", [])
        self.contenders = list(dict.fromkeys(one for row in values["rows"] for one in self._contenders(row)))
        for one in self.contenders:
            self._check(one)

    def measures(self, one: Contender | None = None) -> list[str]:
        """Names of the cells of a contender: the texts (`"text_wiki"`), then the tasks, if those of its seed are wanted."""
        skips_tasks = one is not None and self.task_seeds is not None and one.seed not in (None, *self.task_seeds)
        return [f"text_{name}" for name in self.texts] + ([] if skips_tasks else self.tasks)

    def model_of(self, compression: str) -> str:
        return self.base if compression == NO_COMPRESSION else self.compressions[compression]

    def wants_each_prompt(self, one: Contender) -> bool:
        """Whether every prompt of its bank is forced on the tasks too: five times the cost of a free choice."""
        return f"{one.compression}/{one.name}" in self.each_prompt

    def _contenders(self, row: dict) -> list[Contender]:
        found = []
        for method in row["methods"]:
            if method in UNTRAINED:
                found.append(Contender(row["compression"], method))
            else:
                found += [
                    Contender(row["compression"], method, objective, seed)
                    for objective in row["objectives"]
                    for seed in row["seeds"]
                ]
        return found

    def _check(self, one: Contender) -> None:
        if one.compression not in (NO_COMPRESSION, *self.compressions):
            raise ValueError(
                f"{self.file}: `compression` must be one of {sorted(self.compressions)}, got {one.compression!r}"
            )
        if one.method not in (*UNTRAINED, *self.methods):
            raise ValueError(f"{self.file}: `methods` defines {sorted(self.methods)}, got {one.method!r} in `rows`")
        if one.objective is not None and one.objective not in OBJECTIVES:
            raise ValueError(f"{self.file}: `objectives` must be of {sorted(OBJECTIVES)}, got {one.objective!r}")
