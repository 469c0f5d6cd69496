"""Training loops, each run for one step on a tiny model, and what came of it.

python -m tests.training_loops        # writes the table of docs/training.md anew
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import DataCollatorForSeq2Seq, LlamaForSequenceClassification, Trainer, TrainingArguments

from idp_peft import IDPConfig
from tests.reference import bank_of, brute_force_scores
from tests.tiny import tiny
from tests.tiny_chats import chat_tokenizer, tiny_answers, tiny_questions

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
QUESTIONS = tiny_questions(8, seed=1)
ARGUMENTS = {
    "per_device_train_batch_size": 8,
    "max_steps": 1,
    "learning_rate": 0.05,
    "bf16": False,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
}
LOOPS: dict[str, Callable] = {}


def loop(name: str):
    """A function of the model and a folder that trains one step."""

    def add(function):
        LOOPS[name] = function
        return function

    return add


@dataclass(frozen=True)
class Outcome:
    """What one loop did.

    Args:
        error (`str`, *optional*): of IDP, where it refused.
        moved (`bool`): whether the prompts changed.
        read (`str`): "context" where each row that trained got the prompt that the tokens before its targets choose,
            "row" where it is the one that all its tokens choose, "dealt" where it is neither.
        warned (`bool`): whether IDP said that targets may steer the choice.
    """

    error: str | None = None
    moved: bool = False
    read: str = ""
    warned: bool = False

    def cell(self) -> str:
        """Of the table."""
        if self.error is not None:
            instead = re.search(r"use assignment=('selected'(?: or 'uniform')?)", self.error)
            return "refused: " + (f"use {instead[1]}" if instead else self.error)
        assert self.moved
        chosen = {"context": ", chosen by the context", "row": ", chosen by the whole row", "dealt": ""}[self.read]
        return f"trains{chosen}" + (", warned" if self.warned else "")


@functools.cache
def run(name: str, **config) -> Outcome:
    """Train one step in a loop, by default with the default settings."""
    base = tiny("llama")
    base.generation_config.eos_token_id = None
    torch.manual_seed(0)
    model = get_peft_model(base, IDPConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, **config))
    with torch.no_grad():  # prompts of which most examples choose another once they read their targets
        bank_of(model).weight.normal_(std=0.2, generator=torch.Generator().manual_seed(9))
    start, seen = bank_of(model).weight.detach().clone(), []
    watch(model, seen)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            LOOPS[name](model, folder)
        except ValueError as error:
            if "IDP" not in str(error) and "assignment" not in str(error):
                raise
            return Outcome(error=str(error))
    warned = any("targets may steer" in str(warning.message) for warning in caught)
    moved = not torch.equal(bank_of(model).weight, start)
    with torch.no_grad():
        bank_of(model).weight.copy_(start)
    return Outcome(None, moved, what_was_read(model, seen), warned)


def watch(model, seen: list) -> None:
    """Note the tokens and the prompt of every row that a forward with gradients reads."""
    layer, now = model.base_model.layer, {}

    def before(decoder, args, kwargs):
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is not None:  # not a prompt alone
            mask = kwargs.get("attention_mask")
            mask = torch.ones_like(ids) if mask is None or mask.shape != ids.shape else mask
            now["rows"] = [row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)]

    def remember(selection):
        if torch.is_grad_enabled():
            seen.extend(zip(now["rows"], selection.prompt_ids.tolist(), strict=True))
        type(layer).remember(layer, selection)

    layer.decoder.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
    layer.remember = remember


def what_was_read(model, seen: list) -> str:
    """By the definition, which tokens explain the prompts that rows chose."""
    eager = tiny("llama", "eager")
    forms = [form for each in QUESTIONS for form in (each, f"<s> {each}", f"w2 {each} w3 w4")]
    contexts = [chat_tokenizer()(form).input_ids for form in forms]

    def chosen_by(tokens):
        ids = torch.tensor([tokens])
        ones = torch.ones_like(ids)
        return brute_force_scores(model, eager, ids, ones, ones, 0, "mean").argmax().item()

    by_context, by_row, rows = [], [], dict.fromkeys((tuple(row), prompt) for row, prompt in seen)
    for row, prompt in rows:
        context = max((each for each in contexts if list(row[: len(each)]) == each), key=len)
        by_context.append(chosen_by(context) == prompt)
        by_row.append(chosen_by(list(row)) == prompt)
    return "context" if all(by_context) else "row" if all(by_row) else "dealt"


# ---------------------------------------------------------------------- own loops and transformers' Trainer


def examples() -> list[dict]:
    """Questions with answers: the answers are the labels."""
    tokenizer, rows = chat_tokenizer(), []
    for question, answer in zip(QUESTIONS, tiny_answers(tiny("llama"), QUESTIONS), strict=True):
        context, target = tokenizer(question).input_ids, tokenizer(answer).input_ids
        ids = context + target
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(context) + target})
    return rows


def batch() -> dict:
    return dict(DataCollatorForSeq2Seq(chat_tokenizer())(examples()))


def nats(logits, labels):
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def step(model, loss) -> None:
    loss.backward()
    torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.5).step()


@loop("an own loop that passes `labels`")
def own_loop(model, folder):
    step(model.train(), model(**batch()).loss)


@loop("an own loop that passes `selection_mask`, not `labels`")
def own_loop_with_a_mask(model, folder):
    rows = batch()
    labels = rows.pop("labels")
    step(model.train(), nats(model(**rows, selection_mask=labels == -100).logits, labels))


@loop("an own loop that passes neither")
def own_loop_without_labels(model, folder):
    rows = batch()
    labels = rows.pop("labels")
    step(model.train(), nats(model(**rows).logits, labels))


@loop("an own loop that calls the decoder")
def own_loop_of_the_decoder(model, folder):
    rows, base = batch(), model.train().get_base_model()
    labels = rows.pop("labels")
    step(model, nats(base.lm_head(base.model(**rows).last_hidden_state), labels))


def with_trainer(model, folder, kind=Trainer, label_smoothing_factor=0.0, **options):
    args = TrainingArguments(folder, label_smoothing_factor=label_smoothing_factor, **ARGUMENTS)
    collator = DataCollatorForSeq2Seq(chat_tokenizer())
    kind(model=model, args=args, train_dataset=examples(), data_collator=collator, **options).train()


@loop("`Trainer`")
def trainer(model, folder):
    with_trainer(model, folder)


@loop("`Trainer`, `label_smoothing_factor`")
def label_smoothing(model, folder):
    with_trainer(model, folder, label_smoothing_factor=0.1)


def loss_of(outputs, labels, num_items_in_batch=None):
    return nats(outputs.logits, labels)


@loop("`Trainer`, `compute_loss_func`")
def loss_function(model, folder):
    with_trainer(model, folder, compute_loss_func=loss_of)


@loop("`Trainer`, its own `compute_loss`")
def own_compute_loss(model, folder):
    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            targets = inputs.pop("labels")
            return nats(model(**inputs).logits, targets)

    with_trainer(model, folder, Own)


# ---------------------------------------------------------------------- TRL


def with_trl(where: str, name: str, model, folder: str, data: list[dict], options: dict, settings: dict) -> None:
    """Train with TRL's `<name>Trainer` and `<name>Config`, which are in the module `where`."""
    from datasets import Dataset

    module, tokenizer = importlib.import_module(where), chat_tokenizer()
    tokenizer.padding_side = "left"  # as it is for whatever samples answers
    arguments = getattr(module, f"{name}Config")(output_dir=folder, **ARGUMENTS, **settings)
    getattr(module, f"{name}Trainer")(
        model=model, args=arguments, train_dataset=Dataset.from_list(data), processing_class=tokenizer, **options
    ).train()


