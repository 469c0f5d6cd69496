"""Inference-time Dynamic Prompting for PEFT: soft prompts that repair compressed language models.

Importing this package registers the method with PEFT and changes nothing else.
"""

from idp_peft.config import IDPConfig, IDPPeftType
from idp_peft.model import IDPModel
from idp_peft.registration import register
from idp_peft.selection import Selection

__version__ = "0.1.0"
__all__ = ["IDPConfig", "IDPModel", "IDPPeftType", "Selection"]

register()
