"""The body of an OpenAI request with the chosen prompt's tokens in front of its text."""

from __future__ import annotations

import inspect
import json

from idp_peft.prompt_ids import AUTO, CHOOSES, check_prompt_ids
from idp_peft.serving.chat_template import VARIABLE
from idp_peft.serving.exported import ExportedModel
from idp_peft.serving.openai_errors import RequestError
from idp_peft.serving.router import Router

# Fields with which an engine would show the prompt's tokens as text, cut them off, or put something in front of them.
_REFUSED = {
    "echo": "it would return the soft prompt's tokens as text",
    "prompt_logprobs": "it would return the soft prompt's tokens",
    "truncate_prompt_tokens": "it would cut the soft prompt off",
    "prompt_embeds": "send `prompt`",
    "chat_template": "the served one puts the soft prompt in front",
}


class RequestPrompter:
    """Chooses the prompt of a request and puts its tokens in front.

    A request may force its prompt: `"idp_prompt": 2`, a name, or -1 for none.

    Args:
        router (`Router`): who chooses.
        exported (`ExportedModel`): which tokens a prompt is.
        max_tokens (`int`, *optional*, defaults to the base's `max_position_embeddings`): longer texts are refused, because
            the time of a choice grows with the square of their length.
    """

    def __init__(self, router: Router, exported: ExportedModel, max_tokens: int | None = None) -> None:
        self.router, self.exported = router, exported
        self.max_tokens = max_tokens or getattr(router.layer.decoder.config, "max_position_embeddings", None)

    def completion(self, body: dict) -> tuple[dict, list[int]]:
        """The body for the engine's `/v1/completions`, and the prompts chosen, one for each text.

        Raises:
            `RequestError`: with status 400, for what cannot be served.
        """
        body = self._checked(body)
        special = body.pop("add_special_tokens", True)
        rows = [self._token_ids(text, special) for text in _texts(body.get("prompt"))]
        chosen = self._choose(rows, body.pop(VARIABLE, None))
        body["prompt"] = [self._prefix(prompt) + row for prompt, row in zip(chosen, rows, strict=True)]
        if len(rows) == 1:
            (body["prompt"],) = body["prompt"]
        return self._never_generating(body), chosen

    def chat(self, body: dict) -> tuple[dict, list[int]]:
        """The body for the engine's `/v1/chat/completions`, and the prompt chosen, as a list of one.

        The engine renders the chat with the exported template, which puts the prompt's tokens first.

        Raises:
            `RequestError`: as [`completion`], and with status 501 for a tokenizer that reads text behind the prompt's tokens
                in another way than alone.
        """
        body = self._checked(body)
        if body.get("add_special_tokens"):
            raise RequestError(
                400, "`add_special_tokens` would put a token in front of the prompt", "add_special_tokens"
            )
        body["messages"] = _as_text(body.get("messages"))
        template_kwargs = body.get("chat_template_kwargs") or {}
        taken = {VARIABLE, *inspect.signature(self.router.tokenizer.apply_chat_template).parameters}
        if not isinstance(template_kwargs, dict) or taken & set(template_kwargs):
            which = sorted(taken & set(template_kwargs)) if isinstance(template_kwargs, dict) else []
            raise RequestError(
                400,
                f"`chat_template_kwargs` must be an object of variables of the template, without {which}",
                "chat_template_kwargs",
            )
        row = self._rendered(body, template_kwargs)
        chosen = self._choose([row], body.pop(VARIABLE, None))
        if chosen[0] >= 0:
            body["chat_template_kwargs"] = {**template_kwargs, VARIABLE: chosen[0]}
        return self._never_generating(body), chosen

    def _checked(self, body: dict) -> dict:
        for name, why in _REFUSED.items():
            if body.get(name) not in (None, False):
                raise RequestError(400, f"`{name}` is not served with soft prompts: {why}", name)
        return dict(body)

    def _token_ids(self, text: str | list[int], special: bool) -> list[int]:
        if isinstance(text, str):
            text = self._tokenised(text, bool(special), "prompt")
        limit = self.exported.vocab_size
        if not all(isinstance(token, int) and not isinstance(token, bool) and 0 <= token < limit for token in text):
            raise RequestError(
                400, f"`prompt` must hold token ids from 0 to {limit - 1}: the rest are soft prompts' own", "prompt"
            )
        self._check_length(text, "prompt")
        if not text:
            raise RequestError(400, "`prompt` must not be empty: a prompt is chosen by what stands behind it", "prompt")
        return text

    def _tokenised(self, text: str, special: bool, param: str) -> list[int]:
        try:
            return self.router.tokenizer(text, add_special_tokens=special)["input_ids"]
        except (TypeError, ValueError) as error:  # half a surrogate pair, which JSON can hold
            raise RequestError(400, f"`{param}` is no valid text: {error}", param) from error

    def _check_length(self, row: list[int], param: str) -> None:
        if self.max_tokens is not None and len(row) > self.max_tokens:
            raise RequestError(
                400,
                f"`{param}` has {len(row)} tokens, at most {self.max_tokens} are served",
                param,
                "context_length_exceeded",
            )

    def _rendered(self, body: dict, template_kwargs: dict) -> list[int]:
        """The token ids of a chat, without a soft prompt."""
        tokenizer = self.router.tokenizer
        settings = {"add_generation_prompt": body.get("add_generation_prompt", True)}
        given = ("tools", "documents", "continue_final_message", "reasoning_effort")
        settings |= {name: body[name] for name in given if body.get(name) is not None}
        try:
            text = tokenizer.apply_chat_template(
                _with_parsed_arguments(body["messages"]), tokenize=False, **{**settings, **template_kwargs}
            )
        except Exception as error:  # a template is a program, and raises what it likes
            raise RequestError(400, f"the chat template refuses these messages: {error}", "messages") from error
        row = self._tokenised(text, False, "messages")
        self._check_length(row, "messages")
        behind = self._tokenised("".join(self.exported.tokens[0]) + text, False, "messages")
        if any(token >= self.exported.vocab_size for token in row):
            raise RequestError(400, "`messages` must not hold the names of soft prompt tokens", "messages")
        if behind != self.exported.token_ids[0] + row:
            raise RequestError(
                501, "this model's tokenizer reads text behind a soft prompt in another way: use /v1/completions"
            )
        return row

    def _choose(self, rows: list[list[int]], forced) -> list[int]:
        config = self.router.config
        wanted = forced if isinstance(forced, list) else [AUTO if forced is None else forced] * len(rows)
        try:
            given = check_prompt_ids(wanted, len(rows), config.num_prompts, config.prompt_names).tolist()
        except ValueError as error:
            raise RequestError(400, str(error).replace("prompt_ids", VARIABLE), VARIABLE) from error
        open_rows = [index for index, prompt in enumerate(given) if prompt == CHOOSES]
        if open_rows:
            try:
                selection = self.router.route([rows[index] for index in open_rows])
            except ValueError as error:
                raise RequestError(400, str(error), "prompt") from error
            for index, prompt in zip(open_rows, selection.prompt_ids.tolist(), strict=True):
                given[index] = prompt
        return given

    def _prefix(self, prompt: int) -> list[int]:
        return self.exported.token_ids[prompt] if prompt >= 0 else []

    def _never_generating(self, body: dict) -> dict:
        """Greedy decoding of an untied model cannot pick a new token; all else is told not to."""
        if body.get("temperature") == 0 and not self.exported.tied:
            return body
        bias = body.get("logit_bias") or {}
        if not isinstance(bias, dict):
            raise RequestError(400, "`logit_bias` must be an object", "logit_bias")
        body["logit_bias"] = {**bias, **self.exported.logit_bias}
        return body


def _texts(prompt) -> list[str | list[int]]:
    """What a completion's `prompt` holds: texts or lists of token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(part, str) for part in prompt) or all(isinstance(part, list) for part in prompt):
            return prompt
        if not any(isinstance(part, (str, list)) for part in prompt):
            return [prompt]
    raise RequestError(400, "`prompt` must be a text, a list of token ids, or a list of either", "prompt")


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
    return {**call, "function": {**function, "arguments": arguments}}
