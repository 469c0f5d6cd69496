"""Perplexity of documents over real tokens only, window by window, the same for every kind of model.

The first `window - stride` tokens of a window are context: read, not scored, and all that an IDP model's choice may
read. Of a chat that says what is to be predicted, that alone is scored, behind what stands before it. Prompt positions have
no logits, so they never enter a mean.
"""

from __future__ import annotations

import math
from collections import Counter

import torch
from tqdm.auto import tqdm

from idp_peft.evaluation.prompted import check_prompt_id, idp_layer, input_logits, num_prompts
from idp_peft.evaluation.windows import Window, check_window, cut
from idp_peft.texts.chats import Chat
from idp_peft.texts.tokens import encode, padded_batch


def score_documents(
    model,
    tokenizer,
    texts: list[str | Chat],
    window: int = 256,
    stride: int = 192,
    batch_size: int = 4,
    prompt_id: int | str | None = None,
    ids: list[str] | None = None,
    each_prompt: bool = False,
) -> dict:
    """Negative log-likelihood of each document, and the perplexity over all their scored tokens.

    Args:
        model: any causal language model, with or without an adapter.
        tokenizer: its tokenizer; what it puts in front of every text stands before every window.
        texts (`list[str | Chat]`): the documents, as `load_texts` returns them. One with nothing to score is left out: a text
            with no token after its first context, a chat with nothing to predict.
        window (`int`, defaults to `256`): tokens of a window, at least 2.
        stride (`int`, defaults to `192`): tokens scored at the end of a window, from 1 to `window`. With
            `stride == window` there is no context, and IDP's choice reads the scored window itself (but in front of a
            completion its prompt).
        batch_size (`int`, defaults to `4`): windows per forward pass.
        prompt_id (`int` or `str`, *optional*): force this prompt of an IDP model, by number or name (-1: none); by default
            it chooses.
        ids (`list[str]`, *optional*): names of the documents; by default their numbers.
        each_prompt (`bool`): score with every prompt of the bank forced as well (`nats_by_prompt`).

    Returns:
        `dict`: `window`, `stride`, `nats_per_token`, `perplexity`, `selection_reads` (`"context"`, or `"window"` where
            choices read what is scored) and `items`,
        one per document: `id`, `nats` (summed), `tokens`, `prompt` (the one chosen for most of its windows, the lowest
        in a tie; `None` without a choice), and where its windows chose different ones, all of them as `prompts`.

    Raises:
        `ValueError`: for a wrong window or stride, a prompt that there is not, or texts with nothing to score.
    """
    prompt_id = check_prompt_id(model, prompt_id)
    windows = cut_texts(tokenizer, texts, window, stride)
    reads_window = stride == window and not all(part.has_context for part in windows)
    nats, prompts = _score(model, windows, batch_size, reads_window, prompt_id, "perplexity")
    names = ids if ids is not None else [str(number) for number in range(len(texts))]
    items = _items(windows, names, nats, prompts)
    if each_prompt and (num_prompts(model) or 1) > 1:
        for forced in range(num_prompts(model)):
            again, _ = _score(model, windows, batch_size, reads_window, forced, f"perplexity, prompt {forced}")
            for item, other in zip(items, _items(windows, names, again, None), strict=True):
                item.setdefault("nats_by_prompt", []).append(other["nats"])
    mean = sum(item["nats"] for item in items) / sum(item["tokens"] for item in items)
    return {
        "window": window,
        "stride": stride,
        "nats_per_token": mean,
        "perplexity": math.exp(mean),
        "selection_reads": "window" if reads_window else "context",
        "items": items,
    }


def cut_texts(tokenizer, texts: list[str | Chat], window: int, stride: int) -> list[Window]:
    """Windows of all documents, in their order.

    Raises:
        `ValueError`: for a wrong window or stride, or where no document has a token to score.
    """
    check_window(window, stride)
    encoded = encode(tokenizer, texts)
    windows = [
        part
        for number, document in enumerate(encoded)
        for part in cut(number, document.ids, window, stride, document.front, document.labelled)
    ]
    if not windows:
        longest = max((len(document.ids) for document in encoded), default=0)
        front = len(encoded[0].front) if encoded else 0
        raise ValueError(
            f"no text has a token to score: with window={window} and stride={stride} it must be longer than "
            f"{max(window - stride, 1) - front} tokens, the longest of {len(texts)} has {longest}"
        )
    return windows


def _score(
    model, windows: list[Window], batch_size: int, reads_window: bool, prompt_id: int | None, description: str
) -> tuple[list[float], list[int] | None]:
    """Summed negative log-likelihood of each window and its prompt (`None`: a model that has none)."""
    order = sorted(range(len(windows)), key=lambda index: -len(windows[index].tokens))
    nats, prompts = [0.0] * len(windows), [-1] * len(windows)
    layer, was_training = idp_layer(model), model.training
    model.eval()
    try:
        for start in tqdm(range(0, len(order), batch_size), desc=description):
            batch = order[start : start + batch_size]
            scores, chosen = _score_batch(model, layer, [windows[index] for index in batch], reads_window, prompt_id)
            for row, index in enumerate(batch):
                nats[index] = scores[row]
                prompts[index] = chosen[row] if chosen else -1
    finally:
        model.train(was_training)
    return nats, None if layer is None else prompts


def _score_batch(
    model, layer, windows: list[Window], reads_window: bool, prompt_id: int | None
) -> tuple[list[float], list[int] | None]:
    ids, mask = padded_batch([part.tokens for part in windows], model.device)
    scored, steers = torch.zeros_like(mask, dtype=torch.bool), mask.bool()
    for row, part in enumerate(windows):
        scored[row, : len(part.scored)] = torch.tensor(part.scored)
        if part.has_context or not reads_window:
            steers[row, part.context :] = False
    idp = {}
    if layer is not None and prompt_id is not None:
        idp["prompt_ids"] = torch.full((len(windows),), prompt_id)
    elif layer is not None:
        idp["selection_mask"] = steers
    logits = input_logits(model, ids, mask, **idp)  # [B, n, V]
    nats = []
    for row in range(len(windows)):
        targets = ids[row][scored[row]]  # [scored]
        predictions = logits[row, :-1][scored[row, 1:]].float()  # [scored, V]
        losses = torch.nn.functional.cross_entropy(predictions, targets, reduction="none")
        nats.append(float(losses.double().sum()))
    return nats, None if layer is None else layer.last_selection.prompt_ids.tolist()


def _items(windows: list[Window], names: list[str], nats: list[float], prompts: list[int] | None) -> list[dict]:
    """One item per document, from its windows."""
    items: dict[int, dict] = {}
    chosen: dict[int, list[int]] = {}
    for index, part in enumerate(windows):
        item = items.setdefault(
            part.document, {"id": str(names[part.document]), "nats": 0.0, "tokens": 0, "prompt": None}
        )
        item["nats"] += nats[index]
        item["tokens"] += sum(part.scored)
        if prompts is not None:
            chosen.setdefault(part.document, []).append(prompts[index])
    for document, of_windows in chosen.items():
        counts = Counter(of_windows)
        items[document]["prompt"] = min(counts, key=lambda prompt: (-counts[prompt], prompt))
        if len(counts) > 1:
            items[document]["prompts"] = of_windows
    return list(items.values())
