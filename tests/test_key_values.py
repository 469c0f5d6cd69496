"""Prompts of keys and values: the base continued from a cache that holds them, on every architecture."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from transformers import DynamicCache

import idp_peft
from idp_peft import IDPConfig
from idp_peft.composition import compose, split
from idp_peft.hosting.architectures import cache_name, find_decoder, forward_parameters
from idp_peft.serving import Router, export_to_vocab
from tests.hosts import needs_transformers_adapter_methods
from tests.reference import bank_of
from tests.tiny import NAMES, VOCAB, tiny, token_batch
from tests.tiny_folder import tiny_folder, tiny_tokenizer

K = 5
TOLERANCE = 1e-4  # fp32, docs/method.md, promise 1
# Their layers measure distance in slots: padding between prompt and text would count.
COUNTS_SLOTS = (
    "mistral_small_window",
    "gemma2",
    "gemma3",
    "mpt",
    "gemma3_multimodal",
    "gemma3n",
    "gemma4",
    "gemma4_multimodal",
)
architectures = pytest.mark.parametrize("name", NAMES)


def texts(count: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCAB, (K,), generator=generator).tolist() for _ in range(count)]


@pytest.fixture
def made():
    """made(name, **config) -> a tiny model with prompts of keys and values, moved off the texts that they start at."""

    def build(name: str, attention: str = "sdpa", dtype=torch.float32, moved: bool = True, **config):
        config = {"num_prompts": 4, "num_virtual_tokens": K, "init_weights": False, **config}
        model = get_peft_model(
            tiny(name, attention, dtype=dtype), IDPConfig(task_type="CAUSAL_LM", prompts="key_values", **config)
        ).eval()
        idp_peft.start_at(model, tiny(name, attention, dtype=dtype), texts(config["num_prompts"]))
        if moved:
            with torch.no_grad():
                weight = bank_of(model).weight
                weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
        return model

    return build


def by_hand(model, base, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """The base, which IDP never touched, continued from a cache that holds the prompt's parameters: `[1, n, vocabulary]`."""
    bank, decoder = bank_of(model), find_decoder(base)
    cache, start = DynamicCache(), 0
    row = bank.embeddings()[K * prompt : K * prompt + K]  # [k, P]
    shapes = DynamicCache()
    with torch.no_grad():
        decoder(input_ids=torch.tensor([[2]]), use_cache=True, **{cache_name(type(decoder)): shapes})
    for number, layer in enumerate(shapes.layers):
        parts = []
        for tensor in (layer.keys, layer.values):
            heads, width = tensor.shape[1], tensor.shape[3]
            part = row[:, start : start + heads * width].view(K, heads, width).transpose(0, 1)[None]
            parts.append(part.to(tensor.dtype))
            start += heads * width
        cache.update(*parts, number)
    assert start == row.shape[1]
    extra = {"attention_mask": torch.ones(1, K + ids.shape[1], dtype=torch.long)}
    if "position_ids" in forward_parameters(type(base)):
        extra["position_ids"] = torch.arange(K, K + ids.shape[1])[None]
    return base(input_ids=ids, use_cache=True, **{cache_name(type(base)): cache}, **extra).logits


# ---------------------------------------------------------------------- the definition


@architectures
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("count", [1, 4])
@torch.no_grad()
def test_a_forced_prompt_is_the_base_continued_from_its_keys_and_values(made, name, attention, count):
    model, base = made(name, attention, num_prompts=count), tiny(name, attention)
    ids, _ = token_batch([9])
    plain = base(input_ids=ids).logits
    for prompt in range(count):
        logits = model(input_ids=ids, prompt_ids=torch.tensor([prompt])).logits
        assert logits.shape == (1, 9, VOCAB)
        assert (logits - by_hand(model, base, ids, prompt)).abs().max() <= TOLERANCE
        assert (logits - plain).abs().max() > 1e-2, "the prompt must matter"


@architectures
@torch.no_grad()
def test_a_prompt_that_starts_at_a_text_is_that_text_in_front(made, name):
    model, base = made(name, moved=False), tiny(name)
    ids, _ = token_batch([9])
    for prompt, text in enumerate(texts(4)):
        whole = base(input_ids=torch.cat([torch.tensor([text]), ids], 1)).logits[:, K:]
        assert (model(input_ids=ids, prompt_ids=[prompt]).logits - whole).abs().max() <= TOLERANCE


