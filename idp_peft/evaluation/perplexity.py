"""Perplexity as a metric of the `evaluate` library."""

from __future__ import annotations

import datasets
import evaluate

from idp_peft.evaluation.documents import score_documents

_DESCRIPTION = """Perplexity over real tokens only: exp(sum of nats / number of scored tokens), where every token weighs
the same, whatever its document. Positions of soft prompts have no logits and are never counted."""

_INPUTS = """
Args:
    predictions (list of str): the documents.
    model: a causal language model, with or without an adapter.
    tokenizer: its tokenizer.
    window (int): tokens of a sliding window.
    stride (int): tokens scored at the end of each window; what stands before is context.
    batch_size (int): windows per forward pass.
    prompt_id (int): force this prompt of an IDP model; by default it chooses by the context.
Returns:
    window, stride, nats_per_token, perplexity, selection_reads, and one item per document.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class Perplexity(evaluate.Metric):
    """`Perplexity().compute(predictions=texts, model=model, tokenizer=tokenizer, window=256, stride=192)`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions, model, tokenizer, **options) -> dict:
        return score_documents(model, tokenizer, list(predictions), **options)
