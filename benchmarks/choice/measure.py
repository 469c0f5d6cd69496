"""Everything that is measured of one adapter, item by item: what the tables are made of."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

import numpy as np
import torch

from benchmarks.choice.every_layer import first_token_shares, scores_at_every_layer
from benchmarks.choice.losses import nats_of_every_prompt
from benchmarks.choice.orders import all_orders, balanced_orders, dependence
from benchmarks.choice.views import idp_scores, naive_scores
from idp_peft.evaluation.prompted import idp_layer
from idp_peft.hosting.architectures import rotary_length
from idp_peft.layer import IDPLayer
from idp_peft.selection import select

_CONFIG = ("num_prompts", "selection", "selection_layer", "selection_reduction", "assignment", "init")


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Args:
        blocks (`int`): how many blocks, one per document.
        block_tokens, context_tokens (`int`): the length of a block, and how much of it a choice may read.
        order_blocks (`int`): of how many blocks the naive view is read, in a balanced set of orders.
        every_order_blocks (`int`): of how many blocks IDP's choice is made in all orders.
        order_layer_step (`int`): the naive view is read at every so-many-th layer, from 0.
        bfloat16 (`bool`): losses in bfloat16 autocast. Attention scores are always float32.
    """

    blocks: int = 60
    block_tokens: int = 256
    context_tokens: int = 64
    order_blocks: int = 24
    every_order_blocks: int = 8
    order_layer_step: int = 3
    bfloat16: bool = True


def measure(model, blocks: torch.Tensor, settings: Settings) -> dict:
    """Measure one adapter.

    Args:
        model: a model with an active IDP adapter whose selection is by attention.
        blocks (`torch.Tensor`): int64 `[blocks, n]`.

    Raises:
        `ValueError`: for a model without an IDP adapter, or whose bank has one prompt; for contexts so long that the model
            changes its rotary frequencies.
    """
    layer = idp_layer(model)
    if layer is None or layer.active_config.num_prompts == 1:
        raise ValueError("`adapter` must be an IDP adapter of at least two prompts, or there is no choice to look at")
    model.eval()
    seconds, began = {}, time.process_time()
    contexts = blocks[:, : settings.context_tokens].to(model.device)
    longest = sum(layer.active_bank.lengths) + contexts.shape[1]
    if rotary_length(layer.decoder, longest) is not None:
        raise ValueError(
            f"`context_tokens` must leave prompts and context, {longest} tokens, where the model's rotary frequencies stay as "
            f"they are: the views of one context would differ by them too, got {contexts.shape[1]}"
        )
    scores = scores_at_every_layer(layer.decoder, layer.prompt_cache(), contexts, "sum")
    check = _difference_from_own_choice(layer, contexts, scores)
    seconds["scores"] = time.process_time() - began
    orders = _of_orders(layer, contexts[: settings.order_blocks], settings)
    seconds["orders"] = time.process_time() - began - seconds["scores"]
    with torch.autocast(model.device.type, torch.bfloat16, enabled=settings.bfloat16):
        after, context = nats_of_every_prompt(model, blocks, settings.context_tokens, layer.active_config.num_prompts)
    seconds["losses"] = time.process_time() - began - sum(seconds.values())
    config = layer.active_config
    return {
        "settings": asdict(settings),
        "adapter": {name: getattr(config, name) for name in _CONFIG} | {"lengths": layer.active_bank.lengths},
        "nats_after": rounded(after),  # [blocks][M]
        "nats_context": rounded(context),  # [blocks][M]
        "scores": rounded(scores),  # [layers][blocks][M], reduction "sum"
        "largest_difference_from_own_choice": rounded(check),
        "orders": orders,
        "cpu_seconds": rounded(seconds),
    }


def _difference_from_own_choice(layer: IDPLayer, contexts: torch.Tensor, scores: torch.Tensor) -> float:
    """Largest gap between the scores that the adapter's own choice compares and ours at its layer, relative."""
    config = layer.active_config
    if config.selection != "attention":
        return float("nan")
    own = select(layer, {"input_ids": contexts}, torch.ones_like(contexts, dtype=torch.bool)).scores
    ours = scores[layer.selection_layer]
    if config.selection_reduction == "mean":
        ours = ours / torch.tensor(layer.active_bank.lengths, device=ours.device)
    return float(((own - ours).abs() / own).max())


def _of_orders(layer: IDPLayer, contexts: torch.Tensor, settings: Settings) -> dict:
    """IDP's scores in all orders of the bank, compared; the naive view's in a balanced set of orders, kept."""
    num_prompts = layer.active_bank.num_prompts
    every = all_orders(num_prompts)
    ours = idp_scores(layer, every, contexts[: settings.every_order_blocks]).cpu().numpy()  # [orders, layers, items, M]
    compared = [dependence(ours[:, number], every) for number in range(ours.shape[1])]
    balanced = balanced_orders(num_prompts)
    layers = list(range(0, ours.shape[1], settings.order_layer_step))
    naive, first = naive_scores(layer, balanced, contexts, layers)
    own_first = first_token_shares(layer.decoder, layer.prompt_cache(), contexts)
    return {
        "idp": {
            "orders": len(every),
            "largest_difference": rounded([part.largest_difference for part in compared]),  # [layers]
            "changing": rounded([part.changing for part in compared]),  # [layers]
            "first_token": rounded(own_first),  # [layers][M]
        },
        "naive": {
            "orders": balanced,
            "layers": layers,
            "scores": rounded(naive),  # [orders][layers][items][M], reduction "mean"
            "first_token": rounded(first.mean(2)),  # [orders][layers]
        },
    }


def rounded(values):
    """Plain numbers of 6 significant digits, in lists and dicts; `None` for what is no number."""
    if isinstance(values, torch.Tensor | np.ndarray):
        values = values.tolist()
    if isinstance(values, dict):
        return {name: rounded(value) for name, value in values.items()}
    if isinstance(values, list):
        return [rounded(value) for value in values]
    return float(f"{values:.6g}") if np.isfinite(values) else None
