"""Text into the equally long chunks of tokens that a compression algorithm watches the model read."""

from __future__ import annotations

import random

# Chunks are drawn from a pool so many times larger, so that one long text cannot fill them all.
_POOL = 8


def calibration_chunks(tokenizer, texts: list[str], samples: int, length: int, seed: int) -> list[list[int]]:
    """`samples` chunks of `length` token ids, drawn at random.

    Texts are shuffled and joined by the end-of-text token, so short ones count too, and are tokenised only until the
    pool is full.

    Args:
        tokenizer: any transformers tokenizer.
        texts (`list[str]`): what to read.
        samples (`int`): chunks wanted, at least 1.
        length (`int`): tokens of every chunk, at least 2.
        seed (`int`): of the shuffle and of the draw.

    Raises:
        `ValueError`: where a number is too small, or the texts hold fewer chunks than wanted.
    """
    if samples < 1 or length < 2:
        raise ValueError(
            f"`calibration_samples` must be at least 1 and `calibration_tokens` at least 2, got {samples} and {length}"
        )
    draw = random.Random(seed)
    stream, end = [], [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for text in draw.sample(texts, len(texts)):
        stream += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end
        if len(stream) >= _POOL * samples * length:
            break
    chunks = [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]
    if len(chunks) < samples:
        raise ValueError(
            f"{samples} calibration samples of {length} tokens need {samples * length} tokens, but the {len(texts)} texts "
            f"have {len(stream)}: give more text, or lower `calibration_samples` or `calibration_tokens`"
        )
    return draw.sample(chunks, samples)
