"""`assignment="all"`: a training batch repeated once per prompt, and one set of logits per example out of it."""

from __future__ import annotations

import torch

from idp_peft.hosting.trainers import compares_answers


def repeat_batch(kwargs: dict, prompts: int) -> dict:
    """A model's training call with every row repeated once per prompt: the model's own loss is then the mean over prompts.

    Args:
        kwargs (`dict`): the call, by name, with `labels` `[batch, n]`.
        prompts (`int`): M.

    Returns:
        `dict`: the call for `[M * batch]` rows, prompt after prompt.

    Raises:
        `ValueError`: without labels, with a head that makes a loss of its own, or for tensors that are not one entry per row.
    """
    instead = "assignment='selected'" if compares_answers() else "assignment='selected' or 'uniform'"
    if kwargs.get("labels") is None:
        raise ValueError(
            "assignment='all' needs `labels` in the model's call: its loss is the model's own, the mean over prompts. For "
            f"a loss that is made of the logits, use {instead}"
        )
    if kwargs.get("fused_lm_head"):
        raise ValueError(
            "assignment='all' trains on the model's own loss, and TRL's fused head (`fused_lm_head=True`) makes one of "
            f"its own: use {instead}, or transformers' `Trainer`"
        )
    batch, repeated = len(kwargs["labels"]), dict(kwargs)
    for name, value in kwargs.items():
        if isinstance(value, torch.Tensor) and value.ndim >= 2:
            if len(value) != batch:
                raise ValueError(
                    f"assignment='all' repeats every row of a batch, and `{name}` {list(value.shape)} does not have one entry "
                    f"for each of the {batch} rows: use assignment='selected' or 'uniform'"
                )
            repeated[name] = value.repeat(prompts, *[1] * (value.ndim - 1))
    if kwargs.get("num_items_in_batch") is not None:
        repeated["num_items_in_batch"] = kwargs["num_items_in_batch"] * prompts
    return repeated


def with_mean_logits(batch: int, output):
    """Back to one set of logits per example, `[batch, n, vocab]`: their mean over prompts.

    Args:
        batch (`int`): rows before they were repeated.
        output (`ModelOutput` or `tuple`): what the model returned for all of them; a tuple begins with the loss.
    """
    is_tuple = isinstance(output, tuple)
    logits = output[1] if is_tuple else output.logits  # [M * batch, n, vocab]
    mean = logits.view(-1, batch, *logits.shape[1:]).mean(0)
    if is_tuple:
        return (output[0], mean, *output[2:])
    output["logits"] = mean
    return output