@architectures
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_every_padded_row_equals_that_row_alone(made, name, side):
    model = made(name)
    ids, mask = token_batch([5, 9, 2, 7], side)
    call = {"input_ids": ids, "attention_mask": mask}
    if side == "left" and name in ("mistral", *COUNTS_SLOTS):
        with pytest.raises(ValueError, match="padding would stand between the prompt and its text: pad on the right"):
            model(**call, use_cache=True)  # nobody knows how long the text will be
        if name in ("mpt", "mistral_small_window"):
            return
        call["use_cache"] = False  # so short a text does not fill a window
    together = model(**call).logits
    selection = model.last_selection
    for row in range(4):
        alone = model(input_ids=ids[row][mask[row].bool()][None]).logits[0]
        assert torch.equal(model.last_selection.prompt_ids, selection.prompt_ids[row : row + 1])
        assert (together[row][mask[row].bool()] - alone).abs().max() <= TOLERANCE


@architectures
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_of_a_batch_equals_each_row_alone(made, name, beams):
    model = made(name)
    lengths = [6, 6, 6] if name in COUNTS_SLOTS else [4, 9, 6]
    ids, mask = token_batch(lengths)
    arguments = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False}
    together = model.generate(input_ids=ids, attention_mask=mask, **arguments)
    for row in range(3):
        alone = model.generate(input_ids=ids[row][mask[row].bool()][None], **arguments)
        assert torch.equal(together[row, -6:], alone[0, -6:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_gets_the_prompt_in_its_type(made, dtype):
    model, base = made("llama", dtype=dtype), tiny("llama", dtype=dtype)
    ids, _ = token_batch([9])
    assert bank_of(model).weight.dtype == bank_of(model).frozen.dtype == torch.float32
    assert torch.equal(model(input_ids=ids, prompt_ids=[2]).logits, by_hand(model, base, ids, 2))


@torch.no_grad()
def test_rows_without_a_prompt_and_a_disabled_adapter_are_the_base(made):
    model, base = made("llama"), tiny("llama")
    ids, mask = token_batch([5, 9])
    expected = base(input_ids=ids[1:]).logits
    found = model(input_ids=ids, attention_mask=mask, prompt_ids=[2, -1]).logits[1:]
    assert (found - expected).abs().max() <= TOLERANCE
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids[1:]).logits, expected)


@pytest.mark.parametrize("selection", ["attention", "centroid", "random", "fixed"])
@torch.no_grad()
def test_inputs_choose_as_they_do_among_token_prompts(made, selection):
    """Prompts that start at a text have the keys of token prompts that hold its embeddings."""
    model = made("llama", moved=False, selection=selection)
    tokens = get_peft_model(
        tiny("llama"), IDPConfig(task_type="CAUSAL_LM", num_prompts=4, num_virtual_tokens=K, selection=selection)
    ).eval()
    bank_of(tokens).weight.copy_(tokens.get_input_embeddings()(torch.tensor(texts(4)).flatten()))
    if selection == "centroid":
        for each in (model, tokens):
            idp_peft.fit_centroids(each, [{"input_ids": row} for row in texts(20, seed=3)])
    ids, mask = token_batch([5, 9, 2, 7])
    for each in (model, tokens):
        each(input_ids=ids, attention_mask=mask)
    assert torch.equal(model.last_selection.prompt_ids, tokens.last_selection.prompt_ids)
    if selection in ("attention", "centroid"):
        assert torch.allclose(model.last_selection.scores, tokens.last_selection.scores, atol=1e-5)


def test_caches_and_turns(made):
    model = made("llama")
    ids, mask = token_batch([6, 6])
    arguments = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    expected = model.generate(input_ids=ids, **arguments)
    assert torch.equal(model.generate(input_ids=ids, cache_implementation="static", **arguments), expected)
    assert torch.equal(model.generate(input_ids=ids, use_cache=False, **arguments), expected)
    cache = DynamicCache()
    first = model.generate(input_ids=ids, past_key_values=cache, **arguments)
    chosen = model.last_selection.prompt_ids
    more = torch.cat([first, ids[:, :3]], 1)
    again = model.generate(
        input_ids=more, past_key_values=cache, attention_mask=torch.ones_like(more), max_new_tokens=3, do_sample=False
    )
    whole = model.generate(input_ids=more, prompt_ids=chosen, max_new_tokens=3, do_sample=False)
    assert torch.equal(again, whole)


# ---------------------------------------------------------------------- training


def labelled(lengths=(7, 9)) -> dict:
    ids, mask = token_batch(list(lengths), "right")
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@architectures
def test_training_has_the_gradients_of_the_base_behind_the_same_cache(made, name):
    model = made(name).train()
    batch = labelled((9,))
    for use_cache in (True, False):
        loss = model(**batch, prompt_ids=[1], use_cache=use_cache).loss
        loss.backward()
        found, bank_of(model).weight.grad = bank_of(model).weight.grad, None
        logits = by_hand(model, tiny(name), batch["input_ids"], 1)[:, :-1]
        expected = torch.nn.functional.cross_entropy(logits[0], batch["labels"][0, 1:])
        expected.backward()
        assert abs(loss - expected) <= 1e-5 * expected
        difference = (found - bank_of(model).weight.grad).abs().max()
        assert difference <= 1e-5 * found.abs().max()
        assert found.abs().max() > 0
        bank_of(model).weight.grad = None


