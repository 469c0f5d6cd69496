"""Trainer with two learning rates: scales, which start at 1, want smaller steps than prompts."""

from __future__ import annotations

import torch
from transformers import Trainer

_SCALES = ".scales"


class RepairTrainer(Trainer):
    """`transformers.Trainer`; the schedule multiplies both rates alike.

    Args:
        scales_learning_rate (`float`, *optional*): the peak rate of an IDP adapter's scales; by default that of all.
    """

    def __init__(self, *args, scales_learning_rate: float | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.scales_learning_rate = scales_learning_rate

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """Trainer's own optimiser, with the scales in a group of their own."""
        if self.optimizer is not None or self.scales_learning_rate is None:
            return super().create_optimizer(*args, **kwargs)
        optimizer = super().create_optimizer(*args, **kwargs)
        model = args[0] if args else kwargs.get("model") or self.model
        scales = {id(parameter) for name, parameter in model.named_parameters() if name.endswith(_SCALES)}
        for group in list(optimizer.param_groups):
            own = [parameter for parameter in group["params"] if id(parameter) in scales]
            if own:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in scales]
                optimizer.add_param_group({**group, "params": own, "lr": self.scales_learning_rate})
        return optimizer
