"""Which fields of an OpenAI request the proxy hands to an engine: those listed here, and no others.

Engines read many fields that OpenAI does not name, and new ones with every version. Some of them return the prompt's
tokens, some force tokens out of the model, some change what stands in front of the text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from typing import NamedTuple

from idp_peft.serving.openai_errors import RequestError

# Why some fields that people know from their engine are not in the list.
REFUSED = {
    "echo": "it would return the soft prompt's tokens as text",
    "prompt_logprobs": "it would return the soft prompt's tokens",
    "return_token_ids": "it would return the soft prompt's tokens beside the answer's",
    "truncate_prompt_tokens": "it would cut the soft prompt off",
    "prompt_embeds": "send `prompt`",
    "chat_template": "the served one puts the soft prompt in front",
    "suffix": "a soft prompt has no place in a text with a gap",
    "allowed_token_ids": "it could force the soft prompt's tokens",
    "use_beam_search": "engines' beam search takes no bias against the soft prompt's tokens",
}
_VALUES, _DEPTH = 20_000, 64  # of a body, without its `prompt`
_BIASED_TOKENS = 300  # as at OpenAI
_AS_JSON = re.compile("0|[1-9][0-9]{0,9}")  # engines read " 97" and "097" as 97, too
_FORMATS = ("text", "json_object", "json_schema")
_STRUCTURES = ("json", "json_object", "regex", "choice")


class Field(NamedTuple):
    """What a field may hold.

    Args:
        rule (`str`): the rule in words: "must be ...".
        holds (`Callable`): whether a value keeps it, given the value and the number of the base's token ids.
        steers (`bool`): whether the field can change which token has the greatest logit.
    """

    rule: str
    holds: Callable[[object, int], bool]
    steers: bool = False


def _integer(low: int, high: int = 2**31 - 1, steers: bool = False) -> Field:
    return Field(f"an integer from {low} to {high}", lambda value, _: _is_integer(value, low, high), steers)


def _number(low: float, high: float, steers: bool = False) -> Field:
    return Field(
        f"a number from {low} to {high}", lambda value, _: type(value) in (int, float) and low <= value <= high, steers
    )


def _of(kind: type, rule: str, steers: bool = False) -> Field:
    return Field(rule, lambda value, _: isinstance(value, kind), steers)


def _is_integer(value, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _are_token_ids(value, vocab_size: int) -> bool:
    return isinstance(value, list) and all(_is_integer(token, 0, vocab_size - 1) for token in value)


def _is_bias(value, vocab_size: int) -> bool:
    """Whether a bias leaves soft prompts' tokens where they are, and most of the vocabulary: a bias against all other
    tokens would be one towards them."""
    if not isinstance(value, dict):
        return False
    base = 0
    for key, bias in value.items():
        if not _AS_JSON.fullmatch(key) or type(bias) not in (int, float) or not -100 <= bias <= 100:
            return False
        base += int(key) < vocab_size
        if int(key) >= vocab_size and bias != -100:
            return False
    return base <= min(_BIASED_TOKENS, vocab_size // 2)


_FLAG, _TEXT, _OBJECT, _LIST = (
    _of(bool, "true or false"),
    _of(str, "a text"),
    _of(dict, "an object"),
    _of(list, "a list"),
)
_CHECKED_ELSEWHERE = _of(object, "anything")
_SCHEMA = _of((dict, str), "a JSON schema", steers=True)
# Below 1 it would raise the logits of what stands in the prompt, the soft prompt's tokens among them.
_REPETITION = _number(1, 100, steers=True)

_BOTH = {
    "model": _CHECKED_ELSEWHERE,
    "idp_prompt": _CHECKED_ELSEWHERE,
    "best_of": _integer(1, 128),
    "cache_salt": _TEXT,
    "frequency_penalty": _number(-2, 2, steers=True),
    "guided_choice": _of(list, "a list", steers=True),
    "guided_json": _SCHEMA,
    "guided_regex": _of(str, "a text", steers=True),
    "ignore_eos": _FLAG,
    "include_stop_str_in_output": _FLAG,
    "logit_bias": Field(
        "an object of at most {most} token ids of the base, and numbers from -100 to 100", _is_bias, steers=True
    ),
    "max_tokens": _integer(0),
    "metadata": _OBJECT,
    "min_p": _number(0, 1),
    "min_tokens": _integer(0, steers=True),
    "n": _integer(1, 128),
    "presence_penalty": _number(-2, 2, steers=True),
    "prompt_cache_key": _TEXT,
    "repeat_penalty": _REPETITION,
    "repetition_penalty": _REPETITION,
    "response_format": Field(
        f"an object whose `type` is one of {', '.join(_FORMATS)}",
        lambda value, _: isinstance(value, dict) and value.get("type") in _FORMATS,
        steers=True,
    ),
    "return_tokens_as_token_ids": _FLAG,
    "safety_identifier": _TEXT,
    "seed": _integer(-(2**63), 2**63 - 1),
    "service_tier": _TEXT,
    "skip_special_tokens": _FLAG,
    "spaces_between_special_tokens": _FLAG,
    "stop": Field(
        "a text or a list of texts",
        lambda value, _: (
            isinstance(value, str) or (isinstance(value, list) and all(isinstance(text, str) for text in value))
        ),
    ),
    "stop_token_ids": Field("a list of token ids of the base", _are_token_ids),
    "store": _FLAG,
    "stream": _FLAG,
    "stream_options": _OBJECT,
    "structured_outputs": Field(
        f"an object of {', '.join(_STRUCTURES)}",
        lambda value, _: isinstance(value, dict) and set(value) <= set(_STRUCTURES),
        steers=True,
    ),
    "temperature": _number(0, 100),
    "top_k": _integer(-1),
    "top_p": _number(0, 1),
    "user": _TEXT,
}
COMPLETION_FIELDS = {
    **_BOTH,
    "prompt": _CHECKED_ELSEWHERE,
    "add_special_tokens": _FLAG,
    "logprobs": _integer(0, 20),
}
CHAT_FIELDS = {
    **_BOTH,
    "messages": _CHECKED_ELSEWHERE,
    "add_generation_prompt": _FLAG,
    "add_special_tokens": _FLAG,
    "chat_template_kwargs": _CHECKED_ELSEWHERE,
    "continue_final_message": _FLAG,
    "documents": _LIST,
    "include_reasoning": _FLAG,
    "logprobs": _FLAG,
    "max_completion_tokens": _integer(0),
    "parallel_tool_calls": _FLAG,
    "reasoning_effort": _TEXT,
    "tool_choice": _of((str, dict), "a text or an object", steers=True),
    "tools": _LIST,
    "top_logprobs": _integer(0, 20),
    "verbosity": _TEXT,
}


def checked_fields(body: dict, fields: dict[str, Field], vocab_size: int, extra: Collection[str] = ()) -> dict:
    """A copy of a request's body that holds what may be handed on.

    Args:
        body (`dict`): the request, as parsed from JSON.
        fields (`dict[str, Field]`): [`COMPLETION_FIELDS`] or [`CHAT_FIELDS`].
        vocab_size (`int`): token ids from there on are soft prompts' own.
        extra (`Collection[str]`): names of more fields that pass, whatever they hold.

    Raises:
        `RequestError`: with status 400, naming the field that is unknown or breaks its rule.
    """
    kept = {}
    for name, value in body.items():
        if value is None or (value is False and name in REFUSED):  # as if it were not there
            continue
        if name in REFUSED or (name not in fields and name not in extra):
            why = REFUSED.get(name, "it is not among the fields that this proxy hands on")
            raise RequestError(400, f"`{name}` is not served with soft prompts: {why}", name)
        kept[name] = value
    check_size([value for name, value in kept.items() if name != "prompt"])
    for name, value in kept.items():
        if name in fields and not fields[name].holds(value, vocab_size):
            rule = fields[name].rule.format(most=min(_BIASED_TOKENS, vocab_size // 2))
            raise RequestError(400, f"`{name}` must be {rule}", name)
    return kept


def steers(body: dict, fields: dict[str, Field]) -> bool:
    """Whether a request can change which token has the greatest logit."""
    return any(name not in fields or fields[name].steers for name in body)


def check_size(values: list) -> None:
    """Refuse bodies that are too large or too deep, and numbers that JSON cannot write.

    Args:
        values (`list`): parsed from JSON.

    Raises:
        `RequestError`: with status 400.
    """
    count = 0
    for _ in range(_DEPTH):
        count += len(values)
        if count > _VALUES:
            raise RequestError(400, f"the body must hold at most {_VALUES} values beside its `prompt`")
        if any(isinstance(value, float) and not math.isfinite(value) for value in values):
            raise RequestError(400, "the body must hold finite numbers")
        values = [part for value in values for part in _parts(value)]
        if not values:
            return
    raise RequestError(400, f"the body must be nested at most {_DEPTH} deep")


def _parts(value) -> Collection:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
