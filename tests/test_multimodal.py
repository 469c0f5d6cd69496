"""Multimodal models: on text they are right like any other model; a picture is right too, or one clear error.

The models around the decoders differ in what they do to a call; the lists in `tests/tiny.py` and `PICTURES` below hold one of
each sort. To have another looked at, add it there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import DynamicCache, Trainer, TrainingArguments

import idp_peft
from idp_peft import IDPConfig
from idp_peft.hosting.architectures import cache_name, find_decoder
from tests.hosts import needs_transformers_adapter_methods
from tests.reference import (
    bank_of,
    brute_force_scores,
    concatenated_logits,
    logits_behind,
    looks_up_in_layers,
    prompts_of,
)
from tests.tiny import AROUND_A_DECODER, IMAGE, VOCAB, tiny, token_batch
from tests.tiny_chats import chat_tokenizer

TOLERANCE = 1e-4
UNEQUAL = [3, 5, 2, 5]
TEXT = list(AROUND_A_DECODER)  # the other multimodal models are in the contract
sides = pytest.mark.parametrize("side", ["left", "right"])


@pytest.fixture
def made(make):
    """made(name, **config) -> a tiny IDP model, whose prompts are no embeddings of the base's vocabulary."""

    def build(name: str, attention: str = "sdpa", **config):
        if name == "fuyu" and type(tiny(name).get_decoder()) is tf.FuyuForCausalLM:
            pytest.skip("this version's Fuyu does not say which of its modules is the decoder")
        model = make(name, attention, **{"num_virtual_tokens": UNEQUAL, **config})
        torch.manual_seed(5)
        with torch.no_grad():
            bank_of(model).weight.normal_()
        return model

    return build


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max())


def gradient(model, loss: torch.Tensor) -> torch.Tensor:
    (found,) = torch.autograd.grad(loss, bank_of(model).weight)
    return found


# ---------------------------------------------------------------------- text


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_text_behind_a_forced_prompt_equals_concatenation(made, name, attention):
    model, base = made(name, attention), tiny(name, attention)
    ids, _ = token_batch([9])
    for prompt in range(4):
        with torch.no_grad():
            logits = model(input_ids=ids, prompt_ids=torch.tensor([prompt])).logits
        assert difference(logits, concatenated_logits(model, base, ids, prompt)) <= TOLERANCE


@pytest.mark.parametrize("name", TEXT)
@sides
def test_every_padded_row_of_text_equals_that_row_alone(made, name, side):
    model = made(name)
    lengths = [5, 9, 2, 7]
    ids, mask = token_batch(lengths, side)
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask).logits
        chosen = model.last_selection.prompt_ids
        for row, real in enumerate(mask.bool()):
            alone = model(input_ids=ids[row][real][None]).logits[0]
            assert torch.equal(model.last_selection.prompt_ids, chosen[row : row + 1])
            assert difference(together[row][real], alone) <= TOLERANCE


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("cached", [True, False])
def test_generation_of_padded_text_equals_each_row_alone(made, name, cached):
    model, base = made(name), tiny(name)
    ids, mask = token_batch([4, 9, 6])
    settings = {"max_new_tokens": 6, "do_sample": False, "use_cache": cached}
    together = model.generate(input_ids=ids, attention_mask=mask, **settings)
    chosen = model.last_selection.prompt_ids.tolist()
    for row, real in enumerate(mask.bool()):
        said = ids[row][real][None]
        for _ in range(6):
            step = concatenated_logits(model, base, said, chosen[row])[:, -1].argmax(-1)
            said = torch.cat([said, step[:, None]], dim=1)
        assert torch.equal(together[row, 9:], said[0, -6:])


@pytest.mark.parametrize("name", [*TEXT, "gemma3_multimodal", "gemma4_multimodal", "gemma3n", "gemma4", "qwen2_5_vl"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_has_the_gradients_of_the_concatenation(made, name, checkpointing):
    model, base = made(name), tiny(name)
    ids, _ = token_batch([9])
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    call = {"input_ids": ids, "labels": ids, "prompt_ids": torch.tensor([1])}
    if checkpointing and name == "gemma3n" and tf.__version__.startswith("5.0."):
        with pytest.raises(ValueError, match="shares keys and values between layers in its cache alone"):
            model(**call)
        return
    found = gradient(model, model(**call).loss)
    prompt = bank_of(model).weight.split(UNEQUAL)[1]
    logits = logits_behind(base, prompt[None], ids)
    expected = gradient(model, torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]))
    assert expected.abs().max() > 1e-3
    assert difference(found, expected) <= 1e-5 * expected.abs().max() + 1e-6


