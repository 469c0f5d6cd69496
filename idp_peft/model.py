"""The tuner that PEFT creates, stores as `base_model` and calls, and its registration with PEFT."""

from __future__ import annotations

import sys
from contextlib import contextmanager

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from idp_peft.config import IDPConfig, IDPPeftType
from idp_peft.forward import generate
from idp_peft.hosting.architectures import check_selection_layer, find_decoder
from idp_peft.hosting.call import undisturbed
from idp_peft.hosting.checkpoint import (
    check_place,
    check_shapes,
    check_weights,
    remove_adapter,
    stored_tensors,
)
from idp_peft.hosting.init_text import text_token_ids
from idp_peft.hosting.introspection import adapter_that_transformers_loads, peft_model_under_construction
from idp_peft.hosting.promptable import check_promptable
from idp_peft.layer import IDPLayer, bank_sizes
from idp_peft.selection import Selection

_CHILD = "idp"


class IDPModel(BaseTuner):
    """Inference-time Dynamic Prompting on a causal language model.

    The base's module tree stays as it is; its decoder gets one child, `idp`, which owns the prompt banks, and hooks that
    put the chosen prompt in front of each input. All state lives on that child, so the same adapter works through
    `PeftModel` and through transformers' own adapter methods.

    What differs from the paper, which published no code (arXiv 2310.00867, section 3):
        1. Prompts are compared at positions right before the input, where the chosen one will stand, not one after the
           other.
        2. A prompt's attention is divided by its length (`selection_reduction="mean"`), so longer prompts have no
           advantage.
        3. The choice is made once per input and kept through generation.
        4. Prompts are trained together in one bank; the paper trains each alone.

    Args:
        model (`PreTrainedModel`): a decoder-only causal language model, compressed or not. Its weights never change.
        peft_config (`IDPConfig`): the adapter's configuration.
        adapter_name (`str`): its name.
    """

    prefix = "idp_"
    tuner_layer_cls = IDPLayer
    target_module_mapping: dict[str, list[str]] = {}
    # PEFT's own classes -> those that stand in for them where the adapter is IDP's: filled by `idp_peft/__init__.py`.
    peft_model_classes: dict[type, type] = {}

    def __init__(self, model: nn.Module, *args, **kwargs) -> None:
        super().__init__(model, *args, **kwargs)
        wrapper = peft_model_under_construction(sys._getframe(1))
        if wrapper is not None:
            wrapper.__class__ = self.peft_model_classes.get(type(wrapper), type(wrapper))

    def inject_adapter(self, model: nn.Module, adapter_name: str, **kwargs) -> None:
        check_promptable(model)  # before PEFT looks at the model, and raises for what it finds
        # PEFT reads target modules off a state dict; IDP has one.
        kwargs["state_dict"] = None
        try:
            super().inject_adapter(model, adapter_name, **kwargs)
        except Exception:
            remove_adapter(model, adapter_name)
            raise

    def _prepare_adapter_config(self, peft_config: IDPConfig, model_config: dict) -> IDPConfig:
        """Refuse what this model cannot do, before it is touched."""
        decoder = find_decoder(self.model)
        reads_attention = peft_config.chooses and peft_config.selection == "attention"
        check_selection_layer(decoder, peft_config.selection_layer, reads_attention)
        came_from = getattr(peft_config, "_came_from", None) or adapter_that_transformers_loads()
        if came_from is not None:
            sizes = bank_sizes(peft_config, decoder, self.model.get_input_embeddings())
            check_weights(*came_from, peft_config, sizes, self.model)
        return peft_config

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            self.layer.cast_bank(adapter_name)

    def _check_target_module_exists(self, peft_config: IDPConfig, key: str) -> bool:
        return self.model.get_submodule(key) is find_decoder(self.model)

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ) -> None:
        texts = None
        if peft_config.tokenizer_name_or_path is not None:  # a config that was read from a file has none
            texts = text_token_ids(peft_config)
            if peft_config.num_virtual_tokens is None:
                peft_config.num_virtual_tokens = [len(ids) for ids in texts]
        layer = getattr(target, _CHILD, None)
        if layer is None:
            layer = IDPLayer(self.model, target)
            layer.train(target.training)
            target.add_module(_CHILD, layer)
        elif not isinstance(layer, IDPLayer):
            raise ValueError(f"the decoder already has a module named {_CHILD!r} ({type(layer).__name__})")
        layer.add_bank(adapter_name, peft_config, texts)
        loaded = adapter_that_transformers_loads()
        if loaded is not None:
            layer.idp_prompts[adapter_name].load(stored_tensors(*loaded))

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        try:
            shapes = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}
            source = f"the file of adapter {adapter_name!r}"
            sizes = bank_sizes(config, find_decoder(model), model.get_input_embeddings())
            check_shapes(shapes, config, sizes, source, model)
            check_place(shapes, model, source)
        except ValueError:
            remove_adapter(model, adapter_name, only_new=True)
            raise
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            "an IDP adapter cannot be merged: a prompt is extra context in front of the input, not a change of any weight. "
            "Use `unload()` to get the base model back, or keep the adapter: it costs no matrix product per token"
        )

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs) -> nn.Module:
        if merge:
            self._check_merge_allowed()
        self.layer.detach()
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model

    @property
    def layer(self) -> IDPLayer:
        """The child module that owns the banks."""
        return getattr(find_decoder(self.model), _CHILD)

    @property
    def last_selection(self) -> Selection | None:
        """The latest [`Selection`] (of the calling thread, where it made one): `prompt_ids` int64 `[batch]`, and
        `scores` float32 `[batch, M]` or `None`."""
        return self.layer.last_selection

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "IDP cannot mix adapters in one batch (`adapter_names`): put the prompts into one bank and pass `prompt_ids`"
            )
        with undisturbed():
            yield

    def add_weighted_adapter(self, *args, **kwargs) -> None:
        raise ValueError("IDP adapters cannot be averaged: each prompt is chosen whole; train one bank instead")

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *args,
        prompt_ids=None,
        selection_mask: torch.Tensor | None = None,
        **kwargs,
    ):
        """The base model's `generate`, with one prompt per row chosen at prefill and kept to the end.

        Args:
            inputs (`torch.Tensor`, *optional*): int64 `[batch, n]`, as in transformers; also as `input_ids` or
                `inputs_embeds`.
            prompt_ids (*optional*): forced prompts, in any form that [`check_prompt_ids`] takes: int64 `[batch]`, names, ...
            selection_mask (`torch.Tensor`, *optional*): bool `[batch, n]`, the tokens that may steer the choice.
            kwargs: everything transformers' `generate` takes.

        Returns:
            What the base model's `generate` returns: sequences of the caller's tokens and the new ones, no prompt.

        Raises:
            `ValueError`: for prompts out of range, a cache that is too small, or packed inputs.
        """
        return generate(self.layer, (inputs, *args), kwargs, prompt_ids, selection_mask)


def register() -> None:
    """Make PEFT's auto classes find IDP. Calling it again changes nothing.

    PEFT's own `register_peft_method` refuses names outside its `PeftType` enum and otherwise fills these three
    dictionaries; the checks it makes are made here.

    Raises:
        `RuntimeError`: where another method already holds the name or the prefix.
    """
    key = IDPPeftType.IDP
    holder = PEFT_TYPE_TO_CONFIG_MAPPING.get(key, IDPConfig)
    if holder is not IDPConfig:
        raise RuntimeError(f"PEFT already has a method named {key.value!r} ({holder.__module__}.{holder.__name__})")
    for other, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items():
        if prefix == IDPModel.prefix and other != key:
            raise RuntimeError(f"PEFT's method {other!r} already uses the parameter prefix {prefix!r}")
    PEFT_TYPE_TO_CONFIG_MAPPING[key] = IDPConfig
    PEFT_TYPE_TO_TUNER_MAPPING[key] = IDPModel
    PEFT_TYPE_TO_PREFIX_MAPPING[key] = IDPModel.prefix
