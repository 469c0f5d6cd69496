"""Conversations for tiny models: a tokenizer with a chat template, and prompts with the answers a model would give."""

from __future__ import annotations

import random

import torch

from tests.tiny import SEED
from tests.tiny_folder import tiny_tokenizer

# `w2 .. w3` around a user's words, `w4 .. <s>` around the assistant's.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}w4 {% generation %}{{ message['content'] }} <s> {% endgeneration %}"
    "{% else %}w2 {{ message['content'] }} w3 {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}w4 {% endif %}"
)


def chat_tokenizer():
    """The tiny tokenizer with a chat template that marks the assistant's words."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_questions(count: int = 8, seed: int = 0) -> list[str]:
    """Texts of two to six words."""
    draw = random.Random(SEED + seed)
    return [" ".join(f"w{draw.randrange(5, 97)}" for _ in range(draw.randrange(2, 7))) for _ in range(count)]


def tiny_answers(model, questions: list[str], words: int = 4) -> list[str]:
    """What a model says to each text, its second word replaced: so that it is right about most, not all, of its tokens."""
    tokenizer, answers = chat_tokenizer(), []
    for question in questions:
        ids = tokenizer(question, return_tensors="pt").input_ids
        with torch.no_grad():
            said = model.generate(input_ids=ids, max_new_tokens=words, do_sample=False, suppress_tokens=[0, 1])
        said = said[0, ids.shape[1] :].tolist()
        said[1] = 5 + (said[1] + 1) % 90
        answers.append(tokenizer.decode(said))
    return answers
