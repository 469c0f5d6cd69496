"""One training run: blocks of tokens, transformers' `Trainer`, language modelling or distillation."""

from __future__ import annotations

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from idp_peft.recover.distillation import DistillationTrainer
from idp_peft.recover.two_rates import RepairTrainer
from idp_peft.texts.data import Block
from idp_peft.texts.tokens import pad_right, padded_batch

_IGNORED = -100


def kinds_of(blocks: list[Block]) -> list[str]:
    """The kinds of blocks, in alphabetical order: the names of the prompts that they train. Empty where kinds are unknown."""
    return sorted({block.kind for block in blocks if block.kind is not None})


def training_examples(
    blocks: list[Block | list[int]], context_tokens: int, kinds: list[str] | None = None
) -> list[dict[str, list[int]]]:
    """Examples with labels on what follows each block's context.

    The context is what IDP's choice reads, in training as in evaluation. Where a block says what is to be predicted, it is
    what stands before the first such token. Where all is to be predicted, it is the first `context_tokens`, or half of a
    block that is too short for that.

    Args:
        blocks (`list[Block]` or `list[list[int]]`): blocks of documents, or token ids that are all to be predicted.
        context_tokens (`int`): tokens at the front of such a block that are read but not predicted.
        kinds (`list[str]`, *optional*): the kind of each prompt; an example then trains the prompt of its kind
            (`prompt_ids`).
    """
    examples = []
    for block in blocks:
        block = block if isinstance(block, Block) else Block(block)
        examples.append(_example(block, context_tokens))
        if kinds:
            examples[-1]["prompt_ids"] = kinds.index(block.kind)
    return examples


def _example(block: Block, context_tokens: int) -> dict[str, list[int]]:
    ids, labelled = block.ids, block.labelled or [True] * len(block.ids)
    context = labelled.index(True)
    if context <= block.front:  # nothing of its own stands before what is to be predicted
        context = max(min(context_tokens, len(ids) // 2), block.front)
    scored = [position >= context and wanted for position, wanted in enumerate(labelled)]
    return {"input_ids": ids, "labels": [token if one else _IGNORED for token, one in zip(ids, scored, strict=True)]}


def collate(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A batch padded on the right: `input_ids`, `attention_mask` and `labels`, int64 `[batch, n]`; and `prompt_ids`, one entry
    per row, where examples say which prompt they train."""
    ids, attention_mask = padded_batch([example["input_ids"] for example in examples])
    labels = pad_right([example["labels"] for example in examples], _IGNORED)
    batch = {"input_ids": ids, "attention_mask": attention_mask, "labels": labels}
    if "prompt_ids" in examples[0]:
        batch["prompt_ids"] = torch.tensor([example["prompt_ids"] for example in examples])
    return batch


def make_trainer(
    model: nn.Module,
    arguments: TrainingArguments,
    examples: list[dict[str, list[int]]],
    held_out: list[dict[str, list[int]]] | None = None,
    teacher: nn.Module | None = None,
    distillation_weight: float = 1.0,
    temperature: float = 1.0,
    callbacks: list[TrainerCallback] | None = None,
    scales_learning_rate: float | None = None,
) -> Trainer:
    """transformers' own `Trainer` for language modelling; with a `teacher`, one whose loss is distillation. Scales have a
    learning rate of their own, where one is given."""
    common = dict(
        model=model,
        args=arguments,
        train_dataset=examples,
        eval_dataset=held_out,
        data_collator=collate,
        callbacks=callbacks or [],
        scales_learning_rate=scales_learning_rate,
    )
    if teacher is None:
        return RepairTrainer(**common)
    return DistillationTrainer(teacher=teacher, weight=distillation_weight, temperature=temperature, **common)