@pytest.mark.parametrize("name", TEXT)
def test_without_the_adapter_it_is_the_base_exactly(made, name):
    model, base = made(name), tiny(name)
    ids, mask = token_batch([4, 9])
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(
            model(input_ids=ids, attention_mask=mask).logits, base(input_ids=ids, attention_mask=mask).logits
        )


@pytest.mark.parametrize("name", ["gemma3n", "gemma4", "gemma4_multimodal"])
@sides
def test_what_layers_look_up_by_id_is_there_on_every_path(made, name, side):
    """Past the sliding window, without a cache, under checkpointing: where a prompt goes through with its input."""
    model = made(name)
    ids, mask = token_batch([5, 19], side)
    forced = {"prompt_ids": torch.tensor([1, 2])}
    with torch.no_grad():
        alone = [
            model(input_ids=ids[row][mask[row].bool()][None], prompt_ids=forced["prompt_ids"][[row]]) for row in (0, 1)
        ]
        paths = [
            model(input_ids=ids, attention_mask=mask, use_cache=cached, **forced).logits for cached in (True, False)
        ]
    if name != "gemma3n" or not tf.__version__.startswith("5.0."):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        paths.append(model(input_ids=ids, attention_mask=mask, **forced).logits.detach())
    for logits in paths:
        for row in (0, 1):
            assert difference(logits[row][mask[row].bool()], alone[row].logits[0]) <= TOLERANCE


@sides
def test_embeddings_without_ids_are_what_the_base_makes_of_them(made, side):
    """Gemma 3n then looks nothing up, for any token, with a prompt in front or not."""
    model, base = made("gemma3n"), tiny("gemma3n")
    ids, mask = token_batch([5, 19], side)
    embeds = base.get_input_embeddings()(ids).detach()
    with torch.no_grad():
        for cached in (True, False):
            logits = model(
                inputs_embeds=embeds, attention_mask=mask, use_cache=cached, prompt_ids=torch.tensor([1, 3])
            ).logits
            for row, prompt in ((0, 1), (1, 3)):
                own = embeds[row][mask[row].bool()][None]
                whole = torch.cat([prompts_of(model)[prompt][None], own], dim=1)
                expected = base(inputs_embeds=whole).logits[:, 5:]
                assert difference(logits[row][mask[row].bool()], expected[0]) <= TOLERANCE


def test_trainer_trains_a_multimodal_model_on_text(made, tmp_path):
    model = made("gemma3_multimodal")
    before = bank_of(model).weight.detach().clone()
    ids, _ = token_batch([9, 9, 9, 9])
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    settings = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no"
    )
    Trainer(model, settings, train_dataset=rows).train()
    assert difference(bank_of(model).weight, before) > 0


@pytest.mark.parametrize("name", ["gemma3_multimodal", "gemma4_multimodal", "qwen2_5_vl", "llava"])
def test_a_trainers_own_head_finds_the_prompt_too(made, name):
    """TRL's fused losses call the model without its head."""
    model = made(name)
    ids, mask = token_batch([4, 9])
    base = model.get_base_model()
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        hidden = base.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        assert difference(base.lm_head(hidden), expected) <= TOLERANCE
        assert difference(model(input_ids=ids, attention_mask=mask).logits, expected) == 0, "nothing is left behind"


def test_a_random_choice_goes_by_ids_however_they_reach_the_decoder(made):
    chosen = {}
    for name in ("gemma3", "gemma3_multimodal"):
        model = made(name, selection="random")
        ids, mask = token_batch([4, 9, 6, 5])
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask)
        chosen[name] = model.last_selection.prompt_ids.tolist()
        model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=1, prefill_chunk_size=4, past_key_values=DynamicCache()
        )
        assert model.last_selection.prompt_ids.tolist() == chosen[name]
    assert chosen["gemma3"] == chosen["gemma3_multimodal"]


# ---------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Pictures:
    """How a model is shown one picture of four tokens in each row.

    Args:
        of_rows (`Callable`): what a call is given for these rows, beside ids and mask.
        types (`str`): the argument that marks the picture's tokens.
        before (`list`): ids of the tokens that must stand before the picture.
        read_as (`int`): the id whose embedding the model takes for the picture's tokens before it fills them in.
    """

    of_rows: Callable[[list[int]], dict]
    types: str | None = None
    before: list[int] = field(default_factory=list)
    read_as: int = IMAGE


