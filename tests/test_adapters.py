"""Adapters live, switch, load and leave through the hosts' own verbs."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    DynamicCache,
    T5Config,
    T5ForConditionalGeneration,
)

from idp_peft import IDPConfig
from idp_peft.hosting.architectures import find_decoder
from idp_peft.selection import select
from tests.hosts import needs_transformers_adapter_methods
from tests.reference import bank_of, concatenated_logits
from tests.tiny import NAMES, SEED, tiny, token_batch


def logits(model, prompt=None, lengths=(7,)):
    ids, mask = token_batch(list(lengths))
    forced = {} if prompt is None else {"prompt_ids": torch.tensor([prompt] * len(lengths))}
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **forced).logits


@pytest.fixture
def saved(make, tmp_path):
    """A tiny base folder, an adapter folder, and the model both came from."""
    model = make("llama", num_virtual_tokens=[3, 5, 2, 5])
    tiny("llama").save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "base", tmp_path / "adapter"


@needs_transformers_adapter_methods
@pytest.mark.parametrize("arch", NAMES)
def test_transformers_own_loading_brings_the_stored_prompts_on_every_architecture(arch, tmp_path):
    """transformers 5.0 looks for them under another name where the decoder is called `transformer`."""
    model = get_peft_model(tiny(arch), IDPConfig(task_type="CAUSAL_LM", num_prompts=2, num_virtual_tokens=3))
    with torch.no_grad():
        bank_of(model).weight.normal_()
    model.save_pretrained(tmp_path)
    native = tiny(arch)
    native.load_adapter(str(tmp_path))
    (layer,) = [module for module in native.modules() if hasattr(module, "idp_prompts")]
    assert torch.equal(layer.idp_prompts["default"].weight, bank_of(model).weight)


def test_an_adapter_is_one_tensor_in_one_safetensors_file(saved):
    from safetensors.torch import load_file

    model, _, folder = saved
    tensors = load_file(folder / "adapter_model.safetensors")
    assert list(tensors) == ["base_model.model.model.idp.idp_prompts.weight"]
    assert torch.equal(next(iter(tensors.values())), bank_of(model).weight)
    assert json.loads((folder / "adapter_config.json").read_text())["num_virtual_tokens"] == [3, 5, 2, 5]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_every_loader_gives_the_same_model(saved, low_cpu_mem_usage):
    model, base, folder = saved
    expected = logits(model, lengths=(7, 4))
    by_peft = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), folder, low_cpu_mem_usage=low_cpu_mem_usage
    )
    by_auto = AutoPeftModelForCausalLM.from_pretrained(folder, low_cpu_mem_usage=low_cpu_mem_usage)
    native = AutoModelForCausalLM.from_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(base)
    loaded.load_adapter(str(folder))
    for other in (by_peft, by_auto, native, loaded):
        assert torch.equal(logits(other, lengths=(7, 4)), expected)
    assert not bank_of(by_auto).weight.requires_grad
    assert not by_auto.training


def test_a_loaded_adapter_can_be_trained_on(saved):
    _, base, folder = saved
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder, is_trainable=True)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "base_model.model.model.idp.idp_prompts.default.weight"
    ]


def test_prompts_stay_float32_on_a_half_precision_base(saved, tmp_path):
    model, base, folder = saved
    for arguments in ({}, {"low_cpu_mem_usage": True}):
        low = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), folder, **arguments
        )
        assert bank_of(low).weight.dtype == torch.float32
        assert torch.equal(bank_of(low).weight, bank_of(model).weight)


def test_adapters_switch_disable_and_leave(make):
    model, base = make("llama"), tiny("llama")
    plain = base(input_ids=token_batch([7])[0]).logits
    first = logits(model, 1)
    model.add_adapter("other", IDPConfig(task_type="CAUSAL_LM", num_prompts=2, num_virtual_tokens=[6, 2]))
    assert torch.equal(logits(model, 1), first), "adding does not activate"
    model.set_adapter("other")
    second = logits(model, 1)
    assert (second - first).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
        with pytest.raises(ValueError, match="`prompt_ids` given, but no IDP adapter is active"):
            logits(model, 1)
    assert torch.equal(logits(model, 1), second)
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        model.delete_adapter("other")
    assert torch.equal(logits(model, 1), first)
    assert list(model.peft_config) == ["default"]
    model.delete_adapter("default")  # PeftModel itself cannot run without an adapter
    assert torch.equal(logits(model.base_model.model), plain)


def test_two_active_banks_are_refused(make):
    model = make("llama")
    model.add_adapter("other", IDPConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"one IDP adapter can be active at a time, got \['default', 'other'\]"):
        model.base_model.set_adapter(["default", "other"])


def test_mixed_adapters_in_one_batch_are_refused(make):
    ids, _ = token_batch([4])
    with pytest.raises(ValueError, match="IDP cannot mix adapters in one batch"):
        make("llama")(input_ids=ids, adapter_names=["default"])


def test_merging_says_why_it_cannot(make):
    for merge in ("merge_and_unload", "merge_adapter"):
        with pytest.raises(ValueError, match="an IDP adapter cannot be merged: a prompt is extra context"):
            getattr(make("llama"), merge)()


def test_unloading_allows_a_new_start(make):
    model = make("llama")
    base = model.unload()
    assert base.__class__.__name__ == "LlamaForCausalLM"
    again = get_peft_model(base, IDPConfig(task_type="CAUSAL_LM", num_prompts=2)).eval()
    assert torch.isfinite(logits(again)).all()


def test_a_hooked_model_can_be_copied_and_pickled(make):
    model = make("llama")
    expected = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), expected)
        with torch.no_grad():
            bank_of(twin).weight.mul_(2)
        assert (logits(twin) - expected).abs().max() > 1e-2
        assert torch.equal(logits(model), expected), "a copy must not share its prompts"
        twin.unload()
        assert torch.equal(logits(model), expected), "unloading a copy must not unload the original"


@needs_transformers_adapter_methods
def test_transformers_own_adapter_methods(make, tmp_path):
    reference = make("llama")
    reference.save_pretrained(tmp_path)
    model = tiny("llama")
    model.load_adapter(str(tmp_path))
    ids, mask = token_batch([7, 4])
    assert torch.equal(logits(model, lengths=(7, 4)), logits(reference, lengths=(7, 4)))
    generated = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4)
    assert torch.equal(generated, reference.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4))
    model.disable_adapters()
    assert torch.equal(logits(model), logits(tiny("llama")))
    model.enable_adapters()
    model.add_adapter(IDPConfig(num_prompts=2), adapter_name="second")
    second = logits(model)
    model.set_adapter("default")
    assert (logits(model) - second).abs().max() > 1e-2


def test_what_the_hooks_cannot_do_alone_raises(make, tmp_path):
    make("llama").save_pretrained(tmp_path)
    model = tiny("llama")
    model.load_adapter(str(tmp_path))
    ids, _ = token_batch([7])
    with pytest.raises(ValueError, match=r"generate\(use_cache=False\) would choose a prompt again at every step"):
        model.generate(input_ids=ids, max_new_tokens=2, use_cache=False)
    with pytest.raises(
        ValueError, match=r"generate\(cache_implementation='static'\) sizes a static cache without room"
    ):
        model.generate(input_ids=ids, max_new_tokens=2, cache_implementation="static")
    for arguments in (
        {"prompt_lookup_num_tokens": 2},
        {"assistant_model": tiny("llama")},
        {"prefill_chunk_size": 2, "past_key_values": DynamicCache()},
        {"guidance_scale": 1.5},
    ):
        with pytest.raises(ValueError, match="when the adapter was added by transformers' own adapter methods"):
            model.generate(input_ids=ids, max_new_tokens=2, **arguments)
    with torch.no_grad():
        assert model(input_ids=ids, use_cache=False).past_key_values is None


def test_an_interrupt_leaves_no_call_behind(make):
    model = make("llama")
    ids, mask = token_batch([6, 9])
    decoder = model.get_base_model().model

    def interrupt(*_):
        raise KeyboardInterrupt

    with torch.no_grad():
        decoder(input_ids=ids, attention_mask=mask)
        free = model.last_selection.scores
        handle = decoder.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=ids, attention_mask=mask, prompt_ids=torch.tensor([3, 3]))
        handle.remove()
        decoder(input_ids=ids, attention_mask=mask)
    assert torch.equal(model.last_selection.scores, free)


def test_a_cache_is_not_continued_by_another_adapter(make):
    model = make("llama")
    model.add_adapter("other", IDPConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    ids, _ = token_batch([7])
    first = model.generate(input_ids=ids, max_new_tokens=2, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, ids[:, :2]], dim=1)
    model.set_adapter("other")
    with pytest.raises(ValueError, match="was started by adapter 'default' of this model, adapter 'other' is active"):
        model.generate(input_ids=longer, past_key_values=first.past_key_values, max_new_tokens=2)
    with pytest.raises(ValueError, match="was started by adapter 'default' of another model"):
        make("llama").generate(input_ids=longer, past_key_values=first.past_key_values, max_new_tokens=2)


def test_an_offloaded_base(make):
    from accelerate import cpu_offload

    model = make("llama", num_virtual_tokens=[3, 5, 2, 5])
    expected = logits(model, lengths=(7, 4))
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(logits(model, lengths=(7, 4)), expected)


def test_what_cannot_be_done_with_adapters_says_so(make):
    with pytest.raises(ValueError, match="IDP adapters cannot be averaged"):
        make("llama").add_weighted_adapter(["default"], [1.0], "mean")
    model = make("llama")
    model.generation_config.cache_implementation = "static"
    with pytest.raises(ValueError, match="the model's own generation_config asks for cache_implementation='static'"):
        model.generate(input_ids=token_batch([7])[0], max_new_tokens=2)


def test_multi_turn_works_through_transformers_own_methods(make, tmp_path):
    wrapped = make("llama")
    wrapped.save_pretrained(tmp_path)
    model = tiny("llama")
    model.load_adapter(str(tmp_path))
    ids, _ = token_batch([7])
    first = model.generate(input_ids=ids, max_new_tokens=3, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, ids[:, :3]], dim=1)
    generated = model.generate(input_ids=longer, past_key_values=first.past_key_values, max_new_tokens=3)
    kept = select(wrapped.base_model.layer, {"input_ids": ids}, torch.ones_like(ids).bool()).prompt_ids
    assert torch.equal(generated, wrapped.generate(input_ids=longer, prompt_ids=kept, max_new_tokens=3))


def test_text_init_takes_lengths_from_the_texts(tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    texts = ["w3 w4 w5", "w6"]
    config = IDPConfig(
        task_type="CAUSAL_LM",
        num_prompts=2,
        num_virtual_tokens=None,
        init="text",
        init_text=texts,
        tokenizer_name_or_path=str(tmp_path),
    )
    model = get_peft_model(tiny("gemma3"), config)
    assert config.num_virtual_tokens == [3, 1]
    embeddings = model.get_input_embeddings()
    ids = torch.tensor(tokenizer("w3 w4 w5 w6", add_special_tokens=False)["input_ids"])
    assert torch.equal(bank_of(model).weight, embeddings(ids)), "Gemma scales its embeddings; prompts start scaled"


def test_vocab_init_starts_from_distinct_tokens_of_the_embedding_module(make):
    model = make("gemma3", num_prompts=5, num_virtual_tokens=7)
    table = model.get_input_embeddings()(torch.arange(97))
    same = (bank_of(model).weight[:, None] == table).all(-1)  # [35, vocab]
    assert same.any(-1).all()
    assert len(set(same.long().argmax(-1).tolist())) == 35
    random = make("gemma3", init="random", num_prompts=5, num_virtual_tokens=20)
    ratio = bank_of(random).weight.pow(2).mean().sqrt() / table.pow(2).mean().sqrt()
    assert 0.9 < ratio < 1.1


def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, **{f"w{i}": i for i in range(2, 97)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", padding_side="left")


def test_the_text_generation_pipeline(make, tmp_path):
    from transformers import pipeline

    model = make("llama")
    tokenizer = word_tokenizer()
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = ["w5 w6 w7", "w9 w10 w11 w12 w13"]
    outputs = generator(texts, batch_size=2, max_new_tokens=4, do_sample=False, return_full_text=False)
    for text, output in zip(texts, outputs, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        expected = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
        assert output[0]["generated_text"].strip() == tokenizer.decode(expected).strip()


# ---------------------------------------------------------------------- loading what does not fit


def as_it_was(model, expected):
    assert "idp" not in dict(model.named_modules())
    assert not any("idp" in name for name, _ in model.named_modules())
    assert not hasattr(model, "peft_config")
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(logits(model), expected)


def damage_truncate(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])


def damage_missing(folder):
    from safetensors.torch import save_file

    save_file({"something.else": torch.zeros(2)}, folder / "adapter_model.safetensors")


def damage_extra(folder):
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.lm_head.weight": torch.zeros(2)}, file)


def damage_lengths(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    config["num_virtual_tokens"] = 4
    (folder / "adapter_config.json").write_text(json.dumps(config))


def damage_pickle(folder):
    torch.save({}, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, "cannot be read and may be truncated"),
        (damage_missing, r"has no prompts: expected a tensor named '...idp.idp_prompts.weight', found \['something"),
        (damage_extra, r"has unexpected tensors \['base_model.model.lm_head.weight'\]"),
        (
            damage_lengths,
            r"holds prompts of shape \[15, 32\], expected \[16, 32\]: its config says \[4, 4, 4, 4\] tokens",
        ),
        (damage_pickle, "IDP adapters are safetensors files"),
    ],
)
def test_a_file_that_does_not_fit_is_named_and_the_model_left_as_it_was(saved, damage, message):
    _, base, folder = saved
    damage(folder)
    model = AutoModelForCausalLM.from_pretrained(base)
    expected = logits(model)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(model, folder)
    as_it_was(model, expected)


@pytest.fixture
def hub(saved, monkeypatch):
    """A Hub with one repository, `someone/adapter`, whose files are the saved folder's."""
    from huggingface_hub.errors import EntryNotFoundError

    _, base, folder = saved

    def download(repo, filename, subfolder=None, **_):
        assert repo == "someone/adapter"
        path = folder / filename
        if not path.exists():
            raise EntryNotFoundError(filename)
        return str(path)

    for module in ("peft.config", "idp_peft.hosting.checkpoint", "peft.utils.save_and_load"):
        monkeypatch.setattr(f"{module}.hf_hub_download", download)
    monkeypatch.setattr(
        "peft.utils.save_and_load.file_exists", lambda repo_id, filename, **_: (folder / filename).exists()
    )
    return base, folder


