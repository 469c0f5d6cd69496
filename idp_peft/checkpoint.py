"""Is an adapter file the adapter its config describes? Asked before the model is touched."""

from __future__ import annotations

import os

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from idp_peft.config import IDPConfig

_KEY_END = "idp.idp_prompts.weight"


def check_weights(source: str, subfolder: str | None, hub_arguments: dict, config: IDPConfig, width: int) -> None:
    """Check the weights file beside a config, in a folder or on the Hub (from where PEFT's own loader gets it next).

    A folder or repository without weights, and a Hub that cannot be reached, are left to that loader.

    Args:
        source (`str`): a folder or a Hub id.
        subfolder (`str`, *optional*): where in it.
        hub_arguments (`dict`): further arguments of `hf_hub_download` (`revision`, `token`, ...).
        config (`IDPConfig`): the config.
        width (`int`): d, the width of the base's input embeddings.

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
    check_shapes(shapes, config, width, str(path))


def find_file(source: str, subfolder: str | None, hub_arguments: dict, name: str) -> str | None:
    """The path of a file of an adapter, downloaded where it lies on the Hub; `None` where there is none to be had."""
    folder = os.path.join(source, subfolder or "")
    if os.path.isdir(folder):
        path = os.path.join(folder, name)
        return path if os.path.exists(path) else None
    try:
        return hf_hub_download(source, name, subfolder=subfolder, **hub_arguments)
    except (EntryNotFoundError, HfHubHTTPError, OSError):
        return None


def check_shapes(shapes: dict[str, tuple[int, ...]], config: IDPConfig, width: int, source: str) -> None:
    """Check the tensors of an adapter by name and shape.

    Args:
        shapes (`dict`): name to shape.
        source (`str`): what the error calls the adapter.

    Raises:
        `ValueError`: naming what is missing, unexpected or of another shape.
    """
    ours = [key for key in shapes if key.endswith(_KEY_END)]
    extra = sorted(set(shapes) - set(ours[:1]))
    if not ours:
        raise ValueError(f"{source} has no prompts: expected a tensor named '...{_KEY_END}', found {sorted(shapes)}")
    if extra:
        raise ValueError(f"{source} has unexpected tensors {extra}: an IDP adapter holds its prompts and nothing else")
    found = shapes[ours[0]]
    if config.num_virtual_tokens is None:
        return
    expected = (sum(config.prompt_lengths), width)
    if found != expected:
        _rows, columns = found if len(found) == 2 else (None, None)
        why = (
            f"its base has embeddings of width {columns}, this model's have width {width}"
            if columns != width
            else f"its config says {config.prompt_lengths} tokens, {expected[0]} in all"
        )
        raise ValueError(f"{source} holds prompts of shape {list(found)}, expected {list(expected)}: {why}")
