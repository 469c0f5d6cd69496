"""Which prompt each row of a call gets: forced, kept from earlier, assigned in training, or selected."""

from __future__ import annotations

from dataclasses import replace

import torch

from idp_peft import call as calls
from idp_peft.hosting.architectures import has_changing_rotary, rotary_length
from idp_peft.hosting.checks import real_tokens
from idp_peft.hosting.outer_model import read_by_choice
from idp_peft.hosting.prompt_ids import AUTO, CHOOSES, check_prompt_ids
from idp_peft.hosting.sharding import place_in_batch
from idp_peft.hosting.trainers import in_training, labels_of_step
from idp_peft.probe import attention_at_layer
from idp_peft.random_choice import choose_random
from idp_peft.selection import (
    Selection,
    context_tokens,
    deal_evenly,
    scores_from_attention,
)


def prompts_for(layer, kwargs: dict, real: torch.Tensor) -> torch.Tensor:
    """The prompt of each row of a fresh input, int64 `[batch]`; what was chosen is remembered on the layer.

    Args:
        layer (`IDPLayer`): whose active adapter decides.
        kwargs (`dict`): the decoder's call: `input_ids` `[batch, n]` or `inputs_embeds` `[batch, n, d]`.
        real (`torch.Tensor`): bool `[batch, n]`, the attention mask.
    """
    batch = len(real)
    call = calls.current_call(layer) or calls.Call(layer, labels=labels_of_step(kwargs.get("input_ids")))
    rows = call.batch if call.generating else batch  # `generate` repeats each row for its beams
    selection = call.chosen
    if selection is None:
        given = (slice(None, None, batch // rows), slice(call.tokens))  # without beams and drafted tokens
        inputs = {name: value[given] for name, value in read_by_choice(kwargs, call).items()}
        selection = choose(call, inputs, real[given])
    if call.generating:
        call.chosen = selection
    layer.remember(selection)
    return selection.prompt_ids.repeat_interleave(batch // rows)


def choose(call: calls.Call, inputs: dict, real: torch.Tensor) -> Selection:
    """The prompt of each row of a call's own input: forced where the call says so, assigned or selected elsewhere.

    Args:
        call (`Call`): what it asks for.
        inputs (`dict`), real (`torch.Tensor`): its input and mask, as in [`select`].
    """
    config = call.owner.active_config
    if call.prompt_ids is None:
        selection = _assign_or_select(call, inputs, real)
    else:
        forced = check_prompt_ids(call.prompt_ids, len(real), config.num_prompts, config.prompt_names)
        rows = torch.tensor([row for row, chosen in enumerate(forced.tolist()) if chosen == CHOOSES], dtype=torch.long)
        selection = Selection(forced)
        if len(rows):
            selection = _put(_assign_or_select(call, inputs, real, rows), rows, forced, config.num_prompts)
    return replace(selection, prompt_names=config.prompt_names)


def _put(selection: Selection, rows: torch.Tensor, forced: torch.Tensor, num_prompts: int) -> Selection:
    """What some rows chose, among what the others were given."""
    prompt_ids = forced.to(selection.prompt_ids.device, copy=True)
    prompt_ids[rows] = selection.prompt_ids
    if selection.scores is None:
        return Selection(prompt_ids)
    scores = selection.scores.new_full((len(forced), num_prompts), torch.nan)
    scores[rows] = selection.scores
    return Selection(prompt_ids, scores)


def _assign_or_select(call: calls.Call, inputs: dict, real: torch.Tensor, rows=None) -> Selection:
    """What rows get whose prompt is not forced: int64 `rows`, all by default."""
    layer = call.owner
    config = layer.active_config
    if config.num_prompts > 1 and not call.generating and in_training(layer):
        if config.assignment == "uniform":
            dealt = len(real) if rows is None else len(rows)
            return Selection(deal_evenly(dealt, config.num_prompts, *place_in_batch()))
        if config.assignment == "all":
            raise ValueError(
                "assignment='all' works through the model's own forward with `labels`, not by calling its decoder, and "
                f"not with {AUTO!r} among `prompt_ids`: use assignment='selected' or 'uniform'"
            )
        if config.chooses and call.labels is None and call.selection_mask is None:
            layer.warn_that_targets_may_steer()
    return select(layer, inputs, real, call.selection_mask, call.labels, rows)


def select(
    layer,
    inputs: dict,
    attention_mask: torch.Tensor | None = None,
    selection_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
) -> Selection:
    """i*(x) of each row, by the active adapter's rule (`config.selection`): every choice in this package is made here.

    A row's choice depends on that row alone: on no padding, no other row, and nothing that the model ran before.

    Args:
        layer (`IDPLayer`): whose active adapter decides.
        inputs (`dict`): `input_ids` `[batch, n]` or `inputs_embeds` `[batch, n, d]`.
        attention_mask (`torch.Tensor`, *optional*): `[batch, n]`, padded on either side; all tokens are real by default.
        selection_mask (`torch.Tensor`, *optional*): `[batch, n]`, tokens that may steer the choice.
        labels (`torch.Tensor`, *optional*): `[batch, n]`; without a `selection_mask`, the choice reads what stands
            before a row's first label.
        rows (`torch.Tensor`, *optional*): int64 `[choosing]`, on the CPU: the rows that choose. The result is theirs
            alone, in this order; all rows by default.

    Raises:
        `ValueError`: for an empty input, a row without a token to choose by, or more tokens than the base has positions.
    """
    config = layer.active_config
    real = real_tokens(layer, inputs, attention_mask)
    if not config.chooses:
        choosing = len(real) if rows is None else len(rows)
        fixed = torch.full((choosing,), config.fixed_prompt, device=real.device)
        return Selection(fixed, prompt_names=config.prompt_names)
    context = context_tokens(real, selection_mask, labels, rows)
    if rows is not None:
        inputs, real = {name: value[rows] for name, value in inputs.items()}, real[rows]
    if config.selection == "random":
        drawn = choose_random(_content(inputs), context, config.num_prompts, config.selection_seed)
        return Selection(drawn, prompt_names=config.prompt_names)
    on_prompts = attention_on_bank(layer, layer.selection_layer, inputs, real)  # [B, n, M]
    scores = scores_from_attention(on_prompts, context, layer.active_bank.lengths, config.selection_reduction)
    return Selection(scores.argmax(-1), scores, config.prompt_names)


def attention_on_bank(layer, number: int, inputs: dict, real: torch.Tensor) -> torch.Tensor:
    """Attention of each token on each prompt at one of the decoder's layers: A of the equation, summed over a prompt's
    tokens and averaged over heads, float32 `[batch, n, M]`.

    Where rotary frequencies depend on the length, rows are read together with rows of their own frequencies alone.

    Args:
        layer (`IDPLayer`): whose active bank is read.
        number (`int`): of the decoder's layer, from 0 to L-1.
        inputs (`dict`): as in [`select`].
        real (`torch.Tensor`): bool `[batch, n]`.
    """
    on_prompts = torch.empty(*real.shape, layer.active_bank.num_prompts, dtype=torch.float32, device=real.device)
    for length, rows in _rows_by_rotary_length(layer, real).items():
        prompt_cache = layer.prompt_cache_for_choice(number, length)
        part = {name: value[rows] for name, value in inputs.items()}
        on_prompts[rows] = attention_at_layer(layer.decoder, number, prompt_cache, part, real[rows])
    return on_prompts


def _rows_by_rotary_length(layer, real: torch.Tensor) -> dict[int | None, list[int] | slice]:
    """Which rows have the same rotary frequencies, by the length that decides them; in most models, all have."""
    if not has_changing_rotary(layer.decoder):
        return {None: slice(None)}
    found: dict[int | None, list[int]] = {}
    for row, tokens in enumerate(real.sum(-1).tolist()):
        found.setdefault(rotary_length(layer.decoder, layer.active_bank.max_length + tokens), []).append(row)
    return found


def _content(inputs: dict) -> torch.Tensor:
    """An integer code of each input token, int64 `[batch, n]`: its id, or its embedding's bits."""
    for name in ("input_ids", "token_ids"):
        if name in inputs:
            return inputs[name]
    return inputs["inputs_embeds"].detach().float().contiguous().view(torch.int32).long().sum(-1)
