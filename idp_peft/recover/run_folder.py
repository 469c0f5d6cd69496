"""The folder of one training run: what it was asked to do, how far it got, and where to go on.

run.json        settings, environment, the probe's verdict, status, Trainer's log, digests of what it read and of the adapter
checkpoint-N/   Trainer's checkpoints, each with a marker once it is whole
adapter/        the result; there once the run is complete
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

from transformers import TrainingArguments

from idp_peft.files.whole_file import write_whole
from idp_peft.recover.checkpoints import are_there, last_whole_checkpoint

logger = logging.getLogger(__name__)

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
        settings (`RecoverSettings`): what was asked for.
        arguments (`TrainingArguments`): how to train.

    Raises:
        `ValueError`: where the folder holds a run with other settings, or files that are not a run's.
    """

    def __init__(self, path: str | Path, settings, arguments: TrainingArguments) -> None:
        self.path = Path(path)
        self.settings = {
            **dataclasses.asdict(settings),
            **{name: _plain(getattr(arguments, name)) for name in _DECISIVE if hasattr(arguments, name)},
        }
        self.record: dict = {"format": 1, "status": "new", "settings": self.settings}
        if self.path.is_dir():
            for half_written in self.path.glob(".run.json.*"):
                half_written.unlink()  # by a run that was killed
        if self.file.is_file():
            self.record = self._read()
            self._check_same(settings)
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
        """Whether the adapter is there, as the run left it."""
        if self.record["status"] != "complete":
            return False
        # Runs of earlier versions kept no digests.
        is_there = (
            are_there(self.adapter, self.record["adapter"]) if "adapter" in self.record else self.adapter.is_dir()
        )
        if not is_there:
            logger.warning(
                "%s is gone or not as the run left it: the run goes on from its last checkpoint", self.adapter
            )
        return is_there

    @property
    def last_checkpoint(self) -> str | None:
        """The newest checkpoint that is whole; cut ones are removed."""
        found = last_whole_checkpoint(self.path)
        return None if found is None else str(found)

    def check_inputs(self, **digests: str | None) -> None:
        """Refuse to go on with a run whose model, teacher or text is no longer the one that it began with.

        Args:
            digests (`str`, *optional*): a digest of each, by its name in the settings.

        Raises:
            `ValueError`: naming what changed.
        """
        before = self.record.setdefault("inputs", {})
        for name, digest in digests.items():
            if before.setdefault(name, digest) != digest:
                raise ValueError(
                    f"`{name}` {self.settings.get(name)!r} is not what it was when the run in {str(self.path)!r} began: choose "
                    "another `output_dir`, or bring it back"
                )

    def write(self, status: str, **more) -> None:
        """Put the status and further entries into `run.json`; a reader sees the old file or the new one, never a half."""
        self.record |= {"status": status, **more}
        write_whole(self.file, json.dumps(self.record, indent=1) + "\n")

    def _read(self) -> dict:
        try:
            record = json.loads(self.file.read_text(encoding="utf-8"))
            kept = {"status": str, "settings": dict}
            if not all(isinstance(record[name], kind) for name, kind in kept.items()) or record["format"] != 1:
                raise ValueError("it is no record of `idp-peft recover`")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"`output_dir` {str(self.path)!r} holds a run.json that cannot be read ({type(error).__name__}: {error}): "
                "choose another folder, or remove this one to train anew"
            ) from error
        if not isinstance(record.get("inputs", {}), dict):
            record["inputs"] = {}
        return record

    def _check_same(self, settings) -> None:
        # An option that did not exist then had no other value than its default; but nothing was scaled then.
        defaults = {field.name: field.default for field in dataclasses.fields(settings)} | {"scales": False}
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
