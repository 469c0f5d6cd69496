"""The child module that IDP adds to a decoder: it owns the prompt banks and installs the hooks that apply them."""

from __future__ import annotations

import threading
import uuid
from weakref import WeakKeyDictionary

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from idp_peft.config import IDPConfig
from idp_peft.forward import Forward
from idp_peft.hosting.architectures import embedding_dtype, embedding_width, find_blocks, keeps_rotary
from idp_peft.hosting.call import current_call, internal_run
from idp_peft.hosting.checkpoint import BankSizes
from idp_peft.hosting.checks import refuse_continuous_batching
from idp_peft.hosting.decoder_copy import evaluating, first_layers
from idp_peft.key_values import key_value_layout, keys_and_values, layout_width
from idp_peft.prompt_bank import PromptBank, initial_tokens, same_length
from idp_peft.prompt_cache import PromptCache, RememberedCache, compute_prompt_cache
from idp_peft.scales import LinearScaling, factor_shapes
from idp_peft.selection import Selection

_of_this_thread = threading.local()


class IDPLayer(nn.Module, BaseTunerLayer):
    """Owns the prompt banks of a model and applies the active one.

    Args:
        model (`PreTrainedModel`): the causal language model.
        decoder (`nn.Module`): its decoder, of which this becomes the child `idp`.
    """

    adapter_layer_names = ("idp_prompts",)
    other_param_names = ("idp_remembered", "idp_config")

    def __init__(self, model: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.idp_prompts = nn.ModuleDict({})
        self.idp_remembered: dict[str, RememberedCache] = {}
        self.idp_config: dict[str, IDPConfig] = {}
        self._base = (model, decoder)  # in a tuple: as attributes they would become children of their own child
        # Names: references would keep a model in memory that was sharded since.
        self._trainable_before = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._last_selection: Selection | None = None
        self.warned_of_targets = False
        self._identity = uuid.uuid4().hex
        self._handles = Forward(self).hook(model, decoder)
        self.scaling = LinearScaling(self)

    @property
    def model(self) -> nn.Module:
        return self._base[0]

    @property
    def decoder(self) -> nn.Module:
        return self._base[1]

    def get_base_layer(self) -> nn.Module:
        """The decoder's input embedding: what PEFT asks for device, dtype and `weight`."""
        return self.model.get_input_embeddings()

    def add_bank(self, name: str, config: IDPConfig, texts: list[list[int]] | None) -> None:
        """Add a prompt bank, started by `config.init` (on the meta device: left empty, for weights that follow).

        Raises:
            `ValueError`: for a name that torch cannot give to a module.
        """
        if not name or "." in name or (name not in self.idp_prompts and hasattr(self.idp_prompts, name)):
            raise ValueError(
                f"an adapter's name must not be empty, have a dot in it, or be an attribute of a torch module, got {name!r}"
            )
        embeddings = self.get_base_layer()
        holds_keys, sizes = config.prompts == "key_values", bank_sizes(config, self.decoder, embeddings)
        bank = PromptBank(
            config.prompt_lengths,
            sizes.prompt_width,
            context_width=sizes.width if config.keeps_centroids else None,
            frozen_tokens=config.frozen_tokens,
            holds_keys=holds_keys,
            factor_shapes=self.scaling.hook(config.scale_group_size) if config.scales else None,
        )
        if not bank.weight.is_meta:
            if config.init_weights and not embeddings.weight.is_meta and (texts is not None or not holds_keys):
                start = keys_and_values(self.model, same_length(texts, config)) if holds_keys else None
                bank.start(initial_tokens(config, embeddings, texts) if start is None else start.to(bank.weight.device))
            bank.to(embeddings.weight.device if not embeddings.weight.is_meta else "cpu")
        self.idp_prompts[name] = bank
        self.idp_remembered[name] = RememberedCache()
        self.idp_config[name] = config

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's version also casts to the base's dtype; that is `cast_bank`'s.
        bank = self.idp_prompts[adapter_name]
        if not bank.weight.is_meta:
            bank.to(device or self.get_base_layer().weight.device)

    def cast_bank(self, name: str) -> None:
        """Give a bank the base's dtype: that of its input embeddings. Prompts are float32 otherwise."""
        self.idp_prompts[name].to(self.dtype)

    def drop_scales(self, name: str) -> None:
        """Take the scales off a bank, once they are in the weights (`models/folding.py`)."""
        bank = self.idp_prompts[name]
        bank.scales = bank.factor_shapes = None
        self.idp_config[name].scales, self.idp_config[name].scale_group_size = False, None
        self.idp_remembered[name].forget()
        self.scaling.unhook_where_unused()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1 and len(set(names) & set(self.idp_prompts)) > 1:
            raise ValueError(
                f"one IDP adapter can be active at a time, got {names}: merge their banks into one instead"
            )
        super().set_adapter(names, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.scaling.unhook_where_unused()

    def train(self, mode: bool = True) -> IDPLayer:
        # `model.eval()` is the one step of continuous batching that reaches this module before its threads start.
        if self.active_name is not None:
            refuse_continuous_batching(self.model)
        return super().train(mode)

    def merge(self, *args, **kwargs) -> None:
        raise ValueError("an IDP adapter cannot be merged: a prompt is no change of any weight")

    def unmerge(self) -> None:
        raise ValueError("there is nothing to unmerge: an IDP adapter cannot be merged, so it never was")

    @property
    def active_name(self) -> str | None:
        """Name of the adapter in force: the one that the running call began with, else the one that is set; `None` while
        adapters are disabled or there is none."""
        if self.disable_adapters:
            return None
        call = current_call(self)
        if call is not None and call.adapter in self.idp_prompts:
            return call.adapter
        return next((name for name in self.active_adapters if name in self.idp_prompts), None)

    def detach(self) -> None:
        """Take the hooks and this module off the model, and give parameters back the `requires_grad` they came with."""
        for handle in self._handles:
            handle.remove()
        self.scaling.unhook()
        del self.decoder._modules["idp"]
        parameters = dict(self.model.named_parameters())
        for name in self._trainable_before:
            if name in parameters:
                parameters[name].requires_grad_(True)

    @property
    def active_bank(self) -> PromptBank:
        return self.idp_prompts[self.active_name]

    @property
    def active_config(self) -> IDPConfig:
        return self.idp_config[self.active_name]

    @property
    def selection_layer(self) -> int:
        """The active adapter's selection layer, counted from the front."""
        return self.active_config.selection_layer % len(find_blocks(self.decoder)[1])

    @property
    def signature(self) -> tuple[str, str]:
        """Which model and adapter a cache is started by."""
        return self._identity, self.active_name

    @property
    def dtype(self) -> torch.dtype:
        """What prompts are cast to on use: the dtype of the base's input embeddings."""
        return embedding_dtype(self.get_base_layer(), self.decoder)

    def prompt_cache(self, rotary_length: int | None = None) -> PromptCache:
        """The active adapter's prompt cache, computed where it is missing or stale."""
        remembered = RememberedCache() if keeps_rotary(self.decoder) else self.idp_remembered[self.active_name]
        bank = self.active_bank
        with internal_run(self.scaling.of_all()), evaluating(self.decoder):
            return remembered.get(self.decoder, bank, self.dtype, rotary_length)

    @property
    def trains(self) -> bool:
        """Whether a forward of the calling thread builds a graph: prompts then change from step to step."""
        return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.decoder.parameters())

    @property
    def learns_centroids(self) -> bool:
        """Whether a training forward of the calling thread teaches the active bank what inputs its prompts are for."""
        bank, learns = self.active_bank, self.active_config.learn_centroids
        return bank.clusters is not None and learns and torch.is_grad_enabled() and bank.weight.requires_grad

    def prompt_cache_with_graph(self, prompts: torch.Tensor, rotary_length: int | None = None) -> PromptCache:
        """The keys and values of some prompts for one training step: gradients flow through them.

        Args:
            prompts (`torch.Tensor`): int64 `[m]`, the prompts that the batch uses. The others get a gradient of zero.
        """
        bank = self.active_bank
        with internal_run(self.scaling.of_all()):
            return compute_prompt_cache(self.decoder, bank, self.dtype, rotary_length, prompts)

    def prompt_cache_for_choice(self, number: int, rotary_length: int | None = None) -> PromptCache:
        """What the choice reads at the decoder's layer `number`: the prompt cache, or one that ends there.

        In training the cache ends at that layer: the chosen prompts run again, with a graph. A copied decoder carries no rotary
        frequencies over from another input.
        """
        if self.active_bank.holds_keys or (not self.trains and not keeps_rotary(self.decoder)):
            return self.prompt_cache(rotary_length)
        with torch.no_grad(), evaluating(self.decoder):
            part = first_layers(self.decoder, number)
            return compute_prompt_cache(part, self.active_bank, self.dtype, rotary_length)

    @property
    def last_selection(self) -> Selection | None:
        """The latest choice made by the calling thread, or by any thread where that one made none."""
        return _selections().get(self, self._last_selection)

    def remember(self, selection: Selection) -> None:
        self._last_selection = selection
        _selections()[self] = selection


def bank_sizes(config: IDPConfig, decoder: nn.Module, embeddings: nn.Module) -> BankSizes:
    """What shapes a bank of this config has on a base: d, P for key/value prompts, and the number of its factors."""
    width = embedding_width(embeddings)
    prompt_width = width if config.prompts == "tokens" else layout_width(key_value_layout(decoder))
    shapes = factor_shapes(decoder, config.scale_group_size) if config.scales else {}
    return BankSizes(width, prompt_width, sum(shape.numel() for shape in shapes.values()))


def active_layer(model) -> IDPLayer:
    """The module that owns a model's prompts.

    Raises:
        `ValueError`: where the model has none, or its adapter is disabled.
    """
    layer = next((module for module in model.modules() if isinstance(module, IDPLayer)), None)
    if layer is None:
        raise ValueError(f"this needs a model with an IDP adapter, got {type(model).__name__} without one")
    if layer.active_name is None:
        raise ValueError("this needs an active IDP adapter, but adapters are disabled: enable them, or set one")
    return layer


def _selections() -> WeakKeyDictionary:
    return vars(_of_this_thread).setdefault("selections", WeakKeyDictionary())
