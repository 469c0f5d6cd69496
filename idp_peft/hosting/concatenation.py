"""Prompts in front of the input embeddings: the definition itself, f([P ; E(x)]), where no prompt cache can stand in.

Used under gradient checkpointing, which recomputes layers and cannot keep a cache, and where a decoder measures
distance in slots (a sliding window that fills up, MPT), so that padding must stand before the prompt instead of behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from idp_peft.hosting.architectures import (
    PER_LAYER_INPUTS,
    forward_parameters,
    has_per_layer_inputs,
    of_input,
    of_prompts_beside_input,
)


@dataclass(frozen=True)
class Concatenation:
    """One batch with its prompts: rows are `[prompt ; padding ; tokens]` or `[padding ; prompt ; tokens]`.

    Args:
        inputs_embeds (`torch.Tensor`): `[batch, K+n, d]`.
        attention_mask (`torch.Tensor`): int64 `[batch, K+n]`.
        position_ids (`torch.Tensor`): int64 `[batch, K+n]`, or `[axes, batch, K+n]` where positions have several axes.
        order (`torch.Tensor`): int64 `[batch, K+n]`, what stands in each slot, counted in `[prompt ; padding ; tokens]`.
        front (`int`): K, the slots in front of the caller's n.
    """

    inputs_embeds: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    order: torch.Tensor
    front: int

    @classmethod
    def build(cls, prompts, prompt_mask, embeds, real, position_ids, padding_first: bool) -> Concatenation:
        """Put each row's prompt in front of its input.

        Args:
            prompts (`torch.Tensor`): `[batch, K, d]`, right-aligned.
            prompt_mask (`torch.Tensor`): bool `[batch, K]`.
            embeds (`torch.Tensor`): `[batch, n, d]`.
            real (`torch.Tensor`): bool `[batch, n]`, the attention mask.
            position_ids (`torch.Tensor`): int64 `[batch, n]` or `[axes, batch, n]`, prompts counted in.
            padding_first (`bool`): whether left padding goes before the prompt, so that no slot stands between the
                prompt and the first token. Otherwise the layout is the prompt cache's.
        """
        front = prompts.shape[1]
        slots = torch.arange(front + embeds.shape[1], device=embeds.device)  # [K+n]
        padding = (real.long().cumsum(1) == 0).sum(1, keepdim=True) * padding_first  # [B, 1]
        # Where each slot's content comes from in [prompt ; padding ; tokens]: padding moves forward by K.
        order = torch.where(
            slots < padding, slots + front, torch.where(slots < padding + front, slots - padding, slots)
        )
        prompt_positions = torch.arange(front, device=embeds.device).expand(*position_ids.shape[:-1], -1)
        both = torch.cat([prompt_positions, position_ids], dim=-1)  # [(axes,) B, K+n]
        return cls(
            inputs_embeds=arrange(order, prompts, embeds),
            attention_mask=arrange(order, prompt_mask.long(), real.long()),
            position_ids=both.gather(-1, order.expand_as(both)),
            order=order,
            front=front,
        )

    def arrange(self, prompt_part: torch.Tensor, input_part: torch.Tensor) -> torch.Tensor:
        """Something else that stands beside each token: `[batch, K, ...]` and `[batch, n, ...]` become `[batch, K+n, ...]`."""
        return arrange(self.order, prompt_part, input_part)

    def arrange_others(self, decoder: nn.Module, kwargs: dict, prompts, ids, embeds) -> None:
        """Put, in place, what else a decoder takes for each token into a call's arguments.

        Args:
            decoder (`nn.Module`): the decoder.
            kwargs (`dict`): its arguments.
            prompts (`torch.Tensor`): `[batch, K, d]`.
            ids (`torch.Tensor`, *optional*): int64 `[batch, n]`, the input's.
            embeds (`torch.Tensor`): `[batch, n, d]`, the input's.
        """
        if has_per_layer_inputs(decoder):
            given = kwargs.pop(PER_LAYER_INPUTS, None)
            given = of_input(decoder, ids, embeds) if given is None else given  # [B, n, layers, width]
            if given is not None:
                of_prompts = of_prompts_beside_input(decoder, prompts).to(given)
                kwargs[PER_LAYER_INPUTS] = self.arrange(of_prompts, given)
        others = set(forward_parameters(type(decoder))) - {PER_LAYER_INPUTS, "attention_mask", "position_ids"}
        for name in others & set(kwargs):
            value = kwargs[name]
            if not isinstance(value, torch.Tensor) or value.shape[:2] != embeds.shape[:2]:
                continue
            if value.dtype != torch.bool:
                raise ValueError(
                    f"IDP cannot put a prompt in front of `{name}` {list(value.shape)} of {type(decoder).__name__}: turn "
                    "off gradient checkpointing, and pad on the right or not at all"
                )
            kwargs[name] = self.arrange(value.new_zeros(prompts.shape[:2]), value)


def arrange(order: torch.Tensor, prompt_part: torch.Tensor, input_part: torch.Tensor) -> torch.Tensor:
    """`[batch, K, ...]` and `[batch, n, ...]`, slot by slot: `[batch, K+n, ...]`."""
    both = torch.cat([prompt_part, input_part], dim=1)
    return both.gather(1, order.view(*order.shape, *[1] * (both.ndim - 2)).expand_as(both))


def keep_last(outputs, tokens: int) -> None:
    """Cut a decoder's outputs, in place, to their last `tokens` positions; where there are fewer (Gemma 4 cuts to
    `logits_to_keep` itself), nothing is cut.

    Attention maps keep all columns, as they do when the prompt comes from the cache.
    """
    rows = len(outputs.last_hidden_state)
    outputs["last_hidden_state"] = outputs.last_hidden_state[:, -tokens:]
    if getattr(outputs, "hidden_states", None) is not None:
        outputs["hidden_states"] = tuple(states[:, -tokens:] for states in outputs.hidden_states)
    if getattr(outputs, "attentions", None) is not None:
        outputs["attentions"] = tuple(
            None if weights is None else weights[:, :, -tokens:] for weights in outputs.attentions
        )
    if getattr(outputs, "router_logits", None) is not None:  # per layer [batch * slots, experts]
        outputs["router_logits"] = tuple(
            logits.view(rows, -1, logits.shape[-1])[:, -tokens:].flatten(0, 1) for logits in outputs.router_logits
        )
