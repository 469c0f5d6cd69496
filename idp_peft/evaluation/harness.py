"""Any model under evaluation, as lm-evaluation-harness wants it, with one prompt per question.

The harness scores each answer choice as a row of its own, context and choice together, so a model that chooses a prompt
by its input would score the choices of one question under different prompts, each steered by its own answer. Here the
choice is made once per question, by what all its rows have in common, and forced on each of them.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable

import torch
from lm_eval.models.huggingface import HFLM
from tqdm.auto import tqdm

from idp_peft.evaluation.harness_type import register_model_type
from idp_peft.evaluation.prompted import (
    check_prompt_id,
    idp_layer,
    input_logits,
    is_prompt_learning,
    select_prompts,
    virtual_tokens,
)
from idp_peft.evaluation.requests import Request, Row, group, rows, shared_context
from idp_peft.texts.tokens import ending, padded_batch, text_ids

register_model_type()
# Rows of a choice where the harness finds its batch size by itself: a choice costs a fraction of one layer.
_CHOICE_ROWS = 16


class HarnessModel(HFLM):
    """A model in memory: dense, compressed, or with an adapter of any kind.

    What differs from `HFLM`:
        1. An IDP model's choice reads only the tokens that all requests of a question share, and the harness's prefix
           token where they share none.
        2. Rows carry an attention mask, and log-softmax is taken in float32.
        3. Prompt positions are taken off the model's length before over-long requests are cut at the left.
        4. PEFT's own prompt methods generate one row at a time: they are wrong in left-padded batches.
        5. Each task is scored by itself, so that its numbers do not depend on the tasks it runs together with.
        6. Contexts begin with what the tokenizer puts in front of every text, as the harness has it, and end where they end:
            a token that the tokenizer puts behind every text would stand between a context and its answer.
        7. A rolling text (perplexity tasks) is cut as the harness cuts it, and each window chooses by what it reads and
           does not score: the prefix token for the first, the token before it for a further one, more for the last.

    Args:
        model (`PreTrainedModel` or `PeftModel`): the model.
        tokenizer: its tokenizer.
        batch_size (`int`, defaults to `4`): rows per forward pass.
        prompt_id (`int` or `str`, *optional*): force this prompt of an IDP model, by number or name, on every request
            (-1: none).
        max_length (`int`, *optional*): longest input in tokens; by default the model's own limit.

    Attributes:
        prompts (`dict`): `(task name, doc id)` to the prompt of that question (of a rolling text: the list of its
            windows' prompts); empty for a model without a bank.
    """

    def __init__(
        self, model, tokenizer, batch_size: int = 4, prompt_id: int | str | None = None, max_length: int | None = None
    ):
        prompt_id = check_prompt_id(model, prompt_id)
        log = logging.getLogger("lm_eval.models.huggingface")
        level = log.level
        log.setLevel(logging.ERROR)  # it warns that a model in memory ignores options which are not given here
        try:
            super().__init__(
                pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length, backend="causal"
            )
        finally:
            log.setLevel(level)
        self._begin(prompt_id)

    def _begin(self, prompt_id: int | None) -> None:
        self.prompt_id = prompt_id
        self.prompts: dict[tuple[str | None, int | None], int | list[int]] = {}
        self._questions: list[Hashable] | None = None
        self._windows: list[int] | None = None
        self._strings: list[str] = []
        self._prompt_of: dict[str, int] = {}

    @property
    def max_length(self) -> int:
        return super().max_length - virtual_tokens(self.model)

    # ------------------------------------------------------------------ log-likelihoods

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each request's continuation, and whether greedy decoding would have produced it."""
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for numbers in group([request.task_name for request in requests]).values():
            # An empty context is a question of its own: the unconditional likelihood of an answer.
            self._questions = [
                (request.task_name, number if request.doc_id is None else request.doc_id, request.args[0] != "")
                for number, request in ((number, requests[number]) for number in numbers)
            ]
            try:
                of_task = super().loglikelihood([requests[number] for number in numbers], disable_tqdm=disable_tqdm)
            finally:
                self._questions = None
            for number, answer in zip(numbers, of_task, strict=True):
                answers[number] = answer
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, window by window."""
        self._windows = []
        try:
            answers = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
            start = 0
            for request in requests if self._windows else ():
                stop = start + self._window_count(request.args[0])
                self.prompts[request.task_name, request.doc_id] = self._windows[start:stop]
                start = stop
        finally:
            self._windows = None
        return answers

    def _window_count(self, text: str) -> int:
        tokens, longest = len(self.tok_encode(text)), self.max_length
        return -(-tokens // longest)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        questions = self._questions if self._questions is not None else list(range(len(requests)))
        prompts = self._selected(requests, questions)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        waiting, start, self.batch_sizes = rows(requests, prompts, self.max_length), 0, {}
        with tqdm(total=len(waiting), desc="log-likelihoods", disable=disable_tqdm) as bar:
            while start < len(waiting):
                batch = waiting[start : start + (override_bs or self._rows_at(start, waiting))]
                for number, answer in self._score(batch):
                    answers[number] = answer
                start += len(batch)
                bar.update(len(batch))
        for (strings, _, _), answer in zip(requests, answers, strict=True):
            if strings is not None:
                self.cache_hook.add_partial("loglikelihood", strings, answer)
        return answers

    def _rows_at(self, start: int, waiting: list[Row]) -> int:
        """Rows of the next forward pass. With `batch_size="auto"`, as many as fit (rows come longest first), found once,
        or with `"auto:N"` anew for each N-th of the rows."""
        if self.batch_size != "auto":
            return self.batch_size
        part = start * max(1, int(self.batch_schedule)) // len(waiting)
        if part not in self.batch_sizes:
            self.batch_sizes[part] = self._detect_batch_size([(None, list(waiting[start].tokens), [0])])
        return self.batch_sizes[part]

    def _selected(self, requests: list[Request], questions: list[Hashable]) -> list[int | None]:
        """The prompt of each request, the same for all requests of a question; `None` for a model without a bank."""
        if idp_layer(self.model) is None:
            return [None] * len(requests)
        groups = group(questions)
        if self.prompt_id is not None:
            chosen = [self.prompt_id] * len(groups)
        else:
            shared = [
                shared_context([requests[index] for index in members], self.max_length) for members in groups.values()
            ]
            at_once = _CHOICE_ROWS if self.batch_size == "auto" else self.batch_size
            chosen = select_prompts(self.model, [tokens or [self.prefix_token_id] for tokens in shared], at_once)
        prompts: list[int | None] = [None] * len(requests)
        for (question, members), prompt in zip(groups.items(), chosen, strict=True):
            for index in members:
                prompts[index] = prompt
            if isinstance(question, tuple) and question[2]:
                self.prompts[question[:2]] = prompt
        if self._windows is not None:
            self._windows += prompts
        return prompts

    def _score(self, batch: list[Row]) -> list[tuple[int, tuple[float, bool]]]:
        """`(number of the request, its answer)` of every request that the rows answer."""
        ids, mask = padded_batch([list(row.tokens) for row in batch], self.device)
        idp = {} if batch[0].prompt is None else {"prompt_ids": torch.tensor([row.prompt for row in batch])}
        logits = input_logits(self.model, ids, mask, **idp)  # [B, n, V]
        found = []
        for row, of_row in zip(batch, logits, strict=True):
            longest = max(len(continuation) for _, continuation in row.answers)
            last = of_row[len(row.tokens) - longest : len(row.tokens)].float().log_softmax(-1)  # [longest, V]
            for number, continuation in row.answers:
                scores = last[-len(continuation) :]  # [continuation, V]
                targets = torch.tensor(continuation, device=scores.device)
                greedy = bool((scores.argmax(-1) == targets).all())
                found.append((number, (float(scores.gather(1, targets[:, None]).sum()), greedy)))
        return found

    # ------------------------------------------------------------------ generation

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each request's context; an IDP model chooses by that context."""
        before = self.batch_size_per_gpu
        if is_prompt_learning(self.model):
            self.batch_size_per_gpu = 1
        try:
            answers = super().generate_until(requests, disable_tqdm=disable_tqdm)
        finally:
            self.batch_size_per_gpu = before
        for request in requests:
            if request.args[0] in self._prompt_of:
                self.prompts[request.task_name, request.doc_id] = self._prompt_of[request.args[0]]
        return answers

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, left_truncate_len=None, **kwargs):
        if add_special_tokens is not None or self.add_bos_token is False:
            return super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs)
        return text_ids(self.tokenizer, string)[-(left_truncate_len or 0) :]

    def tok_batch_encode(self, strings: list[str], *args, **kwargs):
        # The harness encodes a batch and then generates on it: these are the contexts of the next `_model_generate`.
        self._strings = list(strings)
        ids, mask = super().tok_batch_encode(strings, *args, **kwargs)
        end = torch.tensor(ending(self.tokenizer), dtype=ids.dtype)
        if len(end) and (ids[:, -len(end) :] == end).all():
            return ids[:, : -len(end)], mask[:, : -len(end)]
        return ids, mask

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs) -> torch.Tensor:
        layer = idp_layer(self.model)
        if layer is not None and self.prompt_id is not None:
            kwargs["prompt_ids"] = torch.full((len(context),), self.prompt_id)
        tokens = super()._model_generate(context, max_length, stop, **kwargs)
        if layer is not None:
            self._prompt_of.update(zip(self._strings, layer.last_selection.prompt_ids.tolist(), strict=True))
        return tokens
