"""Log-likelihood requests of a harness task, put together as rows of a forward pass."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

# What the harness passes on: ((context, continuation), tokens of the context, tokens of the continuation).
Request = tuple[tuple[str, str] | None, list[int], list[int]]


@dataclass
class Row:
    """One row of a forward pass, and the requests that read their answer from it.

    Args:
        tokens (`tuple[int]`): what the model reads.
        prompt (`int`, *optional*): the prompt in front of it.
        answers (`list`): `(number of the request, tokens of its continuation)`; the row's last logits predict them.
    """

    tokens: tuple[int, ...]
    prompt: int | None
    answers: list[tuple[int, list[int]]] = field(default_factory=list)


def cut_left(context: list[int], continuation: list[int], max_length: int) -> tuple[list[int], int]:
    """The tokens a request makes the model read, and how many were cut off at the left to fit `max_length`.

    The last token of the continuation is predicted and never read.

    Raises:
        `ValueError`: where the continuation alone does not fit.
    """
    if not context or not continuation or len(continuation) > max_length:
        raise ValueError(
            f"a request needs a context and a continuation of 1 to {max_length} tokens (the model's length less its "
            f"prompt), got {len(context)} and {len(continuation)} tokens"
        )
    tokens = context + continuation
    cut = max(0, len(tokens) - (max_length + 1))
    return tokens[cut:-1], cut


def shared_context(requests: list[Request], max_length: int) -> list[int]:
    """The tokens that all requests of one question have in common in front: all that a choice for the question may read.

    For ordinary multiple choice that is the whole context. Where the contexts hold the options (WinoGrande) it is the
    text before the first option; it is empty where a question begins with its options.
    """
    contexts = [context for _, context, _ in requests]
    shared = 0
    for tokens in zip(*contexts, strict=False):
        if len(set(tokens)) > 1:
            break
        shared += 1
    cut = max(cut_left(context, continuation, max_length)[1] for _, context, continuation in requests)
    return contexts[0][cut:shared]


def group(questions: list[Hashable]) -> dict[Hashable, list[int]]:
    """Numbers of the requests of each question."""
    groups: dict[Hashable, list[int]] = {}
    for index, question in enumerate(questions):
        groups.setdefault(question, []).append(index)
    return groups


def rows(requests: list[Request], prompts: list[int | None], max_length: int) -> list[Row]:
    """The rows to run, longest first. Requests that read the same behind the same prompt share one: the one-token
    answers of a yes-or-no question, for instance."""
    found: dict[tuple, Row] = {}
    for index, ((_, context, continuation), prompt) in enumerate(zip(requests, prompts, strict=True)):
        tokens = tuple(cut_left(context, continuation, max_length)[0])
        row = found.setdefault((prompt, tokens), Row(tokens, prompt))
        row.answers.append((index, continuation))
    return sorted(found.values(), key=lambda row: -len(row.tokens))
