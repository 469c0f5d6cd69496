"""Which prompt an input gets.

    i*(x) = argmax_i  mean_{heads, t in ctx(x), j <= k_i}  A[t, (i, j)]

`A` is the attention of the selection layer when all M prompts stand in front of the input at once, in one softmax, no
prompt sees another, and each prompt ends right before the input: prompt i has positions K-k_i .. K-1, the input starts
at K. `ctx(x)` are the tokens the choice may look at. This file turns queries and keys into that choice; where they come
from is `probe.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from idp_peft.hosting.reach import EVERYTHING, Reach

# Attention logits of this many elements are held at once (64 MiB in float32).
_CHUNK_ELEMENTS = 2**24


@dataclass(frozen=True)
class Selection:
    """What was chosen for each row of a batch.

    Args:
        prompt_ids (`torch.Tensor`): int64 `[batch]`, the prompt of each row; -1 where a row was given none. (While
            `assignment="all"` trains: `[M * batch]`, prompt after prompt.)
        scores (`torch.Tensor`, *optional*): float32 `[batch, M]`, the score of each prompt (the equation above);
            `None` where nothing was compared (forced, random, fixed or assigned). Beside rows that choose ("auto"),
            forced rows have NaN.
        prompt_names (`list[str]`, *optional*): what the adapter calls its M prompts.
    """

    prompt_ids: torch.Tensor
    scores: torch.Tensor | None = None
    prompt_names: list[str] | None = None

    @property
    def names(self) -> list[str | None] | None:
        """The name of each row's prompt, `None` for a row without one; `None` where prompts have no names."""
        if self.prompt_names is None:
            return None
        return [None if chosen < 0 else self.prompt_names[chosen] for chosen in self.prompt_ids.tolist()]


@dataclass(frozen=True)
class BlockMask:
    """Who sees whom while the input is compared with all prompts at once.

    Keys are the S = sum_i k_i prompt tokens, prompt after prompt, then the n input tokens.

    Args:
        lengths (`list[int]`): k_i of each prompt.
        attention_mask (`torch.Tensor`): bool `[batch, n]`, real tokens of the input.
    """

    lengths: list[int]
    attention_mask: torch.Tensor

    @property
    def prompt_tokens(self) -> int:
        return sum(self.lengths)

    def prompt_positions(self) -> torch.Tensor:
        """int64 `[S]`: every prompt ends at position K-1."""
        last = max(self.lengths)
        return torch.cat([torch.arange(last - length, last) for length in self.lengths]).to(self.attention_mask.device)

    def input_positions(self) -> torch.Tensor:
        """int64 `[batch, n]`: real tokens count up from K, whatever the padding."""
        ranks = self.attention_mask.long().cumsum(-1) - 1
        return ranks.clamp(min=0) + max(self.lengths)

    def visible(self, start: int, stop: int, reach: Reach, given: torch.Tensor | None = None) -> torch.Tensor:
        """bool `[batch, 1, stop-start, S+n]`: keys that the queries `start..stop-1` may attend to.

        Args:
            reach (`Reach`): how far back the layer attends.
            given (`torch.Tensor`, *optional*): bool `[batch, 1, n, n]`, what the input's tokens see of each other; by
                default those before them, as far as the layer reaches.
        """
        batch, tokens = self.attention_mask.shape
        device = self.attention_mask.device
        query_index = torch.arange(start, stop, device=device)  # [q]
        own = (torch.arange(tokens, device=device) <= query_index[:, None]) & self.attention_mask[:, None]  # [B, q, n]
        prompts = own.new_ones(batch, stop - start, self.prompt_tokens)  # [B, q, S]
        if reach.size is not None:
            positions = self.input_positions()
            queries = positions[:, start:stop, None]  # [B, q, 1]
            own = own & reach.covers(queries, positions[:, None])
            prompts = reach.covers(queries, self.prompt_positions())
        if given is not None:
            own = given[:, 0, start:stop] & self.attention_mask[:, None]
        return torch.cat([prompts, own], dim=-1)[:, None]


