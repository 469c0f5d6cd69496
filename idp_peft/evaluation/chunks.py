"""Perplexity over real tokens only, chunk by chunk, so that every row of a table is measured in the same way.

Each chunk begins with context that is not scored. An IDP model chooses its prompt by that context alone, and a model
without prompts is scored on exactly the same tokens. Prompt positions have no logits, so they never enter a mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from idp_peft.texts.data import token_blocks

_IGNORED = -100


@dataclass(frozen=True)
class ChunkScores:
    """What a model made of some chunks.

    Args:
        nats (`torch.Tensor`): float64 `[chunks]`, negative log-likelihood summed over the scored tokens.
        tokens (`torch.Tensor`): int64 `[chunks]`, how many tokens were scored.
        prompt_ids (`torch.Tensor`, *optional*): int64 `[chunks]`, the prompt of each chunk; `None` for a model without.
    """

    nats: torch.Tensor
    tokens: torch.Tensor
    prompt_ids: torch.Tensor | None = None

    @property
    def mean_nats(self) -> float:
        """Negative log-likelihood per scored token: every token weighs the same, whatever its chunk."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        return math.exp(self.mean_nats)

    def difference(self, other: ChunkScores) -> tuple[float, float]:
        """Mean nats per token of `self` minus that of `other`, and its standard error, paired by chunk.

        Raises:
            `ValueError`: where the two did not score the same tokens, or fewer than two chunks.
        """
        if not torch.equal(self.tokens, other.tokens):
            raise ValueError("`difference` needs scores of the same chunks: the numbers of scored tokens differ")
        chunks = len(self.tokens)
        if chunks < 2:
            raise ValueError(f"`difference` needs at least two chunks for a standard error, got {chunks}")
        gaps = self.nats - other.nats
        mean = gaps.sum() / self.tokens.sum()
        residuals = gaps - mean * self.tokens
        error = (residuals.square().sum() * chunks / (chunks - 1)).sqrt() / self.tokens.sum()
        return float(mean), float(error)


def chunk_documents(tokenizer, documents: list[str], length: int, per_document: int | None = None) -> list[list[int]]:
    """Cut documents into chunks of `length` tokens; no chunk crosses documents, and shorter rests are dropped.

    Args:
        tokenizer: any transformers tokenizer.
        documents (`list[str]`): texts.
        length (`int`): tokens of every chunk.
        per_document (`int`, *optional*): take at most so many from the front of each document. With 1, chunks are
            independent of each other, which a standard error assumes.
    """
    return token_blocks(tokenizer, documents, length, min_tokens=length, per_document=per_document)


def mask_context(input_ids: torch.Tensor, context_tokens: int) -> torch.Tensor:
    """Labels of chunks: the tokens themselves, with the first `context_tokens` not scored. int64 `[batch, n]`."""
    labels = input_ids.clone()
    labels[:, :context_tokens] = _IGNORED
    return labels


@torch.no_grad()
def score_chunks(
    model,
    chunks: list[list[int]],
    context_tokens: int,
    prompt_id: int | str | None = None,
    batch_size: int = 4,
    description: str | None = None,
) -> ChunkScores:
    """Negative log-likelihood of each chunk after its context.

    Args:
        model: any causal language model, with or without an adapter.
        chunks (`list[list[int]]`): token ids, all of one length.
        context_tokens (`int`): tokens at the front of each chunk that are read but not scored, at least 1. IDP's choice
            reads these and no others.
        prompt_id (`int` or `str`, *optional*): force this prompt of an IDP model's bank, by number or name (-1: no
            prompt); by default it chooses.
        batch_size (`int`, defaults to `4`): chunks per forward pass.
        description (`str`, *optional*): shows a progress bar with this text.

    Raises:
        `ValueError`: for chunks of several lengths, or a context that leaves nothing to score.
    """
    lengths = sorted({len(chunk) for chunk in chunks})
    if len(lengths) != 1:
        raise ValueError(f"`chunks` must be at least one chunk, all of one length, got lengths {lengths}")
    if not 1 <= context_tokens < lengths[0]:
        raise ValueError(f"`context_tokens` must be from 1 to {lengths[0] - 1}, got {context_tokens}")
    was_training, nats, prompt_ids = model.training, [], []
    model.eval()
    try:
        for start in tqdm(range(0, len(chunks), batch_size), desc=description, disable=description is None):
            input_ids = torch.tensor(chunks[start : start + batch_size], device=model.device)  # [B, n]
            labels = mask_context(input_ids, context_tokens)
            forced = {} if prompt_id is None else {"prompt_ids": prompt_id}
            # `labels` tell IDP where the context ends; the loss they bring is a mean over the batch, not needed here.
            logits = model(input_ids=input_ids, labels=labels, use_cache=False, **forced).logits
            nats.append(_nats(logits[:, context_tokens - 1 : -1], input_ids[:, context_tokens:]))
            if (selection := getattr(model, "last_selection", None)) is not None:
                prompt_ids.append(selection.prompt_ids.cpu())
    finally:
        model.train(was_training)
    tokens = torch.full((len(chunks),), lengths[0] - context_tokens)
    return ChunkScores(torch.cat(nats), tokens, torch.cat(prompt_ids) if prompt_ids else None)


def _nats(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed negative log-likelihood of each row, float64 `[batch]`, from `[batch, n, vocabulary]` and `[batch, n]`."""
    losses = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")  # [B, n]
    return losses.double().sum(1).cpu()
