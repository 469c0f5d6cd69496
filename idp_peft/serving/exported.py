"""The prompts of an exported model, as `idp_prompts.json` describes them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from idp_peft.config import MAX_TOKENS
from idp_peft.files.inside_folder import inside

FILE = "idp_prompts.json"
_MOST = 2 * MAX_TOKENS  # new rows: the prompts, names for unused rows, and what fills the last 64
ADAPTER = "idp_adapter"  # not in the model's own folder: transformers would load it there


@dataclass(frozen=True)
class ExportedModel:
    """An exported model folder.

    Args:
        folder (`Path`): the folder.
        token_ids (`list[list[int]]`): the token ids of each prompt.
        tokens (`list[list[str]]`): their names.
        never_generated (`list[int]`): token ids that must not come out of the model.
        vocab_size (`int`): rows of the base's table: ids from there on are new.
        tied (`bool`): whether a prompt token's output row is the prompt's own vector, so that it could be generated.
        names (`list[str]`, *optional*): the prompts' names.
        default_prompt (`int`, *optional*): the prompt of chats that name none, in the model's own template.
    """

    folder: Path
    token_ids: list[list[int]]
    tokens: list[list[str]]
    never_generated: list[int]
    vocab_size: int
    tied: bool
    names: list[str] | None = None
    default_prompt: int | None = None

    @property
    def adapter(self) -> Path:
        """The adapter that was exported, as it was."""
        return self.folder / ADAPTER

    @property
    def logit_bias(self) -> dict[str, float]:
        """OpenAI's `logit_bias` against all new tokens, so that sampling never picks one."""
        return {str(token): -100.0 for token in self.never_generated}

    @classmethod
    def from_folder(cls, folder: str | Path) -> ExportedModel:
        """Read an exported folder's `idp_prompts.json`.

        Raises:
            `ValueError`: where there is none.
        """
        folder = Path(folder).expanduser()
        try:
            content = json.loads(inside(folder, FILE).read_text(encoding="utf-8"))
            return cls(folder, **_checked(content))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{folder} is no model that `idp-peft export` wrote: its {FILE} cannot be read ({error})"
            ) from error


def _checked(content: dict) -> dict:
    """The fields of an [`ExportedModel`] out of the file's content, each of its type and within the new rows.

    Raises:
        `KeyError`, `TypeError`, `ValueError`: for anything else.
    """
    (first, stop), rows, tied = content["never_generated"], content["vocab_size"], content["tied"]
    if not all(type(number) is int for number in (first, stop, rows)) or not 0 < rows == first < stop <= rows + _MOST:
        raise ValueError(f"`never_generated` must be the new rows, from `vocab_size` on, got {first!r} to {stop!r}")
    token_ids = [list(prompt["token_ids"]) for prompt in content["prompts"]]
    tokens = [list(prompt["tokens"]) for prompt in content["prompts"]]
    names = [prompt["name"] for prompt in content["prompts"]]
    for ids, texts, name in zip(token_ids, tokens, names, strict=True):
        if not ids or not all(type(token) is int and first <= token < stop for token in ids):
            raise ValueError(f"`token_ids` must be new rows, from {first} to {stop - 1}")
        if len(texts) != len(ids) or not all(isinstance(text, str) for text in (*texts, name or "")):
            raise ValueError("`tokens` must be one text per token id, and `name` a text")
    if not token_ids or not isinstance(tied, bool):
        raise ValueError("`prompts` must hold a prompt, and `tied` be true or false")
    default = content.get("default_prompt")
    if default is not None and not (type(default) is int and 0 <= default < len(token_ids)):
        raise ValueError(f"`default_prompt` must be the number of a prompt, got {default!r}")
    return {
        "default_prompt": default,
        "token_ids": token_ids,
        "tokens": tokens,
        "never_generated": list(range(first, stop)),
        "vocab_size": rows,
        "tied": tied,
        "names": None if None in names else names,
    }


def is_exported(folder: str | Path) -> bool:
    return (Path(folder).expanduser() / FILE).is_file()


def describe(vocabulary, tied: bool, default_prompt: int | None = None) -> str:
    """The text of `idp_prompts.json`.

    Args:
        vocabulary (`PromptVocabulary`): what was added.
        tied (`bool`): whether the output head is the embedding table.
        default_prompt (`int`, *optional*): the prompt of chats that name none.
    """
    names = vocabulary.prompt_names or [None] * len(vocabulary.lengths)
    prompts = [
        {"name": name, "token_ids": vocabulary.token_ids(prompt), "tokens": vocabulary.tokens(prompt)}
        for prompt, name in enumerate(names)
    ]
    new = vocabulary.never_generated
    content = {
        "vocab_size": vocabulary.vocab_size,
        "tied": tied,
        "never_generated": [new[0], new[-1] + 1],  # from, to
        "prompts": prompts,
    }
    if default_prompt is not None:
        content["default_prompt"] = default_prompt
    return json.dumps(content, indent=1) + "\n"
