"""One layer's attention on all prompts: A of the equation, without running the layers above it.

The decoder is copied *shallowly* (`hosting/decoder_copy.py`): the copy shares every weight, ends at the selection layer, and
its attention modules call our function. transformers' `AttentionInterface` hands that function the layer's finished queries
and keys (rotated, normalised); at the selection layer it leaves with them. Nothing stays on the model, and other threads run
it undisturbed. Architectures that do not use the interface (BLOOM, Falcon, MPT, GPT-J) report eager attention weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AttentionInterface, DynamicCache

from idp_peft.hosting.architectures import (
    EVERYTHING,
    Reach,
    cache_name,
    check_selection_layer,
    find_attention,
    find_blocks,
    forward_parameters,
    has_changing_rotary,
    masks_by_reach,
    reaches,
    rotary_length,
    uses_interface,
)
from idp_peft.hosting.decoder_copy import Reached, run_until_reached
from idp_peft.hosting.ready_masks import masks_for_decoder
from idp_peft.prompt_cache import PromptCache

_IMPLEMENTATION = "idp_probe"
# Attention logits of this many elements are held at once (64 MiB in float32).
_CHUNK_ELEMENTS = 2**24


def attention_on_bank(layer, number: int, inputs: dict, mask: torch.Tensor) -> torch.Tensor:
    """Attention of each token on each prompt at one of the decoder's layers: A, summed over a prompt's tokens and averaged
    over heads, float32 `[batch, n, M]`.

    Where rotary frequencies depend on the length, rows are read together with rows of the same frequencies alone.

    Args:
        layer (`IDPLayer`): whose active bank is read.
        number (`int`): of the decoder's layer, from 0 to L-1.
        inputs (`dict`): `input_ids` `[batch, n]` or `inputs_embeds` `[batch, n, d]`, and what else
            [`read_by_choice`] finds.
        mask (`torch.Tensor`): bool `[batch, n]`, the input's real tokens.
    """
    bank, decoder = layer.active_bank, layer.decoder
    parts: dict[int | None, list[int] | slice] = {None: slice(None)}
    if has_changing_rotary(decoder):
        parts = {}
        for row, tokens in enumerate(mask.sum(-1).tolist()):
            parts.setdefault(rotary_length(decoder, bank.max_length + tokens), []).append(row)
    on_prompts = torch.empty(*mask.shape, bank.num_prompts, dtype=torch.float32, device=mask.device)
    for length, rows in parts.items():
        prompt_cache = layer.prompt_cache_for_choice(number, length)
        part = {name: value[rows] for name, value in inputs.items()}
        on_prompts[rows] = attention_at_layer(decoder, number, prompt_cache, part, mask[rows])
    return on_prompts


@torch.no_grad()
def attention_at_layer(
    decoder: nn.Module, layer: int, prompt_cache: PromptCache, inputs: dict, attention_mask: torch.Tensor
) -> torch.Tensor:
    """As [`attention_on_bank`], for rows with the same rotary frequencies.

    Args:
        prompt_cache (`PromptCache`): keys and values of the bank, as far as `layer`.

    Raises:
        `ValueError`: for a layer above the first on a model with ALiBi, whose layers cannot be shown all prompts at
            their own distances.
    """
    block = find_blocks(decoder)[1][layer]
    mask = BlockMask(prompt_cache.lengths, attention_mask)
    has_interface = uses_interface(type(getattr(block, find_attention(block))))
    if not has_interface and layer == 0:
        # These decoders may measure distance in slots, so padding must not stand between prompt and input.
        order = (~attention_mask).long().argsort(dim=1, stable=True)  # [B, n], real tokens first
        inputs = {name: _gather(value, order) for name, value in inputs.items()}
        mask = BlockMask(prompt_cache.lengths, attention_mask.gather(1, order))
        return _gather(_combine_separate_runs(decoder, mask, prompt_cache, inputs), order.argsort(dim=1))
    cache = prompt_cache.side_by_side(len(attention_mask), layer + 1)
    if has_interface:
        AttentionInterface.register(_IMPLEMENTATION, attend)
        return run(decoder, layer, mask, inputs, cache, _IMPLEMENTATION)
    check_selection_layer(decoder, layer)
    weights = run(decoder, layer, mask, inputs, cache, "eager")  # [B, H, n, S+n]
    return sum_by_prompt(weights.mean(1), mask)


def _gather(values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Reorder the tokens of each row: `values` `[batch, n, ...]`, `order` `[batch, n]`."""
    return values.gather(1, order.view(*order.shape, *[1] * (values.ndim - 2)).expand_as(values))


