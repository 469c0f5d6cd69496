"""Which prompt each row of a call gets: forced, kept from earlier, assigned in training, or selected."""

from __future__ import annotations

from dataclasses import replace

import torch

from idp_peft import call as calls
from idp_peft.outer_model import read_by_choice
from idp_peft.probe import attention_at_layer
from idp_peft.prompt_ids import AUTO, CHOOSES, check_prompt_ids
from idp_peft.random_choice import choose_random
from idp_peft.selection import (
    Selection,
    context_tokens,
    deal_evenly,
    scores_from_attention,
)
from idp_peft.sharding import place_in_batch


def prompts_for(layer, kwargs: dict, real: torch.Tensor, rotary_length: int | None) -> torch.Tensor:
    """The prompt of each row of a fresh input, int64 `[batch]`; what was chosen is remembered on the layer.

    Args:
        layer (`IDPLayer`): whose active adapter decides.
        kwargs (`dict`): the decoder's call: `input_ids` `[batch, n]` or `inputs_embeds` `[batch, n, d]`.
        real (`torch.Tensor`): bool `[batch, n]`, the attention mask.
        rotary_length (`int`, *optional*): of the sequence, where rotary frequencies depend on it.
    """
    batch = len(real)
    call = calls.current_call(layer) or calls.Call(layer)
    rows = call.batch if call.generating else batch  # `generate` repeats each row for its beams
    selection = call.chosen
    if selection is None:
        given = (slice(None, None, batch // rows), slice(call.tokens))  # without beams and drafted tokens
        inputs = {name: value[given] for name, value in read_by_choice(kwargs, call).items()}
        selection = choose(call, inputs, real[given], rotary_length)
    if call.generating:
        call.chosen = selection
    layer.remember(selection)
    return selection.prompt_ids.repeat_interleave(batch // rows)


def choose(call: calls.Call, inputs: dict, real: torch.Tensor, rotary_length: int | None = None) -> Selection:
    """The prompt of each row of a call's own input: forced where the call says so, assigned or selected elsewhere.

    Args:
        call (`Call`): what it asks for.
        inputs (`dict`), real (`torch.Tensor`), rotary_length (`int`, *optional*): as in [`select`].
    """
    config = call.owner.active_config
    if call.prompt_ids is None:
        selection = _assign_or_select(call, inputs, real, rotary_length)
    else:
        forced = check_prompt_ids(call.prompt_ids, len(real), config.num_prompts, config.prompt_names)
        rows = torch.tensor([row for row, chosen in enumerate(forced.tolist()) if chosen == CHOOSES], dtype=torch.long)
        selection = Selection(forced)
        if len(rows):
            selection = _put(
                _assign_or_select(call, inputs, real, rotary_length, rows), rows, forced, config.num_prompts
            )
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


def _assign_or_select(call: calls.Call, inputs: dict, real: torch.Tensor, rotary_length, rows=None) -> Selection:
    """What rows get whose prompt is not forced: int64 `rows`, all by default."""
    layer = call.owner
    config = layer.active_config
    if layer.training and not call.generating:
        if config.assignment == "uniform":
            dealt = len(real) if rows is None else len(rows)
            return Selection(deal_evenly(dealt, config.num_prompts, *place_in_batch()))
        if config.assignment == "all":
            raise ValueError(
                "assignment='all' works through the model's own forward with `labels`, not by calling its decoder, and "
                f"not with {AUTO!r} among `prompt_ids`"
            )
        if call.labels is None and call.selection_mask is None:
            raise ValueError(
                "assignment='selected' needs `labels` or `selection_mask` in the model's call, so that targets cannot "
                "steer the choice (Trainer's label smoothing takes the labels out of it)"
            )
    return select(layer, inputs, real, call.selection_mask, call.labels, rotary_length, rows)


def select(
    layer,
    inputs: dict,
    real: torch.Tensor,
    selection_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    rotary_length: int | None = None,
    rows: torch.Tensor | None = None,
) -> Selection:
    """Select a prompt for each row by the active adapter's rule (`config.selection`).

    Args:
        layer (`IDPLayer`): whose active adapter decides.
        inputs (`dict`): `input_ids` `[batch, n]` or `inputs_embeds` `[batch, n, d]`.
        real (`torch.Tensor`): bool `[batch, n]`, the attention mask.
        selection_mask (`torch.Tensor`, *optional*): `[batch, n]`, tokens that may steer the choice.
        labels (`torch.Tensor`, *optional*): `[batch, n]`; without a `selection_mask`, the choice reads what stands
            before a row's first label.
        rotary_length (`int`, *optional*): of the sequence, where rotary frequencies depend on it.
        rows (`torch.Tensor`, *optional*): int64 `[choosing]`, on the CPU: the rows that choose. The result is theirs
            alone, in this order; all rows by default.

    Raises:
        `ValueError`: where a row has no token to choose by.
    """
    config = layer.active_config
    if config.selection == "fixed" or config.num_prompts == 1:
        choosing = len(real) if rows is None else len(rows)
        return Selection(torch.full((choosing,), config.fixed_prompt, device=real.device))
    context = context_tokens(real, selection_mask, labels, rows)
    if rows is not None:
        inputs, real = {name: value[rows] for name, value in inputs.items()}, real[rows]
    if config.selection == "random":
        return Selection(choose_random(_content(inputs), context, config.num_prompts, config.selection_seed))
    prompt_cache = layer.prompt_cache_for_choice(rotary_length)
    on_prompts = attention_at_layer(layer.decoder, layer.selection_layer, prompt_cache, inputs, real)  # [B, n, M]
    scores = scores_from_attention(on_prompts, context, prompt_cache.lengths, config.selection_reduction)
    return Selection(scores.argmax(-1), scores)


def _content(inputs: dict) -> torch.Tensor:
    """An integer code of each input token, int64 `[batch, n]`: its id, or its embedding's bits."""
    for name in ("input_ids", "token_ids"):
        if name in inputs:
            return inputs[name]
    return inputs["inputs_embeds"].detach().float().contiguous().view(torch.int32).long().sum(-1)
