"""The ways a model can be compressed, by name. What a name means is the same in every backend."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """One way to compress the linear layers of a model, all but the output embeddings.

    Args:
        algorithm (`str`): `"gptq"`, `"sparsegpt"` or `"rtn"` (round to nearest, no calibration text).
        bits (`int`, *optional*): bits per weight, 3 or 4; `None` for a recipe that prunes.
        sparsity (`float`, *optional*): share of weights that become zero; `None` for a recipe that quantises.
        mask (`str`, defaults to `"0:0"`): `"0:0"` lets any weight be a zero, `"2:4"` makes two of every four so.
    """

    algorithm: str
    bits: int | None = None
    sparsity: float | None = None
    mask: str = "0:0"

    @property
    def calibrated(self) -> bool:
        return self.algorithm != "rtn"


RECIPES = {
    "gptq-3bit": Recipe("gptq", bits=3),
    "gptq-4bit": Recipe("gptq", bits=4),
    "sparsegpt-50": Recipe("sparsegpt", sparsity=0.5),
    "sparsegpt-2:4": Recipe("sparsegpt", sparsity=0.5, mask="2:4"),
    "rtn-3bit": Recipe("rtn", bits=3),
    "rtn-4bit": Recipe("rtn", bits=4),
}