def pixels(*shape: int) -> torch.Tensor:
    return torch.rand(2, *shape, generator=torch.Generator().manual_seed(3))


def qwen_picture(rows: list[int]) -> dict:
    return {
        "pixel_values": pixels(16, 3 * 2 * 14 * 14)[rows].flatten(0, 1),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * len(rows)),
    }


def gemma4_picture(rows: list[int]) -> dict:
    grid = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), dim=-1).view(1, 16, 2)
    return {"pixel_values": pixels(16, 3 * 14 * 14)[rows], "image_position_ids": grid.expand(len(rows), -1, -1)}


_QWEN = Pictures(qwen_picture, None if tf.__version__.startswith("5.0.") else "mm_token_type_ids", [VOCAB - 2])
PICTURES = {
    "llava": Pictures(lambda rows: {"pixel_values": pixels(3, 28, 28)[rows]}),
    "gemma3_multimodal": Pictures(lambda rows: {"pixel_values": pixels(3, 28, 28)[rows]}, "token_type_ids"),
    "gemma4_multimodal": Pictures(gemma4_picture, "mm_token_type_ids"),
    # Their vision towers are left out: what counts is what their masks make of the marked tokens.
    "gemma4_unified": Pictures(lambda rows: {}, "mm_token_type_ids", read_as=0),
    "molmo2": Pictures(lambda rows: {}, "mm_token_type_ids"),
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
}
SEE_EACH_OTHER = ["gemma3_multimodal", "gemma4_multimodal", "gemma4_unified", "molmo2"]  # the tokens of a picture do
pictures = pytest.mark.parametrize("name", list(PICTURES))


