"""The prompts that an adapter holds, as embeddings, whichever of PEFT's prompt methods it is."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from peft import PeftConfig, PeftModel, TaskType, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from idp_peft.config import IDPConfig
from idp_peft.files.error_reason import reason
from idp_peft.hosting.checkpoint import BankSizes, bank_tensors, check_shapes, find_file
from idp_peft.hosting.prompt_ids import AUTO
from idp_peft.prompt_bank import PromptBank
from idp_peft.scales import by_layer, factor_shapes

# What puts embeddings, or keys and values, and nothing else, in front of the input.
_TOKENS = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING")
_KEYS = ("PREFIX_TUNING", "CARTRIDGE")
_METHODS = ("IDP", *_TOKENS, *_KEYS)


@dataclass(frozen=True)
class PromptSource:
    """What one adapter contributes.

    Args:
        label (`str`): what errors call the adapter.
        config (`PeftConfig`): its configuration.
        prompts (`list[torch.Tensor]`): float32 `[k_i, d]` each, on the CPU, as they stand beside token embeddings.
        names (`list[str]`): what to call them.
        longest (`int`): K of the adapter they are from: an input behind any of its prompts started at position K.
        model (`nn.Module`, *optional*): the base that the adapter is loaded on.
        centroids (`torch.Tensor`, *optional*): float32 `[prompts, d]`, what inputs each prompt is for, where the adapter
            says so; and contexts (`torch.Tensor`, *optional*): int64 `[prompts]`, by how many it was learned.
        scales (`torch.Tensor`, *optional*): float32 `[C]`, what the factors of the linear layers differ from 1
            by, where it has such.
    """

    label: str
    config: PeftConfig
    prompts: list[torch.Tensor]
    names: list[str]
    longest: int
    model: nn.Module | None = None
    centroids: torch.Tensor | None = None
    contexts: torch.Tensor | None = None
    scales: torch.Tensor | None = None

    @property
    def width(self) -> int:
        """How many numbers a token of its prompts is."""
        return self.prompts[0].shape[1]

    @property
    def holds_keys(self) -> bool:
        """Whether these are key/value prompts."""
        method = getattr(self.config.peft_type, "value", self.config.peft_type)
        return method in _KEYS or getattr(self.config, "prompts", "tokens") == "key_values"

    @property
    def says_what_for(self) -> bool:
        """Whether the adapter says what inputs each of these prompts is for."""
        return self.centroids is not None and bool((self.contexts > 0).all())

    @property
    def base_name(self) -> str | None:
        """The base that the adapter names, or the one it is loaded on; `None` where neither has a name."""
        return self.config.base_model_name_or_path or getattr(self.model, "name_or_path", None) or None

    def scales_by_layer(self, decoder: nn.Module) -> list[torch.Tensor]:
        """Its scales, in the shape that each linear layer of a base's decoder has them.

        Raises:
            `ValueError`: for scales of other layers than those.
        """
        shapes = factor_shapes(decoder, self.config.scale_group_size).values()
        if (wanted := sum(shape.numel() for shape in shapes)) != len(self.scales):
            raise ValueError(
                f"{self.label} has {len(self.scales)} scales, the base's linear layers have {wanted} factors"
            )
        return by_layer(self.scales, shapes)

    def base_or(self, given) -> str:
        """The base that a caller gives, else the one that the adapter names.

        Raises:
            `ValueError`: where neither is there.
        """
        name = given if given is not None else self.base_name
        if not name:
            raise ValueError(f"`adapter` {self.label!r} does not say what its base is: pass `base`")
        return str(name)


@torch.no_grad()
def fill(bank, sources: list[PromptSource]) -> None:
    """Put the prompts of sources, and what inputs they are for, into a bank that has room for them.

    Args:
        bank (`PromptBank`): the bank.

    Raises:
        `ValueError`: where a bank of several prompts chooses by centroids, and a source has none.
    """
    bank.start(torch.cat([prompt for source in sources for prompt in source.prompts]).to(bank.weight.device))
    if bank.scales is not None:
        bank.scales.copy_(sources[0].scales)
    if bank.clusters is None:
        return
    unknown = [source.label for source in sources if not source.says_what_for]
    if unknown and bank.num_prompts == 1:
        return
    if unknown:
        raise ValueError(
            f"selection='centroid' needs adapters that say what inputs their prompts are for, and {', '.join(unknown)} does not: "
            "train it anew (an adapter with one prompt, or with selection='centroid', learns that), or compose with another "
            "`selection`"
        )
    bank.centroids.copy_(torch.cat([source.centroids for source in sources]))
    bank.contexts.copy_(torch.cat([source.contexts for source in sources]))


def read_prompts(adapter) -> PromptSource:
    """Read an adapter's prompts.

    Args:
        adapter: a folder or a Hub id; a loaded `PeftModel` (its active adapter); or a pair of one of these and the name
            of a loaded adapter, or the prompts to take: a number, a name, or a list of them.

    Raises:
        `ValueError`: for another method than IDP, prompt tuning, p-tuning and multitask prompt tuning, another task type
            than `"CAUSAL_LM"`, a pickled, truncated or foreign weights file, or a prompt that there is not.
        `TypeError`: for anything that is no adapter.
    """
    if isinstance(adapter, PeftModel):
        return _from_model(adapter, adapter.active_adapter)
    if isinstance(adapter, (str, os.PathLike)):
        return _from_files(os.fspath(adapter))
    if isinstance(adapter, tuple) and len(adapter) == 2:
        of, wanted = adapter
        if isinstance(of, PeftModel) and isinstance(wanted, str) and wanted in of.peft_config:
            return _from_model(of, wanted)
        return _take(read_prompts(of), [wanted] if isinstance(wanted, (str, int)) else wanted)
    raise TypeError(
        "an adapter is a folder, a Hub id, a loaded PeftModel, or a pair of one of these and what to take of it, got "
        f"{type(adapter).__name__}"
    )


def distinct(names: Iterable[str]) -> list[str]:
    """The same names, a number behind those that came before."""
    taken, result = {AUTO}, []
    for name in names:
        candidate, number = name, 2
        while candidate in taken:
            candidate, number = f"{name}_{number}", number + 1
        taken.add(candidate)
        result.append(candidate)
    return result


def _from_model(model: PeftModel, name: str) -> PromptSource:
    config, label = model.peft_config[name], f"the loaded adapter {name!r}"
    _check_method(config, label)
    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return _source(label, config, tensors, "prompt" if name == "default" else name, model.get_base_model())


def _from_files(place: str) -> PromptSource:
    try:
        config = PeftConfig.from_pretrained(place)
    except KeyError as error:
        raise ValueError(
            f"{place} is an adapter of a method that this version of PEFT does not know: {error}"
        ) from error
    except ValueError as error:
        if f"'{CONFIG_NAME}'" not in str(error):
            raise
        raise ValueError(
            f"there is no adapter at {place}: it is no folder or Hub id with an {CONFIG_NAME} ({reason(error)})"
        ) from error
    _check_method(config, place)
    path = find_file(place, None, {}, SAFETENSORS_WEIGHTS_NAME)
    if path is None and find_file(place, None, {}, WEIGHTS_NAME) is not None:
        raise ValueError(
            f"{place} holds a pickled {WEIGHTS_NAME}, which could run code when loaded: where you trust it, load it with PEFT "
            f"and save it again, which writes {SAFETENSORS_WEIGHTS_NAME}"
        )
    if path is None:
        raise ValueError(f"{place} holds no {SAFETENSORS_WEIGHTS_NAME}{_why_not(place)}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read and may be truncated: {error}") from error
    stem = Path(place).resolve().name if os.path.isdir(place) else place.rpartition("/")[2]
    return _source(place, config, tensors, stem)


def _why_not(place: str) -> str:
    """Why the weights of an adapter on the Hub could not be downloaded, in brackets."""
    if os.path.isdir(place):
        return ""
    try:
        hf_hub_download(place, SAFETENSORS_WEIGHTS_NAME)
    except Exception as error:  # of whichever HTTP library the hub library uses
        return f" ({reason(error)})"
    return ""


def _source(label: str, config, tensors: dict[str, torch.Tensor], stem: str, model=None) -> PromptSource:
    prompts, names = _prompts(config, tensors, label), getattr(config, "prompt_names", None)
    if names is None:
        names = [stem] if len(prompts) == 1 else [f"{stem}_{number}" for number in range(len(prompts))]
    bank = {name: tensor.detach().to("cpu", copy=True) for name, tensor in bank_tensors(tensors).items()}
    learned = bank.get("centroids"), bank.get("contexts"), bank.get("scales")
    return PromptSource(label, config, prompts, list(names), max(map(len, prompts)), model, *learned)


def _check_method(config: PeftConfig, label: str) -> None:
    method = getattr(config.peft_type, "value", config.peft_type)
    if method not in _METHODS:
        raise ValueError(
            f"{label} is a {method} adapter: only prompts that stand in front of the input can be moved from one adapter to "
            f"another, those of {', '.join(_METHODS)}"
        )
    if config.task_type not in (None, TaskType.CAUSAL_LM):
        raise ValueError(
            f"{label} is for task type {str(config.task_type)!r}: IDP prompts causal language models, 'CAUSAL_LM'"
        )
    if getattr(config, "num_transformer_submodules", None) not in (None, 1):
        raise ValueError(
            f"{label} prompts {config.num_transformer_submodules} parts of an encoder-decoder "
            "(`num_transformer_submodules`): IDP prompts decoder-only models, 1"
        )


def _prompts(config: PeftConfig, tensors: dict[str, torch.Tensor], label: str) -> list[torch.Tensor]:
    """The prompts in an adapter's tensors, float32 `[k_i, d]` each."""
    tensors = {key: tensor.detach().to("cpu", torch.float32, copy=True) for key, tensor in tensors.items()}
    if isinstance(config, IDPConfig):
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        bank = bank_tensors(tensors)
        width = bank["weight"].shape[-1] if "weight" in bank else 0
        inputs = bank["centroids"].shape[-1] if "centroids" in bank else width
        check_shapes(shapes, config, BankSizes(inputs, width), label)
        whole = PromptBank(
            config.prompt_lengths, width, frozen_tokens=config.frozen_tokens, holds_keys=config.prompts == "key_values"
        )
        whole.load(bank)
        return list(whole.embeddings().detach().split(config.prompt_lengths))
    per_task = config.peft_type.value == "MULTITASK_PROMPT_TUNING"
    expected = {"prompt_embeddings"} | ({"prefix_task_cols", "prefix_task_rows"} if per_task else set())
    if set(tensors) != expected:
        raise ValueError(
            f"{label} must hold the tensors {sorted(expected)} and no others, found {sorted(tensors)}: a prompt bank has no "
            "place for anything but prompts"
        )
    shared = tensors["prompt_embeddings"]  # [k, d]
    method = config.peft_type.value
    stated = (config.num_virtual_tokens, shared.shape[-1] if method in _KEYS else config.token_dim or shared.shape[-1])
    if tuple(shared.shape) != stated:
        raise ValueError(f"{label} holds prompts of shape {list(shared.shape)}, its config says {list(stated)}")
    if not per_task:
        return [shared]
    by_task = tensors["prefix_task_cols"] @ tensors["prefix_task_rows"]  # [tasks, k, d]
    return list(shared * by_task)


def _take(source: PromptSource, wanted: Iterable[str | int]) -> PromptSource:
    """Some of a source's prompts, in the order given."""
    numbers = []
    for prompt in wanted:
        number = source.names.index(prompt) if prompt in source.names else prompt
        if isinstance(number, (str, bool)) or number not in range(len(source.prompts)):
            raise ValueError(
                f"{source.label} has no prompt {prompt!r}: take numbers from 0 to {len(source.prompts) - 1}, or names of "
                f"{source.names}"
            )
        numbers.append(number)
    if not numbers:
        raise ValueError(f"no prompt of {source.label} is taken: name at least one")
    learned = [None if of is None else of[numbers] for of in (source.centroids, source.contexts)]
    return replace(
        source,
        prompts=[source.prompts[n] for n in numbers],
        names=[source.names[n] for n in numbers],
        centroids=learned[0],
        contexts=learned[1],
    )
