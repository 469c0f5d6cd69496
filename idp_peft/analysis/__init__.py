"""Analysis of an adapter: which prompts are chosen, by what margin, how good the choice is, and how activations and attention
change.

Importing this is light; each name imports what it needs when it is first used.
"""

from __future__ import annotations

import importlib

# name -> the module that defines it
_ON_USE = {
    "Cluster": "clusters",
    "ExamplePatterns": "taps",
    "PatternComparison": "pattern_comparison",
    "PatternRecording": "recording",
    "SelectionCallback": "callback",
    "SelectionReport": "report",
    "attention_map": "maps",
    "compare_patterns": "patterns",
    "record_patterns": "recording",
    "selection_report": "measure",
}

__all__ = list(_ON_USE)


def __getattr__(name: str):
    if name not in _ON_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ON_USE[name]}"), name)
