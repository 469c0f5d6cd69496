"""Inference-time Dynamic Prompting for PEFT: soft prompts that repair compressed language models.

Importing this package registers the method with PEFT and changes nothing else.
"""

import importlib

from idp_peft.config import IDPConfig, IDPPeftType
from idp_peft.hub.peft_model import OURS
from idp_peft.model import IDPModel, register
from idp_peft.selection import Selection

__version__ = "0.1.0"
# What is done with an adapter, name -> the module that holds it: imported when first used.
_ON_USE = {
    "load": "models.loading",
    "fold_scales": "models.folding",
    "compose": "composition",
    "split": "composition",
    "fit_centroids": "recover.centroids",
    "start_at": "recover.starts",
    "selection_report": "analysis",
    "SelectionCallback": "analysis",
}
__all__ = ["IDPConfig", "IDPModel", "IDPPeftType", "Selection", *_ON_USE]

register()
IDPModel.peft_model_classes.update(OURS)


def __getattr__(name: str):
    if name not in _ON_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ON_USE[name]}"), name)
