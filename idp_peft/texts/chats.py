"""Chats, and prompts with completions, tokenised and masked as TRL's `SFTTrainer` does it.

A chat is what the tokenizer's own template makes of its messages, and all of it is predicted; with `assistant_only_loss`
only what the template marks with `{% generation %}`. Of a prompt with its completion only the completion is predicted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from idp_peft.files.error_reason import reason
from idp_peft.texts.tokens import Encoded, beginning, common_length, encode, without

_COLUMNS = (("messages",), ("conversations",), ("prompt", "completion"))
_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for them


@dataclass(frozen=True)
class Chat:
    """A chat; or a prompt with its completion, as chat or as text.

    Args:
        completion (`list[dict]` or `str`): what is predicted: the messages of a chat (`role`, `content` and whatever else
            the template knows), those that follow a prompt, or a text. Behind a text stands the end-of-text token.
        prompt (`list[dict]` or `str`, *optional*): what is read before, of the same kind.
        tools (`list[dict]`, *optional*): for the template.
        template_kwargs (`dict`): further variables of the template (`enable_thinking`, ...).
        assistant_only_loss (`bool`, defaults to `False`): of messages, predict only what the template marks as the
            assistant's.
        name (`str`, defaults to `"a chat"`): what errors call it.
    """

    completion: list[dict] | str
    prompt: list[dict] | str | None = None
    tools: list[dict] | None = None
    template_kwargs: dict = field(default_factory=dict)
    assistant_only_loss: bool = False
    name: str = "a chat"

    def encode(self, tokenizer) -> Encoded:
        """Its tokens, and which of them are to be predicted.

        Raises:
            `ValueError`: for a tokenizer without a template, or one that refuses the messages or does not mark the
                assistant's words.
        """
        before: list[int] = []
        if isinstance(self.completion, str):
            end, text = tokenizer.eos_token or "", (self.prompt or "") + self.completion
            alone, whole = encode(tokenizer, [self.prompt or "", text if text.endswith(end) else text + end])
            before, ids = alone.front + alone.ids, whole.front + whole.ids
            wanted = [True] * len(ids)
        elif self.prompt is None:
            ids, wanted = self._rendered(tokenizer, self.completion)
        else:
            before, _ = self._rendered(tokenizer, self.prompt, add_generation_prompt=True)
            ids, wanted = self._rendered(tokenizer, self.prompt + self.completion)
        # Tokens may merge, and some templates write a prompt differently alone: the completion begins where the two part.
        read = common_length([before, ids])
        own = without(beginning(tokenizer), ids)
        front = len(ids) - len(own)
        labelled = ([False] * read + wanted[read:])[front:]
        return Encoded(ids[:front], own, None if all(labelled) else labelled, is_whole=True)

    def _rendered(self, tokenizer, messages: list[dict], **more) -> tuple[list[int], list[bool]]:
        """Token ids of messages, and which of them the template does not rule out."""
        template = _template(tokenizer, self.tools, self.assistant_only_loss)
        try:
            out = tokenizer.apply_chat_template(
                messages,
                tools=self.tools,
                chat_template=template,
                return_dict=True,
                return_assistant_tokens_mask=self.assistant_only_loss,
                **{**more, **self.template_kwargs},
            )
        except Exception as error:  # a template is a program, and raises what it likes
            raise ValueError(f"the tokenizer's chat template refuses {self.name}: {reason(error)}") from error
        ids = list(out["input_ids"])
        return ids, [bool(one) for one in out["assistant_masks"]] if self.assistant_only_loss else [True] * len(ids)


def chat_columns(names: Iterable[str]) -> tuple[str, ...]:
    """The columns of a dataset that hold chats: `messages`, else `conversations`, else `prompt` and `completion`; none."""
    return next((columns for columns in _COLUMNS if set(columns) <= set(names)), ())


def read_chat(row: Mapping, columns: tuple[str, ...], name: str) -> Chat | None:
    """A row of a dataset as a chat; `None` for a row with nothing to predict.

    Args:
        row: with `columns`; *optional* with `tools` (a list, or its JSON) and `chat_template_kwargs`.
        columns (`tuple[str]`): the one that holds the messages, or `prompt` and `completion`.
        name (`str`): what errors call the row.

    Raises:
        `ValueError`: for a row that holds something else there.
    """
    *before, last = columns
    prompt, completion = row[before[0]] if before else None, row[last]
    if not completion:
        return None
    is_text = bool(before) and isinstance(completion, str) and isinstance(prompt or "", str)
    if not is_text:
        completion = _messages(completion, last, name)
        prompt = _messages(prompt, before[0], name) if prompt else None
    return Chat(completion, prompt or None, _tools(row, name), row.get("chat_template_kwargs") or {}, name=name)


def _tools(row: Mapping, name: str) -> list[dict] | None:
    tools = row.get("tools") or None
    try:
        return json.loads(tools) or None if isinstance(tools, str) else tools
    except ValueError as error:
        raise ValueError(f"`tools` in {name} must be a list, or the JSON of one: {error}") from error


def assistant_only(documents: list[str | Chat]) -> list[Chat]:
    """The same chats, of which the assistant's words alone are to be predicted, as TRL's `assistant_only_loss` has it.

    Raises:
        `ValueError`: for texts.
    """
    if any(isinstance(document, str) or isinstance(document.completion, str) for document in documents):
        raise ValueError("`assistant_only_loss` needs chats, and the dataset holds texts: leave it out")
    return [replace(document, assistant_only_loss=True) for document in documents]


def has_messages(value) -> bool:
    """Whether a value is a list of messages, with `role` and `content` or, as ShareGPT writes them, `from` and `value`."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, Mapping) and not {"role", "from"}.isdisjoint(first)