def test_a_hub_adapter_loads(hub, saved):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(hub[0]), "someone/adapter")
    assert torch.equal(logits(model), logits(saved[0]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, "may be truncated"),
        (damage_missing, "has no prompts"),
        (damage_pickle, "is pickled and could run"),
    ],
)
def test_a_hub_adapter_that_does_not_fit_leaves_the_model_as_it_was(hub, damage, message):
    base, folder = hub
    damage(folder)
    model = AutoModelForCausalLM.from_pretrained(base)
    expected = logits(model)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(model, "someone/adapter")
    as_it_was(model, expected)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, "may be truncated"),
        (damage_lengths, "holds prompts of shape"),
        (damage_extra, "unexpected tensors"),
    ],
)
def test_transformers_own_loader_refuses_a_file_that_does_not_fit_before_the_model_changes(saved, damage, message):
    _, base, folder = saved
    damage(folder)
    model = AutoModelForCausalLM.from_pretrained(base)
    expected = logits(model)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(str(folder))
    as_it_was(model, expected)


def test_another_width_is_named_and_the_model_left_as_it_was(saved):
    _, _, folder = saved
    model = tiny("opt")  # embeddings of width 24
    expected = logits(model)
    with pytest.raises(ValueError, match=r"its base has embeddings of width 32, this model's have width 24"):
        PeftModel.from_pretrained(model, folder)
    as_it_was(model, expected)


