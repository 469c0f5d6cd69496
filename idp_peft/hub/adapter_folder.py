"""Pushing an adapter that lies in a folder, without loading its base."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path

from huggingface_hub import CommitInfo
from peft import PeftConfig
from safetensors import SafetensorError, safe_open

from idp_peft.config import IDPConfig
from idp_peft.files.inside_folder import files_inside
from idp_peft.hosting.checkpoint import BankSizes, bank_tensors, check_weights
from idp_peft.hub.base_model import Base, base_of
from idp_peft.hub.card_results import read_results
from idp_peft.hub.card_text import CardFacts
from idp_peft.hub.model_card import write_card
from idp_peft.hub.push import push
from idp_peft.models.loading import adapter_config, quantization_of

logger = logging.getLogger(__name__)

_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
# Of what lies beside an adapter, what belongs to it: its card and a tokenizer. The rest is the state of a training.
_BESIDE = (
    "README.md",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
)


def push_adapter(
    adapter: str | Path,
    repo_id: str,
    results=None,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload adapter",
) -> CommitInfo:
    """Push a finished adapter folder with a fresh card. Its weights arrive byte for byte.

    A card that is in the repository already keeps what others wrote there; the folder's own is the start of a first one.

    Args:
        adapter (`str`): a folder as `save_pretrained` or `Trainer` leaves it.
        repo_id (`str`): `"user/name"`, or a name of the user's own.
        results (`str`, `Path` or a list of them, *optional*): result files of `idp-peft evaluate`, or folders of them.
        private (`bool`, *optional*): of a repository that is made by this.
        token, revision, commit_message: as transformers' `push_to_hub`.

    Raises:
        `FileNotFoundError`, `ValueError`: for a folder that holds no whole IDP adapter, or wrong `results`.
        `PushError`: where a step of the push failed.
    """
    folder = Path(adapter)
    config = _checked(folder)
    parameters = math.prod(_shapes(folder).get("weight") or [0])
    measured = read_results(results, config.num_prompts, parameters, folder)
    base = _with_format(base_of(config.base_model_name_or_path), config.revision, token)
    training = (measured.ours.get("training") if measured else None) or _training(folder)

    def save(target: Path) -> None:
        for path in files_inside(folder, (*_ADAPTER, *_BESIDE)):
            shutil.copyfile(path, target / path.name)

    def describe(file: Path, repo_id: str) -> None:
        write_card(file, CardFacts(repo_id, base, {"": config}, parameters, measured, training))

    return push(
        save,
        describe,
        repo_id,
        commit_message=commit_message,
        private=private,
        token=token,
        revision=revision,
    )


def _checked(folder: Path) -> IDPConfig:
    if not folder.is_dir():
        raise FileNotFoundError(f"`adapter` {folder} is no folder")
    config: PeftConfig = adapter_config(folder)
    if not isinstance(config, IDPConfig):
        method = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(
            f"`adapter` {folder} is a {method} adapter: this pushes IDP's, PEFT's `push_to_hub` all others"
        )
    width = _width(folder)
    check_weights(str(folder), None, {}, config, BankSizes(_width(folder, "centroids") or width, width))
    if not (folder / _ADAPTER[1]).is_file():
        raise FileNotFoundError(f"`adapter` {folder} is not complete: there is no {_ADAPTER[1]} in it")
    return config


def _shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of the bank in a folder's file, by the bank's own names; none of a file that cannot be read, which
    `check_weights` says better."""
    try:
        with safe_open(folder / _ADAPTER[1], framework="pt") as file:
            return bank_tensors({key: file.get_slice(key).get_shape() for key in file.keys()})  # noqa: SIM118
    except (SafetensorError, OSError):
        return {}


def _width(folder: Path, name: str = "weight") -> int:
    """Numbers per row of one of these tensors; 0 where there is none."""
    shape = _shapes(folder).get(name)
    return shape[-1] if shape else 0


def _with_format(base: Base, revision: str | None, token) -> Base:
    """The base with its compression, which is read on the Hub; one that is not there is a folder of some machine."""
    if not base.on_hub:
        return base
    where = {name: value for name, value in {"revision": revision, "token": token}.items() if value is not None}
    try:
        return Base(base.name, True, quantization_of(base.name, **where))
    except (OSError, ValueError) as error:
        logger.warning("the base %r is not named in the card's metadata: %s", base.name, error)
        return Base(base.name)


def _training(folder: Path) -> dict | None:
    """What the run that made an adapter left beside it."""
    try:
        return json.loads((folder.parent / "run.json").read_text(encoding="utf-8")).get("training")
    except (OSError, ValueError):
        return None
