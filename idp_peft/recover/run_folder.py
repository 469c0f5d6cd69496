"""The folder of one training run: what it was asked to do, how far it got, and where to go on.

run.json        settings, environment, the probe's verdict, status, Trainer's log
checkpoint-N/   Trainer's checkpoints
adapter/        the result; there once the run is complete
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from idp_peft.whole_file import write_whole

# Of TrainingArguments, what decides which adapter comes out. The rest (logging, saving, progress bars, ...) may change
# between a run and its continuation.
_DECISIVE = (
    "learning_rate",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "optim",
    "optim_args",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
    "gradient_checkpointing",
    "load_best_model_at_end",
    "metric_for_best_model",
)


class RunFolder:
    """A run's folder, read from disk.

    Args:
        path (`str` or `Path`): the run's `output_dir`.
        options (`RecoverOptions`): what was asked for.
        arguments (`TrainingArguments`): how to train.

    Raises:
        `ValueError`: where the folder holds a run with other settings, or files that are not a run's.
    """

    def __init__(self, path: str | Path, options, arguments: TrainingArguments) -> None:
        self.path = Path(path)
        self.settings = {
            **dataclasses.asdict(options),
            **{name: _plain(getattr(arguments, name)) for name in _DECISIVE if hasattr(arguments, name)},
        }
        self.record: dict = {"format": 1, "status": "new", "settings": self.settings}
        if self.file.is_file():
            self.record = json.loads(self.file.read_text(encoding="utf-8"))
            self._check_same(options)
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ValueError(f"`output_dir` {str(self.path)!r} must be new, empty or a run to go on with")

    @property
    def file(self) -> Path:
        return self.path / "run.json"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def is_complete(self) -> bool:
        return self.record["status"] == "complete"

    @property
    def last_checkpoint(self) -> str | None:
        return get_last_checkpoint(str(self.path)) if self.path.is_dir() else None

    def write(self, status: str, **more) -> None:
        """Put the status and further entries into `run.json`; a reader sees the old file or the new one, never a half."""
        self.record |= {"status": status, **more}
        write_whole(self.file, json.dumps(self.record, indent=1) + "\n")

    def _check_same(self, options) -> None:
        # An option that did not exist then had no other value than its default.
        defaults = {field.name: field.default for field in dataclasses.fields(options)}
        before = defaults | self.record["settings"]
        names = [name for name in {**before, **self.settings} if before.get(name) != self.settings.get(name)]
        if names:
            changes = ", ".join(f"{name}: {before.get(name)!r}, now {self.settings.get(name)!r}" for name in names)
            raise ValueError(
                f"`output_dir` {str(self.path)!r} holds a run with other settings ({changes}): choose another folder, or "
                "use the same settings to go on with it"
            )


def _plain(value):
    """As it reads in JSON."""
    return json.loads(json.dumps(value, default=lambda other: getattr(other, "value", str(other))))
