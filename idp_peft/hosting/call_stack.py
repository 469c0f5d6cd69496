"""What a caller knows and does not pass on, read from the call stack. No other file looks at it.

Each function says why nothing else tells, and what would make it unnecessary.
"""

from __future__ import annotations

from types import FrameType

from peft import PeftModel


def peft_model_under_construction(frame: FrameType) -> PeftModel | None:
    """The `PeftModel` whose constructor makes a tuner; `None` where something else makes it.

    Why: PEFT hands the tuner no reference to the `PeftModel` around it, and that class writes the card. Goes when PEFT asks
    the tuner for its card.

    Args:
        frame (`FrameType`): the caller of the tuner's constructor.
    """
    return frame.f_locals["self"] if frame.f_code is PeftModel.__init__.__code__ else None


def repository_of_trainer(frame: FrameType) -> str | None:
    """The repository that a `Trainer` pushes to, when it is the one that asks for a card.

    Why: `Trainer.create_model_card` passes a folder alone. Goes when it passes `hub_model_id`.
    """
    trainer = frame.f_locals.get("self") if frame.f_code.co_name == "create_model_card" else None
    return getattr(trainer, "hub_model_id", None)
