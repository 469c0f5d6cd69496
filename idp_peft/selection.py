"""Which prompt an input gets.

    i*(x) = argmax_i  mean_{heads, t in ctx(x), j <= k_i}  A[t, (i, j)]                    selection="attention"
    i*(x) = argmax_i  cos(m(x) - mu, c_i - mu),   m(x) = mean_{t in ctx(x)} E(x_t)         selection="centroid"

`A` is the attention of the selection layer when all M prompts stand in front of the input at once, in one softmax, and no
prompt sees another. Each prompt ends right before the input: prompt i has positions K-k_i .. K-1, the input starts at K.
`ctx(x)` are the tokens that the choice may look at. `probe.py` computes A.

`E` is the input embedding, `c_i` the mean of m(x) over the contexts that trained prompt i, and `mu` the mean of the `c_i`
(`centroids.py` learns them). No layer runs for that choice.

[`select`] makes every choice of this package.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import nn

from idp_peft.hosting.checks import checked_tokens
from idp_peft.hosting.decoder_copy import without_noise
from idp_peft.hosting.prompt_ids import AUTO, CHOOSES, check_prompt_ids
from idp_peft.hosting.sharding import from_all_processes, place_in_batch
from idp_peft.probe import attention_on_bank


@dataclass(frozen=True)
class Selection:
    """The prompt of each row of a batch.

    Args:
        prompt_ids (`torch.Tensor`): int64 `[batch]`, the prompt of each row; -1 where a row was given none. (While
            `assignment="all"` trains: `[M * batch]`, prompt after prompt.)
        scores (`torch.Tensor`, *optional*): float32 `[batch, M]`, the score of each prompt (the equation above). `None`
            where nothing was compared (forced, random, fixed or assigned). Forced rows beside rows that choose ("auto")
            have NaN.
        prompt_names (`list[str]`, *optional*): the adapter's names of its M prompts.
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


def select(
    layer,
    inputs: dict,
    attention_mask: torch.Tensor | None = None,
    selection_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    prompt_ids=None,
    training: bool = False,
) -> Selection:
    """The prompt of each row: the forced one, else the one that training assigns, else i*(x) by the adapter's rule.

    A row's choice depends on that row alone: not on padding, not on other rows, and not on what the model ran before.

    Args:
        layer (`IDPLayer`): whose active adapter decides.
        inputs (`dict`): `input_ids` `[batch, n]` or `inputs_embeds` `[batch, n, d]`.
        attention_mask (`torch.Tensor`, *optional*): `[batch, n]`, padded on either side; by default all tokens are real.
        selection_mask (`torch.Tensor`, *optional*): `[batch, n]`, the tokens that may steer the choice.
        labels (`torch.Tensor`, *optional*): `[batch, n]`. Without a `selection_mask`, the choice reads what stands before a
            row's first label, and the whole row where nothing does.
        prompt_ids (*optional*): forced prompts, in any form that [`check_prompt_ids`] takes; `"auto"` lets a row choose.
        training (`bool`, defaults to `False`): whether `config.assignment` decides for rows that are not forced.

    Raises:
        `ValueError`: for an empty input, a row without a token to choose by, more tokens than the base has positions, or
            invalid `prompt_ids`.
    """
    config, clusters = layer.active_config, layer.active_bank.clusters
    mask = checked_tokens(layer.decoder, layer.active_bank.max_length, inputs, attention_mask)
    learns = training and layer.learns_centroids
    if learns:
        clusters.settle(layer.active_bank.embeddings())
    elif clusters is not None and not training:
        clusters.settle()
    selected = check_prompt_ids(prompt_ids, len(mask), config.num_prompts, config.prompt_names).to(
        mask.device, copy=True
    )
    is_free = selected == CHOOSES
    rows = is_free.nonzero().flatten().cpu()
    scores = None
    if len(rows):
        chosen = _assign_or_select(layer, inputs, mask, selection_mask, labels, training, rows)
        selected[rows] = chosen.prompt_ids.to(mask.device)
        if chosen.scores is not None:
            scores = chosen.scores.new_full((len(mask), config.num_prompts), torch.nan)
            scores[rows] = chosen.scores
    if learns:
        trained = selected if clusters.known else torch.where(is_free, CHOOSES, selected)
        context = _context(mask, selection_mask, labels)
        has_context = context.any(-1) & (selected >= 0)  # a row without a prompt trains none
        noted = (
            trained[has_context],
            is_free[has_context],
            mean_embeddings(layer.get_base_layer(), inputs, context, has_context),
        )
        clusters.note(*from_all_processes(*noted), layer.active_bank.embeddings())
    return Selection(selected, scores, config.prompt_names)


