"""Compression through existing libraries: good settings, and checks of the result."""

from idp_peft.compression.compress import BACKENDS, compress
from idp_peft.compression.recipes import RECIPES, Recipe

__all__ = ["BACKENDS", "RECIPES", "Recipe", "compress"]
