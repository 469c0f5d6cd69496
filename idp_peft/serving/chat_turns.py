"""The part of a chat that chooses its prompt: as every turn has it, all turns of a chat share a prompt."""

from __future__ import annotations

_USER = "user"


def first_turn(messages: list[dict]) -> list[dict]:
    """A chat up to the end of its first user turn: up to the first message of a user and those of a user right behind it.
    What stands before, such as a system prompt or a greeting, belongs to it. A chat without a user is all of it.

    Args:
        messages (`list[dict]`): the chat.
    """
    roles = [message.get("role") for message in messages]
    if _USER not in roles:
        return messages
    end = roles.index(_USER)
    while end < len(roles) and roles[end] == _USER:
        end += 1
    return messages[:end]