def _assign_or_select(layer, inputs, mask, selection_mask, labels, training, rows) -> Selection:
    """The prompts of the rows that are not forced: int64 `rows`, on the CPU."""
    config, count = layer.active_config, len(rows)
    if training and config.num_prompts > 1:
        if config.assignment == "uniform":
            return Selection(deal_evenly(count, config.num_prompts, *place_in_batch()))
        if config.assignment == "all":
            raise ValueError(
                "assignment='all' works through the model's own forward with `labels`, not by calling its decoder, and "
                f"not with {AUTO!r} among `prompt_ids`: use assignment='selected' or 'uniform'"
            )
        if config.chooses and labels is None and selection_mask is None:
            _warn_that_targets_may_steer(layer)
    if not config.chooses:
        return Selection(torch.full((count,), config.fixed_prompt, device=mask.device))
    context = context_tokens(mask, selection_mask, labels, rows)
    if count < len(mask):
        inputs, mask = {name: value[rows] for name, value in inputs.items()}, mask[rows]
    if config.selection == "random":
        return Selection(random_prompts(_content(inputs), context, config.num_prompts, config.selection_seed))
    if config.selection == "centroid":
        return _select_by_centroid(layer, inputs, context, training)
    with layer.scaling.everywhere():
        on_prompts = attention_on_bank(layer, layer.selection_layer, inputs, mask)  # [B, n, M]
    scores = scores_from_attention(on_prompts, context, layer.active_bank.lengths, config.selection_reduction)
    return Selection(scores.argmax(-1), scores)


def _select_by_centroid(layer, inputs: dict, context: torch.Tensor, training: bool) -> Selection:
    clusters = layer.active_bank.clusters
    if not layer.active_bank.centroids.isfinite().all():
        raise ValueError(
            "the bank's centroids hold NaN or infinity: reload the adapter, or call `idp_peft.fit_centroids`"
        )
    if clusters.known:
        means = mean_embeddings(layer.get_base_layer(), inputs, context)
        scores = checked_scores(clusters.scores(means), "mean input embedding")
        return Selection(scores.argmax(-1), scores)
    if training and layer.learns_centroids:  # the first step: its contexts start the centroids
        return Selection(random_prompts(_content(inputs), context, layer.active_config.num_prompts, 0))
    raise ValueError(
        "this adapter has no centroids yet, so no input can choose a prompt: train it, or call "
        "`idp_peft.fit_centroids(model, dataset)`, or force `prompt_ids`"
    )


