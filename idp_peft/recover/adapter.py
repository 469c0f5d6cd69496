"""The adapter that a repair trains, with its starting values."""

from __future__ import annotations

import itertools
import logging

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from idp_peft.recover.intact_prefix import start_prefix
from idp_peft.recover.methods import method_config, prefix_parameters_per_token
from idp_peft.texts.data import Block
from idp_peft.texts.tokens import common_length, without

logger = logging.getLogger(__name__)


def with_adapter(
    model: nn.Module, tokenizer, blocks: list[list[int]], settings, teacher: nn.Module | None = None
) -> PeftModel:
    """The model with the adapter of `settings.method` on it. What is random is drawn from torch's global generator.

    With `settings.init` "corpus", prompts start at the openings of training blocks, and a prefix at the teacher's keys and
    values of some, where there is a teacher of the model's own shape.

    Args:
        model (`PreTrainedModel`): the compressed model.
        tokenizer: its tokenizer.
        blocks (`list[list[int]]`): token ids of the training text.
        settings (`RecoverSettings`): what the user asked for; see [`method_config`].
        teacher (`PreTrainedModel`, *optional*): the dense model.
    """
    from_text = settings.init == "corpus"
    texts = corpus_starts(tokenizer, blocks, settings) if from_text else None
    adapted = get_peft_model(model, method_config(model, settings, texts))
    if settings.method == "prefix_tuning" and from_text and teacher is not None:
        if prefix_parameters_per_token(teacher.config) == prefix_parameters_per_token(model.config):
            start_prefix(adapted, teacher, opening(tokenizer, blocks, adapted.active_peft_config.num_virtual_tokens))
        else:
            logger.warning("the teacher has other keys and values than the model: the prefix starts at random")
    return adapted


def corpus_starts(tokenizer, blocks: list[list[int]], settings) -> list[str]:
    """One text per prompt for `init="corpus"`: the first tokens of as many random training blocks. Drawn from torch's global
    generator."""
    chosen = torch.randperm(len(blocks))[: settings.num_prompts].tolist()
    return [tokenizer.decode(blocks[i][: settings.num_virtual_tokens]) for i in chosen]


def starting_texts(blocks: list[Block]) -> list[list[int]]:
    """Token ids of the blocks that prompts may start at.

    Chats go without what all of them have in common at their beginning, as a rule a system message: prompts that start
    alike are chosen alike, and stay alike.
    """
    shared = common_length([block.ids for block in blocks]) if len(blocks) > 1 and blocks[0].is_chat else 0
    texts = []
    for block in blocks:
        own = block.ids[max(shared, block.front) :] or block.ids[block.front :]
        texts.append(block.ids[: block.front] + own)
    return texts


def opening(tokenizer, blocks: list[list[int]], count: int) -> list[int]:
    """`count` tokens that a prefix starts at: the beginning-of-sequence token, where there is one, then training blocks in
    random order. Drawn from torch's global generator."""
    front = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    shuffled = itertools.chain.from_iterable(without(front, blocks[i]) for i in torch.randperm(len(blocks)).tolist())
    return list(itertools.islice(itertools.chain(front, shuffled), count))
