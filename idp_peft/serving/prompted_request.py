"""The body of an OpenAI request with the chosen prompt's tokens in front of its text."""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable, Collection, Generator, Iterator
from typing import Any, NamedTuple

from idp_peft.hosting.prompt_ids import AUTO, CHOOSES, check_prompt_ids
from idp_peft.selection import Selection
from idp_peft.serving.chat_template import VARIABLE
from idp_peft.serving.chat_turns import first_turn
from idp_peft.serving.exported import ExportedModel
from idp_peft.serving.openai_errors import RequestError
from idp_peft.serving.request_fields import CHAT_FIELDS, COMPLETION_FIELDS, Field, check_size, checked_fields, steers
from idp_peft.serving.router import Router
from idp_peft.serving.text_process import TextError, TextProcess

MAX_TOKENS, MAX_TEXTS, MAX_REQUEST_TOKENS, CHARACTERS_PER_TOKEN = 8192, 256, 32768, 16
CHAT_CHOICES = FIRST_TURN, WHOLE = "first_turn", "whole"
# Characters and tokens up to which a piece of work is short, and of middle length; texts of a short one.
_CHARACTERS, _TOKENS = (16384, 131072), (512, 2048)
_TEXTS_READ, _TEXTS_ROUTED = 64, 8
_NAME = re.compile(r"<\|idp:[^|]*\|>")  # as `PromptVocabulary` names tokens


class Piece(NamedTuple):
    """A part of the work on one request. Other requests may run between two pieces.

    Args:
        lane (`str`): `"chat"`, `"short"`, `"middle"` or `"long"`: what it waits for. Long texts do not stand in the way of
            short ones.
        work (`Callable`): does it.
    """

    lane: str
    work: Callable[[], Any]


# Yields pieces, is sent what each returns, and returns a body and its prompts.
Pieces = Generator[Piece, Any, tuple[dict, list[int]]]


