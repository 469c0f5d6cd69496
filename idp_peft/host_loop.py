"""What a trainer's loop knows of a forward and does not pass on: labels that it took out, rows that belong together.

transformers' `Trainer` and TRL's trainers sometimes call the model without the labels that they hold (label smoothing, a
loss function of one's own, metrics that need logits), and with rows that nothing in the call tells from single documents
(TRL's `packing_strategy="wrapped"`). Both would silently change what a choice reads. Nothing is patched: the loop that is
running is looked up in the call stack.
"""

from __future__ import annotations

import sys

import torch

_STEPS = ("training_step", "prediction_step")


def labels_of_prediction(inputs: torch.Tensor | None) -> torch.Tensor | None:
    """The labels of a trainer's running `prediction_step`, where it calls the model on `inputs` without them.

    Args:
        inputs (`torch.Tensor`, *optional*): int64 `[batch, n]`, the `input_ids` of the call.

    Returns:
        `torch.Tensor` or `None`: `[batch, n]`; `None` outside of such a step, or where it holds other inputs.
    """
    frame = _running_step()
    if frame is None or inputs is None or frame.f_code.co_name != "prediction_step":
        return None
    batch = frame.f_locals.get("inputs")
    batch = batch if hasattr(batch, "get") else {}
    labels = batch.get("labels")
    # transformers reads them off the batch before it takes them out of it.
    labels = frame.f_locals.get("labels") if labels is None else labels
    same = isinstance(batch.get("input_ids"), torch.Tensor) and torch.equal(batch["input_ids"], inputs)
    return labels if same and isinstance(labels, torch.Tensor) and labels.shape == inputs.shape else None


def packs_rows() -> bool:
    """Whether the running trainer's arguments say that its rows hold several documents (`packing`, `eval_packing`)."""
    frame = _running_step()
    if frame is None:
        return False
    arguments = frame.f_locals["self"].args
    packing = getattr(arguments, "packing", False)
    if frame.f_code.co_name == "prediction_step" and getattr(arguments, "eval_packing", None) is not None:
        packing = arguments.eval_packing
    return bool(packing)


def compares_answers() -> bool:
    """Whether the running trainer is one of TRL's that weighs answers to one prompt, sampled or given (DPO, GRPO, ...)."""
    frame = _running_step()
    if frame is None:
        return False
    classes = type(frame.f_locals["self"]).__mro__
    from_trl = any(each.__module__.startswith("trl.") for each in classes)
    return from_trl and not any(each.__name__ == "SFTTrainer" for each in classes)


def _running_step():
    """The frame of the innermost `training_step` or `prediction_step` of a transformers `Trainer`, or `None`."""
    trainer = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    frame = None if trainer is None else sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name in _STEPS and isinstance(frame.f_locals.get("self"), trainer):
            return frame
        frame = frame.f_back
    return None
