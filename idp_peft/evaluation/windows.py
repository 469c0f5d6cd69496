"""Cutting a document into sliding windows, so that every token after the first context is scored exactly once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """A stretch of one document.

    Args:
        document (`int`): which document.
        tokens (`list[int]`): what the model reads, at most `window` tokens.
        scored (`list[bool]`): which of them are scored; never the first.
        front (`int`): how many at its beginning are the tokenizer's, in front of every text.
    """

    document: int
    tokens: list[int]
    scored: list[bool]
    front: int = 0

    @property
    def context(self) -> int:
        """How many tokens stand before the first one that is scored, at least 1."""
        return self.scored.index(True)

    @property
    def has_context(self) -> bool:
        """Whether something of the document stands there, that a choice can read."""
        return self.context > max(1, self.front)


def check_window(window: int, stride: int) -> None:
    """
    Raises:
        `ValueError`: for a window that leaves nothing to score, or a stride that leaves gaps.
    """
    if window < 2:
        raise ValueError(f"`window` must be at least 2 tokens, got {window}: the first one of a window is never scored")
    if not 1 <= stride <= window:
        raise ValueError(f"`stride` must be from 1 to `window` ({window}), got {stride}")


def cut(
    document: int, ids: list[int], window: int, stride: int, front: list[int], labelled: list[bool] | None = None
) -> list[Window]:
    """The windows of one document, each `stride` tokens further on; the last one may be shorter.

    Nothing predicts the first token of a window, so with `stride == window` windows overlap by that one token. Where a
    document says what is to be predicted, only that is scored, in its first window from the front on; windows without any
    are left out.

    Args:
        document (`int`): its number.
        ids (`list[int]`): its tokens.
        window, stride (`int`): tokens of a window, and how many at its end are scored.
        front (`list[int]`): tokens that stand before every text (`texts/tokens.py`); they count as context.
        labelled (`list[bool]`, *optional*): which of `ids` are to be predicted; by default all.
    """
    context = max(window - stride, len(front), 1)
    step, before = window - context, context - len(front)
    length = window - len(front)
    windows = []
    for start in range(0, max(len(ids) - before, 0 if labelled is None else 1), step):
        tokens = front + ids[start : start + length]
        wanted = [False] * len(front) + (labelled or [True] * len(ids))[start : start + length]
        read = context
        if start == 0 and labelled is not None and not labelled[0]:
            read = max(len(front), 1)  # the document's own context stands before what it wants scored
        scored = [position >= read and one for position, one in enumerate(wanted)]
        if any(scored):
            windows.append(Window(document, tokens, scored, len(front)))
    return windows