def _combine_separate_runs(decoder, mask: BlockMask, prompt_cache: PromptCache, inputs: dict) -> torch.Tensor:
    """Layer 0 from one eager run per prompt. The joint softmax follows exactly from each prompt's odds against the input's
    own keys, because those keys and the queries are the same in every run."""
    odds = []
    for prompt, length in enumerate(mask.lengths):
        cache = prompt_cache.alone(prompt, len(mask.attention_mask), num_layers=1)
        weights = run(decoder, 0, mask, inputs, cache, "eager").float()  # [B, H, n, k+n]
        own = weights[..., length:].sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        odds.append(weights[..., :length].sum(-1) / own)
    odds = torch.stack(odds, dim=-1)  # [B, H, n, M]
    return (odds / (1 + odds.sum(-1, keepdim=True))).mean(1)


@dataclass(frozen=True)
class Reader:
    """What [`attend`] needs beside its arguments: the layer to leave at, who sees whom, how far back layers attend."""

    layer: int
    mask: BlockMask
    reaches: list[Reach]


def run(decoder, layer: int, mask: BlockMask, inputs: dict, cache: DynamicCache, implementation: str) -> torch.Tensor:
    """Run the copied decoder up to the attention of `layer`, and return what that attention reports."""
    front = mask.attention_mask.new_ones(len(mask.attention_mask), cache.get_seq_length())
    visible = torch.cat([front, mask.attention_mask], dim=1).long()
    if "masks" in inputs:
        visible = masks_for_decoder(inputs["masks"], decoder)
    call = {name: value for name, value in inputs.items() if name not in ("masks", "axes", "token_ids")}
    call |= {"attention_mask": visible, "use_cache": True, cache_name(type(decoder)): cache}
    if "position_ids" in forward_parameters(type(decoder)):
        axes = inputs.get("axes")
        call["position_ids"] = mask.input_positions() if axes is None else axes.movedim(-1, 0) + max(mask.lengths)
    seen = reaches(decoder) if masks_by_reach(decoder) else [EVERYTHING] * (layer + 1)
    return run_until_reached(decoder, layer, implementation, Reader(layer, mask, seen), call)


def attend(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    sliding_window=None,
    softcap=None,
    s_aux=None,
    reader: Reader | None = None,
    **_,
):
    """Exact attention under the block mask; at the reader's layer it raises [`Reached`] with the result.

    Shapes as transformers passes them: `query` `[batch, heads, n, head_dim]`, `key` and `value`
    `[batch, kv_heads, S+n, head_dim]`; returns `[batch, n, heads, head_dim]`.
    """
    reader = module.config.idp_reader if reader is None else reader
    biased = isinstance(attention_mask, torch.Tensor) and attention_mask.is_floating_point()  # made by the layer itself
    layer = AttentionLayer(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        reach=reader.reaches[module.layer_idx] if sliding_window is None else Reach(window=sliding_window),
        sinks=s_aux,
        bias=attention_mask if biased else None,
    )
    given = attention_mask if not biased and attention_mask is not None and attention_mask.ndim == 4 else None
    if module.layer_idx == reader.layer:
        raise Reached(attention_on_prompts(query, key, layer, reader.mask, given))
    weights = layer.probabilities(query, key, 0, reader.mask, given).to(value.dtype)
    groups = query.shape[1] // value.shape[1]
    output = weights @ value.repeat_interleave(groups, dim=1)
    return output.transpose(1, 2).contiguous(), None


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
