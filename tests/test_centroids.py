"""The choice by centroids: the definition, and centroids that are learned while training, the same in every way of training."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainingArguments

import idp_peft
from idp_peft import IDPConfig
from idp_peft.composition import compose
from idp_peft.hosting.architectures import find_decoder
from idp_peft.prompt_bank import PromptBank
from tests.reference import bank_of
from tests.tiny import ARCHITECTURES_AND_MORE, NAMES, VOCAB, tiny, token_batch

KINDS = ((2, 5), (30, 33), (60, 63))  # of text, by the tokens that occur in it


def of_kind(kind: int, rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + kind)
    return torch.randint(*KINDS[kind], (rows, tokens), generator=generator)


def examples(rows: int, tokens: int = 15, context: int = 12) -> list[dict]:
    """Texts of three kinds by turns, of which the first half is context."""
    made = []
    for row in range(rows):
        ids = of_kind(row % 3, 1, tokens, seed=row)[0].tolist()
        made.append({"input_ids": ids, "labels": [-100] * context + ids[context:], "attention_mask": [1] * tokens})
    return made


@pytest.fixture
def prompted(make):
    """prompted(name, **config) -> a model that chooses by centroids of three kinds, in evaluation mode."""

    def build(name: str = "llama", attention: str = "sdpa", **config):
        model = make(name, attention, **{"num_prompts": 3, "selection": "centroid", **config})
        if config.get("num_prompts", 3) == 3:
            rows = [{"input_ids": ids, "prompt_ids": kind} for kind in range(3) for ids in of_kind(kind, 8, 20)]
            idp_peft.fit_centroids(model, rows)
        return model

    return build


def by_hand(model, ids: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """The definition, row by row, in float64: `[rows, M]`."""
    embeddings, bank = model.get_input_embeddings(), bank_of(model)
    centroids = bank.centroids.double()
    centre = centroids.sum(0) / len(centroids)
    scores = []
    for row, where in zip(ids, context.bool(), strict=True):
        mean = torch.stack([embeddings(token[None])[0].double() for token in row[where]]).mean(0)
        scores.append(
            [torch.dot(mean - centre, c - centre) / (mean - centre).norm() / (c - centre).norm() for c in centroids]
        )
    return torch.tensor(scores)


# ---------------------------------------------------------------------- the choice


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_the_choice_is_the_definition_and_every_padded_row_chooses_alone(prompted, name, side):
    model = prompted(name)
    ids, mask = token_batch([5, 9, 4, 7], side)
    for row in range(4):
        ids[row][mask[row].bool()] = of_kind(row % 3, 1, int(mask[row].sum()))
    together = model(input_ids=ids, attention_mask=mask).logits
    selection = model.last_selection
    assert torch.allclose(selection.scores.double(), by_hand(model, ids, mask), atol=1e-5)
    assert torch.equal(selection.prompt_ids, selection.scores.argmax(-1))
    assert len(selection.prompt_ids.unique()) > 1
    for row in range(4):
        alone = model(input_ids=ids[row][mask[row].bool()][None]).logits[0]
        assert torch.equal(model.last_selection.scores, selection.scores[row : row + 1]), (
            "not one bit may depend on padding"
        )
        assert (together[row][mask[row].bool()] - alone).abs().max() <= 1e-4


@torch.no_grad()
def test_texts_choose_the_prompt_of_their_kind_and_labels_never_steer(prompted):
    model = prompted()
    for kind in range(3):
        ids = of_kind(kind, 5, 12, seed=7)
        model(input_ids=ids)
        assert model.last_selection.prompt_ids.tolist() == [kind] * 5
        other = torch.cat([ids, of_kind((kind + 1) % 3, 5, 30)], dim=1)
        labels = other.clone()
        labels[:, :12] = -100
        model(input_ids=other, labels=labels)
        assert model.last_selection.prompt_ids.tolist() == [kind] * 5
        mask = torch.arange(42).expand(5, -1) >= 12
        model(input_ids=other, selection_mask=mask)
        assert model.last_selection.prompt_ids.tolist() == [(kind + 1) % 3] * 5


@torch.no_grad()
def test_no_layer_runs_for_the_choice(prompted):
    model = prompted()
    ids, _ = token_batch([9])
    ran = []
    layer = find_decoder(model.get_base_model()).layers[0]
    handle = layer.register_forward_hook(lambda *_: ran.append(1))
    idp_peft.selection.select(model.base_model.layer, {"input_ids": ids})
    handle.remove()
    assert not ran


@torch.no_grad()
def test_an_adapter_without_centroids_says_what_to_do(make):
    model = make("llama", selection="centroid")
    ids, _ = token_batch([9])
    with pytest.raises(ValueError, match=r"no centroids yet.* call `idp_peft.fit_centroids"):
        model(input_ids=ids)
    with pytest.raises(ValueError, match="no centroids yet"):
        model.generate(input_ids=ids, max_new_tokens=1)
    assert model(input_ids=ids, prompt_ids=[1]).logits.shape == (1, 9, VOCAB)
    with pytest.raises(ValueError, match="`fit_centroids` needs an adapter with selection='centroid', got 'attention'"):
        idp_peft.fit_centroids(make("llama"), [{"input_ids": [2, 3]}])


@torch.no_grad()
def test_broken_centroids_are_named_as_the_reason(prompted):
    model = prompted()
    bank_of(model).centroids[1, 3] = float("nan")
    with pytest.raises(ValueError, match="centroids hold NaN or infinity"):
        model(input_ids=of_kind(0, 1, 9))


@torch.no_grad()
def test_a_prompt_that_no_context_trained_is_never_chosen(prompted):
    model = prompted(num_prompts=4)
    rows = [{"input_ids": ids, "prompt_ids": (0, 2, 3)[kind]} for kind in range(3) for ids in of_kind(kind, 8, 20)]
    idp_peft.fit_centroids(model, rows)
    ids = torch.cat([of_kind(kind, 4, 10, seed=9) for kind in range(3)])
    model(input_ids=ids)
    assert set(model.last_selection.prompt_ids.tolist()) == {0, 2, 3}
    assert (model.last_selection.scores[:, 1] == -1).all()


# ---------------------------------------------------------------------- set beforehand


def test_clusters_of_texts_are_their_kinds(make):
    model = make("llama", selection="centroid", num_prompts=3)
    rows = examples(60)
    prompt_ids = idp_peft.fit_centroids(model, rows)
    kinds = [set(prompt_ids[kind::3].tolist()) for kind in range(3)]
    assert all(len(found) == 1 for found in kinds)
    assert len(set.union(*kinds)) == 3
    with torch.no_grad():
        model(
            input_ids=torch.tensor([row["input_ids"] for row in rows]), labels=torch.tensor([r["labels"] for r in rows])
        )
    assert torch.equal(model.last_selection.prompt_ids, prompt_ids), "what was fitted is what chooses"
    assert bank_of(model).contexts.tolist() == [20, 20, 20]
    before = bank_of(model).centroids.clone()
    model.train()
    step(model, rows[:6])
    model.eval()
    assert torch.equal(bank_of(model).centroids, before), "training leaves fitted centroids where they are"


def test_fitting_takes_names_and_leaves_out_what_belongs_to_no_prompt(make):
    model = make("llama", selection="centroid", num_prompts=2, prompt_names=["a", "b"])
    rows = [
        {"input_ids": [2, 3], "prompt_ids": "b"},
        {"input_ids": [4, 5], "prompt_ids": "a"},
        {"input_ids": [6, 7], "prompt_ids": -1},
    ]
    assert idp_peft.fit_centroids(model, rows).tolist() == [1, 0, -1]
    embeddings = model.get_input_embeddings().weight
    assert torch.allclose(
        bank_of(model).centroids, torch.stack([embeddings[[4, 5]].mean(0), embeddings[[2, 3]].mean(0)])
    )
    with pytest.raises(ValueError, match="names 'c'"):
        idp_peft.fit_centroids(model, [{"input_ids": [2], "prompt_ids": "c"}])
    with pytest.raises(ValueError, match="2 prompts need at least as many contexts"):
        idp_peft.fit_centroids(model, [{"input_ids": [2]}])


# ---------------------------------------------------------------------- learned while training


def step(model, rows: list[dict], accumulate: int = 1) -> torch.Tensor:
    """One optimiser step on some examples, in so many batches; returns the prompts that they trained."""
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    size, trained = len(rows) // accumulate, []
    for start in range(0, len(rows), size):
        batch = {name: torch.tensor([row[name] for row in rows[start : start + size]]) for name in rows[0]}
        (model(**batch).loss / accumulate).backward()
        trained.append(model.last_selection.prompt_ids)
    optimiser.step()
    return torch.cat(trained)


def learner(make, **config):
    return make("llama", selection="centroid", **{"num_prompts": 3, **config}).train()


def test_kinds_are_found_while_training(make):
    model, rows = learner(make), examples(60)
    for start in range(0, 60, 12):
        trained = step(model, rows[start : start + 12])
    assert trained.tolist() == trained[:3].tolist() * 4
    assert len(set(trained[:3].tolist())) == 3, "each kind trains a prompt of its own"
    assert bank_of(model).contexts.sum() == 48, "those of the last step move nothing before it has ended"
    model.eval()
    with torch.no_grad():
        for kind in range(3):
            model(input_ids=of_kind(kind, 5, 10, seed=70))
            assert model.last_selection.prompt_ids.tolist() == [trained[kind]] * 5
    contexts = bank_of(model).contexts.clone()
    assert contexts.sum() == 60
    embeddings = model.get_input_embeddings().weight
    means = [
        torch.stack([embeddings[row["input_ids"][:12]].mean(0) for row in rows[kind::3]]).mean(0) for kind in range(3)
    ]
    expected = torch.zeros(3, len(means[0])).index_copy(0, trained[:3], torch.stack(means))
    assert torch.allclose(bank_of(model).centroids, expected, atol=1e-6), (
        "a centroid is the mean of what trained its prompt"
    )
    with torch.no_grad():
        model(input_ids=of_kind(0, 5, 10))
    assert torch.equal(bank_of(model).contexts, contexts), "evaluation moves nothing"


def test_accumulated_batches_learn_what_one_batch_learns(make):
    rows = examples(48)
    whole, parts = learner(make), learner(make)
    for start in range(0, 48, 12):
        trained = step(whole, rows[start : start + 12])
        assert torch.equal(step(parts, rows[start : start + 12], accumulate=4), trained)
    for model in (whole, parts):
        model.eval()
        model.state_dict()  # ends the step
    assert torch.equal(bank_of(whole).contexts, bank_of(parts).contexts)
    assert torch.allclose(bank_of(whole).centroids, bank_of(parts).centroids, atol=1e-6)


def test_a_run_that_resumes_learns_what_a_whole_run_learns(make, tmp_path):
    rows = examples(48)

    def train(folder, stop_at=None, resume=None):
        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                control.should_training_stop = state.global_step == stop_at

        torch.manual_seed(0)
        model = get_peft_model(
            tiny("llama"), IDPConfig(task_type="CAUSAL_LM", num_prompts=3, num_virtual_tokens=4, selection="centroid")
        )
        arguments = TrainingArguments(
            str(folder), max_steps=6, per_device_train_batch_size=4, gradient_accumulation_steps=2, save_steps=1,
            report_to=[], use_cpu=True, learning_rate=0.1, disable_tqdm=True,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows, callbacks=[Stop()]).train(resume_from_checkpoint=resume)
        return model.eval().state_dict()

    whole = train(tmp_path / "whole")
    for stop_at in (1, 3):
        folder = tmp_path / f"{stop_at}"
        train(folder, stop_at)
        resumed = train(folder, resume=str(folder / f"checkpoint-{stop_at}"))
        assert whole.keys() == resumed.keys()
        for name, tensor in whole.items():
            assert torch.equal(tensor, resumed[name]), name


def test_a_centroid_that_has_no_context_takes_the_one_that_fits_worst(make):
    model = learner(make, num_prompts=3)
    two = [row for number, row in enumerate(examples(24)) if number % 3 < 2]
    one = copy.deepcopy(two[0])
    step(model, [one, one, one])  # a first step of one text: one centroid
    assert bank_of(model).contexts.count_nonzero() == 0
    trained = step(model, two[1:9])
    assert bank_of(model).contexts.tolist().count(0) == 2
    assert len(trained.unique()) == 1
    step(model, two[1:9])
    assert bank_of(model).contexts.tolist().count(0) == 0, "the two others start at contexts that were far from it"


def test_rows_that_train_no_prompt_move_no_centroid(make):
    model, rows = learner(make), examples(24)
    for start in (0, 12):
        some = [{**row, "prompt_ids": number % 3} for number, row in enumerate(rows[start : start + 12])]
        odd = {**rows[0], "input_ids": [95] * 15, "prompt_ids": -1}
        step(model, [*some, odd])
    model.state_dict()  # ends the step
    assert bank_of(model).contexts.tolist() == [8, 8, 8]
    embeddings = model.get_input_embeddings().weight
    first = torch.stack([embeddings[row["input_ids"][:12]].mean(0) for row in rows[::3]]).mean(0)
    assert torch.allclose(bank_of(model).centroids[0], first, atol=1e-6)


def test_a_second_centroid_starts_at_the_context_that_is_farthest_from_the_only_one():
    clusters = PromptBank([1, 1], 1, context_width=2).clusters
    clusters.set(torch.tensor([0]), torch.tensor([[1.0, 0.0]]))
    for means, expected in ([[[1.0, 0.0]], [0.0, 0.0]], [[[1.1, 0.0], [-3.0, 0.0], [1.0, 0.2]], [-3.0, 0.0]]):
        means = torch.tensor(means)
        clusters.note(torch.zeros(len(means)).long(), torch.ones(len(means)).bool(), means, torch.zeros(1))
        clusters.settle()
        assert clusters.centroids[1].tolist() == expected, "and not at one that is the same"


def test_named_kinds_are_the_means_of_what_trains_them(make):
    model = learner(make, prompt_names=["x", "y", "z"])
    rows = [{**row, "prompt_ids": (2, 0, 1)[number % 3]} for number, row in enumerate(examples(24))]
    for start in (0, 12):
        assert step(model, rows[start : start + 12]).tolist() == [2, 0, 1] * 4
    model.eval()
    with torch.no_grad():
        for kind in range(3):
            model(input_ids=of_kind(kind, 5, 10, seed=70))
            assert model.last_selection.names == [["z", "x", "y"][kind]] * 5


def test_other_assignments_have_no_centroids_to_learn():
    for assignment in ("uniform", "all"):
        with pytest.raises(ValueError, match="`assignment` must be 'selected' where centroids are learned"):
            IDPConfig(task_type="CAUSAL_LM", selection="centroid", assignment=assignment)
        IDPConfig(task_type="CAUSAL_LM", selection="centroid", assignment=assignment, learn_centroids=False)


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3n", "bloom"])
@torch.no_grad()
def test_a_saved_adapter_chooses_as_it_did(prompted, tmp_path, name):
    model = prompted(name)
    ids, mask = token_batch([5, 9, 2, 7])
    expected = model(input_ids=ids, attention_mask=mask).logits
    scores = model.last_selection.scores
    model.save_pretrained(tmp_path)
    for low_memory in (False, True):
        again = PeftModel.from_pretrained(tiny(name), tmp_path, low_cpu_mem_usage=low_memory).eval()
        assert torch.equal(again(input_ids=ids, attention_mask=mask).logits, expected)
        assert torch.equal(again.last_selection.scores, scores)


def test_centroids_stay_float32_in_a_half_precision_model(prompted):
    model = prompted()
    before = bank_of(model).centroids.clone()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        model.to(dtype)
        assert torch.equal(bank_of(model).centroids, before)


def test_a_file_without_centroids_is_refused_and_changes_nothing(prompted, make, tmp_path):
    model = prompted()
    model.save_pretrained(tmp_path / "right")
    make("llama", num_prompts=3).save_pretrained(tmp_path / "attention")
    right = (tmp_path / "right" / "adapter_config.json").read_text()
    (tmp_path / "attention" / "adapter_config.json").write_text(right)
    base = tiny("llama")
    before = set(base.state_dict())
    with pytest.raises(
        ValueError, match=r"must hold .*centroids.* of shape \[3, 32\], as its config says \(selection='centroid'"
    ):
        PeftModel.from_pretrained(base, tmp_path / "attention")
    assert set(base.state_dict()) == before


@pytest.mark.parametrize("selection", ["centroid", "attention"])
@torch.no_grad()
def test_prompts_that_were_trained_apart_are_chosen_by_kind_once_composed(make, tmp_path, selection):
    for kind in range(3):
        model = make("llama", num_prompts=1, selection=selection, seed=0)
        bank_of(model).weight.normal_(generator=torch.Generator().manual_seed(kind))
        with torch.enable_grad():
            step(model.train(), [{"input_ids": row, "labels": row} for row in of_kind(kind, 9, 12).tolist()])
        model.save_pretrained(tmp_path / f"kind{kind}")
    base = tiny("llama")
    config = compose([str(tmp_path / f"kind{kind}") for kind in (2, 0, 1)], tmp_path / "bank", base_model=base)
    assert config.selection == "centroid"
    bank = PeftModel.from_pretrained(base, tmp_path / "bank").eval()
    for kind in range(3):
        bank(input_ids=of_kind(kind, 5, 10, seed=70))
        assert bank.last_selection.names == [f"kind{kind}"] * 5
    make("llama", num_prompts=1).save_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="selection='centroid' needs adapters that say what inputs"):
        compose(
            [str(tmp_path / "kind0"), str(tmp_path / "none")], tmp_path / "b", base_model=base, selection="centroid"
        )
    assert not (tmp_path / "b").exists()
    pair = [str(tmp_path / "bank"), str(tmp_path / "none")]
    assert compose(pair, tmp_path / "b", base_model=base, selection="attention").selection == "attention"


@pytest.mark.parametrize(
    ("one", "other", "composed"),
    [
        (
            {},
            {},
            {"selection": "attention"},
        ),  # a bank of two that chose by attention does not say what its prompts are for
        ({}, {"selection": "centroid"}, {"selection": "centroid", "learn_centroids": True}),
        ({"assignment": "uniform"}, None, {"selection": "centroid", "learn_centroids": False, "assignment": "uniform"}),
    ],
)
def test_a_composed_bank_chooses_by_centroids_where_all_have_them(make, tmp_path, one, other, composed):
    for name, prompts, fields in (("one", 1, one), ("other", 2, other)):
        if fields is not None:
            model = make("llama", num_prompts=prompts, **fields).train()
            step(model, [{"input_ids": row, "labels": row} for kind in (0, 1) for row in of_kind(kind, 4, 12).tolist()])
            model.save_pretrained(tmp_path / name)
    sources = [str(path) for path in sorted(tmp_path.iterdir())]
    config = compose(sources, tmp_path / "bank", base_model=tiny("llama"))
    assert {name: getattr(config, name) for name in composed} == composed


@pytest.mark.parametrize("missing", ["", "centroids", "contexts", "centroids contexts"])
def test_a_file_of_one_prompt_may_be_of_a_time_when_it_did_not_say_what_it_is_for(make, tmp_path, missing):
    make("llama", num_prompts=1).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if not name.endswith(tuple(missing.split()))}
    assert len(tensors) == 3 - len(missing.split())
    save_file(tensors, path, metadata={"format": "pt"})
    if len(missing.split()) == 1:
        with pytest.raises(ValueError, match=f"must hold .*{missing}"):
            PeftModel.from_pretrained(tiny("llama"), tmp_path)
    else:
        model = PeftModel.from_pretrained(tiny("llama"), tmp_path)
        assert not bank_of(model).clusters.known


@torch.no_grad()
def test_pictures_and_embeddings_choose_by_what_the_decoder_reads(prompted):
    model = prompted()
    ids, mask = token_batch([5, 9])
    model(input_ids=ids, attention_mask=mask)
    scores = model.last_selection.scores
    model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask)
    assert torch.equal(model.last_selection.scores, scores)
    assert "gemma3_multimodal" in ARCHITECTURES_AND_MORE


def test_the_selection_report_says_what_inputs_each_prompt_is_for(prompted):
    model = prompted()
    rows = examples(30)
    report = idp_peft.selection_report(model, rows)
    for kind, cluster in enumerate(report.clusters):
        assert set(cluster.tokens) == set(range(*KINDS[kind]))
        assert {number % 3 for number in cluster.examples} == {kind}
        assert report.scores[cluster.examples, kind].tolist() == sorted(report.scores[kind::3, kind], reverse=True)[:8]
    assert "prompt 1" in str(report).partition("most telling tokens")[2]
    assert idp_peft.selection_report(model, rows[:3]).warning is None
    with pytest.warns(UserWarning, match="2 of 3 prompts were never chosen.*name the kinds"):
        idp_peft.selection_report(model, rows[::3])