def pictured(name: str, lengths: list[int], side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of rows with a picture inside: int64 `[2, max]` each."""
    ids, mask = token_batch(lengths, side)
    before = PICTURES[name].before
    for row in range(2):
        start = int(mask[row].argmax()) + 2 + row
        ids[row, start : start + 4] = IMAGE
        ids[row, start - len(before) : start] = torch.tensor(before, dtype=torch.long)
    return ids, mask


def call_for(name: str, ids: torch.Tensor, mask: torch.Tensor, rows: list[int], width: int = 0) -> dict:
    """A call on rows with pictures; `width` tokens more of text stand before them."""
    case = PICTURES[name]
    call = {"attention_mask": mask, **case.of_rows(rows)}
    if case.types is not None:
        types = (ids == IMAGE).long()
        call[case.types] = torch.cat([types.new_zeros(len(types), width), types], dim=1)
    return call


def alone(name: str, ids: torch.Tensor, mask: torch.Tensor, row: int) -> dict:
    """The call on one row, unpadded."""
    own = ids[row][mask[row].bool()][None]
    return {"input_ids": own, **call_for(name, own, torch.ones_like(own), [row])}


def concatenated(name: str, chosen: torch.Tensor, base, call: dict, row: int, said: list[int] = ()) -> torch.Tensor:
    """The base on `[P_i ; E(x)]`, whose picture tokens it fills in itself: `[1, n, vocab]`.

    Args:
        chosen (`torch.Tensor`): P_i, `[k, d]`.
        said (`list[int]`, *optional*): its token ids, where it is a text.
    """
    ids = call["input_ids"]
    front = len(chosen)
    read = torch.where(ids == IMAGE, PICTURES[name].read_as, ids)
    whole = torch.cat([chosen[None], base.get_input_embeddings()(read)], dim=1)
    given = call_for(name, ids, torch.ones(whole.shape[:2], dtype=torch.long), [row], front)
    decoder = find_decoder(base)
    if looks_up_in_layers(decoder):  # of its padding token, for prompts and pictures
        text = torch.where(ids == IMAGE, 0, ids)
        before = torch.tensor([said or [0] * front])
        given["per_layer_inputs"] = decoder.get_per_layer_inputs(torch.cat([before, text], dim=1))
    if hasattr(base.model, "get_rope_index"):
        types = {key: call[key] for key in ("mm_token_type_ids",) if key in call}
        positions, _ = base.model.get_rope_index(ids, image_grid_thw=call["image_grid_thw"], **types)
        prefix = torch.arange(front).expand(3, 1, -1)
        given["position_ids"] = torch.cat([prefix, positions + front], dim=-1)
    with torch.no_grad():
        return base(inputs_embeds=whole, **given).logits[:, front:]


@pictures
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_picture_behind_a_forced_prompt_equals_concatenation(made, name, attention):
    model, base = made(name, attention), tiny(name, attention)
    ids, mask = pictured(name, [9, 12])
    for row in range(2):
        call = alone(name, ids, mask, row)
        for prompt in range(4):
            forced = {**call, "prompt_ids": torch.tensor([prompt])}
            expected = concatenated(name, prompts_of(model)[prompt], base, call, row)
            with torch.no_grad():
                assert difference(model(**forced).logits, expected) <= TOLERANCE
            model.train()
            assert difference(model(**forced).logits, expected) <= TOLERANCE
            model.gradient_checkpointing_enable({"use_reentrant": False})
            assert difference(model(**forced).logits, expected) <= TOLERANCE
            model.gradient_checkpointing_disable()
            model.eval()


@pictures
@sides
@pytest.mark.parametrize("lengths", [[9, 12], [9, 30]])
def test_padded_rows_with_pictures_equal_each_row_alone(made, name, side, lengths):
    model = made(name)
    ids, mask = pictured(name, lengths, side)
    together = call_for(name, ids, mask, [0, 1])
    with torch.no_grad():
        for settings in ({}, {"use_cache": False}):
            logits = model(input_ids=ids, **together, **settings).logits
            chosen, scores = model.last_selection.prompt_ids, model.last_selection.scores
            for row in range(2):
                own = model(**alone(name, ids, mask, row)).logits[0]
                assert torch.equal(model.last_selection.prompt_ids, chosen[row : row + 1])
                assert difference(model.last_selection.scores, scores[row]) <= 1e-5
                assert difference(logits[row][mask[row].bool()], own) <= TOLERANCE


@pictures
def test_a_picture_behind_keys_and_values_of_a_text_is_as_behind_the_text(name):
    base, texts = tiny(name), [[5, 9, 6, 8], [7, 11, 4, 10]]
    config = {"prompts": "key_values", "num_prompts": 2, "num_virtual_tokens": 4, "init_weights": False}
    model = get_peft_model(tiny(name), IDPConfig(task_type="CAUSAL_LM", selection="fixed", **config)).eval()
    idp_peft.start_at(model, base, texts)
    ids, mask = pictured(name, [9, 12])
    for row in range(2):
        call = alone(name, ids, mask, row)
        for prompt, text in enumerate(texts):
            chosen = base.get_input_embeddings()(torch.tensor(text)).detach()
            expected = concatenated(name, chosen, base, call, row, text)
            with torch.no_grad():
                assert difference(model(**call, prompt_ids=torch.tensor([prompt])).logits, expected) <= TOLERANCE


@pictures
@sides
@pytest.mark.parametrize("beyond", [{"selection": "centroid"}, {"scales": True}], ids=str)
def test_padded_rows_with_pictures_equal_each_row_alone_by_centroid_and_with_scales(made, name, side, beyond):
    model, base = made(name, **beyond), tiny(name)
    bank = bank_of(model)
    with torch.no_grad():
        if bank.clusters is not None:
            bank.clusters.set(torch.arange(4), torch.randn(4, bank.centroids.shape[1]))
        else:
            bank.scales.normal_(std=0.1)
    ids, mask = pictured(name, [9, 12], side)
    with torch.no_grad():
        logits = model(input_ids=ids, **call_for(name, ids, mask, [0, 1])).logits
        chosen = model.last_selection.prompt_ids
        for row in range(2):
            call = alone(name, ids, mask, row)
            assert difference(logits[row][mask[row].bool()], model(**call).logits[0]) <= TOLERANCE
            assert torch.equal(model.last_selection.prompt_ids, chosen[row : row + 1])
            nobody = model(**call, prompt_ids=torch.tensor([-1])).logits
            assert torch.equal(nobody, base(**call).logits), "a row without a prompt is the base's"


@pictures
def test_generation_from_padded_rows_with_pictures_equals_each_row_alone(made, name):
    model, base = made(name), tiny(name)
    ids, mask = pictured(name, [9, 12])
    settings = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    together = torch.stack(model.generate(input_ids=ids, **call_for(name, ids, mask, [0, 1]), **settings).logits, dim=1)
    chosen = model.last_selection.prompt_ids.tolist()
    for row in range(2):
        call = alone(name, ids, mask, row)
        own = torch.stack(model.generate(**call, **settings).logits, dim=1)
        assert difference(together[row], own[0]) <= TOLERANCE
        first = concatenated(name, prompts_of(model)[chosen[row]], base, call, row)[0, -1]
        assert difference(own[0, 0], first) <= TOLERANCE


@pictures
@pytest.mark.parametrize("layer", [0, 1])
def test_the_choice_sees_a_picture_as_the_model_does(made, name, layer):
    model, base = made(name, selection_layer=layer), tiny(name, "eager")
    ids, mask = pictured(name, [9, 12])
    call = alone(name, ids, mask, 1)
    seen = {}

    def keep(_decoder, _args, kwargs):
        seen.update(kwargs)

    handle = base.get_decoder().register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        base(**call)
        handle.remove()
        model(**call)
    expected = brute_force_scores(
        model, base, call["input_ids"], call["attention_mask"], call["attention_mask"], layer, "mean", seen
    )
    assert torch.allclose(model.last_selection.scores, expected, atol=1e-5, rtol=1e-4)


@pictures
def test_a_row_without_a_prompt_keeps_its_picture(made, name):
    model, base = made(name), tiny(name)
    ids, mask = pictured(name, [9, 12])
    call = alone(name, ids, mask, 1)
    with torch.no_grad():
        expected = base(**call).logits
        for settings in ({}, {"use_cache": False}):
            found = model(**call, **settings, prompt_ids=torch.tensor([-1])).logits
            assert difference(found, expected) <= TOLERANCE
        with model.disable_adapter():
            assert torch.equal(model(**call).logits, expected)


@pytest.mark.parametrize("name", SEE_EACH_OTHER)
def test_a_prompt_longer_than_the_window_leaves_a_picture_right(made, name):
    model, base = made(name, num_prompts=1, num_virtual_tokens=20), tiny(name)
    ids, mask = pictured(name, [9, 12])
    for row in range(2):
        call = alone(name, ids, mask, row)
        with torch.no_grad():
            assert (
                difference(model(**call).logits, concatenated(name, prompts_of(model)[0], base, call, row)) <= TOLERANCE
            )


# ---------------------------------------------------------------------- one clear error


@pytest.mark.parametrize("name", ["gemma3_multimodal", "gemma4_multimodal"])
def test_pictures_that_cannot_be_right_are_refused(made, name):
    model = made(name)
    ids, mask = pictured(name, [12, 12])
    call = {"input_ids": ids, **call_for(name, ids, mask, [0, 1])}
    with pytest.raises(ValueError, match="the masks of a static cache where they show tokens of a picture"):
        model.generate(**call, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(
        ValueError, match=r"chooses a prompt before the model has read `pixel_values`: force `prompt_ids`"
    ):
        model.generate(**call, prefill_chunk_size=4, past_key_values=DynamicCache(), max_new_tokens=2)
    with torch.no_grad():
        text = model(input_ids=token_batch([5, 5])[0], use_cache=True)
    cache = text.get("cache") or text["past_key_values"]
    later = {
        **call,
        "attention_mask": torch.ones(2, 17, dtype=torch.long),
        cache_name(type(model.get_base_model())): cache,
    }
    with pytest.raises(ValueError, match="give a model all its pictures in the first turn"), torch.no_grad():
        model(**later)


def test_assignment_all_refuses_what_is_not_one_per_row(made):
    model = made("qwen2_5_vl", assignment="all").train()
    ids, mask = pictured("qwen2_5_vl", [12, 12])
    with pytest.raises(ValueError, match=r"`pixel_values` \[32, 1176\] does not have one entry for each of the 2 rows"):
        model(input_ids=ids, labels=ids, **call_for("qwen2_5_vl", ids, mask, [0, 1]))


def test_assignment_all_takes_one_picture_for_each_row(made):
    ids, mask = pictured("gemma3_multimodal", [12, 12])
    call = {"input_ids": ids, "labels": ids, **call_for("gemma3_multimodal", ids, mask, [0, 1])}
    every = made("gemma3_multimodal", assignment="all").train()(**call).loss
    model = made("gemma3_multimodal")
    with torch.no_grad():
        losses = [model(**call, prompt_ids=torch.tensor([prompt] * 2)).loss for prompt in range(4)]
    assert difference(every, torch.stack(losses).mean()) <= 1e-4


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("paligemma", {}),
        ("gemma3", {"use_bidirectional_attention": True}),
        ("gemma4", {"use_bidirectional_attention": "all"}),
    ],
)
def test_attention_in_both_directions_is_refused_when_the_adapter_is_added(name, arguments):
    base = tiny(name)
    if arguments:
        config = type(base.config)(**{**base.config.to_dict(), **arguments})
        base = type(base)(config)
    with pytest.raises(ValueError, match=rf"{type(base).__name__} attends in both directions, and a prompt's keys"):
        get_peft_model(base, IDPConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


def test_a_decoder_called_by_itself_refuses_ready_made_masks(made):
    model = made("gemma3_multimodal")
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    ids, _ = token_batch([4])
    with pytest.raises(
        ValueError, match=r"got dict: ready-made masks have no room for the prompt\. Give the 2-D one to the model"
    ):
        find_decoder(model.get_base_model())(
            input_ids=ids, attention_mask={"full_attention": mask, "sliding_attention": mask}
        )
    with pytest.raises(ValueError, match="ready-made masks have no room for the prompt"):
        model(input_ids=ids, attention_mask=mask)


# ---------------------------------------------------------------------- saving, loading, transformers' own methods


@pytest.mark.parametrize("name", ["gemma3_multimodal", "gemma4_multimodal", "qwen2_5_vl", "llava"])
def test_an_adapter_comes_back_on_its_multimodal_base(made, tmp_path, name):
    model = made(name)
    ids, mask = token_batch([4, 9])
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
    model.get_base_model().save_pretrained(tmp_path / "base")
    chat_tokenizer().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(tmp_path / "base")})
    )
    loaded = [
        PeftModel.from_pretrained(tiny(name), tmp_path / "adapter"),
        idp_peft.load(tmp_path / "adapter", device_map=None)[0],
    ]
    if type(model.get_base_model().config) in tf.AutoModelForCausalLM._model_mapping:
        loaded.append(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"))
    for each in loaded:
        assert type(each.get_base_model()) is type(model.get_base_model())
        with torch.no_grad():
            assert difference(each(input_ids=ids, attention_mask=mask).logits, expected) <= TOLERANCE


def test_an_adapter_of_the_multimodal_class_is_told_from_the_text_only_one(made, tmp_path):
    made("gemma3_multimodal").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.language_model.*model"):
        PeftModel.from_pretrained(tiny("gemma3"), tmp_path)


def test_the_pages_snippet_runs(tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs" / "multimodal.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    tiny("gemma3_multimodal").save_pretrained(tmp_path / "base")
    chat_tokenizer().save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    here = {"google/gemma-3-4b-it": str(tmp_path / "base"), "a short one": "w5 w6", "a longer question": "w7 w8 w9"}
    for theirs, ours in here.items():
        assert code.count(f'"{theirs}"') == 1
        code = code.replace(theirs, ours)
    names: dict = {}
    exec(compile(code, "multimodal.md", "exec"), names)
    model, batch = names["model"].eval(), names["batch"]
    together = model.generate(**batch, max_new_tokens=5, do_sample=False)
    for row, real in enumerate(batch["attention_mask"].bool()):
        own = batch["input_ids"][row][real][None]
        alone = model.generate(input_ids=own, max_new_tokens=5, do_sample=False)
        assert torch.equal(together[row, -5:], alone[0, -5:])


@needs_transformers_adapter_methods
@pytest.mark.parametrize("name", ["gemma3_multimodal", "gemma4_multimodal", "exaone4_5"])
def test_transformers_own_adapter_methods_do_the_same(made, name):
    model, native = made(name, selection="fixed"), tiny(name)
    native.add_adapter(IDPConfig(num_prompts=4, num_virtual_tokens=UNEQUAL, selection="fixed"))
    with torch.no_grad():
        find_decoder(native).idp.idp_prompts["default"].weight.copy_(bank_of(model).weight)
    native.eval()
    ids, mask = token_batch([4, 9])
    with torch.no_grad():
        call = {"input_ids": ids, "attention_mask": mask}
        assert torch.equal(native(**call).logits, model(**call).logits)
    settings = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(native.generate(**call, **settings), model.generate(**call, **settings))
    with pytest.raises(ValueError, match="sizes a static cache without room for the prompt"):
        native.generate(**call, cache_implementation="static", **settings)
