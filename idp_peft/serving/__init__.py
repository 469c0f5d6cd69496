"""Serving an adapter with engines that do not know the method."""

import importlib

# name -> the module that holds it: imported when first used, so that a router needs no web framework.
_ON_USE = {
    "export_to_vocab": "export",
    "export_folded": "export",
    "export_to_gguf": "export_gguf",
    "ExportedModel": "exported",
    "Router": "router",
    "VllmPrompts": "vllm_prompts",
    "proxy_app": "proxy",
    "first_turn": "chat_turns",
}
__all__ = [*_ON_USE]


def __getattr__(name: str):
    if name not in _ON_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ON_USE[name]}"), name)