def _messages(value, column: str, name: str) -> list[dict]:
    if not has_messages(value):
        raise ValueError(
            f"`{column}` in {name} must be a list of messages with `role` and `content`, got {value!r:.60}"
        )
    return [_message(dict(message), column, name) for message in value]


def _message(message: dict, column: str, name: str) -> dict:
    """One message with `role` and `content`, without the empty fields that a table adds because other messages have them."""
    for old, new in (("from", "role"), ("value", "content")):
        if old in message:
            message[new] = message.pop(old)
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    if others := sorted({str(part.get("type")) for part in parts if isinstance(part, Mapping)} - {"text"}):
        raise ValueError(f"`{column}` in {name} must hold text alone, got a message with {', '.join(others)}")
    return {key: _filled(value) for key, value in message.items() if value is not None or key == "content"}


def _filled(value):
    if isinstance(value, Mapping):
        return {key: _filled(one) for key, one in value.items() if one is not None}
    return [_filled(one) for one in value] if isinstance(value, list) else value


def _template(tokenizer, tools, assistant_only_loss: bool) -> str | None:
    """The template to render with, where it is not simply the tokenizer's."""
    if not tokenizer.chat_template:
        raise ValueError(
            "the dataset holds chats, and the tokenizer has no chat template to write them with: take a model whose "
            "tokenizer has one, set `tokenizer.chat_template`, or name a column of texts as `text_column`"
        )
    if not assistant_only_loss or _MARKERS.search(tokenizer.get_chat_template(tools=tools)):
        return None
    try:
        from trl.chat_template_utils import get_training_chat_template

        return get_training_chat_template(tokenizer)  # TRL has marked versions of many models' templates
    except (ImportError, ValueError) as error:
        raise ValueError(
            "`assistant_only_loss` needs a chat template that marks the assistant's words with {% generation %}; the "
            f"tokenizer's has no such marks, and TRL has no marked version of it ({reason(error)}): leave it out, or give "
            "columns `prompt` and `completion`"
        ) from error
