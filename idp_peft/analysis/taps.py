"""Recording what happens in every layer of a model: activations and attention at the input's positions.

Forward hooks of our own do it, and they are always removed again: `output_hidden_states` and `output_attentions` would leave
transformers' own hooks on the model for good. A prompt's positions stand before the input's, whether as keys and values
of a cache (IDP, prefix tuning) or as embeddings (prompt tuning), so the input's are always the last n.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn

from idp_peft.hosting.architectures import by_name, find_attention, find_blocks, forward_parameters
from idp_peft.hosting.call import is_internal_run
from idp_peft.hosting.sharding import unwrapped

HIDDEN, ATTENTION_OUTPUT, MLP_OUTPUT, ATTENTION = PARTS = ("hidden", "attention_output", "mlp_output", "attention")
ACTIVATIONS = (HIDDEN, ATTENTION_OUTPUT, MLP_OUTPUT)
_MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "fc2")  # OPT's layers hold theirs in pieces


@dataclass(frozen=True)
class ExamplePatterns:
    """One example of n tokens in a model of L layers; everything float32 on the CPU.

    Args:
        activations (`dict`): by part, L tensors `[n, hidden]`: `"hidden"` is the residual stream behind a layer (before the
            decoder's last norm), `"attention_output"` and `"mlp_output"` are what these blocks of a layer return.
        attention (`list[torch.Tensor]`, *optional*): L tensors `[heads, n, n]`, of input tokens on input tokens.
        prompt_attention (`list[torch.Tensor]`, *optional*): L tensors `[heads, n]`, of input tokens on all prompt
            positions together; with `attention` it sums to 1 (less where a model has attention sinks of its own).
    """

    activations: dict[str, list[torch.Tensor]]
    attention: list[torch.Tensor] | None = None
    prompt_attention: list[torch.Tensor] | None = None

    @property
    def tokens(self) -> int:
        """n."""
        return (next(iter(self.activations.values())) if self.activations else self.attention)[0].shape[-2]

    def only(self, parts: tuple[str, ...]) -> ExamplePatterns:
        """Some of `PARTS` alone."""
        activations = {part: layers for part, layers in self.activations.items() if part in parts}
        return replace(self, activations=activations) if ATTENTION in parts else ExamplePatterns(activations)


class Tap:
    """Collects, during one forward of a decoder, what its hooks see.

    Args:
        parts (`tuple[str]`): of `PARTS`.
        lengths (`list[int]`): real tokens of each row, which is padded on the right to the longest.
    """

    def __init__(self, parts: tuple[str, ...], lengths: list[int]) -> None:
        self.parts, self.lengths = parts, lengths
        self.seen: dict[str, list] = {part: [] for part in parts}
        self._open = False

    def open(self, *_) -> None:
        """Decoder pre-hook. IDP's own stands before it, so a choice, and the prompts that are run alone, are not seen."""
        self._open = not is_internal_run()

    def on_layer(self, module, args, output) -> None:
        if self._open:
            self._keep(HIDDEN, _first(output))

    def on_mlp(self, module, args, kwargs, output) -> None:
        if self._open:
            self._keep(MLP_OUTPUT, _without_residual(module, args, kwargs, _first(output)))

    def before_attention(self, module, args, kwargs):
        """Some return their weights only when asked to (OPT in transformers 5.0)."""
        if self._open and "output_attentions" in forward_parameters(type(module)):
            return (), by_name(module, args, kwargs) | {"output_attentions": True}
        return None

    def on_attention(self, module, args, kwargs, output) -> None:
        if not self._open:
            return
        if ATTENTION_OUTPUT in self.parts:
            self._keep(ATTENTION_OUTPUT, _without_residual(module, args, kwargs, _first(output)))
        if ATTENTION in self.parts:
            more = output[1:] if isinstance(output, tuple) else ()
            weights = next((part for part in more if getattr(part, "ndim", 0) == 4), None)
            if weights is None:
                raise ValueError(
                    f"{type(module).__name__} does not report its attention weights: leave 'attention' out of `parts`"
                )
            self._keep_attention(weights)

    def _keep(self, part: str, values: torch.Tensor) -> None:
        rows, tokens = len(self.lengths), max(self.lengths)
        values = values.reshape(rows, -1, values.shape[-1])[:, -tokens:]  # some layers flatten rows and positions
        copied = values.detach().to("cpu", torch.float32, copy=True)
        self.seen[part].append([copied[row, :length] for row, length in enumerate(self.lengths)])

    def _keep_attention(self, weights: torch.Tensor) -> None:
        tokens = max(self.lengths)
        weights = weights.detach()[:, :, -tokens:]  # [B, H, n, K+n]
        own = weights[..., -tokens:].to("cpu", torch.float32, copy=True)
        on_prompt = weights[..., :-tokens].float().sum(-1).cpu()  # [B, H, n]
        rows = enumerate(self.lengths)
        self.seen[ATTENTION].append([(own[i, :, :n, :n], on_prompt[i, :, :n]) for i, n in rows])

    def examples(self) -> Iterator[ExamplePatterns]:
        """What was seen, row by row."""
        for row in range(len(self.lengths)):
            layers = {part: [rows[row] for rows in kept] for part, kept in self.seen.items()}
            attention = layers.pop(ATTENTION, None)
            if attention is None:
                yield ExamplePatterns(layers)
            else:
                yield ExamplePatterns(layers, [own for own, _ in attention], [prompt for _, prompt in attention])


@contextmanager
def tapped(decoder: nn.Module, parts: tuple[str, ...], lengths: list[int]):
    """A [`Tap`] on a decoder; hooks and the attention implementation are as before afterwards, after errors too.

    Raises:
        `ValueError`: for `"mlp_output"` where a layer's MLP is not found.
    """
    tap, handles = Tap(parts, lengths), []
    try:
        with eager_attention(decoder) if ATTENTION in parts else nullcontext():
            handles.append(decoder.register_forward_pre_hook(tap.open))
            for block in map(unwrapped, find_blocks(decoder)[1]):
                if HIDDEN in parts:
                    handles.append(block.register_forward_hook(tap.on_layer))
                attention = getattr(block, find_attention(block))
                if ATTENTION in parts:
                    handles.append(attention.register_forward_pre_hook(tap.before_attention, with_kwargs=True))
                if ATTENTION in parts or ATTENTION_OUTPUT in parts:
                    handles.append(attention.register_forward_hook(tap.on_attention, with_kwargs=True))
                if MLP_OUTPUT in parts:
                    handles.append(find_mlp(block).register_forward_hook(tap.on_mlp, with_kwargs=True))
            yield tap
    finally:
        for handle in handles:
            handle.remove()


def find_mlp(block: nn.Module) -> nn.Module:
    """The module of a layer whose output its MLP adds to the residual stream.

    Raises:
        `ValueError`: where there is none by a known name.
    """
    for name in _MLP_NAMES:
        if isinstance(module := getattr(block, name, None), nn.Module):
            return module
    raise ValueError(f"the MLP of a {type(block).__name__} was not found: leave 'mlp_output' out of `parts`")


@contextmanager
def eager_attention(decoder: nn.Module):
    """Within it the decoder computes eager attention, the only one that reports its weights.

    The model's configs are changed meanwhile, so another thread that uses the model runs eager attention, too.
    """
    configs = {id(module.config): module.config for module in decoder.modules() if hasattr(module, "config")}
    before = [
        (config, config._attn_implementation_internal)
        for config in configs.values()
        if hasattr(config, "_attn_implementation_internal")
    ]
    try:
        for config, _ in before:
            config._attn_implementation_internal = "eager"
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation


def _first(output) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _without_residual(module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor:
    """BLOOM's and MPT's blocks are given the residual stream and return the sum."""
    residual = by_name(module, args, kwargs).get("residual")
    return output if residual is None else output - residual
