"""Running a model over examples: the prompt that each one chooses, and its loss under every prompt."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from tqdm.auto import tqdm

from idp_peft.analysis.clusters import describe_clusters
from idp_peft.analysis.quietly import quietly
from idp_peft.analysis.report import SelectionReport
from idp_peft.evaluation.prompted import input_logits
from idp_peft.layer import IDPLayer, active_layer
from idp_peft.selection import context_tokens, select
from idp_peft.texts.examples import IGNORED, Example, collate, read_examples

_BAR_AFTER = 5  # seconds


def selection_report(
    model,
    dataset,
    *,
    tokenizer=None,
    oracle: bool = False,
    group: str | Sequence | None = None,
    batch_size: int = 8,
    max_examples: int | None = None,
) -> SelectionReport:
    """Which prompt each example of a dataset chooses, by what margin, and, with `oracle=True`, whether that is the best one.

    The choice is the model's own: with `labels` and no `selection_mask`, it reads what stands before an example's first
    label, as in training and evaluation. Nothing above the selection layer runs for it; at the default layer 0 that is one
    embedding and one layer's queries and keys. `oracle=True` adds M whole forward passes per example.

    The model is left as it was: modes, `last_selection`, no gradients. Results are on the CPU.

    Args:
        model: a model with an active IDP adapter: a `PeftModel`, or one that loaded it by transformers' own methods.
        dataset: a `datasets.Dataset` or list of rows with `input_ids` (and, *optional*, `attention_mask`, `labels`,
            `selection_mask`; lists or tensors `[n]`), or of rows with `text`; a list of texts; or a `DataLoader`
            whose batches hold these columns.
        tokenizer (*optional*): for texts.
        oracle (`bool`, defaults to `False`): also force every prompt on every example, which needs `labels`.
        group (`str` or sequence, *optional*): a column such as `"task"`, or one value per example.
        batch_size (`int`, defaults to `8`): examples per pass, at least 1; sorted by length, so padding is small.
        max_examples (`int`, *optional*): read the first so many alone.

    Returns:
        [`SelectionReport`].

    Raises:
        `ValueError`: without an active IDP adapter, for an empty dataset, for examples that cannot be read, and for
            `oracle=True` where no example has a label to score.

    Warns:
        `UserWarning`: names the prompts that no example chose, and says what to do.
    """
    examples = read_examples(dataset, tokenizer, group, max_examples)
    report = measure(model, examples, oracle=oracle, batch_size=batch_size, tokenizer=tokenizer)
    if (text := report.warning) is not None:
        warnings.warn(text, UserWarning, stacklevel=2)
    return report


def measure(model, examples: list[Example], *, oracle: bool, batch_size: int, tokenizer=None) -> SelectionReport:
    """[`selection_report`] of examples that were read, without its warning."""
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}")
    layer = active_layer(model)
    config, count = layer.active_config, len(examples)
    has_labels = examples[0].labels is not None
    _check_columns(examples, oracle)
    order = sorted(range(count), key=lambda index: len(examples[index].input_ids))
    batches = [order[start : start + batch_size] for start in range(0, count, batch_size)]
    passes = 1 + config.num_prompts if oracle else 1
    prompt_ids, reads_labels = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=bool)
    scores = np.zeros((count, config.num_prompts), dtype=np.float32)
    nats, tokens = np.zeros((count, config.num_prompts)), np.zeros(count, dtype=np.int64)
    contexts: list[list[int]] = [[] for _ in range(count)]
    with quietly(model, layer), tqdm(total=len(batches) * passes, desc="selection", delay=_BAR_AFTER) as bar:
        for rows in batches:
            batch = {name: value.to(_device(layer)) for name, value in collate([examples[i] for i in rows]).items()}
            inputs = {"input_ids": batch["input_ids"]}
            masks = batch["attention_mask"], batch.get("selection_mask"), batch.get("labels")
            selection = select(layer, inputs, *masks)
            prompt_ids[rows] = selection.prompt_ids.cpu().numpy()
            scores = None if selection.scores is None else _put(scores, rows, selection.scores)
            if config.selection == "centroid":
                steers = context_tokens(*masks)
                for row, ids, where in zip(rows, batch["input_ids"], steers, strict=True):
                    contexts[row] = ids[where].tolist()
            if has_labels:
                reads_labels[rows] = _reads_labels(batch).cpu().numpy()
            bar.update()
            for prompt in range(config.num_prompts if oracle else 0):
                summed, scored = _nats(model, batch, prompt)
                nats[rows, prompt], tokens[rows] = summed.cpu().numpy(), scored.cpu().numpy()
                bar.update()
    if oracle and not tokens.any():
        raise ValueError(
            "`oracle=True` needs a label to score: every `labels` of the dataset is -100 (or a first token)"
        )
    names = getattr(config, "prompt_names", None)
    return SelectionReport(
        prompt_ids=prompt_ids,
        num_prompts=config.num_prompts,
        names=None if names is None else list(names),
        selection=config.selection,
        assignment=config.assignment,
        scores=scores,
        nats=nats if oracle else None,
        tokens=tokens if oracle else None,
        groups=[example.group for example in examples] if any(e.group is not None for e in examples) else None,
        reads_labels=int(reads_labels.sum()),
        clusters=(
            describe_clusters(contexts, prompt_ids, scores, tokenizer)
            if config.selection == "centroid" and scores is not None
            else None
        ),
    )


def _check_columns(examples: list[Example], oracle: bool) -> None:
    for name in ("labels", "selection_mask"):
        having = sum(getattr(example, name) is not None for example in examples)
        if having not in (0, len(examples)):
            raise ValueError(f"`{name}` must be in every example or in none, got it in {having} of {len(examples)}")
    if oracle and examples[0].labels is None:
        raise ValueError(
            "`oracle=True` needs `labels` in the dataset: the tokens whose loss decides, -100 for the context before them"
        )


def _device(layer: IDPLayer) -> torch.device:
    return layer.get_base_layer().weight.device


def _put(table: np.ndarray, rows: list[int], values: torch.Tensor) -> np.ndarray:
    table[rows] = values.float().cpu().numpy()
    return table


def _reads_labels(batch: dict) -> torch.Tensor:
    """bool `[batch]`: whether tokens that are to be predicted may steer the choice."""
    context = context_tokens(batch["attention_mask"], batch.get("selection_mask"), batch["labels"])
    return (context & (batch["labels"] != IGNORED)).any(-1)


def _nats(model, batch: dict, prompt: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed negative log-likelihood of each row's labels under a forced prompt, float64 `[batch]`, and how many."""
    targets = batch["labels"][:, 1:]  # the first token has nothing before it
    forced = torch.full((len(targets),), prompt, device=targets.device)
    logits = input_logits(model, batch["input_ids"], batch["attention_mask"], prompt_ids=forced)[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.float().transpose(1, 2), targets.to(logits.device), reduction="none", ignore_index=IGNORED
    )  # [B, n-1]
    return losses.double().sum(1), (targets != IGNORED).sum(1)
