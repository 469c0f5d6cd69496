"""One cell: a model on one text or one task, item by item."""

from __future__ import annotations

import torch

from benchmarks.choice.losses import nats_of_every_prompt
from benchmarks.study.choices import ContextRecorder, least_loss
from idp_peft.evaluation.chunks import chunk_documents, score_chunks
from idp_peft.evaluation.harness import HarnessModel
from idp_peft.evaluation.prompted import num_prompts, select_prompts
from idp_peft.evaluation.task_loading import load_tasks
from idp_peft.evaluation.task_scores import run_task, sample_indices, score_of


def score_text(model, tokenizer, name: str, documents: int, settings: dict) -> dict:
    """Nats of one block per document, after the context that a choice may read. A model with several prompts is scored
    under each of them, and the chosen one's value looked up.

    Returns:
        `dict`: `metric`, `context_tokens`, `block_tokens` and `items`: `id` (of the document), `nats`, `tokens`, `prompt`
        (chosen by attention), and where there is a choice `least_loss_prompt` and `by_prompt` (`{"nats": [M]}`).
    """
    length, context, batch = settings["block_tokens"], settings["context_tokens"], settings["batch_size"]
    ids, blocks = _blocks(tokenizer, name, documents, length)
    prompts, count = None, num_prompts(model) or 1
    if count == 1:
        nats = score_chunks(model, blocks, context, batch_size=batch, description=name).nats.tolist()
    else:
        prompts = select_prompts(model, [block[:context] for block in blocks], batch)
        after, of_context = nats_of_every_prompt(model, torch.tensor(blocks), context, count, batch)  # [items, M] each
        nats = [float(after[number, prompt]) for number, prompt in enumerate(prompts)]
    items = [{"id": i, "nats": value, "tokens": length - context} for i, value in zip(ids, nats, strict=True)]
    if prompts is not None:
        _add(items, prompts, of_context.argmin(1).tolist(), {"nats": after.tolist()})
    return {"metric": "nats", "block_tokens": length, "context_tokens": context, "items": items}


def _blocks(tokenizer, name: str, documents: int, length: int) -> tuple[list[str], list[list[int]]]:
    """The first `documents` held-out documents that are long enough: their numbers, and a block of each."""
    from idp_peft.texts.data import load_texts

    ids, blocks = [], []
    for number, text in enumerate(load_texts(name, "held_out")):
        if found := chunk_documents(tokenizer, [text], length, per_document=1):
            ids, blocks = [*ids, str(number)], blocks + found
        if len(blocks) == documents:
            break
    return ids, blocks


def score_task(model, tokenizer, name: str, settings: dict, each_prompt: bool) -> dict:
    """Scores of one task's sample of questions.

    Args:
        each_prompt (`bool`): force every prompt in turn and look the chosen one's score up, in place of one free pass.

    Returns:
        `dict`: `metric`, `chance` and `items`: `id`, `score`, `scores`, `prompt`, and with `each_prompt`
        `least_loss_prompt` and `by_prompt` (`{"score": [M], "probability": [M]}`).
    """
    task, batch = load_tasks([name])[name], settings["batch_size"]
    sample = sample_indices(len(task.eval_docs), settings["limit"], settings["sample_seed"], name)

    def answered(prompt: int | None = None) -> list[dict]:
        return run_task(HarnessModel(model, tokenizer, batch, prompt), task, name, sample)

    if not each_prompt:
        items = answered()
    else:
        forced = [answered(prompt) for prompt in range(num_prompts(model))]
        recorder = ContextRecorder(model, tokenizer, batch)
        run_task(recorder, task, name, sample)
        contexts = [recorder.contexts[name, within] for within in range(len(forced[0]))]
        prompts = select_prompts(model, contexts, batch)
        items = [dict(forced[prompt][number]) for number, prompt in enumerate(prompts)]
        by_prompt = {"score": [[one[i]["score"] for one in forced] for i in range(len(items))]}
        if "probability" in items[0]["scores"]:
            by_prompt["probability"] = [[one[i]["scores"]["probability"] for one in forced] for i in range(len(items))]
        _add(items, prompts, least_loss(model, contexts, num_prompts(model), batch), by_prompt)
    score = score_of(name, items[0]["scores"])
    return {"metric": score.metric, "chance": score.chance, "items": items}


def _add(items: list[dict], prompts: list[int], least_loss: list[int], by_prompt: dict[str, list[list[float]]]) -> None:
    """What each way of choosing takes for each item, and what every prompt is worth on it, `[items][M]` by what is measured."""
    for number, item in enumerate(items):
        item |= {"prompt": prompts[number], "least_loss_prompt": least_loss[number]}
        item["by_prompt"] = {key: values[number] for key, values in by_prompt.items()}