@torch.no_grad()
def mean_embeddings(
    embeddings: nn.Module, inputs: dict, context: torch.Tensor, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """m(x), the mean input embedding of each row's context, float32 `[batch, d]`. Each row is computed alone.

    Args:
        embeddings (`nn.Module`): the base's input embeddings.
        inputs (`dict`): `input_ids` `[batch, n]` or `inputs_embeds` `[batch, n, d]`.
        context (`torch.Tensor`): bool `[batch, n]`, ctx(x), at least one token per row.
        rows (`torch.Tensor`, *optional*): bool `[batch]`, the rows to compute; all by default.
    """
    embeds = inputs.get("inputs_embeds")
    if embeds is None:
        embeds = without_noise(embeddings)(inputs["input_ids"])
    context = context.to(embeds.device)
    wanted = range(len(context)) if rows is None else rows.nonzero().flatten().tolist()
    means = [embeds[row][context[row]].float().mean(0) for row in wanted]
    return torch.stack(means) if means else embeds.new_zeros(0, embeds.shape[-1], dtype=torch.float32)


def scores_from_attention(
    on_prompts: torch.Tensor, context: torch.Tensor, lengths: list[int], reduction: str
) -> torch.Tensor:
    """The score of each prompt: the mean over the context, and over the prompt's tokens where `reduction="mean"`.

    Args:
        on_prompts (`torch.Tensor`): `[batch, n, M]`, attention of each token on each prompt.
        context (`torch.Tensor`): bool `[batch, n]`, ctx(x), at least one token per row.

    Returns:
        `torch.Tensor`: float32 `[batch, M]`.

    Raises:
        `ValueError`: where a score is NaN, because the model's own numbers overflow.
    """
    weight = context.to(on_prompts.dtype)
    scores = (on_prompts * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
    if reduction == "mean":
        scores = scores / torch.tensor(lengths, device=scores.device, dtype=scores.dtype)
    return checked_scores(scores, "selection layer's attention")


def checked_scores(scores: torch.Tensor, of: str) -> torch.Tensor:
    """Scores `[batch, M]`, none of them NaN.

    Raises:
        `ValueError`: where one is, because the model's own numbers overflow.
    """
    if scores.isnan().any():
        rows = scores.isnan().any(-1).nonzero().flatten().tolist()
        raise ValueError(
            f"the {of} is NaN in row(s) {rows}, so no prompt can be chosen: the model's numbers overflow or hold NaN; load it "
            "in bfloat16 or float32, or force `prompt_ids`"
        )
    return scores


def context_tokens(
    attention_mask: torch.Tensor,
    selection_mask: torch.Tensor | None,
    labels: torch.Tensor | None,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """ctx(x): the tokens that the choice may look at, bool `[batch, n]`, of all rows or of those that choose.

    `selection_mask` decides where it is given. Else, where `labels` are given, the tokens before a row's first label count
    (all of them in a row without such tokens). Padding never counts.

    Args:
        rows (`torch.Tensor`, *optional*): int64 `[choosing]`, the rows that choose; all by default.

    Raises:
        `ValueError`: where a row that chooses has no token to choose by.
    """
    context = _context(attention_mask, selection_mask, labels)
    context = context if rows is None else context[rows]
    if not (has_context := context.any(-1)).all():
        empty = (~has_context).nonzero().flatten().cpu()
        where = (empty if rows is None else rows[empty]).tolist()
        if selection_mask is None:
            raise ValueError(f"`attention_mask` has no real token in row(s) {where}: drop them, or force `prompt_ids`")
        raise ValueError(
            f"`selection_mask` leaves no token to choose a prompt by in row(s) {where}: mark at least one real token"
        )
    return context


def _context(attention_mask: torch.Tensor, selection_mask, labels) -> torch.Tensor:
    """As [`context_tokens`], where a row may have none."""
    given = attention_mask.bool()
    if selection_mask is not None:
        if selection_mask.shape != given.shape:
            raise ValueError(
                f"`selection_mask` must have the input's shape {list(given.shape)}, got {list(selection_mask.shape)}"
            )
        return given & selection_mask.to(given.device).bool()
    if labels is None:
        return given
    labelled = labels.to(given.device) != -100
    before = labelled.long().cumsum(-1) == 0  # [B, n]
    context = given & before & labelled.any(-1, keepdim=True)
    return torch.where(context.any(-1, keepdim=True), context, given)


def random_prompts(content: torch.Tensor, context: torch.Tensor, num_prompts: int, seed: int) -> torch.Tensor:
    """`selection="random"`: a reproducible random prompt per row, a hash of the row's context and the seed.

    Padding does not enter the hash, so a row gets the same prompt alone and in any batch.

    Args:
        content (`torch.Tensor`): int64 `[batch, n]`, token ids (or any integer code of the inputs).
        context (`torch.Tensor`): bool `[batch, n]`.

    Returns:
        `torch.Tensor`: int64 `[batch]`.
    """
    rank = context.long().cumsum(-1)  # 1, 2, ... over the context, whatever stands between
    terms = _mix(content.long() + _mix(rank + (seed * 0x9E3779B1 & (2**62 - 1)))) * context  # a seed may be any int64
    return (_mix(terms.sum(-1) + (seed & (2**62 - 1))) & (2**62 - 1)) % num_prompts


def _mix(value: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64 on int64 (arithmetic wraps around; shifts are made logical by masking)."""
    value = (value ^ ((value >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    value = (value ^ ((value >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    return value ^ ((value >> 31) & (2**33 - 1))


def _content(inputs: dict) -> torch.Tensor:
    """An integer code of each input token, int64 `[batch, n]`: its id, or its embedding's bits."""
    for name in ("input_ids", "token_ids"):
        if name in inputs:
            return inputs[name]
    return inputs["inputs_embeds"].detach().float().contiguous().view(torch.int32).long().sum(-1)


def deal_evenly(batch: int, num_prompts: int, rank: int = 0, processes: int = 1) -> torch.Tensor:
    """`assignment="uniform"`: a shuffled deal of the prompts over a batch, int64 `[batch]`; counts differ by one at most.

    It is drawn from torch's global CPU generator, which `Trainer` saves with its checkpoints. Several processes draw the
    same deal for the whole batch, since trainers seed them alike, and each takes its part. (Drawn for each part alone, all
    parts would get the same few prompts.) So each must have as many rows to deal to as the others.

    Args:
        batch (`int`): rows of this process.
        rank (`int`), processes (`int`): which part of the whole batch they are.
    """
    deals = -(-batch * processes // num_prompts)
    if not batch:
        return torch.zeros(0).long()
    return torch.cat([torch.randperm(num_prompts) for _ in range(deals)])[rank * batch : (rank + 1) * batch]


def _warn_that_targets_may_steer(layer) -> None:
    """Say once what it means to train without saying which tokens are targets."""
    if not layer.warned_of_targets:
        layer.warned_of_targets = True
        warnings.warn(
            "this training step does not say which tokens are targets, so each row chose its prompt by all of its tokens: "
            "targets may steer the choice, and the same text may choose another prompt at inference. Pass `labels` (the "
            "choice then reads what stands before a row's first label) or `selection_mask` in the model's call",
            UserWarning,
            stacklevel=2,
        )
