"""Everything that is measured of one model: perplexity on a text, and tasks."""

from __future__ import annotations

from idp_peft.evaluation.documents import cut_texts, score_documents
from idp_peft.evaluation.task_scores import sample_indices, score_tasks
from idp_peft.texts.chats import Chat


def evaluate_model(
    model,
    tokenizer,
    *,
    texts: list[str | Chat] | None = None,
    dataset: str = "text",
    tasks=(),
    limit: int | None = None,
    seed: int = 0,
    window: int = 256,
    stride: int = 192,
    batch_size: int = 4,
    each_prompt: bool = False,
) -> dict:
    """Measure a model that is in memory.

    Args:
        model: any causal language model: dense, compressed, or with an adapter.
        tokenizer: its tokenizer.
        texts (`list[str | Chat]`, *optional*): documents for perplexity; left out: not measured.
        dataset (`str`, defaults to `"text"`): what to call them in the result.
        tasks (`list[str]` or comma-separated `str`): local tasks, the harness's own, or `all_local`.
        limit (`int`, *optional*): at most so many documents (of those long enough to be scored), and questions of each
            task, drawn by `seed`; the same ones for every model.
        window, stride, batch_size, each_prompt: see `score_documents` and `score_tasks`.

    Returns:
        `dict`: `perplexity` (by `dataset`) and `tasks` (by name).
    """
    perplexity = {}
    if texts is not None:
        # Drawn from the documents that have something to score: a collection may hold many that are too short.
        long_enough = sorted({cut.document for cut in cut_texts(tokenizer, texts, window, stride)})
        drawn = sample_indices(len(long_enough), limit, seed, dataset)
        chosen = long_enough if drawn is None else [long_enough[index] for index in drawn]
        perplexity[dataset] = score_documents(
            model,
            tokenizer,
            [texts[index] for index in chosen],
            window,
            stride,
            batch_size,
            ids=[str(index) for index in chosen],
            each_prompt=each_prompt,
        )
    scores = score_tasks(model, tokenizer, tasks, limit, seed, batch_size, each_prompt) if tasks else {}
    return {"perplexity": perplexity, "tasks": scores}
