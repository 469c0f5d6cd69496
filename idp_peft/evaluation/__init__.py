"""Measuring a model: perplexity over real tokens only, and zero-shot tasks, with every item's score kept.

Importing this is light. What needs lm-eval, evaluate or datasets is imported by the name that uses it.
"""

from __future__ import annotations

import importlib

from idp_peft.evaluation.chunks import ChunkScores, chunk_documents, mask_context, score_chunks
from idp_peft.evaluation.environment import environment

# name -> the module that defines it, imported when the name is first used
_HEAVY = {
    "HarnessModel": "harness",
    "Perplexity": "perplexity",
    "evaluate": "result_file",
    "evaluate_model": "model_scores",
    "expand_tasks": "tasks",
    "score_documents": "documents",
    "score_tasks": "task_scores",
}

__all__ = ["ChunkScores", "chunk_documents", "environment", "mask_context", "score_chunks", *_HEAVY]


def __getattr__(name: str):
    if name not in _HEAVY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HEAVY[name]}"), name)