def test_frozen_tokens_stay_and_the_others_learn(made):
    model = made("llama", num_frozen_tokens=2).train()
    base = {key: value.clone() for key, value in model.get_base_model().state_dict().items() if "idp" not in key}
    before = bank_of(model).embeddings().detach().view(4, K, -1).clone()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    for _ in range(3):
        loss = model(**labelled(), prompt_ids=[0, 3]).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    after = bank_of(model).embeddings().detach().view(4, K, -1)
    assert torch.equal(after[:, :2], before[:, :2]), "weight decay must not reach them either"
    assert (after[[0, 3], 2:] - before[[0, 3], 2:]).abs().min(-1).values.max() > 0
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "base_model.model.model.idp.idp_prompts.default.weight"
    ]
    state = model.get_base_model().state_dict()
    assert all(torch.equal(state[key], value) for key, value in base.items())


def test_what_no_cache_can_hold_is_refused_with_a_way_out(made):
    model = made("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(
        ValueError, match=r"gradient checkpointing drops the cache .* turn it off, or use prompts='tokens'"
    ):
        model(**labelled(), use_cache=False)
    model.gradient_checkpointing_disable()
    model.eval()

    class Own(DynamicCache):
        pass

    with pytest.raises(ValueError, match="this cache does not give back what it was given: use the default cache"):
        model(input_ids=token_batch([5])[0], past_key_values=Own())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_virtual_tokens": [3, 4, 3, 4]}, "`num_virtual_tokens` must be one length for all"),
        ({"num_frozen_tokens": 5}, "`num_frozen_tokens` must be an int of at least 0 and at most 4"),
        ({"init_weights": True}, "must start at real text"),
        ({"init": "random", "init_weights": True}, "must start at real text"),
        ({"prompts": "tokens", "num_frozen_tokens": "x"}, "`num_frozen_tokens` must be an int of at least 0, got 'x'"),
        ({"prompts": "keys"}, "`prompts` must be one of 'tokens', 'key_values'"),
    ],
)
def test_configs_that_cannot_be_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        IDPConfig(
            **{
                "task_type": "CAUSAL_LM",
                "num_virtual_tokens": K,
                "prompts": "key_values",
                "init_weights": False,
                **config,
            }
        )


def test_starts_that_do_not_fit_are_refused(made, make):
    model = made("llama")
    with pytest.raises(ValueError, match="`texts` must be one per prompt"):
        idp_peft.start_at(model, tiny("llama"), texts(3))
    with pytest.raises(ValueError, match=r"`texts` \[1\] have no token"):
        idp_peft.start_at(model, tiny("llama"), [[2], [], [3], [4]])
    with pytest.raises(ValueError, match="makes 192 numbers of a token's keys and values, this model 96"):
        idp_peft.start_at(model, tiny("gpt2"), texts(4))
    with pytest.raises(ValueError, match="needs an adapter with prompts='key_values', got 'tokens'"):
        idp_peft.start_at(make("llama"), tiny("llama"), texts(4))


