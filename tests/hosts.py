"""What the installed versions of transformers and peft can do together."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.version import parse
from transformers.integrations.peft import MIN_PEFT_VERSION

# transformers refuses these methods, for every PEFT method, beside a peft that is older than it wants.
needs_transformers_adapter_methods = pytest.mark.skipif(
    parse(version("peft")) < parse(MIN_PEFT_VERSION),
    reason=f"this transformers wants peft >= {MIN_PEFT_VERSION} for its own adapter methods",
)
