"""Choosing prompts outside the engine: the choice of the full model, from the part of it that the choice reads."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from idp_peft.composition.base_skeleton import BaseNotFound, skeleton
from idp_peft.composition.prompt_sources import PromptSource, fill, read_prompts
from idp_peft.config import IDPConfig
from idp_peft.hosting.architectures import (
    check_selection_layer,
    embedding_width,
    find_blocks,
    find_decoder,
    has_per_layer_inputs,
)
from idp_peft.key_values import key_value_layout, layout_width
from idp_peft.layer import IDPLayer
from idp_peft.scales import factor_shapes
from idp_peft.selection import Selection, select
from idp_peft.serving.exported import ExportedModel, is_exported
from idp_peft.texts.tokens import padded_batch

_NAME = "default"


class Router:
    """Chooses a prompt for each text, as the full model would: `Router.from_pretrained("adapter").route(texts).prompt_ids`.

    Holds the embedding table and, for a choice by attention, the decoder's layers up to the selection layer (of layer 0: one
    layer); no output head.
    Safe to be used by several threads.

    Args:
        layer (`IDPLayer`): the prompts, on a decoder that reaches to the selection layer.
        tokenizer (`PreTrainedTokenizerBase`): the base's.
        holds_keys (`bool`, defaults to `False`): whether the adapter's prompts are keys and values.
        has_scales (`bool`, defaults to `False`): whether the adapter scales the base's linear layers.
    """

    def __init__(self, layer: IDPLayer, tokenizer, holds_keys: bool = False, has_scales: bool = False) -> None:
        self.layer, self.tokenizer, self.holds_keys, self.has_scales = layer, tokenizer, holds_keys, has_scales

    @classmethod
    def from_pretrained(cls, adapter: str | Path, base: str | Path | None = None, **load_model_kwargs) -> Router:
        """Load what an adapter's choice needs.

        Args:
            adapter (`str`): folder or Hub id of an IDP adapter; or a folder that `idp-peft export` wrote, which is its own
                base.
            base (`str`, *optional*, defaults to the one that the adapter's config names): anything `load_model` takes.
            load_model_kwargs: go to `load_model`. On the CPU by default, where the engine leaves room.

        Raises:
            `ValueError`: for an adapter of another method, or one that does not fit the base.
            `FileNotFoundError`: where the adapter or the base is not there.
        """
        from idp_peft.models.loading import load_tokenizer, tokenizer_beside

        if is_exported(adapter):
            base = adapter if base is None else base
            adapter = ExportedModel.from_folder(adapter).adapter
        source = read_prompts(str(adapter))
        if not isinstance(source.config, IDPConfig):
            method = getattr(source.config.peft_type, "value", source.config.peft_type)
            raise ValueError(f"`adapter` {str(adapter)!r} is a {method} adapter: only IDP chooses between prompts")
        name = source.base_or(base)
        layer = _layer(source, name, {"device_map": "cpu", **load_model_kwargs})
        tokenizer = tokenizer_beside(str(adapter), {}, None)
        tokenizer = load_tokenizer(name) if tokenizer is None else tokenizer
        return cls(layer, tokenizer, source.holds_keys, source.scales is not None)

    @property
    def config(self) -> IDPConfig:
        """The adapter's config."""
        return self.layer.active_config

    @property
    def prompts(self) -> list[torch.Tensor]:
        """The prompts in the base's type, `[k_i, d]` each."""
        bank = self.layer.active_bank
        return [part.to(self.layer.dtype) for part in bank.embeddings().detach().split(bank.lengths)]

    @torch.no_grad()
    def select(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        selection_mask: torch.Tensor | None = None,
    ) -> Selection:
        """The prompt of each row.

        Args:
            input_ids (`torch.Tensor`): int64 `[batch, n]`.
            attention_mask (`torch.Tensor`, *optional*): `[batch, n]`, padded on either side.
            selection_mask (`torch.Tensor`, *optional*): `[batch, n]`, the tokens that may steer the choice.

        Raises:
            `ValueError`: for an empty input, a row without a token to choose by, or more tokens than the base has positions.
        """
        input_ids = input_ids.to(self.layer.get_base_layer().weight.device)
        return select(self.layer, {"input_ids": input_ids}, attention_mask, selection_mask)

    def route(self, texts: Sequence[str | list[int]], batch_size: int = 8) -> Selection:
        """The prompt of each text.

        Args:
            texts (`Sequence[str | list[int]]`): texts, tokenised as the tokenizer does by default, or token ids.
            batch_size (`int`, defaults to `8`): texts at once, those of like length together.

        Returns:
            `Selection`: on the CPU, in the order of the texts.
        """
        written = [text for text in texts if isinstance(text, str)]
        read = iter(self.tokenizer(written)["input_ids"] if written else [])  # at once: on several cores
        rows = [next(read) if isinstance(text, str) else list(text) for text in texts]
        if empty := [index for index, row in enumerate(rows) if not row]:
            raise ValueError(f"text(s) {empty} have no token to choose a prompt by")
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        prompt_ids = torch.zeros(len(rows), dtype=torch.long)
        scores = None
        for start in range(0, len(order), batch_size):
            here = order[start : start + batch_size]
            part = self.select(*padded_batch([rows[index] for index in here]))
            prompt_ids[here] = part.prompt_ids.cpu()
            if part.scores is not None:
                scores = torch.zeros(len(rows), self.config.num_prompts) if scores is None else scores
                scores[here] = part.scores.cpu()
        return Selection(prompt_ids, scores, self.config.prompt_names)

    def token_ids(self, text: str | list[int]) -> list[int]:
        return self.tokenizer(text)["input_ids"] if isinstance(text, str) else list(text)


class _Headless(nn.Module):
    """A decoder in the place of the model that a layer's prompts belong to."""

    def __init__(self, decoder: nn.Module, embeddings: nn.Module) -> None:
        super().__init__()
        self.config, self.decoder = decoder.config, decoder
        self._embeddings = (embeddings,)  # not a child a second time

    def get_input_embeddings(self) -> nn.Module:
        return self._embeddings[0]


def _layer(source: PromptSource, name: str, load_model_kwargs: dict) -> IDPLayer:
    from idp_peft.models.loading import load_model

    config = copy.deepcopy(source.config)
    try:
        bones = skeleton(name)
    except BaseNotFound as error:
        reason = str(error).rpartition(": pass")[0]
        raise FileNotFoundError(f"{reason}: pass `base`, the folder or Hub id where that model is now") from error
    decoder = find_decoder(bones)
    layers = kept = _layers_needed(config, decoder)
    if has_per_layer_inputs(decoder) or getattr(decoder.config, "num_kv_shared_layers", 0):
        kept = len(
            find_blocks(decoder)[1]
        )  # one table is for all layers together, or the last ones read earlier ones' keys
    with _without_report():
        model = load_model(name, headless=True, config=_first_layers(bones.config, kept), **load_model_kwargs)
    whole, decoder, embeddings = decoder, find_decoder(model), model.get_input_embeddings()
    source, config.scales = _scales_of_first_layers(source, whole, decoder), bool(source.scales is not None and layers)
    if source.holds_keys:
        source = _keys_of_first_layers(source, config, decoder, layers, embedding_width(embeddings))
    elif source.width != embedding_width(embeddings):
        raise ValueError(
            f"the prompts of {source.label} have width {source.width}, the embeddings of the base model {name!r} "
            f"{embedding_width(embeddings)}"
        )
    config.inference_mode, config.init_weights = True, False
    config.selection_layer = layers - 1
    layer = IDPLayer(_Headless(decoder, embeddings), decoder)
    layer.add_bank(_NAME, config, None)
    layer.set_adapter(_NAME, inference_mode=True)
    fill(layer.active_bank, [source])
    layer.eval()
    return layer


def _scales_of_first_layers(source: PromptSource, whole: nn.Module, decoder: nn.Module) -> PromptSource:
    """As much of an adapter's scales as the layers that there are have."""
    if source.scales is None:
        return source
    size = source.config.scale_group_size
    parts = dict(zip(factor_shapes(whole, size), source.scales_by_layer(whole), strict=True))
    kept = [parts[name].flatten() for name in factor_shapes(decoder, size)]
    return replace(source, scales=torch.cat(kept) if kept else source.scales[:0])


def _keys_of_first_layers(source: PromptSource, config: IDPConfig, decoder, layers: int, width: int) -> PromptSource:
    """As much of key/value prompts as a choice reads: the keys and values of the layers that there are, or nothing."""
    if layers:
        kept = layout_width(key_value_layout(decoder))
        return replace(source, prompts=[prompt[:, :kept] for prompt in source.prompts])
    config.prompts = "tokens"  # whatever they are: nothing reads them
    return replace(source, prompts=[torch.zeros(len(prompt), width) for prompt in source.prompts])


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """transformers lists all weights that it did not load, which are most of them here."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # layers that there are none of
            yield
    finally:
        logging.set_verbosity(before)


def _layers_needed(config: IDPConfig, decoder: nn.Module) -> int:
    reads = config.selection == "attention" and config.num_prompts > 1
    check_selection_layer(decoder, config.selection_layer, reads)
    return config.selection_layer % len(find_blocks(decoder)[1]) + 1 if reads else 0


def _first_layers(config, layers: int):
    """The config of a model of so many layers. (What it lists per layer is read from the front.)"""
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = text.layer_types[:layers]
    text.num_hidden_layers = layers
    return config
