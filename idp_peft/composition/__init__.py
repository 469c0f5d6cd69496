"""One bank out of existing prompts, and prompts out of a bank: no training."""

from idp_peft.composition.compose import compose, split

__all__ = ["compose", "split"]
