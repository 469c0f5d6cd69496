"""One process's models and texts, and the measurement of one cell."""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
import time
from pathlib import Path

import torch
from transformers import set_seed

from benchmarks.common.cells import Cells
from benchmarks.repair.tables import slug
from idp_peft.evaluation import environment
from idp_peft.evaluation.chunks import chunk_documents, score_chunks
from idp_peft.models.loading import accepted_by_trainer, load_model, load_tokenizer
from idp_peft.offline.assets import KINDS
from idp_peft.recover.adapter import with_adapter
from idp_peft.recover.arguments import RecoverArguments
from idp_peft.recover.methods import LEARNING_RATES, learning_rate
from idp_peft.recover.settings import RecoverSettings
from idp_peft.recover.training import kinds_of, make_trainer, training_examples
from idp_peft.texts.data import Block, blocks, load_texts

LENGTH, CONTEXT = 256, 64  # tokens of a block; tokens at its front that the choice reads, not scored


def work(model: str, teacher: str, held_out: int, results: Path, queue, deadline: float) -> None:
    """Measure cells of a queue until it gives `None`, and begin none after the deadline."""
    bench = None
    while (cell := queue.get()) is not None:
        if time.time() > deadline:
            continue
        bench = Bench(model, teacher, held_out) if bench is None else bench
        result = bench.measure(cell)
        Cells(results, f"{cell['text']}/{slug(cell['contender'])}").add(cell["name"], result)
        print(f"{cell['text']}: {cell['contender']}, {cell['name']}: {result['seconds']:.1f} s", flush=True)


class Bench:
    """A compressed and a dense model, on which cells are measured.

    Args:
        model (`str`), teacher (`str`): the models.
        held_out (`int`): blocks per text that are scored.
    """

    def __init__(self, model: str, teacher: str, held_out: int) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        torch.set_float32_matmul_precision("high")
        self.name, self.held_out = model, held_out
        self.tokenizer = load_tokenizer(model)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = load_model(model, for_training=True).to(self.device)
        self.teacher = load_model(teacher).to(self.device)
        self._blocks: dict[str, list[Block]] = {}
        self._scored: dict[tuple[str, str], list[list[int]]] = {}
        self._unrepaired: dict[tuple[str, str], dict[str, list[float]]] = {}

    def measure(self, cell: dict) -> dict:
        """Train a contender as a cell says, and score it: nats per token of each held-out block, of the dense, the compressed
        and the repaired model."""
        prompts, scales = cell["rate"] or (None, None)
        settings = RecoverSettings(self.name, teacher="dense", context_tokens=CONTEXT, **cell["settings"])
        text = "wiki" if cell["text"] == "tuning" else cell["text"]
        train = self._train(text, settings.kind_column is not None)
        with tempfile.TemporaryDirectory() as folder:
            arguments = RecoverArguments(
                output_dir=folder,
                max_steps=cell["steps"],
                seed=cell["seed"],
                learning_rate=prompts or learning_rate(settings),
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                remove_unused_columns=False,
            )
            began = time.perf_counter()
            set_seed(cell["seed"])
            model = with_adapter(self.model, self.tokenizer, train, settings, self.teacher).to(self.device)
            kinds = kinds_of(train)
            scales = scales or LEARNING_RATES["scales"]
            with accepted_by_trainer(model):
                examples = training_examples(train, CONTEXT, kinds)
                trainer = make_trainer(model, arguments, examples, teacher=self.teacher, scales_learning_rate=scales)
            started = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - started
        result = {"parameters": model.get_nb_trainable_parameters()[0], "rates": [arguments.learning_rate, scales]}
        result |= {"steps": cell["steps"], "seed": cell["seed"], "seconds": seconds, "start_seconds": started - began}
        result["nats"], result["choices"] = {}, {}
        for of, scored in self._texts(text, cell["split"]).items():
            scores = score_chunks(model, scored, CONTEXT, batch_size=16)
            result["nats"][of] = _rounded(scores.nats / (LENGTH - CONTEXT))
            if scores.prompt_ids is not None and settings.num_prompts > 1:
                result["choices"][of] = scores.prompt_ids.tolist()
        if text == "kinds" and settings.method == "idp" and settings.num_prompts > 1:
            result["by_prompt"] = self._by_prompt(model, settings.num_prompts, cell["split"])
        self.model = self._without_adapter(model)
        result["unrepaired"] = self._of_base(text, cell["split"])
        result["environment"] = environment()
        return result

    def _without_adapter(self, model):
        if hasattr(model.base_model, "unload"):
            return model.unload()
        return model.get_base_model()  # of PEFT's prompt learning

    def _by_prompt(self, model, num_prompts: int, split: str) -> dict[str, list[list[float]]]:
        """Nats of every block under every prompt, forced: text -> `[prompts][blocks]`."""
        return {
            of: [
                _rounded(score_chunks(model, scored, CONTEXT, prompt, 16).nats / (LENGTH - CONTEXT))
                for prompt in range(num_prompts)
            ]
            for of, scored in self._texts("kinds", split).items()
        }

    def _of_base(self, text: str, split: str) -> dict[str, dict[str, list[float]]]:
        """Nats of the dense and the compressed model. The compressed one is scored after its first repair: unchanged."""
        if (text, split) not in self._unrepaired:
            self._unrepaired[text, split] = {
                role: {
                    of: _rounded(score_chunks(model, scored, CONTEXT, batch_size=16).nats / (LENGTH - CONTEXT))
                    for of, scored in self._texts(text, split).items()
                }
                for role, model in (("dense", self.teacher), ("compressed", self.model))
            }
        return self._unrepaired[text, split]

    def _train(self, text: str, named: bool) -> list[Block]:
        """Training blocks; of six kinds as many of each."""
        if text not in self._blocks:
            cut = {
                kind: blocks(self.tokenizer, load_texts(kind, "train"), LENGTH)
                for kind in (KINDS if text == "kinds" else [text])
            }
            fewest = min(map(len, cut.values()))
            self._blocks[text] = [
                dataclasses.replace(block, kind=kind)
                for kind, of_kind in cut.items()
                for block in _spread(of_kind, fewest)
            ]
        found = self._blocks[text]
        return found if named else [dataclasses.replace(block, kind=None) for block in found]

    def _texts(self, text: str, split: str) -> dict[str, list[list[int]]]:
        """What is scored: name -> blocks."""
        names = KINDS if text == "kinds" else [text] if split == "validation" else [text, "c4"]
        each = math.ceil(self.held_out / len(names)) if text == "kinds" else self.held_out
        for name in names:
            if (name, split) not in self._scored:
                found = chunk_documents(self.tokenizer, load_texts(name, split), LENGTH)
                self._scored[name, split] = _spread(found, each)
        return {name: self._scored[name, split] for name in names}


def _spread(items: list, count: int) -> list:
    """So many items from all over a list."""
    every = max(1, len(items) // count)
    return items[::every][:count]


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 6) for value in values.tolist()]
