"""The one place that writes into PEFT's tables, so that its auto classes know IDP."""

from __future__ import annotations

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

from idp_peft.config import IDPConfig, IDPPeftType
from idp_peft.model import IDPModel


def register() -> None:
    """Make PEFT's auto classes find IDP. Calling it again changes nothing.

    PEFT's own `register_peft_method` refuses names outside its `PeftType` enum and otherwise fills these three
    dictionaries; the checks it makes are made here.

    Raises:
        `RuntimeError`: where another method already holds the name or the prefix.
    """
    key = IDPPeftType.IDP
    holder = PEFT_TYPE_TO_CONFIG_MAPPING.get(key, IDPConfig)
    if holder is not IDPConfig:
        raise RuntimeError(f"PEFT already has a method named {key.value!r} ({holder.__module__}.{holder.__name__})")
    for other, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items():
        if prefix == IDPModel.prefix and other != key:
            raise RuntimeError(f"PEFT's method {other!r} already uses the parameter prefix {prefix!r}")
    PEFT_TYPE_TO_CONFIG_MAPPING[key] = IDPConfig
    PEFT_TYPE_TO_TUNER_MAPPING[key] = IDPModel
    PEFT_TYPE_TO_PREFIX_MAPPING[key] = IDPModel.prefix
