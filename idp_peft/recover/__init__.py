"""Repair a compressed model: the training behind `idp-peft recover`."""

from idp_peft.recover.run import recover
from idp_peft.recover.settings import RecoverSettings
from idp_peft.recover.stored_teacher import teach

__all__ = ["RecoverSettings", "recover", "teach"]
