"""Reading one layer's attention on all prompts, without running the layers above it and without touching the model.

The decoder is copied *shallowly*: the copy shares every weight, has its first layers only, and its attention modules
see a config whose attention implementation is our function. transformers' `AttentionInterface` hands that function the
layer's finished queries and keys (rotated, normalised, scaled); at the selection layer it leaves with them. Nothing is
registered on the model, and other threads run it undisturbed.

Architectures that do not use the interface (BLOOM, Falcon, MPT, GPT-J) return eager attention weights instead.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AttentionInterface, DynamicCache

from idp_peft.hosting.architectures import (
    cache_name,
    check_selection_layer,
    find_attention,
    find_blocks,
    forward_parameters,
    keeps_rotary,
    uses_interface,
)
from idp_peft.hosting.reach import EVERYTHING, Reach, masks_by_reach, reaches
from idp_peft.hosting.ready_masks import masks_for_decoder
from idp_peft.hosting.sharding import gather_around, plain_class, unwrapped
from idp_peft.prompt_cache import PromptCache
from idp_peft.selection import AttentionLayer, BlockMask, attention_on_prompts, sum_by_prompt

_IMPLEMENTATION = "idp_probe"
_HOOK_TABLES = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


@dataclass(frozen=True)
class _Probe:
    layer: int
    mask: BlockMask
    reaches: list[Reach]


class _Reached(Exception):
    """Raised at the selection layer: carries the result out of the model's forward."""

    def __init__(self, result: torch.Tensor) -> None:
        self.result = result


_current: ContextVar[_Probe | None] = ContextVar("idp_probe", default=None)


@torch.no_grad()
def attention_at_layer(
    decoder: nn.Module, layer: int, prompt_cache: PromptCache, inputs: dict, attention_mask: torch.Tensor
) -> torch.Tensor:
    """Attention of the input's tokens on each prompt at one layer, all prompts standing in front of the input at once.

    Args:
        decoder (`nn.Module`): the base model's decoder.
        layer (`int`): from 0 to L-1.
        prompt_cache (`PromptCache`): keys and values of the bank.
        inputs (`dict`): `input_ids` `[batch, n]` or `inputs_embeds` `[batch, n, d]`, and what else [`read_by_choice`]
            finds.
        attention_mask (`torch.Tensor`): bool `[batch, n]`.

    Returns:
        `torch.Tensor`: float32 `[batch, n, M]`, summed over a prompt's tokens, averaged over heads.

    Raises:
        `ValueError`: for a layer above the first on a model with ALiBi, whose layers cannot be shown all prompts at
            their own distances.
    """
    block = find_blocks(decoder)[1][layer]
    mask = BlockMask(prompt_cache.lengths, attention_mask)
    if uses_interface(type(getattr(block, find_attention(block)))):
        AttentionInterface.register(_IMPLEMENTATION, _probe_attention)
        cache = prompt_cache.side_by_side(len(attention_mask), layer + 1)
        return _run(decoder, layer, mask, inputs, cache, mask.input_positions(), _IMPLEMENTATION)
    if layer == 0:
        # These decoders may measure distance in slots, so padding must not stand between prompt and input.
        order = (~attention_mask).long().argsort(dim=1, stable=True)  # [B, n], real tokens first
        inputs = {name: _gather(value, order) for name, value in inputs.items()}
        mask = BlockMask(prompt_cache.lengths, attention_mask.gather(1, order))
        return _gather(_combine_separate_runs(decoder, mask, prompt_cache, inputs), order.argsort(dim=1))
    check_selection_layer(decoder, layer)
    cache = prompt_cache.side_by_side(len(attention_mask), layer + 1)
    weights = _run(decoder, layer, mask, inputs, cache, mask.input_positions(), "eager")  # [B, H, n, S+n]
    return sum_by_prompt(weights.mean(1), mask)