def test_a_bad_second_adapter_leaves_the_first_in_place(saved):
    model, _, folder = saved
    expected = logits(model)
    damage_truncate(folder)
    with pytest.raises(ValueError, match="truncated"):
        model.load_adapter(folder, "second")
    assert list(bank_of(model).parameters())
    assert list(model.base_model.layer.idp_prompts) == ["default"]
    assert torch.equal(logits(model), expected)


def test_weights_of_another_shape_are_refused_without_a_file_too(saved):
    from peft import set_peft_model_state_dict

    model, _, _ = saved
    logits(model)
    with pytest.raises(ValueError, match=r"holds prompts of shape \[2, 2\], expected \[15, 32\]"):
        set_peft_model_state_dict(model, {"base_model.model.model.idp.idp_prompts.weight": torch.zeros(2, 2)})
    assert model.base_model.layer.active_name == "default", "an adapter in use stays"
    fresh = get_peft_model(tiny("llama"), IDPConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"has no prompts"):
        set_peft_model_state_dict(fresh, {})
    as_it_was(fresh.base_model.model, logits(tiny("llama")))


# ---------------------------------------------------------------------- models that cannot be prompted


def test_models_that_cannot_be_prompted_are_refused():
    """One of each kind that is not in transformers' lists of causal language models; those are in tests/test_models.py."""
    config = IDPConfig(task_type="CAUSAL_LM")
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4))
    with pytest.raises(ValueError, match="IDP needs a decoder-only model: T5ForConditionalGeneration"):
        get_peft_model(t5, config)
    with pytest.raises(ValueError, match=r"IDP needs a causal language model with its head .* got LlamaModel"):
        get_peft_model(tiny("llama").model, config)
    bert = BertForMaskedLM(
        BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    with pytest.raises(ValueError, match="IDP needs causal attention: BertForMaskedLM attends in both directions"):
        get_peft_model(bert, config)
    with pytest.raises(ValueError, match=r"IDP needs a transformers model with `get_decoder\(\)`, got Linear"):
        find_decoder(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="`selection_layer` must be between -3 and 2 for this model, got 3"):
        get_peft_model(tiny("llama"), IDPConfig(task_type="CAUSAL_LM", selection_layer=3))


# ---------------------------------------------------------------------- imports, threads

IMPORT_CHECK = """
import json, sys
import torch, transformers, peft, peft.mapping
from peft.tuners import tuners_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

def snapshot():
    classes = [torch.nn.Module, transformers.PreTrainedModel, transformers.GenerationMixin, peft.PeftModel,
               peft.PeftModelForCausalLM, tuners_utils.BaseTuner, tuners_utils.BaseTunerLayer, transformers.Cache,
               transformers.DynamicCache, transformers.StaticCache]
    state = {f"{c.__module__}.{c.__name__}.{n}": id(v) for c in classes for n, v in vars(c).items()}
    state["attention"] = sorted(ALL_ATTENTION_FUNCTIONS.keys())
    state["peft types"] = sorted(t.value for t in peft.PeftType)
    for table in ("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING"):
        state[table] = sorted(str(getattr(k, "value", k)) for k in getattr(peft.mapping, table))
    state["rng"] = torch.get_rng_state().sum().item()
    return state

before = snapshot()
import idp_peft
MEDDLE
after = snapshot()
import importlib
importlib.reload(idp_peft)
idp_peft.register()
again = snapshot()
changed = {k: None for k in after if before.get(k) != after[k]}
print(json.dumps([sorted(changed), again == after, sorted(set(after["PEFT_TYPE_TO_CONFIG_MAPPING"]) -
      set(before["PEFT_TYPE_TO_CONFIG_MAPPING"]))]))
"""


def import_check(meddle=""):
    code = IMPORT_CHECK.replace("MEDDLE", meddle)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def test_importing_changes_nothing_but_the_registration():
    changed, harmless_twice, added = import_check()
    assert changed == [
        "PEFT_TYPE_TO_CONFIG_MAPPING",
        "PEFT_TYPE_TO_PREFIX_MAPPING",
        "PEFT_TYPE_TO_TUNER_MAPPING",
    ]
    assert harmless_twice
    assert added == ["IDP"]


def test_the_import_check_notices_a_patch():
    changed, _, _ = import_check("peft.PeftModel.forward = lambda self: None")
    assert "peft.peft_model.PeftModel.forward" in changed


def test_a_name_that_is_taken_is_refused(monkeypatch):
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    from idp_peft import IDPPeftType, register

    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, IDPPeftType.IDP, PeftConfig)
    with pytest.raises(RuntimeError, match="PEFT already has a method named 'IDP'"):
        register()
    monkeypatch.undo()
    monkeypatch.setitem(PEFT_TYPE_TO_PREFIX_MAPPING, "UPSTREAM", "idp_")
    with pytest.raises(RuntimeError, match="PEFT's method 'UPSTREAM' already uses the parameter prefix 'idp_'"):
        register()


