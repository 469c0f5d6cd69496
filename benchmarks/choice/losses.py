"""What every prompt of a bank is worth on every block: losses of the context, and of what follows it."""

from __future__ import annotations

import torch
from tqdm.auto import tqdm

from idp_peft.evaluation.prompted import input_logits


@torch.no_grad()
def nats_of_every_prompt(
    model, blocks: torch.Tensor, context_tokens: int, num_prompts: int, batch_size: int = 4
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of each block under each prompt, forced.

    Args:
        model: a causal language model with an active IDP adapter, in evaluation mode.
        blocks (`torch.Tensor`): int64 `[blocks, n]`.
        context_tokens (`int`): c, tokens at the front that a choice may read, from 2 to n-1.
        num_prompts (`int`): M.

    Returns:
        Two float64 tensors `[blocks, M]`: nats summed over the n-c tokens after the context, and over the c-1 tokens of
        the context that have a token before them.

    Raises:
        `ValueError`: for a context that leaves nothing to score, on either side.
    """
    if not 2 <= context_tokens < blocks.shape[1]:
        raise ValueError(f"`context_tokens` must be from 2 to {blocks.shape[1] - 1}, got {context_tokens}")
    after, context = (torch.zeros(len(blocks), num_prompts, dtype=torch.float64) for _ in range(2))
    starts = range(0, len(blocks), batch_size)
    with tqdm(total=len(starts) * num_prompts, desc="every prompt") as bar:
        for start in starts:
            ids = blocks[start : start + batch_size].to(model.device)  # [B, n]
            for prompt in range(num_prompts):
                logits = input_logits(model, ids, torch.ones_like(ids), prompt_ids=prompt)[
                    :, :-1
                ]  # [B, n-1, vocabulary]
                losses = torch.nn.functional.cross_entropy(
                    logits.float().transpose(1, 2), ids[:, 1:], reduction="none"
                ).double()  # [B, n-1]
                rows = slice(start, start + len(ids))
                after[rows, prompt] = losses[:, context_tokens - 1 :].sum(1).cpu()
                context[rows, prompt] = losses[:, : context_tokens - 1].sum(1).cpu()
                bar.update()
    return after, context
