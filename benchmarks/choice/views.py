"""Two ways to show an input all prompts at once, in any order of the bank: IDP's definition, and the naive one.

IDP lets no prompt see another and ends each right before the input. The naive view is the plain model on
`[P_1; ...; P_M; x]`: causal attention over everything that came before, one position after the other.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache

from benchmarks.choice.every_layer import scores_at_every_layer
from idp_peft.analysis.taps import eager_attention
from idp_peft.hosting.architectures import cache_name
from idp_peft.hosting.call import internal_run
from idp_peft.layer import IDPLayer
from idp_peft.probe import BlockMask, sum_by_prompt
from idp_peft.prompt_bank import PromptBank
from idp_peft.prompt_cache import PromptCache, compute_prompt_cache


@torch.no_grad()
def idp_scores(layer: IDPLayer, orders: list[list[int]], contexts: torch.Tensor) -> torch.Tensor:
    """Scores (mean over tokens) of the bank put in other orders, float32 `[orders, layers, items, M]`, by prompt."""
    found = []
    with internal_run():
        for order in orders:
            scores = scores_at_every_layer(layer.decoder, _cache(layer, order), contexts, "mean")  # by place
            found.append(by_prompt(scores, order))
    return torch.stack(found)


@torch.no_grad()
def naive_scores(
    layer: IDPLayer, orders: list[list[int]], contexts: torch.Tensor, layers: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention on each prompt in the naive view, from the eager weights that the model itself reports.

    Returns:
        Two float32 tensors: the mean over heads, the context and the prompt's tokens, `[orders, layers, items, M]`, by
        prompt; and of all attention on prompts, the share that falls on the very first token, `[orders, layers, items]`.
    """
    bank, decoder = layer.active_bank, layer.decoder
    scores, first = [], []
    with internal_run(), eager_attention(layer.decoder):
        for order in orders:
            lengths = [bank.lengths[i] for i in order]
            joined = _cache(layer, order, as_one=True).alone(0, len(contexts), decoder.config.num_hidden_layers)
            weights = _attentions(decoder, contexts, joined, sum(lengths))
            weights = torch.stack([weights[i].float().mean((1, 2)) for i in layers])  # [layers, items, keys]
            mask = BlockMask(lengths, torch.ones_like(contexts, dtype=torch.bool))
            sums = sum_by_prompt(weights, mask)  # [layers, items, M]
            first.append(weights[..., 0] / sums.sum(-1))
            scores.append(by_prompt(sums / torch.tensor(lengths, device=sums.device), order))
    return torch.stack(scores), torch.stack(first)


def by_prompt(by_place: torch.Tensor, order: list[int]) -> torch.Tensor:
    """Scores `[..., M]` of the prompts at each place, sorted by prompt."""
    return by_place[..., torch.tensor(order).argsort()]


def _cache(layer: IDPLayer, order: list[int], as_one: bool = False) -> PromptCache:
    """Keys and values of the prompts in an order; `as_one`: of one prompt that is all of them, end to end."""
    bank = layer.active_bank
    prompts = bank.embeddings().split(bank.lengths)
    lengths = [bank.lengths[i] for i in order]
    ordered = PromptBank([sum(lengths)] if as_one else lengths, bank.embedding_dim)
    ordered.weight.copy_(torch.cat([prompts[i] for i in order]))
    return compute_prompt_cache(layer.decoder, ordered.to(bank.weight.device), layer.dtype)


def _attentions(decoder, contexts: torch.Tensor, cache: DynamicCache, start: int) -> tuple[torch.Tensor, ...]:
    """Attention weights of the context behind a filled cache, per layer `[items, heads, n, start+n]`."""
    positions = torch.arange(start, start + contexts.shape[1], device=contexts.device)[None]
    output = decoder(
        input_ids=contexts,
        position_ids=positions,
        use_cache=True,
        output_attentions=True,
        **{cache_name(type(decoder)): cache},
    )
    return output.attentions