@pytest.mark.parametrize("name", NAMES)
def test_threads_get_what_they_get_one_after_the_other(make, name):
    model = make(name, num_virtual_tokens=[3, 5, 2, 5])
    if name == "qwen2_5_vl" and transformers.__version__.startswith("5.0."):
        pytest.skip("the base itself keeps the positions of the input it ran last")
    batches = [token_batch([4 + i % 3, 9, 3 + i % 5], seed=i) for i in range(8)]
    forced = [None if i % 2 else torch.tensor([i % 4, -1, (i + 1) % 4]) for i in range(8)]

    def generate(i):
        ids, mask = batches[i]
        extra = {} if forced[i] is None else {"prompt_ids": forced[i]}
        tokens = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, **extra)
        return tokens, model.last_selection.prompt_ids.clone()

    alone = [generate(i) for i in range(8)]
    model.base_model.layer.idp_remembered["default"].forget()
    results, errors = {}, []

    def work(i):
        try:
            for _ in range(2):
                results.setdefault(i, []).append(generate(i))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for i in range(8):
        for tokens, chosen in results[i]:
            assert torch.equal(tokens, alone[i][0])
            assert torch.equal(chosen, alone[i][1]), "last_selection must be the calling thread's"


def test_concatenation_still_holds_after_everything(saved):
    _, _, folder = saved
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder)
    ids, _ = token_batch([7])
    for prompt in range(4):
        assert (logits(loaded, prompt) - concatenated_logits(loaded, tiny("llama"), ids, prompt)).abs().max() <= 1e-4


# ---------------------------------------------------------------------- files of earlier versions


@pytest.mark.parametrize(
    "folder", sorted((Path(__file__).parent / "files").glob("adapter-*")), ids=lambda path: path.name
)
@torch.no_grad()
def test_an_adapter_of_an_earlier_version_chooses_and_answers_as_it_did(folder):
    expected = load_file(folder / "expected.safetensors")
    model = PeftModel.from_pretrained(tiny("llama", seed=-SEED), folder).eval()
    logits = model(input_ids=expected["input_ids"], attention_mask=expected["attention_mask"]).logits[:, -1]
    assert torch.allclose(model.last_selection.scores, expected["scores"], atol=1e-5)
    assert (logits - expected["logits"]).abs().max() <= 1e-4