@dataclass(frozen=True)
class AttentionLayer:
    """The numbers of one attention layer that its logits depend on, as transformers passes them to an attention
    function: `scaling`, `softcap` (Gemma 2), `reach` (sliding windows, chunks), `sinks` (one logit per head, GPT-OSS),
    `bias` (`[batch, heads or 1, n, S+n]`, what the layer itself adds to the logits, Doge)."""

    scaling: float
    softcap: float | None = None
    reach: Reach = EVERYTHING
    sinks: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def probabilities(
        self, query: torch.Tensor, key: torch.Tensor, start: int, mask: BlockMask, given: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attention of some queries over all keys, float32 `[batch, heads, q, S+n]`.

        Args:
            query (`torch.Tensor`): `[batch, heads, q, head_dim]`.
            key (`torch.Tensor`): `[batch, kv_heads, S+n, head_dim]`.
            start (`int`): which of the input's tokens the first query is.
            mask (`BlockMask`): who sees whom.
            given (`torch.Tensor`, *optional*): as in [`BlockMask.visible`].
        """
        batch, heads, queries, width = query.shape
        visible = mask.visible(start, start + queries, self.reach, given)  # [B, 1, q, S+n]
        kv_heads = key.shape[1]
        if query.dtype == torch.float16:  # a product of queries and keys can pass 65,504
            query, key = query.float(), key.float()
        # In place where it can be: these tensors are the largest of a choice, and each pass over them is felt.
        grouped = (query * self.scaling).reshape(batch, kv_heads, heads // kv_heads * queries, width)
        logits = (grouped @ key.transpose(-1, -2)).view(batch, heads, queries, -1).float()
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if self.bias is not None:
            logits += self.bias[:, :, start : start + queries]
        logits.masked_fill_(~visible, torch.finfo(logits.dtype).min)
        if self.sinks is None:
            return logits.softmax(-1)
        sinks = self.sinks.float().view(1, heads, 1, 1).expand(batch, heads, queries, 1)
        return torch.cat([logits, sinks], dim=-1).softmax(-1)[..., :-1]


def attention_on_prompts(
    query: torch.Tensor, key: torch.Tensor, layer: AttentionLayer, mask: BlockMask, given: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention that each input token pays to each prompt, summed over the prompt's tokens and averaged over heads.

    Works through the queries in chunks, so that memory stays flat for long inputs.

    Args:
        query (`torch.Tensor`): `[batch, heads, n, head_dim]`, queries of the input.
        key (`torch.Tensor`): `[batch, kv_heads, S+n, head_dim]`, keys of all prompts, then of the input.
        given (`torch.Tensor`, *optional*): as in [`BlockMask.visible`].

    Returns:
        `torch.Tensor`: float32 `[batch, n, M]`.
    """
    batch, heads, tokens, _ = query.shape
    chunk = max(1, _CHUNK_ELEMENTS // (batch * heads * key.shape[2]))
    shares = []
    for start in range(0, tokens, chunk):
        stop = min(start + chunk, tokens)
        weights = layer.probabilities(query[:, :, start:stop], key, start, mask, given)
        shares.append(sum_by_prompt(weights.mean(1), mask))
    return torch.cat(shares, dim=1)


def sum_by_prompt(attention: torch.Tensor, mask: BlockMask) -> torch.Tensor:
    """Attention on each prompt, summed over its tokens: `[batch, q, S+n]` to `[batch, q, M]`."""
    on_prompts = attention[..., : mask.prompt_tokens].split(mask.lengths, dim=-1)
    return torch.stack([part.sum(-1) for part in on_prompts], dim=-1)


def scores_from_attention(
    on_prompts: torch.Tensor, context: torch.Tensor, lengths: list[int], reduction: str
) -> torch.Tensor:
    """The score of each prompt: mean over the context, and over the prompt's tokens when `reduction="mean"`.

    Args:
        on_prompts (`torch.Tensor`): `[batch, n, M]`, from [`attention_on_prompts`].
        context (`torch.Tensor`): bool `[batch, n]`, the tokens the choice may look at, at least one per row.

    Returns:
        `torch.Tensor`: float32 `[batch, M]`.

    Raises:
        `ValueError`: where a score is NaN, because the model's own numbers overflow.
    """
    weight = context.to(on_prompts.dtype)
    scores = (on_prompts * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
    if reduction == "mean":
        scores = scores / torch.tensor(lengths, device=scores.device, dtype=scores.dtype)
    if scores.isnan().any():
        rows = scores.isnan().any(-1).nonzero().flatten().tolist()
        raise ValueError(
            f"the selection layer's attention is NaN in row(s) {rows}, so no prompt can be chosen: the model's numbers overflow "
            f"or hold NaN; load it in bfloat16 or float32, or force `prompt_ids`"
        )
    return scores


def deal_evenly(batch: int, num_prompts: int, rank: int = 0, processes: int = 1) -> torch.Tensor:
    """`assignment="uniform"`: a shuffled deal of the prompts over a batch, int64 `[batch]`; counts differ by one at
    most. Drawn from torch's global CPU generator, which `Trainer` saves and restores with its checkpoints.

    Several processes draw the same deal for the whole batch, since trainers seed them alike, and each takes its part: what
    one process with the whole batch would deal. Drawn for each part alone, all parts would get the same few prompts.

    Args:
        batch (`int`): rows of this process.
        rank (`int`), processes (`int`): which part of the whole batch they are.
    """
    deals = -(-batch * processes // num_prompts)
    if not batch:
        return torch.zeros(0).long()
    return torch.cat([torch.randperm(num_prompts) for _ in range(deals)])[rank * batch : (rank + 1) * batch]


def context_tokens(
    attention_mask: torch.Tensor,
    selection_mask: torch.Tensor | None,
    labels: torch.Tensor | None,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """ctx(x): the tokens the choice may look at, bool `[batch, n]`, of all rows or of those that choose.

    `selection_mask` decides where it is given. Else, where `labels` are given, the tokens before a row's first label
    (a row without such tokens reads all of them). Padding never counts.

    Args:
        rows (`torch.Tensor`, *optional*): int64 `[choosing]`, the rows that choose; all by default.

    Raises:
        `ValueError`: where a row that chooses has no token to choose by.
    """
    real = attention_mask.bool()
    if selection_mask is not None:
        if selection_mask.shape != real.shape:
            raise ValueError(
                f"`selection_mask` must have the input's shape {list(real.shape)}, got {list(selection_mask.shape)}"
            )
        context = real & selection_mask.to(real.device).bool()
        hint = "`selection_mask` leaves no token to choose a prompt by in row(s) {rows}: mark at least one real token"
    elif labels is not None:
        labelled = labels.to(real.device) != -100
        before = labelled.long().cumsum(-1) == 0  # [B, n]
        context = real & before & labelled.any(-1, keepdim=True)
        context = torch.where(context.any(-1, keepdim=True), context, real)
        hint = None
    else:
        context, hint = real, None
    context = context if rows is None else context[rows]
    if not (has_context := context.any(-1)).all():
        empty = (~has_context).nonzero().flatten().cpu()
        hint = hint or "`attention_mask` has no real token in row(s) {rows}: drop them, or force `prompt_ids`"
        raise ValueError(hint.format(rows=(empty if rows is None else rows[empty]).tolist()))
    return context
