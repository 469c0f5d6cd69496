"""Checks an adapter's file against its config and its base, before the model is changed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NamedTuple

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn

from idp_peft.hosting.introspection import adapter_of_auto_class

_KEY_END = "idp.idp_prompts.weight"
_BANK = "idp.idp_prompts."
SCALES_END = f"{_BANK}scales"
_CENTROIDS = "centroids", "contexts"  # a bank's names for what its prompts are for


class BankSizes(NamedTuple):
    """What the base says of the shapes of an adapter's tensors.

    Args:
        width (`int`): d, the width of the base's input embeddings.
        prompt_width (`int`): numbers per token of a prompt; d for token prompts.
        factors (`int`, *optional*): how many factors the linear layers of the decoder have; `None` where the base is not known.
    """

    width: int
    prompt_width: int
    factors: int | None = None


def check_weights(
    source: str,
    subfolder: str | None,
    hub_arguments: dict,
    config,
    sizes: BankSizes,
    model: nn.Module | None = None,
) -> None:
    """Check the weights file beside a config, in a folder or on the Hub (from where PEFT's own loader gets it next).

    A folder or repository without weights, and a Hub that cannot be reached, are left to that loader.

    Args:
        source (`str`): a folder or a Hub id.
        subfolder (`str`, *optional*): where in it.
        hub_arguments (`dict`): further arguments of `hf_hub_download` (`revision`, `token`, ...).
        config (`IDPConfig`): the config.
        sizes (`BankSizes`): what the base says.
        model (`PreTrainedModel`, *optional*): the base; without it, the file may hold no embeddings.

    Raises:
        `ValueError`: for a pickled or truncated file, missing or unexpected keys, or another shape.
    """
    path = find_file(source, subfolder, hub_arguments, SAFETENSORS_WEIGHTS_NAME)
    if path is None:
        pickled = find_file(source, subfolder, hub_arguments, WEIGHTS_NAME)
        if pickled is not None:
            raise ValueError(
                f"IDP adapters are safetensors files: {pickled} is pickled and could run code when loaded; ask for "
                f"{SAFETENSORS_WEIGHTS_NAME}"
            )
        return
    try:
        with safe_open(path, framework="pt") as file:
            keys = file.keys()
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in keys}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read and may be truncated: {error}") from error
    check_shapes(shapes, config, sizes, str(path), model)


def refuse_gguf_base_in_auto_class(base: str | None) -> None:
    """Raise where one of PEFT's auto classes is about to load a base that is a GGUF file.

    Args:
        base (`str`, *optional*): `base_model_name_or_path` of an adapter's config.
    """
    if not str(base).endswith(".gguf") or os.path.isdir(base):
        return
    adapter = adapter_of_auto_class()
    if adapter is not None:
        raise ValueError(
            f"the base of adapter {adapter!r} is the GGUF file {base!r}, which PEFT's auto classes cannot load: use "
            f"`model, tokenizer = idp_peft.load({adapter!r})`"
        )


def find_file(source: str, subfolder: str | None, hub_arguments: dict, name: str) -> str | None:
    """The path of a file of an adapter, downloaded where it lies on the Hub; `None` where there is none."""
    folder = os.path.join(source, subfolder or "")
    if os.path.isdir(folder):
        path = os.path.join(folder, name)
        return path if os.path.exists(path) else None
    try:
        return hf_hub_download(source, name, subfolder=subfolder, **hub_arguments)
    except (EntryNotFoundError, HfHubHTTPError, OSError):
        return None


def stored_tensors(source: str, subfolder: str | None, hub_arguments: dict) -> dict[str, torch.Tensor]:
    """The tensors of the bank in an adapter's file, by the bank's own names; empty without a file.

    Args:
        source (`str`), subfolder (`str`, *optional*), hub_arguments (`dict`): as in [`check_weights`].
    """
    path = find_file(source, subfolder, hub_arguments, SAFETENSORS_WEIGHTS_NAME)
    if path is None:
        return {}
    with safe_open(path, framework="pt") as file:
        return bank_tensors({key: file.get_tensor(key) for key in file.keys() if _BANK in key})  # noqa: SIM118


def bank_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those tensors of an adapter that are its bank's, by the bank's own names (`"weight"`, `"centroids"`, ...)."""
    return {key.rpartition(_BANK)[2]: tensor for key, tensor in tensors.items() if _BANK in key}


def check_shapes(
    shapes: dict[str, tuple[int, ...]],
    config,
    sizes: BankSizes,
    source: str,
    model: nn.Module | None = None,
) -> None:
    """Check the tensors of an adapter by name and shape.

    An adapter holds its bank and nothing else, but for the base's embeddings where PEFT saved them too: it does so
    with `save_embedding_layers=True`, and by itself where they were resized for new tokens.

    Args:
        shapes (`dict`): name to shape.
        config (`IDPConfig`): the adapter's config.
        sizes (`BankSizes`): what the base says.
        source (`str`): what the error calls the adapter.
        model (`PreTrainedModel` or `PeftModel`, *optional*): where it is going to be.

    Raises:
        `ValueError`: naming what is missing, unexpected or of another shape.
    """
    ours = [key for key in shapes if key.endswith(_KEY_END)]
    if not ours:
        raise ValueError(f"{source} has no prompts: expected a tensor named '...{_KEY_END}', found {sorted(shapes)}")
    place = ours[0].removesuffix("weight")
    beside = _beside_prompts(config, sizes)
    if config.selection != "centroid" and not {f"{place}{name}" for name in _CENTROIDS} & set(shapes):
        for name in _CENTROIDS:  # an older file of a single prompt does not say what it is for
            beside.pop(name, None)
    others = sorted(set(shapes) - set(ours[:1]) - {f"{place}{name}" for name in beside})
    embeddings = {key: shape for key in others if (shape := _embedding_shape(key, model)) is not None}
    if extra := [key for key in others if key not in embeddings or len(shapes[key]) != 2]:
        raise ValueError(f"{source} has unexpected tensors {extra}: an IDP adapter holds its prompts and nothing else")
    for key, shape in embeddings.items():
        if shapes[key] != shape:
            raise ValueError(
                f"{source} holds embeddings ({key}) of shape {list(shapes[key])}, this model's have {list(shape)}: call "
                f"`resize_token_embeddings({shapes[key][0]})` on the model first"
            )
    _check_prompts(shapes[ours[0]], config, sizes.prompt_width, source)
    for name, expected in beside.items():
        found = shapes.get(f"{place}{name}")
        if not _fits(found, expected):
            raise ValueError(
                f"{source} must hold '{place}{name}' of shape {['any' if size is None else size for size in expected]}, as its "
                f"config says (selection={config.selection!r}, prompts={config.prompts!r}, scales={config.scales}) and its base, "
                f"found {'none' if found is None else list(found)}"
            )


def _fits(found: tuple[int, ...] | None, expected: tuple[int | None, ...]) -> bool:
    if found is None or len(found) != len(expected):
        return False
    return all(wanted in (None, size) for size, wanted in zip(found, expected, strict=True))


def _beside_prompts(config, sizes: BankSizes) -> dict[str, tuple[int | None, ...]]:
    """What an adapter holds beside the prompts that it trains: name in the bank to shape, `None` for a size not known."""
    beside = {}
    if config.keeps_centroids:
        beside |= dict(zip(_CENTROIDS, [(config.num_prompts, sizes.width), (config.num_prompts,)], strict=True))
    if config.frozen_tokens:
        beside["frozen"] = (config.num_prompts * config.frozen_tokens, sizes.prompt_width)
    if config.scales:
        beside["scales"] = (sizes.factors,)
    return beside


def _check_prompts(found: tuple[int, ...], config, width: int, source: str) -> None:
    if config.num_virtual_tokens is None:
        return
    expected = (sum(config.prompt_lengths) - config.frozen_tokens * config.num_prompts, width)
    if found != expected:
        _rows, columns = found if len(found) == 2 else (None, None)
        why = (
            f"its base has embeddings of width {columns}, this model's have width {width}"
            if columns != width
            else f"its config says {config.prompt_lengths} tokens, {expected[0]} in all"
        )
        raise ValueError(f"{source} holds prompts of shape {list(found)}, expected {list(expected)}: {why}")


def _embedding_shape(key: str, model: nn.Module | None) -> tuple[int, ...] | None:
    """The shape of the input or output embeddings that a tensor's name means; `None` where it means neither."""
    if model is None:
        return None
    wanted = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    for name, module in model.named_modules():
        if any(module is one for one in wanted) and _plain(key) == f"{_plain(name)}.weight":
            return tuple(module.weight.shape)
    return None


def check_place(names: Iterable[str], model: nn.Module, source: str) -> None:
    """Check that the prompts of a file belong to this model's decoder. PEFT would only warn, and leave the prompts at their
    starting values.

    Args:
        names (`Iterable[str]`): the tensors' names, after PEFT's `key_mapping`.

    Raises:
        `ValueError`: where they are for another place.
    """
    (found, *_) = [_plain(name) for name in names if name.endswith(_KEY_END)]
    places = [_plain(name) for name, module in model.named_modules() if hasattr(module, "idp_prompts")]
    if places and found != f"{places[0]}.idp_prompts.weight":
        raise ValueError(
            f"{source} holds the prompts of {found.removesuffix('.' + _KEY_END)!r}, but this model's decoder is "
            f"{places[0].removesuffix('.idp')!r}: load it on the architecture it was trained on, or pass `key_mapping`"
        )


def remove_adapter(model: nn.Module, adapter_name: str, only_new: bool = False) -> None:
    """Remove a half-loaded adapter, and the `idp` module where it was the only one.

    Args:
        only_new (`bool`): leave a bank that was applied before where it is.
    """
    for layer in [module for module in model.modules() if hasattr(module, "idp_prompts")]:
        bank = dict(layer.idp_prompts).get(adapter_name)
        if only_new and not (bank is not None and bank.is_new):
            return
        configs = getattr(layer.model, "peft_config", {})
        if bank is not None and len(layer.idp_prompts) > 1:
            layer.delete_adapter(adapter_name)
            configs.pop(adapter_name, None)
        elif bank is not None or not layer.idp_prompts:
            layer.detach()
            if hasattr(layer.model, "peft_config"):
                del layer.model.peft_config


def _plain(name: str) -> str:
    """A module's name without what wrappers put into it."""
    for part in ("_orig_mod.", "_fsdp_wrapped_module."):
        name = name.replace(part, "")
    return name.removeprefix("base_model.model.")
