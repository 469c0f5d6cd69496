"""What inputs each prompt is for: centroids, learned from the contexts that train it, and the choice by them."""

from __future__ import annotations

import torch
from torch import nn

_SAME = 0.999  # a context whose cosine to a centroid is higher cannot start another


class Clusters:
    """What inputs each prompt is for: its centroid c_i is the mean of m(x) over the contexts that trained prompt i.

    m(x) is the mean input embedding of a context. Centroids are learned by online k-means (MacQueen, 1967): each context
    moves its prompt's centroid by 1/n of the way, n being how many that prompt has had. They move when an optimiser step
    has changed the prompts, so that accumulated batches and several processes give what one large batch gives. They start at
    contexts of the first step that are as different as can be; a prompt without a centroid takes the context that fits worst.

    Args:
        bank (`PromptBank`): it keeps `centroids`, float32 `[M, d]`, and `contexts`, int64 `[M]`, how many each has had.
    """

    def __init__(self, bank) -> None:
        self.bank = bank
        self._noted: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._prompts: torch.Tensor | None = None

    @property
    def centroids(self) -> torch.Tensor:
        return self.bank.centroids

    @property
    def contexts(self) -> torch.Tensor:
        return self.bank.contexts

    @property
    def known(self) -> bool:
        """Whether any prompt has a centroid."""
        return bool(self.contexts.any())

    def scores(self, means: torch.Tensor) -> torch.Tensor:
        """cos(m(x) - mu, c_i - mu), float32 `[batch, M]`; mu is the mean of the centroids. -1 for a prompt without one.

        Args:
            means (`torch.Tensor`): m(x), float32 `[batch, d]`.
        """
        has_one = self.contexts > 0
        centre = self.centroids[has_one].mean(0)
        scores = nn.functional.cosine_similarity((means - centre)[:, None], (self.centroids - centre)[None], dim=-1)
        return scores.masked_fill(~has_one, -1.0)

    @torch.no_grad()
    def set(self, prompt_ids: torch.Tensor, means: torch.Tensor) -> None:
        """Make the centroids those of these contexts, in place of what they are.

        Args:
            prompt_ids (`torch.Tensor`): int64 `[contexts]`, from 0 to M-1.
            means (`torch.Tensor`): m(x), float32 `[contexts, d]`.
        """
        self._noted = []
        self.centroids.zero_()
        self.contexts.zero_()
        self._move(prompt_ids.to(self.centroids.device), means.to(self.centroids.device, torch.float32))

    def note(self, prompt_ids: torch.Tensor, is_free: torch.Tensor, means: torch.Tensor, prompts: torch.Tensor) -> None:
        """Note the contexts of a training batch; [`settle`] moves the centroids.

        Args:
            prompt_ids (`torch.Tensor`): int64 `[batch]`, which prompt each trains; below 0 before any centroid exists.
            is_free (`torch.Tensor`): bool `[batch]`, whether the row was left to choose.
            means (`torch.Tensor`): m(x), float32 `[batch, d]`.
            prompts (`torch.Tensor`): the bank's rows; a change marks the end of a step.
        """
        if not self._noted:
            self._prompts = prompts.detach().clone()
        self._noted.append((prompt_ids, is_free, means))

    @torch.no_grad()
    def settle(self, prompts: torch.Tensor | None = None) -> None:
        """Move the centroids by what was noted, once the step has ended (without `prompts`: at once)."""
        if not self._noted or (prompts is not None and torch.equal(prompts, self._prompts)):
            return
        prompt_ids, is_free, means = (
            torch.cat(part).to(self.centroids.device) for part in zip(*self._noted, strict=True)
        )
        self._noted, self._prompts = [], None
        waits = prompt_ids < 0
        self._move(prompt_ids[~waits], means[~waits])
        started = self._start_empty(means[waits] if waits.any() else means[is_free])
        if waits.any():
            nearest = self.scores(means[waits]).argmax(-1)
            self.contexts[started] = 0  # what they start at is among those that wait
            self._move(nearest, means[waits])

    def _move(self, prompt_ids: torch.Tensor, means: torch.Tensor) -> None:
        """Each context moves its prompt's centroid."""
        here = prompt_ids.bincount(minlength=len(self.contexts))
        total = self.centroids * self.contexts[:, None]
        total.index_add_(0, prompt_ids, means)
        self.contexts.add_(here)
        self.centroids.copy_(
            torch.where(here[:, None] > 0, total / self.contexts.clamp(min=1)[:, None], self.centroids)
        )

    def _start_empty(self, means: torch.Tensor) -> list[int]:
        """Give prompts without a centroid one: of the contexts `[contexts, d]`, each time the one that fits worst."""
        started = []
        centre = self.centroids[self.contexts > 0].mean(0) if self.known else means.mean(0)
        directions = nn.functional.normalize(means - centre, dim=-1)
        for prompt in (self.contexts == 0).nonzero().flatten().tolist():
            taken = self.centroids[self.contexts > 0] - centre
            if (taken.norm(dim=-1) > 0).any():
                fit = (directions @ nn.functional.normalize(taken, dim=-1).T).max(-1).values
            else:  # no direction yet: the context that is farthest out
                distance = (means - centre).norm(dim=-1)
                fit = torch.where(distance > 0, -distance, 1.0)
            if not len(fit) or fit.min() > _SAME:
                break
            self.centroids[prompt] = means[fit.argmin()]
            self.contexts[prompt] = 1
            started.append(prompt)
        return started