def chats() -> list[dict]:
    turns = zip(QUESTIONS, tiny_answers(tiny("llama"), QUESTIONS), strict=True)
    return [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in turns]


def completions() -> list[dict]:
    turns = zip(QUESTIONS, tiny_answers(tiny("llama"), QUESTIONS), strict=True)
    return [{"prompt": f"{q} ", "completion": f"{a} <s>"} for q, a in turns]


def preferences() -> list[dict]:
    good, bad = tiny_answers(tiny("llama"), QUESTIONS, 3), tiny_answers(tiny("llama"), QUESTIONS[::-1], 5)
    rows = zip(QUESTIONS, good, bad, strict=True)
    return [{"prompt": f"{q} ", "chosen": f"{a} ", "rejected": f"{b} "} for q, a, b in rows]


def questions() -> list[dict]:
    return [{"prompt": question} for question in QUESTIONS]


def alternating(completions, **_) -> list[float]:
    """Rewards that differ among the answers to one prompt, whatever is sampled."""
    return [float(index % 2) for index in range(len(completions))]


def with_context() -> list[dict]:
    return [row | {"privileged_context": "w5 w6"} for row in questions()]


def with_references() -> list[dict]:
    return [row | {"reference": row["chosen"]} for row in preferences()]


REWARDED, TAUGHT = {"reward_funcs": alternating}, {"teacher_model": None}
SHORT, GROUPS = {"max_completion_length": 5}, {"max_completion_length": 5, "num_generations": 4}
BASE_TEACHES = {"teacher_model_kind": "base"}  # TRL's own default is for LoRA alone
NOT_BYTES = {"dataset_kwargs": {"skip_prepare_dataset": True}}  # its preparation wants a byte-level tokenizer
# title -> module, class, data, further arguments of the trainer, settings beside the defaults (most of them sizes)
TRL = {
    "SFT": ("trl", "SFT", completions, {}, {}),
    "SFT, `label_smoothing_factor`": ("trl", "SFT", completions, {}, {"label_smoothing_factor": 0.1}),
    "SFT, `compute_loss_func`": ("trl", "SFT", completions, {"compute_loss_func": loss_of}, {}),
    "DPO": ("trl", "DPO", preferences, {}, {}),
    "KTO": ("trl", "KTO", preferences, {}, {}),
    "GRPO": ("trl", "GRPO", questions, REWARDED, GROUPS),
    "RLOO": ("trl", "RLOO", questions, REWARDED, GROUPS),
    "Distillation": ("trl", "Distillation", questions, TAUGHT, SHORT),
    "A2PO": ("trl.experimental.a2po", "A2PO", questions, REWARDED, SHORT),
    "CPO": ("trl.experimental.cpo", "CPO", preferences, {}, {}),
    "GKD": ("trl.experimental.gkd", "GKD", chats, TAUGHT, {"max_new_tokens": 5}),
    "GMPO": ("trl.experimental.gmpo", "GMPO", questions, REWARDED, GROUPS),
    "GOLD": ("trl.experimental.gold", "GOLD", chats, TAUGHT, SHORT | NOT_BYTES),
    "IW-OPD": ("trl.experimental.iw_opd", "IWOPD", chats, TAUGHT, SHORT),
    "Online DPO": ("trl.experimental.online_dpo", "OnlineDPO", questions, REWARDED, {"max_new_tokens": 5}),
    "ORPO": ("trl.experimental.orpo", "ORPO", preferences, {}, {}),
    "SDFT": ("trl.experimental.sdft", "SDFT", with_context, {}, GROUPS | {"distillation_topk": 10}),
    "SDPO": ("trl.experimental.sdpo", "SDPO", questions, REWARDED, GROUPS | BASE_TEACHES),
    "TPO": ("trl.experimental.tpo", "TPO", with_references, {}, {}),
}
# What is not run: the title of what is run instead, or why nothing is.
NOT_RUN = {
    "AsyncDistillation": "needs a vLLM server",
    "AsyncGRPO": "needs a vLLM server",
    "ServerDistillation": "needs a vLLM server",
}


