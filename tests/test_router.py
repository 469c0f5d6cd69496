"""The router chooses what the full model chooses, from a part of it."""

from __future__ import annotations

import io
import json
import logging
import threading

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from idp_peft.selection import Selection
from idp_peft.serving import Router, export_to_vocab
from idp_peft_cli import main
from tests.test_export import edit, is_tied
from tests.tiny import CHANGING_ROTARY, NAMES, token_batch
from tests.tiny_folder import tiny_texts
from tests.tiny_serving import Saved, saved

UNEQUAL = [3, 5, 2, 5]
ALIBI = ("bloom", "falcon_alibi", "mpt")


def router_of(one: Saved, **arguments) -> Router:
    return Router.from_pretrained(one.adapter, one.base, **arguments)


@pytest.mark.parametrize("name", [*NAMES, *CHANGING_ROTARY])
def test_the_choice_is_bit_for_bit_the_full_models(tmp_path, name):
    for layer in (0,) if name in ALIBI else (0, 1, -1):
        one = saved(tmp_path / str(layer), name, num_prompts=4, num_virtual_tokens=UNEQUAL, selection_layer=layer)
        router = router_of(one)
        for side in ("left", "right"):
            ids, mask = token_batch([9, 7, 2, 4], side)  # behind a prompt: beyond the length where frequencies change
            with torch.no_grad():
                one.model(input_ids=ids, attention_mask=mask)
            expected, found = one.model.last_selection, router.select(ids, mask)
            assert torch.equal(found.prompt_ids, expected.prompt_ids)
            assert torch.equal(found.scores, expected.scores)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_long_and_short_inputs_of_one_router_do_not_disturb_each_other(tmp_path, name):
    one = saved(tmp_path, name, num_prompts=4)
    router = router_of(one)
    for tokens in (40, 3, 20, 40):
        ids, _ = token_batch([tokens], seed=tokens)
        with torch.no_grad():
            one.model(input_ids=ids)
        assert torch.equal(router.select(ids).scores, one.model.last_selection.scores)


def test_a_selection_mask_steers_it_as_the_full_model(tmp_path):
    one = saved(tmp_path, num_prompts=4)
    ids, mask = token_batch([9, 6])
    context = mask.clone()
    context[:, -3:] = 0
    with torch.no_grad():
        one.model(input_ids=ids, attention_mask=mask, selection_mask=context)
    found = router_of(one).select(ids, mask, context)
    assert torch.equal(found.scores, one.model.last_selection.scores)
    assert not torch.allclose(found.scores, router_of(one).select(ids, mask).scores)


@pytest.mark.parametrize("layer", [0, 1])
def test_it_holds_the_layers_that_the_choice_reads_and_no_head(tmp_path, layer):
    one = saved(tmp_path, selection_layer=layer)
    decoder = router_of(one).layer.decoder
    full = one.model.get_base_model().model
    assert len(decoder.layers) == layer + 1
    expected = {name for name, _ in full.named_parameters() if "idp" not in name}
    expected = {n for n in expected if not n.startswith("layers.") or int(n.split(".")[1]) <= layer}
    assert {name for name, _ in decoder.named_parameters()} == expected


def test_the_layers_it_does_not_hold_are_not_read(tmp_path):
    """A base whose other layers are missing serves as well."""
    one = saved(tmp_path)
    others = ("layers.1", "layers.2", "lm_head")
    edit(one.base, lambda tensors: [tensors.pop(n) for n in list(tensors) if any(part in n for part in others)])
    ids, mask = token_batch([9, 4])
    with torch.no_grad():
        one.model(input_ids=ids, attention_mask=mask)
    assert torch.equal(router_of(one).select(ids, mask).scores, one.model.last_selection.scores)


def test_no_head_is_ever_loaded(tmp_path, monkeypatch):
    one = saved(tmp_path)

    def refuse(*_, **__):
        raise AssertionError("a model with its head was asked for")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    assert router_of(one).route(["w5 w6"]).prompt_ids.shape == (1,)


def test_texts_are_routed_in_their_order_whatever_the_batches(tmp_path):
    one = saved(tmp_path, num_prompts=4, prompt_names=["a", "b", "c", "d"])
    router = router_of(one)
    texts = [text[: 3 + 37 * index % 61] for index, text in enumerate(tiny_texts(11))]
    assert sorted(texts, key=len) not in (texts, texts[::-1])
    found = router.route(texts, batch_size=3)
    for index, text in enumerate(texts):
        ids = router.tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            one.model(input_ids=ids)
        assert found.prompt_ids[index] == one.model.last_selection.prompt_ids[0]
        assert torch.allclose(found.scores[index], one.model.last_selection.scores[0], atol=1e-6)
    mixed = [router.token_ids(text) if index % 3 else text for index, text in enumerate(texts)]
    assert torch.equal(router.route(mixed, batch_size=3).scores, found.scores)
    assert found.names == [["a", "b", "c", "d"][chosen] for chosen in found.prompt_ids]
    assert len(found.prompt_ids.unique()) > 1, "else any order would do"


@pytest.mark.parametrize("selection", ["random", "fixed"])
def test_other_ways_of_choosing_are_the_full_models_too(tmp_path, selection):
    fixed = {"fixed_prompt": 2} if selection == "fixed" else {}
    one = saved(tmp_path, num_prompts=4, selection=selection, **fixed)
    ids, mask = token_batch([9, 4, 7, 5, 3])
    with torch.no_grad():
        one.model(input_ids=ids, attention_mask=mask)
    found = router_of(one).select(ids, mask)
    assert torch.equal(found.prompt_ids, one.model.last_selection.prompt_ids)
    assert found.scores is None


