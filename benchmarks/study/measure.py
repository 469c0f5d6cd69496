"""One cell: a model on one text or one task, item by item."""

from __future__ import annotations

from idp_peft.evaluation.chunks import chunk_documents, score_chunks
from idp_peft.evaluation.prompted import choose, num_prompts
from idp_peft.evaluation.task_scores import run_task, sample_indices, score_tasks


def score_text(model, tokenizer, name: str, documents: int, settings: dict) -> dict:
    """Nats of one block per document, after the context that a choice may read. A model with several prompts is scored
    under each of them, and the chosen one's value looked up.

    Returns:
        `dict`: `metric`, `context_tokens`, `block_tokens` and `items`: `id` (of the document), `nats`, `tokens`, `prompt`
        (chosen by attention), and where there is a choice `least_loss_prompt` and `by_prompt` (`{"nats": [M]}`).
    """
    length, context, batch = settings["block_tokens"], settings["context_tokens"], settings["batch_size"]
    ids, blocks = _blocks(tokenizer, name, documents, length)
    if (count := num_prompts(model) or 1) == 1:
        nats, prompts = score_chunks(model, blocks, context, batch_size=batch, description=name).nats.tolist(), None
    else:
        contexts = [block[:context] for block in blocks]
        prompts = choose(model, contexts, batch)
        by_prompt = [score_chunks(model, blocks, context, i, batch, f"{name}, {i}").nats.tolist() for i in range(count)]
        nats = [by_prompt[prompt][number] for number, prompt in enumerate(prompts)]
    items = [{"id": i, "nats": value, "tokens": length - context} for i, value in zip(ids, nats, strict=True)]
    if prompts is not None:
        for item, prompt in zip(items, prompts, strict=True):
            item["prompt"] = prompt
        _add(items, by_prompt, "nats", _least_loss(model, contexts, batch))
    return {"metric": "nats", "block_tokens": length, "context_tokens": context, "items": items}


def _blocks(tokenizer, name: str, documents: int, length: int) -> tuple[list[str], list[list[int]]]:
    """The first `documents` held-out documents that are long enough: their numbers, and a block of each."""
    from idp_peft.text_data import load_texts

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
    wanted = {"limit": settings["limit"], "seed": settings["sample_seed"], "batch_size": settings["batch_size"]}
    if not each_prompt:
        result = score_tasks(model, tokenizer, [name], **wanted)[name]
        return {key: result[key] for key in ("metric", "chance", "items")}
    forced = [
        score_tasks(model, tokenizer, [name], prompt_id=prompt, **wanted)[name] for prompt in range(num_prompts(model))
    ]
    contexts = _contexts(model, tokenizer, name, wanted)
    chosen = choose(model, contexts, wanted["batch_size"])
    items = []
    for number, prompt in enumerate(chosen):
        items.append({**forced[prompt]["items"][number], "prompt": prompt})
    _add(
        items,
        [[item["score"] for item in one["items"]] for one in forced],
        "score",
        _least_loss(model, contexts, wanted["batch_size"]),
    )
    if "probability" in items[0]["scores"]:
        for number, item in enumerate(items):
            item["by_prompt"]["probability"] = [one["items"][number]["scores"]["probability"] for one in forced]
    return {"metric": forced[0]["metric"], "chance": forced[0]["chance"], "items": items}


def _contexts(model, tokenizer, name: str, wanted: dict) -> list[list[int]]:
    """What a choice may read of each question of the sample, in the order of the items."""
    from benchmarks.study.choices import ContextRecorder
    from idp_peft.evaluation.task_loading import load_tasks

    task = load_tasks([name])[name]
    sample = sample_indices(len(task.eval_docs), wanted["limit"], wanted["seed"], name)
    recorder = ContextRecorder(model, tokenizer, wanted["batch_size"])
    run_task(recorder, task, name, sample)
    return [recorder.contexts[name, within] for within in range(len(sample or task.eval_docs))]


def _least_loss(model, rows: list[list[int]], batch_size: int) -> list[int]:
    from benchmarks.study.choices import least_loss

    return least_loss(model, rows, num_prompts(model), batch_size)


def _add(items: list[dict], by_prompt: list[list[float]], key: str, least_loss: list[int]) -> None:
    for number, item in enumerate(items):
        item["least_loss_prompt"] = least_loss[number]
        item["by_prompt"] = {key: [values[number] for values in by_prompt]}
