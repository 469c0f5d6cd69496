"""Compressing a model through existing libraries: a thin layer that picks good settings and checks what comes out."""

from idp_peft.compression.compress import BACKENDS, compress
from idp_peft.compression.recipes import RECIPES, Recipe

__all__ = ["BACKENDS", "RECIPES", "Recipe", "compress"]
