"""Prompts by name, and rows that choose for themselves beside forced ones."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import DynamicCache, Trainer, TrainingArguments

from idp_peft.evaluation.chunks import score_chunks
from idp_peft.evaluation.prompted import check_prompt_id
from idp_peft.hosting.prompt_ids import check_prompt_ids
from tests.reference import bank_of, concatenated_logits
from tests.tiny import tiny, token_batch

NAMES = ["arc", "boolq", "piqa", "wic"]
TOLERANCE = 1e-4  # fp32, docs/method.md, promise 1
UNEQUAL = [3, 5, 2, 5]
named = {"prompt_names": NAMES, "num_virtual_tokens": UNEQUAL}


def logits(model, ids, mask, **call):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **call).logits


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "bloom", "mpt"])
def test_one_batch_mixes_tasks_by_name(make, architecture):
    model, base = make(architecture, **named), tiny(architecture)
    ids, mask = token_batch([5, 9, 7, 4])
    rows = ["piqa", 0, None, "boolq"]
    mixed = logits(model, ids, mask, prompt_ids=rows)
    assert torch.equal(mixed, logits(model, ids, mask, prompt_ids=torch.tensor([2, 0, -1, 1])))
    assert model.last_selection.names == ["piqa", "arc", None, "boolq"]
    for row, prompt in ((0, 2), (1, 0), (3, 1)):
        real = mask[row].bool()
        expected = concatenated_logits(model, base, ids[row][real][None], prompt)[0]
        assert (mixed[row][real] - expected).abs().max() <= TOLERANCE
    real = mask[2].bool()
    assert (mixed[2][real] - base(input_ids=ids[2][real][None]).logits[0]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("rows", [("piqa", 0, None), np.array(["piqa", "arc", "wic"]), np.array([2, 0, 3]), [2, 0, -1]])
def test_what_is_not_a_list_of_names_works_too(make, rows):
    model = make("llama", **named)
    ids, mask = token_batch([5, 9, 7])
    expected = [2, 0, -1 if rows[2] is None else {"wic": 3}.get(rows[2], rows[2])]
    forced = logits(model, ids, mask, prompt_ids=torch.tensor(expected))
    assert torch.equal(logits(model, ids, mask, prompt_ids=rows), forced)
    generated = model.generate(input_ids=ids, attention_mask=mask, prompt_ids=rows, max_new_tokens=3)
    assert model.last_selection.prompt_ids.tolist() == expected
    again = model.generate(input_ids=ids, attention_mask=mask, prompt_ids=torch.tensor(expected), max_new_tokens=3)
    assert torch.equal(generated, again)


@pytest.mark.parametrize("one", ["boolq", 1, np.int64(1), np.array("boolq")])
def test_one_name_or_number_is_for_every_row(make, one):
    model = make("llama", **named)
    ids, mask = token_batch([5, 9, 7])
    expected = logits(model, ids, mask, prompt_ids=torch.tensor([1, 1, 1]))
    assert torch.equal(logits(model, ids, mask, prompt_ids=one), expected)
    beams = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 4, "num_beams": 2}
    generated = model.generate(**beams, prompt_ids=one)
    assert model.last_selection.names == ["boolq"] * 3
    assert torch.equal(generated, model.generate(**beams, prompt_ids=torch.tensor([1, 1, 1])))


def test_names_are_saved_and_loaded(make, tmp_path):
    model = make("llama", **named)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    ids, mask = token_batch([5, 9])
    expected = logits(model, ids, mask, prompt_ids=torch.tensor([3, 1]))
    assert torch.equal(logits(loaded, ids, mask, prompt_ids=["wic", "boolq"]), expected)
    assert loaded.peft_config["default"].prompt_names == NAMES


def test_the_name_of_what_was_chosen(make):
    ids, mask = token_batch([5, 9, 7])
    model, unnamed = make("llama", **named), make("llama", num_virtual_tokens=UNEQUAL)
    model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2)
    chosen = model.last_selection
    assert chosen.names == [NAMES[i] for i in chosen.prompt_ids]
    logits(unnamed, ids, mask)
    assert unnamed.last_selection.names is None


@pytest.mark.parametrize(
    ("prompt_ids", "message"),
    [
        (
            ["arc", "bool"],
            r"`prompt_ids` names 'bool', which is no prompt of this adapter: it has 'arc', 'boolq', 'piqa'",
        ),
        ("Arc", r"`prompt_ids` names 'Arc', which is no prompt of this adapter"),
        (["arc"], r"`prompt_ids` must be integers of shape \[2\], one per row, got torch.int64 of shape \[1\]"),
        (["arc", 4], r"`prompt_ids` must be between -1 \(no prompt\) and 3, got \[0, 4\]"),
        (["auto", -2], r"`prompt_ids` must be between -1 \(no prompt\) and 3, got \[-1, -2\]"),
        (-2, r"`prompt_ids` must be between -1 \(no prompt\) and 3, got \[-2, -2\]"),
        (["arc", 1.5], r"must be integers of shape \[2\].*got torch.float32"),
        (True, r"`prompt_ids` must be a tensor or a list of one entry per row \(2\), or one name or number .*got True"),
        ({"arc", "wic"}, r"`prompt_ids` must be a tensor or a list of one entry per row"),
        ([["arc"], "wic"], r"`prompt_ids` must have one number or name per row \(2\), got \[\['arc'\], 3\]"),
    ],
)
def test_what_names_no_prompt_is_refused_before_anything_runs(make, prompt_ids, message):
    model = make("llama", **named)
    ids, mask = token_batch([4, 6])
    with pytest.raises(ValueError, match=message):
        logits(model, ids, mask, prompt_ids=prompt_ids)
    with pytest.raises(ValueError, match=message):
        model.generate(input_ids=ids, attention_mask=mask, prompt_ids=prompt_ids, max_new_tokens=2)
    assert logits(model, ids, mask).shape == (2, 6, 97), "an error must leave nothing behind"


def test_names_need_prompt_names(make):
    model = make("llama")
    ids, mask = token_batch([4, 6])
    with pytest.raises(ValueError, match=r"'arc', but this adapter's prompts have no names .*from 0 to 3, or set"):
        logits(model, ids, mask, prompt_ids="arc")
    with pytest.raises(ValueError, match="have no names"):
        model.peft_config["default"].prompt_id("arc")
    model.peft_config["default"].prompt_names = NAMES
    forced = logits(model, ids, mask, prompt_ids=torch.tensor([1, 1]))
    assert torch.equal(logits(model, ids, mask, prompt_ids="boolq"), forced)


# ---------------------------------------------------------------------- "auto"


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "bloom", "falcon", "mpt"])
@pytest.mark.parametrize("selection", ["attention", "random"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_that_choose_stand_beside_forced_ones(make, architecture, selection, side):
    model = make(architecture, selection=selection, **named)
    ids, mask = token_batch([5, 9, 7, 4, 6], side)
    free = logits(model, ids, mask)
    chosen = model.last_selection
    forced = [3 - int(chosen.prompt_ids[1]), -1]  # not what row 1 would choose
    rows = ["auto", forced[0], "auto", None, "auto"]
    mixed = logits(model, ids, mask, prompt_ids=rows)
    got = model.last_selection
    expected = chosen.prompt_ids.clone()
    expected[[1, 3]] = torch.tensor(forced)
    assert torch.equal(got.prompt_ids, expected)
    assert (mixed - logits(model, ids, mask, prompt_ids=expected))[mask.bool()].abs().max() <= TOLERANCE
    assert (mixed - free)[[0, 2, 4]][mask[[0, 2, 4]].bool()].abs().max() <= TOLERANCE
    if selection == "attention":
        assert torch.allclose(got.scores[[0, 2, 4]], chosen.scores[[0, 2, 4]], atol=1e-6)
        assert got.scores[[1, 3]].isnan().all()
    else:
        assert got.scores is None


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"use_cache": False},
        {"cache_implementation": "static"},
    ],
    ids=str,
)
def test_generation_with_rows_that_choose(make, arguments):
    """Random selection hashes the whole input, so another choice at a later step or of another row would show."""
    for selection in ("attention", "random"):
        model = make("llama", selection=selection, **named)
        ids, mask = token_batch([5, 9, 7, 4])
        call = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 5, **arguments}
        model.generate(**call)
        expected = model.last_selection.prompt_ids.clone()
        expected[1], expected[2] = -1, 3 - int(expected[2])
        rows = ["auto", None, int(expected[2]), "auto"]
        mixed = model.generate(**call, prompt_ids=rows)
        assert torch.equal(model.last_selection.prompt_ids, expected)
        assert torch.equal(mixed, model.generate(**call, prompt_ids=expected))


def test_rows_that_choose_read_the_whole_input_of_a_chunked_prefill(make):
    model = make("llama", **named)
    ids, mask = token_batch([9, 9])
    call = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 3}
    whole = model.generate(**call, prompt_ids=["auto", "wic"])
    scores = model.last_selection.scores
    chunked = model.generate(
        **call, prompt_ids=["auto", "wic"], prefill_chunk_size=3, past_key_values=DynamicCache(config=model.config)
    )
    assert torch.equal(chunked, whole)
    assert torch.allclose(model.last_selection.scores[0], scores[0], atol=1e-6)


def test_a_draft_never_steers_a_row_that_chooses(make):
    model = make("llama", **named)
    ids, _ = token_batch([6])
    repeated = torch.cat([ids, ids], dim=1)  # prompt lookup drafts what followed before
    plain = model.generate(input_ids=repeated, max_new_tokens=4)
    scores = model.last_selection.scores
    looked_up = model.generate(input_ids=repeated, max_new_tokens=4, prompt_lookup_num_tokens=4, prompt_ids=["auto"])
    assert torch.allclose(model.last_selection.scores, scores, atol=1e-6)
    assert torch.equal(plain, looked_up)


def test_auto_for_all_rows_is_free_choice(make):
    model = make("llama", **named)
    ids, mask = token_batch([5, 9])
    free = logits(model, ids, mask)
    chosen = model.last_selection
    assert torch.equal(logits(model, ids, mask, prompt_ids="auto"), free)
    assert torch.equal(model.last_selection.scores, chosen.scores)


def test_only_rows_that_choose_need_something_to_choose_by(make):
    model = make("llama", **named)
    ids, mask = token_batch([4, 6, 5])
    steers = torch.ones_like(mask)
    steers[:2] = 0
    mixed = logits(model, ids, mask, prompt_ids=["arc", 2, "auto"], selection_mask=steers)
    assert torch.equal(mixed, logits(model, ids, mask, prompt_ids=model.last_selection.prompt_ids))
    with pytest.raises(ValueError, match=r"`selection_mask` leaves no token to choose a prompt by in row\(s\) \[1\]"):
        logits(model, ids, mask, prompt_ids=["arc", "auto", "auto"], selection_mask=steers)
    with pytest.raises(ValueError, match=r"`selection_mask` must have the input's shape \[3, 6\], got \[2, 6\]"):
        logits(model, ids, mask, prompt_ids=["arc", "auto", 2], selection_mask=steers[:2])


def test_labels_never_steer_a_row_that_chooses(make):
    model = make("llama", **named)
    ids, mask = token_batch([9, 6, 8])
    labels = ids.masked_fill(torch.arange(9) < 6, -100)
    other = ids.clone()
    other[:, 6:] = 3
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, labels=labels)
        scores = model.last_selection.scores
        model(input_ids=other, attention_mask=mask, labels=labels, prompt_ids=["auto", "wic", "auto"])
    assert torch.allclose(model.last_selection.scores[[0, 2]], scores[[0, 2]], atol=1e-6)


def test_the_next_turn_keeps_what_a_row_chose(make):
    model = make("llama", **named)
    ids, mask = token_batch([6, 9, 4])
    free = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 3, "return_dict_in_generate": True}
    first = model.generate(**free, prompt_ids=["auto", "wic", None])
    chosen = model.last_selection.prompt_ids.tolist()
    longer = torch.cat([first.sequences, ids[:, -2:]], dim=1)
    longer_mask = torch.cat([mask, torch.ones(3, 5, dtype=torch.long)], dim=1)
    call = {"input_ids": longer, "attention_mask": longer_mask, "max_new_tokens": 3}
    expected = model.generate(**call, prompt_ids=torch.tensor(chosen))
    for rows in (["auto", "wic", None], ["auto", "auto", "auto"], [NAMES[chosen[0]], 3, -1], None):
        cache = copy.deepcopy(first.past_key_values)
        assert torch.equal(model.generate(**call, past_key_values=cache, prompt_ids=rows), expected)
        assert model.last_selection.prompt_ids.tolist() == chosen
        assert model.last_selection.names == [None if i < 0 else NAMES[i] for i in chosen]
    with pytest.raises(
        ValueError, match=rf"`prompt_ids` \[{chosen[0]}, 0, -1\] differ from those .* with, \[{chosen[0]}, 3"
    ):
        model.generate(**call, past_key_values=first.past_key_values, prompt_ids=["auto", "arc", "auto"])


@pytest.mark.parametrize("assignment", ["selected", "uniform"])
def test_in_training_forced_rows_train_theirs_and_others_what_they_are_assigned(make, assignment):
    model = make("llama", assignment=assignment, **named)
    ids, mask = token_batch([9, 6, 8, 7, 5])
    labels = ids.masked_fill(torch.arange(9) < 6, -100)
    call = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    with torch.no_grad():
        model(**call)
    chosen = model.last_selection.prompt_ids
    model.train()
    model(**call, prompt_ids=["auto", "wic", "auto", "auto", "auto"]).loss.backward()
    got = model.last_selection.prompt_ids
    assert got[1] == 3
    others = got[[0, 2, 3, 4]]
    if assignment == "selected":
        assert torch.equal(others, chosen[[0, 2, 3, 4]])
    else:
        assert sorted(others.tolist()) == [0, 1, 2, 3]
    gradients = bank_of(model).weight.grad.split(UNEQUAL)
    assert {i for i, gradient in enumerate(gradients) if gradient.abs().max() > 0} == set(got.tolist())


def test_every_prompt_on_every_example_has_no_rows_that_choose(make):
    model = make("llama", assignment="all", **named)
    model.train()
    ids, mask = token_batch([9, 6])
    with pytest.raises(ValueError, match=r"assignment='all' works .* not with 'auto' among `prompt_ids`"):
        model(input_ids=ids, attention_mask=mask, labels=ids, prompt_ids=["auto", "arc"])


# ---------------------------------------------------------------------- elsewhere


def test_a_dataset_maps_names_to_numbers_for_the_trainer(make, tmp_path):
    model = make("llama", **named)
    config = model.peft_config["default"]
    tasks = ["wic", "piqa", None, "wic"]
    ids, _ = token_batch([6, 6, 6, 6])
    rows = [{"input_ids": ids[i], "labels": ids[i], "prompt_ids": config.prompt_id(tasks[i])} for i in range(4)]
    before = [part.clone() for part in bank_of(model).weight.detach().split(UNEQUAL)]
    arguments = TrainingArguments(
        tmp_path, max_steps=1, per_device_train_batch_size=4, remove_unused_columns=False, report_to=[], use_cpu=True
    )
    Trainer(model, arguments, train_dataset=rows).train()
    after = bank_of(model).weight.detach().split(UNEQUAL)
    assert [not torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [False, False, True, True]


def test_threads_keep_their_own_names(make):
    model = make("llama", **named)
    ids, mask = token_batch([5, 9])
    call = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6}
    tasks = [["arc", "auto"], ["wic", "boolq"], ["auto", None]]
    expected = [model.generate(**call, prompt_ids=task) for task in tasks]
    results = [None] * 3

    def generate(index):
        for _ in range(4):
            tokens = model.generate(**call, prompt_ids=tasks[index])
        results[index] = tokens, model.last_selection.names

    threads = [threading.Thread(target=generate, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(3):
        tokens, names = results[index]
        assert torch.equal(tokens, expected[index])
        asked = tasks[index]
        assert all(name == task for name, task in zip(names, asked, strict=True) if task != "auto")


def test_an_evaluation_forces_a_prompt_by_its_name(make):
    model = make("llama", **named)
    ids, _ = token_batch([8, 8, 8])
    by_name = score_chunks(model, ids.tolist(), 4, prompt_id="piqa")
    by_number = score_chunks(model, ids.tolist(), 4, prompt_id=2)
    assert torch.equal(by_name.nats, by_number.nats)
    assert by_name.prompt_ids.tolist() == [2, 2, 2]
    assert [check_prompt_id(model, prompt) for prompt in ("wic", 0, -1, None, "auto")] == [3, 0, -1, None, None]
    with pytest.raises(ValueError, match="'hellaswag', which is no prompt of this adapter"):
        check_prompt_id(model, "hellaswag")


def test_the_callers_tensor_is_left_alone():
    given = torch.tensor([1, -1], dtype=torch.int32)
    assert check_prompt_ids(given, 2, 4).dtype == torch.int64
    assert given.tolist() == [1, -1]
    rows = ["a", "auto"]
    assert check_prompt_ids(rows, 2, 4, ["a", "b", "c", "d"]).tolist() == [0, -2]
    assert rows == ["a", "auto"]