@torch.no_grad()
def test_a_config_with_texts_starts_at_them_behind_the_beginning_of_sequence(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    config = IDPConfig(
        task_type="CAUSAL_LM",
        prompts="key_values",
        num_prompts=2,
        num_virtual_tokens=4,
        init="text",
        init_text=["w5 w6 w7 w8 w9", "w3 w4"],
        tokenizer_name_or_path=str(tmp_path),
    )
    model, base = get_peft_model(tiny("llama"), config).eval(), tiny("llama")
    ids, _ = token_batch([6])
    for prompt, text in enumerate([[1, 5, 6, 7], [1, 3, 4, 1]]):
        whole = base(input_ids=torch.cat([torch.tensor([text]), ids], 1)).logits[:, 4:]
        assert (model(input_ids=ids, prompt_ids=[prompt]).logits - whole).abs().max() <= TOLERANCE


# ---------------------------------------------------------------------- files and other methods


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3n", "bloom"])
@pytest.mark.parametrize("frozen", [0, 1])
@torch.no_grad()
def test_a_saved_adapter_answers_as_it_did(made, tmp_path, name, frozen):
    model = made(name, num_frozen_tokens=frozen)
    ids, mask = token_batch([5, 9], "right")
    expected = model(input_ids=ids, attention_mask=mask).logits
    model.save_pretrained(tmp_path)
    for low_memory in (False, True):
        again = PeftModel.from_pretrained(tiny(name), tmp_path, low_cpu_mem_usage=low_memory).eval()
        assert torch.equal(again(input_ids=ids, attention_mask=mask).logits, expected)
    other = "gpt2" if name in ("llama", "gemma3n") else "llama"
    with pytest.raises(ValueError, match=r"holds prompts of shape \[.*\], expected"):
        PeftModel.from_pretrained(tiny(other), tmp_path)


@torch.no_grad()
def test_peft_prefix_tuning_moves_in_and_out(made, tmp_path):
    base = tiny("llama")
    for number in range(2):
        prefix = get_peft_model(copy.deepcopy(base), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=K))
        prefix.prompt_encoder["default"].embedding.weight.normal_(generator=torch.Generator().manual_seed(number))
        prefix.save_pretrained(tmp_path / f"prefix{number}")
    bank_folder = tmp_path / "bank"
    config = compose([str(tmp_path / "prefix0"), str(tmp_path / "prefix1")], bank_folder, base_model=base)
    assert (config.prompts, config.num_prompts, config.num_virtual_tokens) == ("key_values", 2, K)
    bank = PeftModel.from_pretrained(tiny("llama"), bank_folder).eval()
    ids, _ = token_batch([9])
    for number in range(2):
        alone = PeftModel.from_pretrained(tiny("llama"), tmp_path / f"prefix{number}").eval()
        expected = alone(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert (bank(input_ids=ids, prompt_ids=[f"prefix{number}"]).logits - expected).abs().max() <= TOLERANCE
    ours = made("llama")
    ours.save_pretrained(tmp_path / "ours")
    folders = split(str(tmp_path / "ours"), tmp_path / "apart", base_model=base)
    for number, folder in enumerate(folders):
        assert (
            json.loads((tmp_path / "apart" / folder / "adapter_config.json").read_text())["peft_type"]
            == "PREFIX_TUNING"
        )
        alone = PeftModel.from_pretrained(tiny("llama"), folder).eval()
        expected = alone(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert (ours(input_ids=ids, prompt_ids=[number]).logits - expected).abs().max() <= TOLERANCE
    again = compose(folders, tmp_path / "again", base_model=base)
    back = PeftModel.from_pretrained(tiny("llama"), tmp_path / "again").eval()
    assert again.num_prompts == 4
    assert torch.equal(bank_of(back).embeddings(), bank_of(ours).embeddings())


def test_banks_of_two_kinds_do_not_mix(made, make, tmp_path):
    made("llama").save_pretrained(tmp_path / "keys")
    make("llama").save_pretrained(tmp_path / "tokens")
    with pytest.raises(ValueError, match="prompts of keys and values and token prompts cannot stand in one bank"):
        compose([str(tmp_path / "keys"), str(tmp_path / "tokens")], tmp_path / "bank", base_model=tiny("llama"))


@pytest.mark.parametrize("selection", ["attention", "centroid"])
@torch.no_grad()
def test_the_router_chooses_and_what_needs_tokens_is_refused(made, tmp_path, selection):
    tiny_folder(tmp_path / "base")
    model = made("llama", selection=selection)
    if selection == "centroid":
        idp_peft.fit_centroids(model, [{"input_ids": row} for row in texts(20, seed=3)])
    model.save_pretrained(tmp_path / "adapter")
    router = Router.from_pretrained(tmp_path / "adapter", tmp_path / "base")
    ids, mask = token_batch([5, 9, 2, 7])
    model(input_ids=ids, attention_mask=mask)
    assert torch.equal(router.select(ids, mask).prompt_ids, model.last_selection.prompt_ids)
    assert torch.allclose(router.select(ids, mask).scores, model.last_selection.scores, atol=1e-6)
    with pytest.raises(ValueError, match="no token of a vocabulary has these"):
        export_to_vocab(tmp_path / "adapter", tmp_path / "exported", tmp_path / "base")
    assert not (tmp_path / "exported").exists()


@needs_transformers_adapter_methods
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_transformers_own_loading_brings_everything(made, tmp_path, name):
    model = made(name, selection="centroid")
    idp_peft.fit_centroids(model, [{"input_ids": row} for row in texts(20, seed=3)])
    model.save_pretrained(tmp_path)
    ids, mask = token_batch([5, 9], "right")
    expected = model(input_ids=ids, attention_mask=mask).logits
    base = tiny(name)
    base.load_adapter(str(tmp_path))
    assert torch.equal(base.eval()(input_ids=ids, attention_mask=mask).logits, expected)