@pytest.mark.parametrize("tied", [False, True])
def test_an_exported_folder_is_its_own_base(tmp_path, tied):
    one = saved(tmp_path, tied=tied, num_prompts=4)
    assert is_tied(AutoModelForCausalLM.from_pretrained(one.base)) == tied
    folder = export_to_vocab(one.adapter, tmp_path / "exported", one.base)
    texts = tiny_texts(6)
    found, expected = Router.from_pretrained(folder).route(texts), router_of(one).route(texts)
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.prompt_ids, expected.prompt_ids)


def test_threads_get_what_they_get_one_after_the_other(tmp_path):
    router = router_of(saved(tmp_path, num_prompts=4))
    texts = tiny_texts(12)
    expected = [router.route([text]) for text in texts]
    found: list[Selection | None] = [None] * len(texts)

    def ask(index: int) -> None:
        found[index] = router.route([texts[index]])

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one.scores, other.scores) for one, other in zip(found, expected, strict=True))


def test_loading_it_says_nothing_of_the_weights_it_leaves(tmp_path, monkeypatch):
    one, said = saved(tmp_path), []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: said.append(record.getMessage()))
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        router_of(one)
        assert said == []
        AutoModel.from_pretrained(one.base)
        assert "lm_head.weight" in "".join(said), "else nobody would have said anything"
    finally:
        logger.removeHandler(handler)


def test_what_cannot_be_routed_is_refused(tmp_path):
    one = saved(tmp_path, "gpt2")
    router = router_of(one)
    with pytest.raises(ValueError, match="the input is empty: got 1 rows of 0 tokens"):
        router.select(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match=r"text\(s\) \[1\] have no token to choose a prompt by"):
        router.route(["w5", ""])
    with pytest.raises(
        ValueError, match="61 input tokens and 4 prompt positions need 65 positions, but the model has 64"
    ):
        router.select(torch.ones(1, 61, dtype=torch.long))
    with pytest.raises(ValueError, match=r"`attention_mask` must cover the input, \[1, 5\], got \[1, 4\]"):
        router.select(torch.ones(1, 5, dtype=torch.long), torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"`attention_mask` has no real token in row\(s\) \[0\]"):
        router.select(torch.ones(1, 5, dtype=torch.long), torch.zeros(1, 5))


def test_adapters_that_do_not_choose_or_fit_are_refused(tmp_path):
    from peft import PromptTuningConfig, get_peft_model

    one = saved(tmp_path)
    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(one.base), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    )
    tuned.save_pretrained(tmp_path / "tuned")
    with pytest.raises(ValueError, match="is a PROMPT_TUNING adapter: only IDP chooses between prompts"):
        Router.from_pretrained(tmp_path / "tuned", one.base)
    config = type(one.model.config)(**{**one.model.config.to_dict(), "hidden_size": 16, "head_dim": 4})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "narrow")
    with pytest.raises(ValueError, match=r"have width 32, the embeddings of the base model .* 16"):
        Router.from_pretrained(
            one.adapter,
            tmp_path / "narrow",
        )
    with pytest.raises(FileNotFoundError, match=r"there is no model at .*: pass `base`, the folder"):
        Router.from_pretrained(one.adapter, tmp_path / "nowhere")


# ---------------------------------------------------------------------- the command


def test_the_command_routes_lines(tmp_path, capsys, monkeypatch):
    one = saved(tmp_path, num_prompts=4, prompt_names=["a", "b", "c", "d"])
    texts = tiny_texts(5)
    lines = [json.dumps({"id": 7, "question": texts[0]}), "", *(json.dumps(text) for text in texts[1:])]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    call = ["route", "--adapter", str(one.adapter), "--model", str(one.base), "--text_column", "question"]
    main([*call, "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")])
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    main(call)
    written = (tmp_path / "out.jsonl").read_text()
    assert capsys.readouterr().out == written
    rows = [json.loads(line) for line in written.splitlines()]
    expected = router_of(one).route(texts)
    assert [row["prompt_id"] for row in rows] == expected.prompt_ids.tolist()
    assert [row["prompt_name"] for row in rows] == expected.names
    assert [row["question"] for row in rows] == texts
    assert rows[0]["id"] == 7
    assert torch.allclose(torch.tensor([row["scores"] for row in rows]), expected.scores, atol=1e-6)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("{not json", "line 2 is not JSON"),
        ('{"other": "w5"}', "line 2 must be a text, or an object with a text that is not empty as 'text'"),
        ('""', "line 2 must be a text, or an object with a text that is not empty as 'text'"),
        ("7", "line 2 must be a text, or an object with a text that is not empty as 'text'"),
    ],
)
def test_the_command_names_the_line_that_is_wrong(tmp_path, capsys, line, text):
    one = saved(tmp_path)
    (tmp_path / "in.jsonl").write_text(f'"w5"\n{line}\n')
    with pytest.raises(SystemExit):
        main(["route", "--adapter", str(one.adapter), "--model", str(one.base), "--input", str(tmp_path / "in.jsonl")])
    assert text in capsys.readouterr().err
