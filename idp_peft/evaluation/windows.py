"""Cutting a document into sliding windows, so that every token after the first context is scored exactly once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """A stretch of one document.

    Args:
        document (`int`): which document.
        tokens (`list[int]`): what the model reads, at most `window` tokens.
        context (`int`): how many at the front are read but not scored, at least 1.
    """

    document: int
    tokens: list[int]
    context: int


def check_window(window: int, stride: int) -> None:
    """
    Raises:
        `ValueError`: for a window that leaves nothing to score, or a stride that leaves gaps.
    """
    if window < 2:
        raise ValueError(f"`window` must be at least 2 tokens, got {window}: the first one of a window is never scored")
    if not 1 <= stride <= window:
        raise ValueError(f"`stride` must be from 1 to `window` ({window}), got {stride}")


def cut(document: int, ids: list[int], window: int, stride: int, front: list[int]) -> list[Window]:
    """The windows of one document, each `stride` tokens further on; the last one may be shorter.

    Nothing predicts the first token of a window, so with `stride == window` windows overlap by that one token.

    Args:
        document (`int`): its number.
        ids (`list[int]`): its tokens.
        window, stride (`int`): tokens of a window, and how many at its end are scored.
        front (`list[int]`): special tokens that the tokenizer puts before every text; they count as context.
    """
    context = max(window - stride, 1)
    step, before = window - context, context - len(front)
    starts = range(0, len(ids) - before, step)
    length = window - len(front)
    return [Window(document, front + ids[start : start + length], context) for start in starts]
