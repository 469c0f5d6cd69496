"""The number types of GGUF files, row by row: rows are encoded, and a factor per row goes into the scales of its blocks.

Bytes as in llama.cpp's ggml-common.h. The library `gguf` decodes all of these types, and encodes the simple ones.
"""

from __future__ import annotations

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize, quantize

# Where a block keeps its half-float scales (and the half-float factor of its minima), in bytes from its beginning.
_SCALES = {
    **{name: (0,) for name in ("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS", "IQ1_S")},
    **{name: (0,) for name in ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")},
    **{name: (0, 2) for name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K")},
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,)},
}
_ENCODED = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
_CHUNK = 4096  # rows decoded at once


def encoded(rows: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Rows in a type: float32 `[rows, d]` to what a file holds of them, `[rows, d]` or `[rows, bytes]`.

    Raises:
        `ValueError`: for a type that nothing here encodes, or rows that are no whole blocks of it.
    """
    if kind.name not in _ENCODED:
        raise ValueError(f"rows of type {kind.name} cannot be written: {', '.join(_ENCODED)} can")
    block = GGML_QUANT_SIZES[kind][0]
    if rows.shape[-1] % block:
        raise ValueError(f"rows of {rows.shape[-1]} numbers are no whole blocks of type {kind.name} ({block} numbers)")
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    if not kind.name.endswith("_K"):
        return quantize(rows, kind)
    blocks = rows.reshape(-1, 256)
    data = _q6_k(blocks) if kind.name == "Q6_K" else _q45_k(blocks, bits=int(kind.name[1]))
    return data.reshape(len(rows), -1)


def decoded(data: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """What a file's rows stand for, float32 `[rows, d]`."""
    return dequantize(np.ascontiguousarray(data), kind)


def mean_row(data: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """The mean of a table's rows, float32 `[1, d]`."""
    parts = (decoded(data[start : start + _CHUNK], kind) for start in range(0, len(data), _CHUNK))
    return (sum(part.sum(0, dtype=np.float64, keepdims=True) for part in parts) / len(data)).astype(np.float32)


def scaled(data: np.ndarray, kind: GGMLQuantizationType, factors: np.ndarray, what: str) -> np.ndarray:
    """Rows times their factors, in their own type: of blocks only the scales change, rounded to half-floats.

    Args:
        data (`np.ndarray`): what a file holds: `[rows, ...]`.
        factors (`np.ndarray`): float32 `[rows]`, or `[rows, groups]` of neighbouring numbers.
        what (`str`): what errors call the tensor.

    Raises:
        `ValueError`: for a type whose blocks have no half-float scale, groups that are no whole blocks, or a scale that becomes too
            large for its type.
    """
    by_row = factors.reshape(len(factors), -1)

    def spread(rows: np.ndarray) -> np.ndarray:
        """Factors for `[rows, ...]`, whose second dimension runs along the rows."""
        blocks = rows.shape[1] if rows.ndim > 1 else 1
        if blocks % by_row.shape[1]:
            raise ValueError(
                f"{what} of type {kind.name} has {blocks} block(s) in a row, and {by_row.shape[1]} factors go in there: train with "
                "a `scale_group_size` that is a multiple of the type's block"
            )
        return by_row.repeat(blocks // by_row.shape[1], 1).reshape(len(rows), *[blocks][: rows.ndim - 1])

    with np.errstate(over="ignore"):
        if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            product = changed = (data.astype(np.float32) * spread(data)).astype(data.dtype)
        elif kind == GGMLQuantizationType.BF16:
            rows = decoded(data, kind)
            product = rows * spread(rows)
            changed = quantize(product, kind)
        elif kind.name in _SCALES:
            changed = np.array(data).reshape(len(data), -1, GGML_QUANT_SIZES[kind][1])  # [rows, blocks, bytes]
            places = [slice(place, place + 2) for place in _SCALES[kind.name]]
            scales = np.stack(
                [changed[..., place].copy().view(np.float16) for place in places]
            )  # [places, rows, blocks, 1]
            product = (scales.astype(np.float32) * spread(changed[..., 0])[..., None]).astype(np.float16)
            for place, values in zip(places, product, strict=True):
                changed[..., place] = values.view(np.uint8)
            changed = changed.reshape(data.shape)
        else:
            raise ValueError(f"{what} is of type {kind.name}, whose blocks cannot take a factor")
    if not np.isfinite(product).all():
        raise ValueError(f"{what}: a scale times its factor is too large for type {kind.name}")
    return changed


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    """Float32 `[blocks, 256]` to Q6_K: 16 groups of 16 with a scale of 8 bits each."""
    groups = blocks.reshape(-1, 16, 16)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1)[..., 0]  # with its sign
    scales = largest / -32.0
    d = _half(np.abs(scales).max(-1) / 127.0)
    steps = np.clip(np.rint(_divided(scales, d[:, None])), -128, 127)
    q = np.clip(np.rint(_divided(groups, (d[:, None] * steps)[..., None])), -32, 31).astype(np.int8) + 32
    q = q.astype(np.uint8).reshape(-1, 2, 4, 32)  # [blocks, halves, quarters, 32]
    low = np.concatenate([q[:, :, :2] & 15 | (q[:, :, 2:] & 15) << 4], axis=2).reshape(-1, 128)
    high = q[:, :, 0] >> 4 | q[:, :, 1] >> 4 << 2 | q[:, :, 2] >> 4 << 4 | q[:, :, 3] >> 4 << 6
    return np.hstack([low, high.reshape(-1, 64), steps.astype(np.int8).view(np.uint8), _bytes(d)])


def _q45_k(blocks: np.ndarray, bits: int) -> np.ndarray:
    """Float32 `[blocks, 256]` to Q4_K or Q5_K: 8 groups of 32 with a scale and a minimum of 6 bits each."""
    groups, levels = blocks.reshape(-1, 8, 32), 2**bits - 1
    lowest = np.minimum(groups.min(-1), 0)
    scales = (groups.max(-1) - lowest) / levels
    d, dmin = _half(scales.max(-1) / 63.0), _half(-lowest.min(-1) / 63.0)
    steps = np.clip(np.rint(_divided(scales, d[:, None])), 0, 63).astype(np.uint8)
    minima = np.clip(np.rint(_divided(-lowest, dmin[:, None])), 0, 63).astype(np.uint8)
    shifted = groups + (dmin[:, None] * minima)[..., None]
    q = np.clip(np.rint(_divided(shifted, (d[:, None] * steps)[..., None])), 0, levels).astype(np.uint8)
    low = (q & 15).reshape(-1, 4, 2, 32)
    parts = [(low[:, :, 0] | low[:, :, 1] << 4).reshape(-1, 128)]
    if bits == 5:  # bit g of byte l is the fifth bit of number l of group g
        parts.insert(0, np.bitwise_or.reduce((q >> 4) << np.arange(8, dtype=np.uint8)[:, None], axis=1))
    packed = [
        steps[:, :4] | steps[:, 4:] >> 4 << 6,
        minima[:, :4] | minima[:, 4:] >> 4 << 6,
        steps[:, 4:] & 15 | (minima[:, 4:] & 15) << 4,
    ]
    return np.hstack([_bytes(d), _bytes(dmin), *packed, *parts])


def _half(values: np.ndarray) -> np.ndarray:
    """Rounded to half-floats, as float32."""
    return values.astype(np.float16).astype(np.float32)


def _bytes(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16)[:, None].view(np.uint8)


def _divided(values: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Zero where the divisor is."""
    return np.divide(values, by, out=np.zeros(np.broadcast_shapes(values.shape, by.shape), np.float32), where=by != 0)