class RequestPrompter:
    """Chooses the prompt of a request and puts its tokens in front.

    A request may force its prompt: `"idp_prompt": 2`, a name, or -1 for none.

    Args:
        router (`Router`): who chooses.
        exported (`ExportedModel`): which tokens a prompt is.
        max_tokens (`int`, *optional*, defaults to the base's `max_position_embeddings`, 8192 at most): tokens of a text;
            the time of a choice grows with their square.
        max_texts (`int`, defaults to `256`): texts of a request.
        max_request_tokens (`int`, *optional*, defaults to 32768, or `max_tokens` if that is more): tokens of all its texts.
        max_characters (`int`, *optional*, defaults to 16 for each of `max_request_tokens`): characters of all its texts;
            more are refused before they are tokenised.
        extra_fields (`Collection[str]`): fields of the engine's own that are handed on, unchecked.
        chat_choice (`str`, defaults to `"first_turn"`): what of a chat chooses its prompt. `"first_turn"`: its [`first_turn`],
            so that all its turns share a prompt, and the engine's cache; `"whole"`: all of it, anew in each turn.
    """

    def __init__(
        self,
        router: Router,
        exported: ExportedModel,
        max_tokens: int | None = None,
        max_texts: int = MAX_TEXTS,
        max_request_tokens: int | None = None,
        max_characters: int | None = None,
        extra_fields: Collection[str] = (),
        chat_choice: str = FIRST_TURN,
    ) -> None:
        if chat_choice not in CHAT_CHOICES:
            raise ValueError(f"`chat_choice` must be one of {', '.join(CHAT_CHOICES)}, got {chat_choice!r}")
        self.router, self.exported = router, exported
        positions = getattr(router.layer.decoder.config, "max_position_embeddings", None) or MAX_TOKENS
        self.max_tokens = max_tokens or min(positions, MAX_TOKENS)
        self.max_texts = max_texts
        self.max_request_tokens = max_request_tokens or max(MAX_REQUEST_TOKENS, self.max_tokens)
        self.max_characters = max_characters or CHARACTERS_PER_TOKEN * self.max_request_tokens
        self.extra_fields, self.chat_choice = frozenset(extra_fields), chat_choice
        self.texts = TextProcess(router.tokenizer)
        self.texts.start()
        self._names = {token for tokens in exported.tokens for token in tokens}

    def completion(self, body: dict) -> tuple[dict, list[int]]:
        """The body for the engine's `/v1/completions`, and the prompts chosen, one for each text.

        Raises:
            `RequestError`: with status 400, for what cannot be served.
        """
        return _at_once(self.completion_pieces(body))

    def chat(self, body: dict) -> tuple[dict, list[int]]:
        """The body for the engine's `/v1/chat/completions`, and the prompt chosen, as a list of one.

        The engine renders the chat with the exported template, which puts the prompt's tokens first.

        Raises:
            `RequestError`: as [`completion`], and with status 501 for a tokenizer that reads text behind the prompt's tokens
                in another way than alone.
        """
        return _at_once(self.chat_pieces(body))

    def completion_pieces(self, body: dict) -> Pieces:
        """[`completion`], piece by piece."""
        body = self._checked(body, COMPLETION_FIELDS)
        special = body.pop("add_special_tokens", True)
        texts = _texts(body.get("prompt"), self.max_texts)
        rows = yield from self._read(texts, special, "prompt")
        chosen = yield from self._choose(rows, body.pop(VARIABLE, None))
        body["prompt"] = [self._prefix(prompt) + row for prompt, row in zip(chosen, rows, strict=True)]
        if len(rows) == 1:
            (body["prompt"],) = body["prompt"]
        return self._never_generating(body, COMPLETION_FIELDS), chosen

    def chat_pieces(self, body: dict) -> Pieces:
        """[`chat`], piece by piece."""
        body, row = yield from self._chat(body)
        chosen = yield from self._choose([row], body.pop(VARIABLE, None))
        if chosen[0] >= 0 or self.exported.default_prompt is not None:
            body["chat_template_kwargs"] = {**body.get("chat_template_kwargs", {}), VARIABLE: chosen[0]}
        return self._never_generating(body, CHAT_FIELDS), chosen

    def choice_pieces(self, body: dict) -> Generator[Piece, Any, Selection]:
        """What a chat, or the first text of a completion, chooses, whatever `idp_prompt` says; piece by piece."""
        if "messages" in body:
            _, row = yield from self._chat(body)
        else:
            body = self._checked(body, COMPLETION_FIELDS)
            texts = _texts(body.get("prompt"), self.max_texts)
            row, *_ = yield from self._read(texts, body.get("add_special_tokens", True), "prompt")
        return (yield self._choosing([row]))

    def _chat(self, body: dict) -> Generator[Piece, Any, tuple[dict, list[int]]]:
        """The body of a chat, checked, and the token ids of what chooses its prompt."""
        body = self._checked(body, CHAT_FIELDS)
        if body.get("add_special_tokens"):
            raise RequestError(
                400, "`add_special_tokens` would put a token in front of the prompt", "add_special_tokens"
            )
        body["messages"] = _as_text(body.get("messages"))
        template_kwargs = body.get("chat_template_kwargs", {})
        taken = {VARIABLE, *inspect.signature(self.router.tokenizer.apply_chat_template).parameters}
        if not isinstance(template_kwargs, dict) or taken & set(template_kwargs):
            which = sorted(taken & set(template_kwargs)) if isinstance(template_kwargs, dict) else []
            raise RequestError(
                400,
                f"`chat_template_kwargs` must be an object of variables of the template, without {which}",
                "chat_template_kwargs",
            )
        return body, (yield from self._choosing_part(body, template_kwargs))

    def _checked(self, body: dict, fields: dict[str, Field]) -> dict:
        body = checked_fields(body, fields, self.exported.vocab_size, self.extra_fields)
        for name, value in body.items():
            if name != "prompt":  # there they are seen when it is tokenised
                self._check_names(name, value)
        return body

    def _check_names(self, param: str, value) -> None:
        if self._names.intersection(_NAME.findall(json.dumps(value, ensure_ascii=False))):
            raise RequestError(400, f"`{param}` must not hold the names of soft prompt tokens", param)

    def _read(self, texts: list[str] | list[list[int]], special: bool, param: str) -> Generator[Piece, Any, list]:
        """The token ids of texts, each of them checked."""
        rows = texts
        if isinstance(texts[0], str):
            rows = yield from self._tokenised(texts, special, param)
        self._check_lengths(rows, param)
        limit = self.exported.vocab_size
        for row in rows:
            if set(map(type, row)) - {int} or (row and not 0 <= min(row) <= max(row) < limit):
                raise RequestError(
                    400, f"`{param}` must hold token ids from 0 to {limit - 1}: the rest are soft prompts' own", param
                )
        if [] in rows:
            raise RequestError(400, f"`{param}` must not be empty: a prompt is chosen by what stands behind it", param)
        return rows

    def _tokenised(self, texts: list[str], special: bool, param: str) -> Generator[Piece, Any, list]:
        self._check_characters(sum(map(len, texts)), param)
        rows: list[list[int] | int] = []
        for some in _in_pieces(texts):
            rows += yield self._reading(some, special, param)
            self._check_lengths(rows, param)
        return rows

    def _reading(self, texts: list[str], special: bool, param: str) -> Piece:
        """The token ids of each text, or how many there are where they are too many."""

        def work() -> list[list[int] | int]:
            try:
                return self.texts.token_ids(texts, special, self.max_request_tokens + len(self.exported.token_ids[0]))
            except TextError as error:  # half a surrogate pair, which JSON can hold, or one that takes too long
                raise RequestError(400, f"`{param}` is no valid text: {error}", param) from error

        return Piece(_lane(sum(map(len, texts)), _CHARACTERS), work)

    def _check_characters(self, count: int, param: str) -> None:
        if count > self.max_characters:
            raise RequestError(
                400,
                f"`{param}` has {count} characters, at most {self.max_characters} are served",
                param,
                "context_length_exceeded",
            )

    def _check_lengths(self, rows: list[list[int] | int], param: str) -> None:
        lengths = [row if isinstance(row, int) else len(row) for row in rows]
        for count, most, where in (
            (max(lengths), self.max_tokens, ""),
            (sum(lengths), self.max_request_tokens, " in all its texts"),
        ):
            if count > most:
                raise RequestError(
                    400,
                    f"`{param}` has {count} tokens{where}, at most {most} are served",
                    param,
                    "context_length_exceeded",
                )

    def _choosing_part(self, body: dict, template_kwargs: dict) -> Generator[Piece, Any, list[int]]:
        """The token ids of what chooses a chat's prompt. The first turn is rendered as it was when it came alone; where the
        template refuses it so, the whole chat chooses."""
        settings = {"add_generation_prompt": body.get("add_generation_prompt", True)}
        given = ("tools", "documents", "continue_final_message", "reasoning_effort")
        settings |= {name: body[name] for name in given if name in body}
        messages = _with_parsed_arguments(body["messages"])
        self._check_names("messages", messages)
        text = yield Piece("chat", functools.partial(self._text_of, messages, {**settings, **template_kwargs}))
        whole = yield from self._ids_of_chat(text)
        first = first_turn(messages)
        if self.chat_choice == WHOLE or first == messages:
            return whole
        if settings.pop("continue_final_message", False):  # of an answer that was begun behind a generation prompt
            settings["add_generation_prompt"] = True
        text = yield Piece("chat", functools.partial(self._text_or_nothing, first, {**settings, **template_kwargs}))
        return (yield from self._ids_of_chat(text)) or whole

    def _ids_of_chat(self, text: str) -> Generator[Piece, Any, list[int]]:
        """The token ids of a rendered chat, without a soft prompt."""
        self._check_characters(len(text), "messages")
        behind = "".join(self.exported.tokens[0]) + text
        row, whole = yield self._reading([text, behind], False, "messages")
        self._check_lengths([row], "messages")
        if any(token >= self.exported.vocab_size for token in row):
            raise RequestError(400, "`messages` must not make the names of soft prompt tokens", "messages")
        if whole != self.exported.token_ids[0] + row:
            raise RequestError(
                501, "this model's tokenizer reads text behind a soft prompt in another way: use /v1/completions"
            )
        return row

    def _text_or_nothing(self, messages: list[dict], settings: dict) -> str:
        try:
            return self._text_of(messages, settings)
        except RequestError:
            return ""

    def _text_of(self, messages: list[dict], settings: dict) -> str:
        try:
            template = self.router.tokenizer.get_chat_template(None, settings.get("tools"))
            chat = {**settings, "conversation": messages, "chat_template": template}
            return self.texts.rendered(chat, self.max_characters)
        except ValueError as error:  # what the process says, and a tokenizer without a template
            raise RequestError(400, f"the chat template refuses these messages: {error}", "messages") from error

    def _choose(self, rows: list[list[int]], forced) -> Generator[Piece, Any, list[int]]:
        config = self.router.config
        wanted = forced if isinstance(forced, list) else [AUTO if forced is None else forced] * len(rows)
        try:
            given = check_prompt_ids(wanted, len(rows), config.num_prompts, config.prompt_names).tolist()
        except (ValueError, OverflowError) as error:
            raise RequestError(400, str(error).replace("prompt_ids", VARIABLE), VARIABLE) from error
        open_rows = [index for index, prompt in enumerate(given) if prompt == CHOOSES]
        for some in _of_like_length(open_rows, rows):
            selection = yield self._choosing([rows[index] for index in some])
            for index, prompt in zip(some, selection.prompt_ids.tolist(), strict=True):
                given[index] = prompt
        return given

    def _choosing(self, rows: list[list[int]]) -> Piece:
        def work() -> Selection:
            try:
                return self.router.route(rows)
            except ValueError as error:
                raise RequestError(400, str(error), "prompt") from error

        return Piece(_lane(len(rows[-1]), _TOKENS), work)

    def _prefix(self, prompt: int) -> list[int]:
        return self.exported.token_ids[prompt] if prompt >= 0 else []

    def _never_generating(self, body: dict, fields: dict[str, Field]) -> dict:
        """Adds the bias against new tokens, except for greedy decoding of an untied model, which cannot pick one."""
        if body.get("temperature") == 0 and not self.exported.tied and not steers(body, fields):
            return body
        body["logit_bias"] = {**body.get("logit_bias", {}), **self.exported.logit_bias}
        return body