def _gather(values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Reorder the tokens of each row: `values` `[batch, n, ...]`, `order` `[batch, n]`."""
    return values.gather(1, order.view(*order.shape, *[1] * (values.ndim - 2)).expand_as(values))


def _combine_separate_runs(
    decoder: nn.Module, mask: BlockMask, prompt_cache: PromptCache, inputs: dict
) -> torch.Tensor:
    """Layer 0 from one eager run per prompt: the joint softmax follows exactly from each prompt's odds against the
    input's own keys, because those keys and the queries are the same in every run."""
    batch = len(mask.attention_mask)
    odds = []
    for prompt, length in enumerate(mask.lengths):
        cache = prompt_cache.alone(prompt, batch, num_layers=1)
        weights = _run(decoder, 0, mask, inputs, cache, mask.input_positions(), "eager").float()  # [B, H, n, k+n]
        own = weights[..., length:].sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        odds.append(weights[..., :length].sum(-1) / own)
    odds = torch.stack(odds, dim=-1)  # [B, H, n, M]
    return (odds / (1 + odds.sum(-1, keepdim=True))).mean(1)


def _run(decoder, layer, mask, inputs, cache: DynamicCache, position_ids, implementation: str) -> torch.Tensor:
    """Run the copied decoder up to the attention of `layer` and return what that attention reports."""
    probe = _copy_decoder(decoder, layer, implementation)
    front = mask.attention_mask.new_ones(len(mask.attention_mask), cache.get_seq_length())
    visible = torch.cat([front, mask.attention_mask], dim=1).long()
    if "masks" in inputs:
        visible = masks_for_decoder(inputs["masks"], decoder)
    if "axes" in inputs:
        position_ids = inputs["axes"].movedim(-1, 0) + max(mask.lengths)
    call = dict(
        {name: value for name, value in inputs.items() if name not in ("masks", "axes", "token_ids")},
        attention_mask=visible,
        position_ids=position_ids,
        use_cache=True,
        **{cache_name(type(decoder)): cache},
    )
    if "position_ids" not in forward_parameters(type(decoder)):
        del call["position_ids"]
    seen = reaches(decoder) if masks_by_reach(decoder) else [EVERYTHING] * (layer + 1)
    token = _current.set(_Probe(layer, mask, seen))
    try:
        type(decoder).forward(probe, **call)
    except _Reached as reached:
        return reached.result
    finally:
        _current.reset(token)
    raise RuntimeError(f"the attention of layer {layer} of {type(decoder).__name__} was not reached")


def first_layers(decoder: nn.Module, layer: int) -> nn.Module:
    """A shallow copy of a decoder that ends behind `layer` and has no hooks of its own; its layers are the decoder's."""
    name, blocks = find_blocks(decoder)
    part = _copy_around_layers(decoder)
    part._modules[name] = nn.ModuleList(blocks[: layer + 1])
    return part


def _copy_decoder(decoder: nn.Module, layer: int, implementation: str) -> nn.Module:
    config = copy.copy(decoder.config)
    config._attn_implementation_internal = implementation
    config.output_hidden_states = False
    config._output_attentions = False
    name, blocks = find_blocks(decoder)
    probe = _copy_around_layers(decoder)
    probe.config = config
    for key, child in probe._modules.items():
        if isinstance(child, nn.Embedding):  # its hooks stay: they may fetch its weights; noise is for training
            probe._modules[key] = _shallow_copy(child)
            probe._modules[key].training = False
    probe._modules[name] = nn.ModuleList(
        _copy_block(block, config, number) for number, block in enumerate(blocks[: layer + 1])
    )
    return probe


def _copy_around_layers(decoder: nn.Module) -> nn.Module:
    copied = _bare_copy(decoder)
    if keeps_rotary(decoder):
        for name, child in copied._modules.items():
            if hasattr(child, "max_seq_len_cached"):
                copied._modules[name] = _at_original_frequencies(child)
    return copied


def _at_original_frequencies(rotary: nn.Module) -> nn.Module:
    """A copy of a rotary embedding that has run no input yet."""
    copied = _shallow_copy(rotary)
    copied._buffers = dict(rotary._buffers)
    for name in rotary._buffers:
        original = getattr(rotary, f"{name.removesuffix('inv_freq')}original_inv_freq", None)
        if original is not None:
            copied._buffers[name] = original.to(rotary._buffers[name].device)
    for name in list(vars(rotary)):
        if name.endswith("max_seq_len_cached"):
            setattr(copied, name, rotary.original_max_seq_len)
    return copied


def _copy_block(owner: nn.Module, config, layer: int) -> nn.Module:
    block = unwrapped(owner)
    name = find_attention(block)
    attention = _bare_copy(getattr(block, name))
    gather_around(attention, getattr(block, name))
    attention.config = config
    if not uses_interface(type(attention)):
        attention.forward = _EagerProbe(attention, layer)
    copied = _bare_copy(block)
    copied._modules[name] = attention
    gather_around(copied, owner)
    return copied


class _EagerProbe:
    """Calls an attention module that does not use the interface, and leaves with its weights at the selection layer."""

    def __init__(self, attention: nn.Module, layer: int) -> None:
        self.attention, self.layer = attention, layer
        # Classes for other implementations (`NemotronSdpaAttention`) are made of the eager one, which reports its weights.
        made_of = [kind for kind in type(attention).__mro__ if issubclass(kind, nn.Module) and "forward" in vars(kind)]
        self.eager = made_of[made_of.index(nn.Module) - 1]

    def __call__(self, *args, **kwargs):
        if "output_attentions" in forward_parameters(self.eager):
            kwargs["output_attentions"] = True
        outputs = self.eager.forward(self.attention, *args, **kwargs)
        if self.layer == _current.get().layer:
            weights = next((output for output in outputs[1:] if getattr(output, "ndim", 0) == 4), None)
            if weights is None:
                raise ValueError(
                    f"{type(self.attention).__name__} does not report its attention weights: load the base model with "
                    "attn_implementation='eager'"
                )
            raise _Reached(weights)
        return outputs


def _bare_copy(module: nn.Module) -> nn.Module:
    """A shallow copy in evaluation mode that shares weights and children, without hooks or dropout of its own."""
    copied = _shallow_copy(module)
    copied._modules = {k: nn.Identity() if isinstance(v, nn.Dropout) else v for k, v in module._modules.items()}
    for table in _HOOK_TABLES:
        setattr(copied, table, OrderedDict())
    copied.__dict__.pop("forward", None)  # accelerate binds a device-moving forward to the original
    copied.training = False
    return copied


def _shallow_copy(module: nn.Module) -> nn.Module:
    """`copy.copy`, also of a module that FSDP2 shards, without the class it is given there, which answers for gathering.
    Weights that are gathered later show in the copy as well: both hold the same dict of them."""
    copied = object.__new__(plain_class(module))
    copied.__dict__.update(module.__dict__)
    return copied


def _probe_attention(
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
    **_,
):
    """The attention function of copied decoders: exact attention under the block mask; leaves at the selection layer.

    Shapes as transformers passes them: `query` `[batch, heads, n, head_dim]`, `key` and `value`
    `[batch, kv_heads, S+n, head_dim]`; returns `[batch, n, heads, head_dim]`.
    """
    probe = _current.get()
    biased = isinstance(attention_mask, torch.Tensor) and attention_mask.is_floating_point()  # made by the layer itself
    layer = AttentionLayer(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        reach=probe.reaches[module.layer_idx] if sliding_window is None else Reach(window=sliding_window),
        sinks=s_aux,
        bias=attention_mask if biased else None,
    )
    given = attention_mask if not biased and attention_mask is not None and attention_mask.ndim == 4 else None
    if module.layer_idx == probe.layer:
        raise _Reached(attention_on_prompts(query, key, layer, probe.mask, given))
    weights = layer.probabilities(query, key, 0, probe.mask, given).to(value.dtype)
    groups = query.shape[1] // value.shape[1]
    output = weights @ value.repeat_interleave(groups, dim=1)
    return output.transpose(1, 2).contiguous(), None
