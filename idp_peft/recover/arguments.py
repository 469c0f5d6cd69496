"""`TrainingArguments` with the defaults of a repair."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

EFFORTS = {"quick": 30, "standard": 100, "thorough": 300}  # optimiser steps


@dataclass
class RecoverArguments(TrainingArguments):
    """transformers' `TrainingArguments`; only the defaults differ, as measured in benchmarks/LOG.md.

    `learning_rate` `None`: the method's own. Neither `max_steps` nor `num_train_epochs` given: the steps of `effort`.
    """

    effort: str = field(
        default="standard",
        metadata={"help": f"How long to train, where neither steps nor epochs are given: {', '.join(EFFORTS)}."},
    )

    learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate (default: the method's own)."}
    )
    num_train_epochs: float | None = field(default=None, metadata={"help": "Epochs, in place of `max_steps`."})
    max_steps: int = field(default=-1, metadata={"help": "Optimiser steps (default: those of `effort`)."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Examples per device and step."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Warm-up: steps, or below 1 a share of all steps."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay."})
    logging_steps: float = field(default=0.05, metadata={"help": "Steps between logs, or a share of all steps."})
    save_steps: float = field(default=0.1, metadata={"help": "Steps between checkpoints, or a share of all steps."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints kept."})
    seed: int = field(default=0, metadata={"help": "Seed of the prompts' start and of the data's order."})

    def __post_init__(self) -> None:
        if self.output_dir is None:
            raise ValueError("the following arguments are required: --output_dir")
        if self.effort not in EFFORTS:
            raise ValueError(f"`effort` must be one of {', '.join(EFFORTS)}, got {self.effort!r}")
        if self.num_train_epochs is None:
            self.num_train_epochs = 1.0
            if self.max_steps <= 0:
                self.max_steps = EFFORTS[self.effort]
        if not torch.accelerator.is_available():
            self.use_cpu = True  # as is plain; without it, `bf16` is refused
        super().__post_init__()
