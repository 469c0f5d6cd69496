"""What each way of choosing would take for a question, without scoring it: by attention, or by the loss of its context.

A choice reads what all rows of a question share in front, as everywhere; scores under every prompt are looked up after.
"""

from __future__ import annotations

import torch

from idp_peft.evaluation.harness import HarnessModel
from idp_peft.evaluation.prompted import input_logits
from idp_peft.evaluation.requests import group, shared_context
from idp_peft.texts.tokens import padded_batch


class ContextRecorder(HarnessModel):
    """Takes a task's requests and answers none; `contexts` holds what a choice may read of each question.

    Attributes:
        contexts (`dict`): `(task name, doc id)` to token ids.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.contexts: dict[tuple, list[int]] = {}

    def _selected(self, requests, questions):
        for question, members in group(questions).items():
            if question[2]:
                shared = shared_context([requests[index] for index in members], self.max_length)
                self.contexts[question[:2]] = shared or [self.prefix_token_id]
        return [None] * len(requests)

    def _score(self, batch):
        return [(number, (0.0, False)) for row in batch for number, _ in row.answers]

    def generate_until(self, requests, disable_tqdm: bool = False):
        for request in requests:
            self.contexts[request.task_name, request.doc_id] = self.tok_encode(request.args[0])
        return [""] * len(requests)


@torch.no_grad()
def context_nats(model, rows: list[list[int]], prompt: int, batch_size: int) -> list[float]:
    """Negative log-likelihood per token of each row behind one prompt; nothing predicts a row's first token here, since
    models without a prompt have nothing to predict it by. 0 for a row of one token."""
    found: dict[int, float] = {}
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        ids, mask = padded_batch([rows[index] for index in batch], model.device)  # [B, n]
        logits = input_logits(model, ids, mask, prompt_ids=torch.full((len(batch),), prompt))  # [B, n, V]
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
        sums = (losses * mask[:, 1:]).sum(1)  # [B]
        for index, total, count in zip(batch, sums.tolist(), mask[:, 1:].sum(1).tolist(), strict=True):
            found[index] = total / max(1, count)
    return [found[index] for index in range(len(rows))]


def least_loss(model, rows: list[list[int]], num_prompts: int, batch_size: int) -> list[int]:
    """The prompt under which each row itself is likeliest; the first of equals."""
    nats = [context_nats(model, rows, prompt, batch_size) for prompt in range(num_prompts)]  # [M][rows]
    return [min(range(num_prompts), key=lambda prompt: nats[prompt][index]) for index in range(len(rows))]