def _at_once(pieces: Pieces) -> tuple[dict, list[int]]:
    result = None
    while True:
        try:
            piece = pieces.send(result)
        except StopIteration as done:
            return done.value
        result = piece.work()


def _texts(prompt, most: int) -> list[str] | list[list[int]]:
    """What a completion's `prompt` holds: texts or lists of token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if len(prompt) > most and isinstance(prompt[0], (str, list)):
            raise RequestError(400, f"`prompt` has {len(prompt)} texts, at most {most} are served", "prompt")
        if all(isinstance(part, str) for part in prompt) or all(isinstance(part, list) for part in prompt):
            return prompt
        if not any(isinstance(part, (str, list)) for part in prompt):
            return [prompt]
    raise RequestError(400, "`prompt` must be a text, a list of token ids, or a list of either", "prompt")


def _lane(length: int, bounds: tuple[int, int]) -> str:
    return ("short", "middle", "long")[sum(length > bound for bound in bounds)]


def _in_pieces(texts: list[str]) -> Iterator[list[str]]:
    """Texts in their order, as many at once as are short together; a long one alone."""
    some: list[str] = []
    for text in texts:
        if some and (len(some) == _TEXTS_READ or sum(map(len, some)) + len(text) > _CHARACTERS[0]):
            yield some
            some = []
        some.append(text)
    yield some


def _of_like_length(indices: list[int], rows: list[list[int]]) -> Iterator[list[int]]:
    """Rows from short to long, a few at once; a long one alone."""
    some: list[int] = []
    for index in sorted(indices, key=lambda index: len(rows[index])):
        if some and (len(some) == _TEXTS_ROUTED or len(rows[index]) > _TOKENS[0]):
            yield some
            some = []
        some.append(index)
    if some:
        yield some


def _as_text(messages) -> list[dict]:
    """Messages whose content is text: engines would read parts in one of two ways, by what the template looks like."""
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise RequestError(400, "`messages` must be a list of at least one message", "messages")
    result = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            parts = [
                part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
            ]
            if not all(isinstance(part, str) for part in parts):
                raise RequestError(400, "`messages` may hold text alone: prompts are chosen by text", "messages")
            message = {**message, "content": "\n".join(parts)}
        elif content is not None and not isinstance(content, str):
            raise RequestError(400, "the `content` of a message must be a text or a list of text parts", "messages")
        result.append(message)
    return result


def _with_parsed_arguments(messages: list[dict]) -> list[dict]:
    """Messages as templates expect them: arguments of tool calls as objects, not as their JSON."""
    result = []
    for message in messages:
        calls = message.get("tool_calls")
        if isinstance(calls, list):
            message = {**message, "tool_calls": [_with_parsed(call) for call in calls]}
        result.append(message)
    return result


def _with_parsed(call):
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:
        return call
    except RecursionError as error:
        raise RequestError(400, "the arguments of a tool call are nested too deep", "messages") from error
    check_size([arguments])
    return {**call, "function": {**function, "arguments": arguments}}
