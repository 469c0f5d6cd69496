"""The adapter that a repair trains, with its starting values."""

from __future__ import annotations

import itertools
import logging

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from idp_peft.recover.centroids import cluster, context_means, nearest
from idp_peft.recover.intact_prefix import start_prefix
from idp_peft.recover.methods import method_config, prefix_parameters_per_token
from idp_peft.recover.starts import start_at
from idp_peft.recover.training import kinds_of, training_examples
from idp_peft.texts.data import Block
from idp_peft.texts.examples import read_examples
from idp_peft.texts.tokens import common_length, without

logger = logging.getLogger(__name__)


def with_adapter(
    model: nn.Module, tokenizer, blocks: list[Block | list[int]], settings, teacher: nn.Module | None = None
) -> PeftModel:
    """The model with the adapter of `settings.method` on it. What is random is drawn from torch's global generator.

    With `settings.init` "corpus", prompts start at the openings of training blocks, and a prefix at the teacher's keys and
    values of some, where there is a teacher of the model's own shape. With `settings.selection` "centroid", or blocks of
    named kinds, each prompt starts at a block of its own cluster or kind.

    Args:
        model (`PreTrainedModel`): the compressed model.
        tokenizer: its tokenizer.
        blocks (`list[Block]`): the training text; or token ids alone.
        settings (`RecoverSettings`): what the user asked for; see [`method_config`].
        teacher (`PreTrainedModel`, *optional*): the dense model.
    """
    blocks = [block if isinstance(block, Block) else Block(block) for block in blocks]
    from_text = settings.init == "corpus"
    kinds, starts = kinds_of(blocks), starting_texts(blocks)
    count = len(kinds) or settings.num_prompts
    clusters = None
    if settings.method == "idp" and (settings.selection == "centroid" or count == 1):
        clusters = _clusters(model, blocks, kinds, count, settings)
    chosen = _starts_of_kinds(blocks, kinds, clusters)
    in_words = from_text and not (settings.method == "idp" and settings.prompts == "key_values")
    texts = corpus_starts(tokenizer, starts, settings, chosen) if in_words else None
    adapted = get_peft_model(model, method_config(model, settings, texts, kinds or None))
    if clusters is not None:
        adapted.base_model.layer.active_bank.clusters.set(*clusters)
    if settings.method == "idp" and settings.prompts == "key_values":
        _start_at_keys(adapted, tokenizer, starts, chosen, teacher)
    if settings.method == "prefix_tuning" and from_text and teacher is not None:
        if prefix_parameters_per_token(teacher.config) == prefix_parameters_per_token(model.config):
            start_prefix(adapted, teacher, opening(tokenizer, starts, adapted.active_peft_config.num_virtual_tokens))
        else:
            logger.warning("the teacher has other keys and values than the model: the prefix starts at random")
    return adapted


def _start_at_keys(adapted: PeftModel, tokenizer, starts: list[list[int]], chosen: list[int] | None, teacher) -> None:
    """Key/value prompts at what the teacher makes of the chosen training blocks; of random ones by default."""
    count = adapted.active_peft_config.num_prompts
    chosen = torch.randperm(len(starts))[:count].tolist() if chosen is None else chosen
    front = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows = [front + without(front, starts[number]) for number in chosen]
    base = adapted.get_base_model()
    if teacher is not None and prefix_parameters_per_token(teacher.config) != prefix_parameters_per_token(base.config):
        logger.warning("the teacher has other keys and values than the model: prompts start at the model's own")
        teacher = None
    start_at(adapted, base if teacher is None else teacher, rows)


def _clusters(model, blocks: list[Block], kinds: list[str], count: int, settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Which prompt each block's context counts for, int64 `[blocks]`, and m(x), float32 `[blocks, d]`."""
    examples = read_examples(training_examples(blocks, settings.context_tokens))
    means = context_means(model.get_input_embeddings(), examples)
    if kinds:
        return torch.tensor([kinds.index(block.kind) for block in blocks]), means
    return cluster(means, count, int(torch.randint(2**31, (1,))) if count > 1 else 0), means


def _starts_of_kinds(blocks: list[Block], kinds: list[str], clusters) -> list[int] | None:
    """The number of the block that each prompt starts at; `None` where any will do."""
    if clusters is not None and len(clusters[0].unique()) > 1:
        return nearest(clusters[1], clusters[0], len(clusters[0].unique()))
    if not kinds:
        return None
    order = torch.randperm(len(blocks)).tolist()
    return [next(number for number in order if blocks[number].kind == kind) for kind in kinds]


def corpus_starts(tokenizer, blocks: list[list[int]], settings, chosen: list[int] | None = None) -> list[str]:
    """One text per prompt for `init="corpus"`: the first tokens of the chosen training blocks; by default, of random ones
    (drawn from torch's global generator)."""
    if chosen is None:
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
