"""Repair a compressed model: the training behind `idp-peft recover`."""

from idp_peft.recover.run import recover

__all__ = ["recover"]
