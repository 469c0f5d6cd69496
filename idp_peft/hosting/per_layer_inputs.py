"""Embeddings per layer: what Gemma 3n and Gemma 4 look up for a token in every layer, beside its input embedding.

A prompt token has no id to look up. It gets what the base makes of embeddings without ids: Gemma 3n leaves the looked-up part
out, Gemma 4 gives soft tokens (those of pictures and sounds) the part of its padding token.
"""

from __future__ import annotations

import inspect

import torch
from torch import nn

from idp_peft.hosting.architectures import forward_parameters

NAME = "per_layer_inputs"


def has_per_layer_inputs(decoder: nn.Module) -> bool:
    """Whether the decoder looks up embeddings per layer."""
    return NAME in forward_parameters(type(decoder)) and bool(decoder.config.hidden_size_per_layer_input)


def of_prompts_alone(decoder: nn.Module, prompts: torch.Tensor) -> dict[str, torch.Tensor]:
    """What to call a decoder with, beside the embeddings of prompts `[m, K, d]` and nothing else."""
    needed = has_per_layer_inputs(decoder) and not _can_go_without(decoder)
    return {NAME: _of_padding(decoder, prompts)} if needed else {}


def of_input(decoder: nn.Module, ids: torch.Tensor | None, embeds: torch.Tensor) -> torch.Tensor | None:
    """The looked-up part of an input, `[batch, n, layers, width]`; `None` where the decoder goes without.

    Args:
        ids (`torch.Tensor`, *optional*): `[batch, n]`. Without them Gemma 4 finds them by the embeddings.
        embeds (`torch.Tensor`): `[batch, n, d]`.
    """
    if ids is not None:
        return decoder.get_per_layer_inputs(ids)
    return None if _can_go_without(decoder) else decoder.get_per_layer_inputs(None, embeds)


def of_prompts_beside_input(decoder: nn.Module, prompts: torch.Tensor) -> torch.Tensor:
    """The part of prompts `[batch, K, d]` where the tokens beside them have one: `[batch, K, layers, width]`.

    Gemma 3n computes `(projected + looked_up) * scale` for a token with an id, and `projected` for one without: so its
    prompts are given what comes to the same.
    """
    if not _can_go_without(decoder):
        return _of_padding(decoder, prompts)
    projected = decoder.project_per_layer_inputs(prompts)
    return projected / decoder.per_layer_input_scale.to(projected) - projected


def _can_go_without(decoder: nn.Module) -> bool:
    return "inputs_embeds" not in inspect.signature(decoder.get_per_layer_inputs).parameters


def _of_padding(decoder: nn.Module, embeds: torch.Tensor) -> torch.Tensor:
    padding = torch.full(embeds.shape[:2], decoder.config.pad_token_id or 0, device=embeds.device)
    return decoder.get_per_layer_inputs(padding)
