"""Text into the equally long chunks of tokens that a compression algorithm watches the model read."""

from __future__ import annotations

import random

from idp_peft.texts.chats import Chat
from idp_peft.texts.tokens import beginning, encode

# Chunks are drawn from a pool so many times larger, so that one long text cannot fill them all.
_POOL = 8


def calibration_chunks(tokenizer, texts: list[str | Chat], samples: int, length: int, seed: int) -> list[list[int]]:
    """`samples` chunks of `length` token ids, drawn at random.

    Texts are shuffled and joined by the end-of-text token, so short ones count too, and are tokenised only until the
    pool is full. Each chunk begins with what the tokenizer puts in front of every text, as in training and evaluation.

    Args:
        tokenizer: any transformers tokenizer.
        texts (`list[str | Chat]`): what to read.
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
    front = beginning(tokenizer)
    room = max(1, length - len(front))
    stream, end = [], [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for text in draw.sample(texts, len(texts)):
        (document,) = encode(tokenizer, [text])
        stream += document.ids if end and document.ids[-1:] == end else document.ids + end
        if len(stream) >= _POOL * samples * room:
            break
    chunks = [front + stream[start : start + room] for start in range(0, len(stream) - room + 1, room)]
    if len(chunks) < samples:
        raise ValueError(
            f"{samples} calibration samples of {length} tokens need {samples * room} tokens, but the {len(texts)} texts "
            f"have {len(stream)}: give more text, or lower `calibration_samples` or `calibration_tokens`"
        )
    return draw.sample(chunks, samples)
