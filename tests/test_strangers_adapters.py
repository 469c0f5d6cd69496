"""An adapter from a stranger: loading it reads its config and its weights, and does nothing else."""

from __future__ import annotations

import contextlib
import json
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import idp_peft
from idp_peft import IDPConfig
from tests.reference import bank_of
from tests.tiny import tiny
from tests.tiny_folder import tiny_folder, tiny_tokenizer

FILES = {"adapter_config.json", "adapter_model.safetensors"}
_watched: list | None = None


def _audit(event: str, args: tuple) -> None:
    if _watched is not None and event in ("open", "socket.connect", "subprocess.Popen", "os.system"):
        _watched.append((event, str(args[0])))


sys.addaudithook(_audit)  # cannot be taken off again: it looks at nothing while `_watched` is None


@contextlib.contextmanager
def watched():
    """What is opened, started and connected to within it."""
    global _watched
    _watched = []
    try:
        yield _watched
    finally:
        _watched = None


@pytest.fixture
def base(tmp_path):
    return tiny_folder(tmp_path / "base")


@pytest.fixture
def hostile(tmp_path, base):
    """hostile(**config) -> an adapter whose config names a tokenizer with code of its own, and what that code would leave."""
    marker = tmp_path / "ran"

    def build(**config):
        folder = tmp_path / "adapter"
        model = get_peft_model(
            tiny("llama"), IDPConfig(task_type="CAUSAL_LM", num_prompts=2, num_virtual_tokens=[3, 1])
        )
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        (folder / "evil.py").write_text(
            f"open({str(marker)!r}, 'w').close()\nfrom transformers import PreTrainedTokenizerFast\n"
            "class Evil(PreTrainedTokenizerFast): pass\n"
        )
        file = folder / "tokenizer_config.json"
        names = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
        file.write_text(json.dumps(json.loads(file.read_text()) | names))
        file = folder / "adapter_config.json"
        content = json.loads(file.read_text()) | {
            "base_model_name_or_path": base,
            "init": "text",
            "init_text": ["w3 w4 w5", "w6"],
            "tokenizer_name_or_path": str(folder),
            "tokenizer_kwargs": {"trust_remote_code": True},
        }
        file.write_text(json.dumps(content | config))
        return folder, marker

    return build


def by_peft(folder, base):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)


def by_peft_to_train(folder, base):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder, is_trainable=True)


def as_a_second_adapter(folder, base):
    config = IDPConfig(task_type="CAUSAL_LM", num_prompts=1, num_virtual_tokens=2)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config, "mine")
    model.load_adapter(folder, "default", is_trainable=True)
    return model


def by_transformers(folder, base):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_adapter(str(folder))
    return model


def by_transformers_to_train(folder, base):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_adapter(str(folder), is_trainable=True)
    return model


def by_auto_model(folder, base):
    return AutoModelForCausalLM.from_pretrained(str(folder))


def by_auto_peft_model(folder, base):
    return AutoPeftModelForCausalLM.from_pretrained(str(folder))


def by_load(folder, base):
    return idp_peft.load(folder)[0]


def by_router(folder, base):
    from idp_peft.serving import Router

    return Router.from_pretrained(folder)


def by_compose(folder, base):
    return idp_peft.compose([folder], folder.parent / "composed")


LOADERS = [
    by_peft,
    by_peft_to_train,
    as_a_second_adapter,
    by_transformers,
    by_transformers_to_train,
    by_auto_model,
    by_auto_peft_model,
    by_load,
    by_router,
    by_compose,
]


@pytest.mark.parametrize("lengths", [[3, 1], None], ids=["lengths", "no lengths"])
@pytest.mark.parametrize("load", LOADERS)
def test_no_loader_runs_the_code_beside_an_adapter(load, lengths, hostile, base):
    folder, marker = hostile(num_virtual_tokens=lengths)
    with contextlib.suppress(ValueError, OSError):  # some read the tokenizer beside it, by design, and refuse its code
        load(folder, base)
    assert not marker.exists()


@pytest.mark.parametrize(
    "load", [by_peft, by_peft_to_train, as_a_second_adapter, by_transformers, by_transformers_to_train]
)
def test_loading_an_adapter_reads_two_files(load, hostile, base):
    folder, _ = hostile()
    with watched() as events:
        load(folder, base)
    opened = {name.removeprefix(f"{folder}/") for event, name in events if name.startswith(str(folder))}
    assert opened <= FILES
    assert "adapter_config.json" in opened
    assert not [event for event in events if event[0] != "open"]


def test_the_watch_sees_a_tokenizer_being_read(hostile):
    folder, _ = hostile()
    with watched() as events:
        (folder / "tokenizer.json").read_text()
    assert ("open", str(folder / "tokenizer.json")) in events


