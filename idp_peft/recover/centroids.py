"""Centroids set before training: what inputs each prompt is for, from the contexts that are there."""

from __future__ import annotations

import torch
from torch import nn
from tqdm.auto import tqdm

from idp_peft.centroids import Clusters
from idp_peft.hosting.prompt_ids import check_prompt_ids
from idp_peft.layer import active_layer
from idp_peft.prompt_bank import PromptBank
from idp_peft.selection import context_tokens, mean_embeddings
from idp_peft.texts.examples import Example, collate, read_examples

_BAR_AFTER = 5  # seconds
_ROUNDS = 20  # of moving centroids to what chooses them; it settles far earlier


def fit_centroids(
    model, dataset, *, tokenizer=None, batch_size: int = 32, max_examples: int | None = None, seed: int = 0
) -> torch.Tensor:
    """Set the centroids of the active adapter by a dataset, before training or in place of it.

        model = get_peft_model(base, IDPConfig(task_type="CAUSAL_LM", selection="centroid"))
        idp_peft.fit_centroids(model, train_dataset)

    Contexts are put into M clusters by k-means on the directions of their mean input embeddings (scikit-learn), then moved
    to where the choice itself puts them. Where the dataset has a column `prompt_ids`, a centroid is the mean of those that
    it gives to a prompt. Training leaves the centroids where they are from then on (`learn_centroids` becomes `False`).

    Args:
        model: a model with an active IDP adapter whose `selection` is `"centroid"`.
        dataset: as [`selection_report`] takes it. With `labels` and no `selection_mask`, a context is what stands before an
            example's first label, as everywhere. `prompt_ids` may hold numbers, names, or -1 for examples to leave out.
        tokenizer (*optional*): for texts.
        batch_size (`int`, defaults to `32`): examples at once.
        max_examples (`int`, *optional*): read the first so many alone.
        seed (`int`, defaults to `0`): of k-means.

    Returns:
        `torch.Tensor`: int64 `[examples]`, the prompt that each context counts for; -1 where it was left out.

    Raises:
        `ValueError`: for an adapter with another selection, fewer examples than prompts, or examples that cannot be read.
        `ImportError`: where scikit-learn is not installed.
    """
    layer = active_layer(model)
    config, clusters = layer.active_config, layer.active_bank.clusters
    if clusters is None:
        raise ValueError(f"`fit_centroids` needs an adapter with selection='centroid', got {config.selection!r}")
    examples = read_examples(dataset, tokenizer, max_examples=max_examples)
    means = context_means(layer.get_base_layer(), examples, batch_size)
    if any(example.prompt is not None for example in examples):
        given = [example.prompt for example in examples]
        prompt_ids = check_prompt_ids(given, len(given), config.num_prompts, config.prompt_names)
        if (prompt_ids < -1).any():
            raise ValueError("`prompt_ids` of a dataset must be numbers, names or -1, not 'auto'")
    else:
        prompt_ids = cluster(means, config.num_prompts, seed)
    counts = prompt_ids >= 0
    clusters.set(prompt_ids[counts], means[counts])
    config.learn_centroids = False
    return prompt_ids


def context_means(embeddings: nn.Module, examples: list[Example], batch_size: int = 32) -> torch.Tensor:
    """m(x), the mean input embedding of each example's context, float32 `[examples, d]` on the CPU.

    Args:
        embeddings (`nn.Module`): the base's input embeddings.
        examples (`list[Example]`): what [`read_examples`] read.
        batch_size (`int`, defaults to `32`): examples at once.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}")
    device, means = embeddings.weight.device, []
    for start in tqdm(range(0, len(examples), batch_size), desc="contexts", delay=_BAR_AFTER):
        batch = {name: value.to(device) for name, value in collate(examples[start : start + batch_size]).items()}
        context = context_tokens(batch["attention_mask"], batch.get("selection_mask"), batch.get("labels"))
        means.append(mean_embeddings(embeddings, {"input_ids": batch["input_ids"]}, context).cpu())
    return torch.cat(means)


def cluster(means: torch.Tensor, num_prompts: int, seed: int = 0) -> torch.Tensor:
    """Put contexts into one cluster per prompt: int64 `[contexts]`.

    Args:
        means (`torch.Tensor`): m(x), float32 `[contexts, d]`.
        num_prompts (`int`): M.
        seed (`int`, defaults to `0`): of k-means.

    Raises:
        `ValueError`: for fewer contexts than prompts.
        `ImportError`: where scikit-learn is not installed.
    """
    if len(means) < num_prompts:
        raise ValueError(f"{num_prompts} prompts need at least as many contexts to be told apart by, got {len(means)}")
    if num_prompts == 1:
        return torch.zeros(len(means), dtype=torch.long)
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ImportError(f"centroids are found by scikit-learn: pip install 'idp-peft[recover]' ({error})") from error
    directions = nn.functional.normalize(means - means.mean(0), dim=-1)
    found = KMeans(num_prompts, n_init=10, random_state=seed).fit_predict(directions.double().numpy())
    prompt_ids = torch.as_tensor(found, dtype=torch.long)
    clusters = Clusters(PromptBank([1] * num_prompts, 1, context_width=means.shape[1]))
    for _ in range(_ROUNDS):
        clusters.set(prompt_ids, means)
        moved = clusters.scores(means).argmax(-1)
        if torch.equal(moved, prompt_ids) or len(moved.unique()) < num_prompts:
            break
        prompt_ids = moved
    return prompt_ids


def nearest(means: torch.Tensor, prompt_ids: torch.Tensor, num_prompts: int) -> list[int]:
    """For each prompt, the number of its context that its centroid is nearest to: what it is like.

    Args:
        means (`torch.Tensor`): m(x), float32 `[contexts, d]`.
        prompt_ids (`torch.Tensor`): int64 `[contexts]`, which prompt each counts for.
        num_prompts (`int`): M. A prompt without a context takes that of another.
    """
    clusters = Clusters(PromptBank([1] * num_prompts, 1, context_width=means.shape[1]))
    clusters.set(prompt_ids, means)
    scores = clusters.scores(means)
    own = nn.functional.one_hot(prompt_ids, num_prompts).bool()
    return scores.masked_fill(~own, -2.0).argmax(0).tolist()
