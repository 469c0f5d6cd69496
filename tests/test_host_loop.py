"""Which tokens are targets, read off a trainer's running step: how loops hold that, and what must not be taken for it."""

from __future__ import annotations

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from idp_peft.hosting.trainers import labels_of_step
from tests.tiny import tiny
from tests.tiny_folder import tiny_tokenizer

IDS = torch.tensor([[7, 8, 9, 10, 11], [0, 7, 5, 6, 0]])
LABELS = torch.tensor([[-100, -100, 9, 10, 11], [-100, -100, 5, 6, 0]])
COMPLETIONS = (LABELS != -100).long()

# What a function between the step and the model holds, as its source; `ids` are the rows that the model is called with.
FOUND = {
    "labels": "labels = LABELS",
    "of another name": "answers = LABELS.clone()",
    "of another type": "answers = LABELS.int()",
    "in a dict": "batch = {'ids': ids, 'targets': LABELS}",
    "one token longer": "targets = torch.nn.functional.pad(LABELS, (0, 1), value=3)",
}
FOUND_IN_TRL = {
    "a mask of the completions": "completion_mask = COMPLETIONS",
    "the mask in a dict": "inputs = {'completion_mask': COMPLETIONS}",
    "how many tokens completions have": "logits_to_keep = 3",
    "how many logits the model shall keep, beside that": "logits_to_keep = 3; kwargs = {'logits_to_keep': 4}",
    "the prompts": "prompt_ids = IDS[:, :2]",
}
NOT_FOUND = {
    "nothing": "pass",
    "the tokens": "again = ids.clone()",
    "the mask": "attention_mask = (ids != 0).long()",
    "labels of other rows": "labels = LABELS.flip(0)",
    "shifted labels": "labels = torch.nn.functional.pad(LABELS[:, 1:], (0, 1), value=-100)",
    "labels of fewer rows": "labels = LABELS[:1]",
    "labels of fewer tokens": "labels = LABELS[:, :4]",
    "classes": "labels = torch.tensor([1, 0])",
    "numbers": "scores = LABELS.float()",
}


def held(source: str, module: str):
    """A function of a module that holds something while it asks."""
    code = f"def ask(ids):\n    {source}\n    return labels_of_step(ids)"
    names = {"__name__": module, "torch": torch, "labels_of_step": labels_of_step, "IDS": IDS, "LABELS": LABELS}
    names["COMPLETIONS"] = COMPLETIONS
    exec(code, names)
    return names["ask"]


def in_a_step(folder, ask, step: str = "training_step", **inputs):
    """What `ask` answers inside of a trainer's step."""

    class Asks(Trainer):
        def training_step(self, model, inputs, *_):
            return ask(IDS)

        def prediction_step(self, model, inputs, *_):
            return ask(IDS)

    args = TrainingArguments(str(folder), use_cpu=True, report_to=[])
    trainer = Asks(tiny("llama"), args, data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()))
    return getattr(trainer, step)(None, inputs)


@pytest.mark.parametrize("step", ["training_step", "prediction_step"])
@pytest.mark.parametrize("source", FOUND.values(), ids=FOUND.keys())
def test_labels_are_found_by_what_they_are(tmp_path, source, step):
    assert torch.equal(in_a_step(tmp_path, held(source, "somebody"), step).long(), LABELS)


@pytest.mark.parametrize("source", FOUND_IN_TRL.values(), ids=FOUND_IN_TRL.keys())
def test_in_trl_they_follow_from_where_completions_begin(tmp_path, source):
    found = in_a_step(tmp_path, held(source, "trl.trainer.some_trainer"))
    assert torch.equal(found != -100, COMPLETIONS.bool())
    assert torch.equal(found[found != -100], IDS[COMPLETIONS.bool()])
    assert in_a_step(tmp_path, held(source, "somebody")) is None, "elsewhere these names mean nothing"


@pytest.mark.parametrize("module", ["somebody", "trl.trainer.some_trainer"])
@pytest.mark.parametrize("source", NOT_FOUND.values(), ids=NOT_FOUND.keys())
def test_nothing_else_is_taken_for_labels(tmp_path, source, module):
    assert in_a_step(tmp_path, held(source, module)) is None


def test_labels_of_the_steps_own_rows_are_theirs_whatever_they_say(tmp_path):
    other = LABELS.where(LABELS == -100, 3)
    batch, ask = {"input_ids": IDS.clone(), "labels": other}, held("pass", "somebody")
    assert torch.equal(in_a_step(tmp_path, ask, **batch), other)
    assert in_a_step(tmp_path, ask, **{**batch, "input_ids": IDS.flip(0)}) is None


def test_outside_of_a_step_and_in_its_generate_there_are_none(tmp_path):
    source = FOUND["labels"]
    assert held(source, "somebody")(IDS) is None
    inside = held("return generate(ids)", "transformers.generation.utils")
    inside.__globals__["generate"] = held(source, "somebody")
    assert in_a_step(tmp_path, inside) is None
