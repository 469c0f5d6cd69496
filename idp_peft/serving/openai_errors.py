"""Errors in the shape that OpenAI's clients read."""

from __future__ import annotations

_LONGEST = 1000  # characters of a message: some of them repeat what the request said
_TYPES = {401: "authentication_error", 404: "not_found_error", 502: "bad_gateway", 504: "gateway_timeout"}


class RequestError(Exception):
    """A request that is answered with an error.

    Args:
        status (`int`): HTTP status.
        message (`str`): what is wrong and what to do.
        param (`str`, *optional*): the field of the body that it is about.
        code (`str`, *optional*): OpenAI's code, such as `"model_not_found"`.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        message, param = _shown(message), None if param is None else _shown(param)
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def _shown(text: str) -> str:
    """A text cut to a bearable length, without halves of surrogate pairs, which JSON can hold and UTF-8 cannot."""
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