@pytest.mark.parametrize("load", [by_peft, by_peft_to_train, by_transformers, by_transformers_to_train])
def test_an_adapter_that_started_from_text_comes_back_as_it_was(load, tmp_path):
    base = tiny_folder(tmp_path / "base")
    config = IDPConfig(
        task_type="CAUSAL_LM",
        num_prompts=2,
        num_virtual_tokens=None,
        init="text",
        init_text=["w3 w4 w5", "w6"],
        tokenizer_name_or_path=base,
        tokenizer_kwargs={"use_fast": True},
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["num_virtual_tokens"] == [3, 1]
    assert saved["tokenizer_name_or_path"] is saved["tokenizer_kwargs"] is None
    assert config.tokenizer_name_or_path == base, "the config in use stays what it was"
    loaded = load(tmp_path / "adapter", base)
    weight = next(tensor for name, tensor in loaded.named_parameters() if "idp_prompts" in name)
    assert torch.equal(weight, bank_of(model).weight)


def test_a_config_is_not_saved_before_its_lengths_are_known(tmp_path):
    config = IDPConfig(
        num_prompts=1, num_virtual_tokens=None, init="text", init_text=["w3"], tokenizer_name_or_path="somewhere"
    )
    with pytest.raises(ValueError, match="save the config after `get_peft_model`"):
        config.save_pretrained(tmp_path)


# ---------------------------------------------------------------------- configs that ask for too much

_MANY = [f"n{number}" for number in range(30_000)]
GREEDY = {
    "a hundred million prompts": (
        {"num_prompts": 10**8, "num_virtual_tokens": 4},
        "at most 1048576 prompt tokens in all",
    ),
    "a trillion prompts": ({"num_prompts": 10**12, "num_virtual_tokens": 1}, "at most 1048576 prompt tokens in all"),
    "one endless prompt": ({"num_prompts": 1, "num_virtual_tokens": 10**15}, "at most 1048576 prompt tokens in all"),
    "endless lengths": ({"num_virtual_tokens": [10**9, 10**9]}, "at most 1048576 prompt tokens in all"),
    "an endless seed": ({"selection_seed": 10**30}, "`selection_seed` must be an int of at least 0 and at most"),
    "an endless layer": ({"selection_layer": 10**30}, "`selection_layer` must be between -3 and 2"),
    "more names than prompts": ({"prompt_names": _MANY}, r"one name per prompt \(num_prompts=2\)"),
    "a name twice": (
        {"num_prompts": 30_000, "num_virtual_tokens": 1, "prompt_names": [*_MANY[:-1], "n0"]},
        "must hold distinct names, got 'n0' twice",
    ),
}


@pytest.mark.parametrize("load", [by_peft, by_transformers, by_load])
@pytest.mark.parametrize("name", list(GREEDY))
def test_a_config_that_asks_for_too_much_is_refused_before_anything_is_made(name, load, hostile, base):
    asked, text = GREEDY[name]
    folder, _ = hostile(**{"num_prompts": 2, "num_virtual_tokens": [3, 1], **asked})
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match=text):
        load(folder, base)


def test_a_config_that_asks_for_more_than_its_file_holds_is_refused_before_anything_is_made(hostile, base, monkeypatch):
    folder, _ = hostile(num_prompts=2**19, num_virtual_tokens=2, init="vocab", init_text=None)
    monkeypatch.setattr("idp_peft.layer.PromptBank", lambda *_: pytest.fail("a bank was made"))
    with pytest.raises(ValueError, match=r"holds prompts of shape \[4, 32\], expected \[1048576, 32\]"):
        by_peft(folder, base)


# ---------------------------------------------------------------------- numbers that half precision cannot hold


def test_scores_beyond_half_precision_still_choose_as_in_single(make):
    from idp_peft.probe import AttentionLayer, BlockMask

    query, key = torch.full((1, 1, 1, 4), 200.0), torch.tensor([[[[300.0] * 4, [400.0] * 4]]])
    one, mask = AttentionLayer(1.0), BlockMask([1], torch.ones(1, 1, dtype=torch.bool))
    half = one.probabilities(query.half(), key.half(), 0, mask)
    assert torch.equal(half, one.probabilities(query, key, 0, mask))
    assert half[..., 1] == 1


def test_a_choice_by_nan_is_refused(make):
    model = make("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = torch.nan
    ids = torch.tensor([[6, 7], [5, 7]])
    with pytest.raises(ValueError, match=r"attention is NaN in row\(s\) \[1\], so no prompt can be chosen"):
        model(ids)
    assert model(ids[:1]).logits.isfinite().all()


@pytest.mark.parametrize("training", [False, True])
def test_prompts_that_half_precision_cannot_hold_are_refused(training, make):
    model = make("llama", dtype=torch.float16, num_prompts=2)
    with torch.no_grad():
        bank_of(model).weight[-1, 0] = 1e5
    model.train(training)
    with pytest.raises(
        ValueError, match=r"prompt\(s\) \[1\] of the bank hold numbers up to 1e\+05, which torch.float16"
    ):
        model(torch.tensor([[6, 7]]), labels=torch.tensor([[-100, 7]]))


def test_prompts_on_which_the_base_overflows_are_refused(make):
    model = make("llama", dtype=torch.float16, num_prompts=1)
    with torch.no_grad():
        model.get_base_model().model.layers[0].self_attn.v_proj.weight.mul_(3e5)
    with pytest.raises(
        ValueError, match=r"the base model makes NaN or infinity of this adapter's prompts in torch.float16"
    ):
        model(torch.tensor([[6, 7]]))