def trl_loop(title: str, where: str, name: str, data: Callable, options: dict, settings: dict) -> None:
    @loop(f"TRL: {title}")
    def train(model, folder):
        given = dict(options)
        if options is TAUGHT:  # some look for its tokenizer where it came from
            given["teacher_model"] = teacher = tiny("llama", seed=1)
            chat_tokenizer().save_pretrained(folder)
            teacher.save_pretrained(folder)
            teacher.config._name_or_path = folder
        with_trl(where, name, model, folder, data(), given, settings)


for _title, _how in TRL.items():
    trl_loop(_title, *_how)


@loop("TRL: Reward")
def reward(model, folder):
    config = tiny("llama").config
    config.num_labels = 1
    peft_config = IDPConfig(num_virtual_tokens=4)
    with_trl(
        "trl", "Reward", LlamaForSequenceClassification(config), folder, preferences(), {"peft_config": peft_config}, {}
    )


# ---------------------------------------------------------------------- the table

PAGE = Path(__file__).parent.parent / "docs" / "training.md"
COLUMNS = {"`assignment='selected'`, the default": "selected", "`'uniform'`": "uniform", "`'all'`": "all"}


def table() -> str:
    """Markdown: what each loop does, by assignment."""
    lines = [f"| loop | {' | '.join(COLUMNS)} |", "|---|" + "---|" * len(COLUMNS)]
    for name in LOOPS:
        cells = [run(name, assignment=assignment).cell() for assignment in COLUMNS.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table_of(page: str) -> str:
    """The table that a page has between its marks."""
    return re.search(r"<!-- loops: begin -->\n(.*?)\n<!-- loops: end -->", page, re.DOTALL)[1]


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    before, mark = f"<!-- loops: begin -->\n{table_of(page)}", "<!-- loops: begin -->\n"
    PAGE.write_text(page.replace(before, mark + table()), encoding="utf-8")
