"""A bank made of existing adapters gives what each of them gave, and what is split off a bank gives what it gave there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file

import idp_peft
from tests.reference import bank_of, concatenated_logits, looks_up_in_layers, plain_concatenated_logits
from tests.tiny import CHANGING_ROTARY, LEARNED_POSITIONS, NAMES, tiny, token_batch

ROOT = Path(__file__).parent.parent
TOLERANCE = 1e-4  # fp32, docs/method.md, promise 1
METHODS = {
    "prompt_tuning": (PromptTuningConfig, {}),
    "mlp": (PromptEncoderConfig, {"encoder_hidden_size": 16}),
    "lstm": (PromptEncoderConfig, {"encoder_hidden_size": 16, "encoder_reparameterization_type": "LSTM"}),
}


def width_of(base) -> int:
    return base.get_input_embeddings().weight.shape[-1]


def prompt_tuned(
    name: str, length: int = 4, seed: int = 1, method: str = "prompt_tuning", dtype=torch.float32, **extra
):
    """A PEFT prompt adapter on a tiny model, with a prompt large enough to matter, in evaluation mode."""
    base = tiny(name, dtype=dtype)
    config_class, arguments = METHODS[method]
    heads = base.config.get_text_config().num_attention_heads  # PEFT does not find them in MPT's config
    arguments = {"num_attention_heads": heads, "token_dim": width_of(base), **arguments, **extra}
    model = get_peft_model(base, config_class(task_type="CAUSAL_LM", num_virtual_tokens=length, **arguments))
    torch.manual_seed(seed)
    for parameter in model.prompt_encoder.parameters():
        parameter.data.normal_(std=0.5)
    return model.eval()


def saved(model, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


def of_base(base_model: str | Path, folder: str) -> str:
    """The adapter in a folder, naming this base."""
    file = Path(folder) / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(base_model)}))
    return folder


def loaded(name: str, folder, dtype=torch.float32):
    return PeftModel.from_pretrained(tiny(name, dtype=dtype), folder).eval()


def logits(model, ids, **call):
    """At the input's own positions: PEFT's prompt tuning returns those of its prompt too."""
    with torch.no_grad():
        return model(input_ids=ids, **call).logits[:, -ids.shape[1] :]


def tokens_in(folder) -> torch.Tensor:
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    return next(tensor for name, tensor in tensors.items() if name.endswith(("weight", "prompt_embeddings")))


# ---------------------------------------------------------------------- compose


@pytest.mark.parametrize("name", NAMES)
def test_each_forced_prompt_gives_what_its_adapter_gives(make, tmp_path, name):
    if name == "qwen2_5_vl" and transformers.__version__.startswith("5.0."):
        pytest.skip("the base cannot run embeddings without a mask, which are all that PEFT's prompt tuning gives it")
    if looks_up_in_layers(tiny(name).get_decoder()):
        pytest.skip("PEFT's prompt tuning gives this model embeddings alone, and what it looks up by id is lost")
    lengths = [4, 4, 4, 4] if name in LEARNED_POSITIONS else [3, 5, 2, 5]
    one, other = prompt_tuned(name, lengths[0], seed=1), prompt_tuned(name, lengths[1], seed=2)
    bank = make(name, num_prompts=2, num_virtual_tokens=lengths[2:])
    sources = [saved(one, tmp_path / "arc"), saved(bank, tmp_path / "bank"), saved(other, tmp_path / "boolq")]
    config = idp_peft.compose(sources, tmp_path / "all", base_model=tiny(name))
    assert config.prompt_names == ["arc", "bank_0", "bank_1", "boolq"]
    model = loaded(name, tmp_path / "all")
    ids, _ = token_batch([7])
    for prompt, alone in (("arc", one), ("boolq", other)):
        expected = logits(alone, ids)
        assert (logits(model, ids, prompt_ids=prompt) - expected).abs().max() <= TOLERANCE
        assert (logits(alone.get_base_model(), ids) - expected).abs().max() > 1e-2, "the prompt must matter"
    for number in range(2):
        expected = logits(bank, ids, prompt_ids=number)
        assert (logits(model, ids, prompt_ids=f"bank_{number}") - expected).abs().max() <= TOLERANCE

    ids, mask = token_batch([5, 9, 7, 4])
    mixed = logits(model, ids, attention_mask=mask, prompt_ids=["boolq", "bank_0", None, "arc"])
    for row, prompt in ((0, 3), (1, 1), (3, 0)):
        real = mask[row].bool()
        expected = plain_concatenated_logits(model, tiny(name), ids[row][real][None], prompt)[0]
        assert (mixed[row][real] - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", LEARNED_POSITIONS)
def test_unequal_lengths_on_learned_positions_follow_the_definition_and_warn(tmp_path, name):
    short, long = prompt_tuned(name, 3, seed=1), prompt_tuned(name, 5, seed=2)
    sources = [saved(short, tmp_path / "short"), saved(long, tmp_path / "long")]
    message = (
        r"every input of this bank starts at position 5, so these prompts do not .*: \{'short': 3\}\. Compose prompts"
    )
    with pytest.warns(UserWarning, match=message):
        idp_peft.compose(sources, tmp_path / "both", base_model=tiny(name))
    model = loaded(name, tmp_path / "both")
    ids, _ = token_batch([7])
    assert (logits(model, ids, prompt_ids="long") - logits(long, ids)).abs().max() <= TOLERANCE
    ours = logits(model, ids, prompt_ids="short")
    assert (ours - concatenated_logits(model, tiny(name), ids, 0)).abs().max() <= TOLERANCE
    assert (ours - logits(short, ids)).abs().max() > 1e-2, "if this holds, the warning is wrong"
    with pytest.warns(UserWarning, match=r"starts at position 3, .*: \{'both_short': 5\}"):
        idp_peft.compose(
            [(tmp_path / "both", "short"), sources[0]], tmp_path / "x", ["both_short", "s"], base_model=tiny(name)
        )


def test_frequencies_that_follow_the_length_warn_as_well(tmp_path, recwarn):
    name = next(iter(CHANGING_ROTARY))
    sources = [saved(prompt_tuned(name, k), tmp_path / f"p{k}") for k in (2, 5)]
    with pytest.warns(UserWarning, match=r"starts at position 5, .*: \{'p2': 2\}"):
        idp_peft.compose(sources, tmp_path / "both", base_model=tiny(name))
    recwarn.clear()
    idp_peft.compose(sources[:1] * 2, tmp_path / "same", base_model=tiny(name))
    sources = [saved(prompt_tuned("gptj", k), tmp_path / f"g{k}") for k in (2, 5)]
    idp_peft.compose(
        sources, tmp_path / "table", base_model=tiny("gptj")
    )  # a table of rotations is no learned position
    assert not [warning for warning in recwarn if "starts at position" in str(warning.message)]


@pytest.mark.parametrize("method", ["mlp", "lstm"])
@pytest.mark.parametrize("live", [True, False])
def test_p_tuning_is_the_prompt_its_encoder_makes(tmp_path, method, live):
    model = prompt_tuned("llama", method=method)
    idp_peft.compose([model if live else saved(model, tmp_path / "p")], tmp_path / "bank", base_model=tiny("llama"))
    ids, _ = token_batch([7])
    composed = loaded("llama", tmp_path / "bank")
    assert (logits(composed, ids, prompt_ids=0) - logits(model, ids)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("live", [True, False])
def test_multitask_prompt_tuning_has_one_prompt_per_task(tmp_path, live):
    base = tiny("llama")
    config = MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_tasks=3, num_ranks=2)
    model = get_peft_model(base, config).eval()
    torch.manual_seed(0)
    for parameter in model.prompt_encoder.parameters():
        parameter.data.normal_()
    source = model if live else saved(model, tmp_path / "mpt")
    composed = idp_peft.compose([source], tmp_path / "bank", base_model=tiny("llama"))
    assert composed.prompt_names == [f"{'prompt' if live else 'mpt'}_{task}" for task in range(3)]
    ids, _ = token_batch([7])
    bank = loaded("llama", tmp_path / "bank")
    for task in range(3):
        expected = logits(model, ids, task_ids=torch.tensor([task]))
        assert (logits(bank, ids, prompt_ids=task) - expected).abs().max() <= TOLERANCE


def test_a_bfloat16_adapter_on_a_bfloat16_base(tmp_path):
    source = Path(saved(prompt_tuned("llama", dtype=torch.bfloat16), tmp_path / "p"))
    half = {key: tensor.bfloat16() for key, tensor in load_file(source / "adapter_model.safetensors").items()}
    save_file(half, source / "adapter_model.safetensors", metadata={"format": "pt"})
    tiny("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    idp_peft.compose([source], tmp_path / "bank", base_model=tmp_path / "base")
    assert tokens_in(tmp_path / "bank").dtype == torch.float32
    assert torch.equal(tokens_in(tmp_path / "bank"), half["prompt_embeddings"].float())
    ids, _ = token_batch([7])
    expected = logits(loaded("llama", source, torch.bfloat16), ids)
    composed = logits(loaded("llama", tmp_path / "bank", torch.bfloat16), ids, prompt_ids=0)
    # as in test_contract: a few units of bfloat16's 8 bits of mantissa
    assert (composed - expected).abs().max() <= 0.03 * expected.abs().max()


def test_the_folder_is_an_adapter_like_any_other(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "weights")  # composing needs none
    sources = [of_base(tmp_path / "base", saved(prompt_tuned("llama"), tmp_path / name)) for name in ("arc", "boolq")]
    idp_peft.compose(sources, tmp_path / "bank", selection_layer=1)
    (tmp_path / "weights").rename(tmp_path / "base" / "model.safetensors")
    stored = json.loads((tmp_path / "bank" / "adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == str(tmp_path / "base")
    assert (stored["num_prompts"], stored["num_virtual_tokens"], stored["selection_layer"]) == (2, 4, 1)
    assert stored["prompt_names"] == ["arc", "boolq"]
    assert [file.name for file in (tmp_path / "bank").glob("*.safetensors")] == ["adapter_model.safetensors"]
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "bank").eval()
    ids, mask = token_batch([6, 9])
    expected = logits(model, ids, attention_mask=mask, prompt_ids=["boolq", "auto"])
    native = tiny("llama")
    native.load_adapter(str(tmp_path / "bank"))
    assert torch.equal(logits(native, ids, attention_mask=mask, prompt_ids=["boolq", "auto"]), expected)
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path / "bank", is_trainable=True).train()
    again(input_ids=ids, attention_mask=mask, labels=ids, prompt_ids=["arc", "boolq"]).loss.backward()
    assert bank_of(again).weight.grad.abs().max() > 0, "a composed bank can be trained on"


def test_loaded_adapters_are_taken_by_name(make, tmp_path):
    model = prompt_tuned("llama", seed=1)
    saved(prompt_tuned("llama", seed=2), tmp_path / "x")
    model.load_adapter(str(tmp_path / "x"), "second")
    bank = make("llama", num_virtual_tokens=[3, 5, 2, 5], prompt_names=["a", "b", "c", "d"])
    before = {key: value.clone() for key, value in bank.state_dict().items()}
    config = idp_peft.compose([(bank, ["d", 0]), (model, "second"), model, bank, (bank, 3)], tmp_path / "all")
    assert config.prompt_names == ["d", "a", "second", "prompt", "a_2", "b", "c", "d_2", "d_3"]
    assert config.num_virtual_tokens == [5, 3, 4, 4, 3, 5, 2, 5, 5]
    parts = bank_of(bank).weight.detach().split([3, 5, 2, 5])
    first, second = (model.prompt_encoder[name].embedding.weight for name in ("default", "second"))
    expected = torch.cat([parts[3], parts[0], second, first, *parts, parts[3]])
    assert torch.equal(tokens_in(tmp_path / "all"), expected)
    assert all(torch.equal(bank.state_dict()[key], value) for key, value in before.items())
    assert model.active_adapter == "default"


def test_the_given_base_model_is_not_touched(tmp_path):
    base = tiny("llama")
    before = {key: value.clone() for key, value in base.state_dict().items()}
    base.name_or_path = "here/llama"
    source = saved(prompt_tuned("llama"), tmp_path / "arc")
    config = idp_peft.compose([source], tmp_path / "bank", base_model=base)
    assert config.base_model_name_or_path == "here/llama"
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())
    assert all(parameter.requires_grad for parameter in base.parameters())
    again = idp_peft.compose([source], tmp_path / "again", base_model=get_peft_model(base, LoraConfig()))
    assert again == config


def test_banks_hand_on_what_they_agree_on(make, tmp_path):
    one = make("llama", selection_layer=1, selection_reduction="sum", assignment="uniform")
    other = make("llama", selection_layer=1, selection_reduction="mean", assignment="uniform")
    config = idp_peft.compose([one, other, prompt_tuned("llama")], tmp_path / "a")
    assert (config.selection_layer, config.selection_reduction, config.assignment) == (1, "mean", "uniform")
    assert idp_peft.compose([one, other], tmp_path / "b", selection_layer=-1).selection_layer == -1
    assert idp_peft.compose([one], tmp_path / "c").selection_reduction == "sum"
    fixed = make("llama", selection="fixed", fixed_prompt=2)
    assert idp_peft.compose([fixed], tmp_path / "d").selection == "attention"


def test_names_are_what_the_adapters_are_called(tmp_path, monkeypatch):
    for place in ("a/adapter", "b/adapter", "auto"):
        saved(prompt_tuned("llama"), tmp_path / place)
    monkeypatch.chdir(tmp_path / "a" / "adapter")
    sources = [tmp_path / "a" / "adapter", f"{tmp_path}/b/adapter/", tmp_path / "auto", "."]
    config = idp_peft.compose(sources, tmp_path / "bank", base_model=tiny("llama"))
    assert config.prompt_names == ["adapter", "adapter_2", "auto_2", "adapter_3"]
    config = idp_peft.compose(sources, tmp_path / "bank", ("w", "x", "y", "z"), tiny("llama"))
    assert config.prompt_names == ["w", "x", "y", "z"]


# ---------------------------------------------------------------------- split

SPLIT = ["llama", "gemma2", "gemma3", "opt", "gpt2", "bloom", "falcon_alibi", "mpt", "mixtral", "granite"]

_FRESH = """
import sys
from pathlib import Path
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

for folder in sorted(Path(sys.argv[1]).iterdir()):
    expected = torch.load(folder / "expected.pt")
    for prompt in sorted((folder / "prompts").iterdir()):
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        model = PeftModel.from_pretrained(base, prompt).eval()
        with torch.no_grad():
            logits = model(input_ids=expected["ids"]).logits[:, -expected["ids"].shape[1]:]
        difference = (logits - expected[prompt.name]).abs().max().item()
        assert difference <= 1e-4, (folder.name, prompt.name, difference)
        print(folder.name, prompt.name)
assert "idp_peft" not in sys.modules
"""


def test_split_prompts_give_the_same_in_a_program_that_knows_peft_alone(make, tmp_path):
    expected_lines = []
    for name in SPLIT:
        lengths = [4, 4, 4, 4] if name in LEARNED_POSITIONS else [3, 5, 2, 5]
        model = make(name, num_virtual_tokens=lengths, prompt_names=["arc", "boolq", "c3: easy/hard", ".."])
        tiny(name).save_pretrained(tmp_path / name / "base")
        folders = idp_peft.split(model, tmp_path / name / "prompts")
        names = [Path(folder).name for folder in folders]
        assert names == ["arc", "boolq", "c3_easy_hard", "prompt"]
        ids, _ = token_batch([7])
        results = {folder: logits(model, ids, prompt_ids=number) for number, folder in enumerate(names)}
        torch.save({"ids": ids, **results}, tmp_path / name / "expected.pt")
        expected_lines += [f"{name} {folder}" for folder in names]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    run = subprocess.run(
        [sys.executable, "-c", _FRESH, str(tmp_path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert sorted(run.stdout.splitlines()) == sorted(expected_lines)


@pytest.mark.parametrize("prompt_names", [None, ["w", "x", "y", "z"]])
def test_round_trips_are_bit_equal(make, tmp_path, prompt_names):
    model = make("llama", num_virtual_tokens=[3, 5, 2, 5], prompt_names=prompt_names)
    bank = saved(model, tmp_path / "bank")
    folders = idp_peft.split(bank, tmp_path / "prompts", base_model=tiny("llama"))
    assert [Path(folder).name for folder in folders] == (prompt_names or [f"bank_{number}" for number in range(4)])
    config = idp_peft.compose(folders, tmp_path / "again", base_model=tiny("llama"))
    assert config.prompt_names == [Path(folder).name for folder in folders]
    assert torch.equal(tokens_in(tmp_path / "again"), tokens_in(bank))
    again = idp_peft.split(tmp_path / "again", tmp_path / "prompts_again", base_model=tiny("llama"))
    for one, other in zip(folders, again, strict=True):
        assert torch.equal(tokens_in(one), tokens_in(other))
        first, second = (Path(folder, "adapter_config.json").read_text() for folder in (one, other))
        assert first == second


def test_a_prompt_that_peft_cannot_place_is_not_split_off(make, tmp_path):
    bank = saved(make("gpt2", num_virtual_tokens=[3, 5, 2, 5]), tmp_path / "bank")
    message = r"\['bank_0', 'bank_2'\] of .* shorter than its longest, 5 tokens: on a gpt2 model .* Split off the others alone"
    with pytest.raises(ValueError, match=message):
        idp_peft.split(bank, tmp_path / "prompts", base_model=tiny("gpt2"))
    with pytest.raises(ValueError, match="does not name its base model: pass `base_model=`"):
        idp_peft.split(bank, tmp_path / "prompts")  # nobody can tell what its positions are
    assert not (tmp_path / "prompts").exists()
    folders = idp_peft.split((bank, [3, 1]), tmp_path / "prompts", base_model=tiny("gpt2"))
    assert [Path(folder).name for folder in folders] == ["bank_3", "bank_1"]
    model, ids = loaded("gpt2", bank), token_batch([7])[0]
    for number, folder in ((3, folders[0]), (1, folders[1])):
        expected = logits(model, ids, prompt_ids=number)
        assert (logits(loaded("gpt2", folder), ids) - expected).abs().max() <= TOLERANCE


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(task_type="CAUSAL_LM"), r"is a LORA adapter: only prompts that stand in front of the input"),
        (PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4), "for task type 'SEQ_CLS': .* 'CAUSAL_LM'"),
        (PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4), "for task type 'SEQ_2_SEQ_LM'"),
        (
            PromptTuningConfig(num_virtual_tokens=4, num_transformer_submodules=2),
            r"prompts 2 parts of an encoder-decoder \(`num_transformer_submodules`\)",
        ),
    ],
)
def test_an_adapter_of_another_kind_is_refused(tmp_path, config, message):
    config.save_pretrained(str(tmp_path / "x"))
    with pytest.raises(ValueError, match=rf"{tmp_path / 'x'} .*{message}"):
        idp_peft.compose([tmp_path / "x"], tmp_path / "bank")


def test_adapters_of_different_bases_are_refused_or_warned_of(tmp_path):
    narrow, wide = prompt_tuned("opt"), prompt_tuned("llama")  # widths 24 and 32
    a, b, c = (
        of_base(f"/nowhere/{name}", saved(model, tmp_path / name))
        for name, model in zip("abc", (narrow, wide, wide), strict=True)
    )
    with pytest.raises(ValueError, match=rf"the prompts of {b} have width 32, those of {a} 24"):
        idp_peft.compose([b, a], tmp_path / "bank", base_model=tiny("llama"))
    with pytest.raises(ValueError, match=rf"the prompts of {a} have width 24, the embeddings of the base model .* 32"):
        idp_peft.compose([a], tmp_path / "bank", base_model=tiny("llama"))
    with (
        pytest.warns(
            UserWarning, match=rf"{b} was made for the base model '/nowhere/b', {c} for '/nowhere/c': .*`base_model=`"
        ),
        pytest.raises(
            ValueError, match=r"the base model '/nowhere/b' cannot be asked what it is .*: pass `base_model=`"
        ),
    ):
        idp_peft.compose([b, c], tmp_path / "bank")
    config = idp_peft.compose([b, c], tmp_path / "bank", base_model=tiny("llama"))
    assert config.base_model_name_or_path == "/nowhere/b"


def test_prompts_of_another_width_are_not_split_off_either(tmp_path):
    tiny("llama").config.save_pretrained(tmp_path / "base")
    narrow = of_base(tmp_path / "base", saved(prompt_tuned("opt"), tmp_path / "narrow"))
    with pytest.raises(ValueError, match=r"narrow have width 24, the embeddings of the base model '.*base' 32"):
        idp_peft.split(narrow, tmp_path / "prompts")
    of_base("/nowhere/opt", narrow)
    (folder,) = idp_peft.split(narrow, tmp_path / "prompts")  # without its base, by what the adapter says itself
    assert torch.equal(tokens_in(folder), tokens_in(narrow))


def test_files_that_are_no_prompts_are_refused(make, tmp_path):
    base = tiny("llama")

    def refused(message, change):
        folder = tmp_path / "x"
        saved(prompt_tuned("llama"), folder)
        change(folder / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=message):
            idp_peft.compose([folder], tmp_path / "bank", base_model=base)
        with pytest.raises(ValueError, match=message):
            idp_peft.split(folder, tmp_path / "prompts", base_model=base)

    refused(
        "holds a pickled adapter_model.bin, which could run code", lambda f: f.rename(f.with_name("adapter_model.bin"))
    )
    (tmp_path / "x" / "adapter_model.bin").unlink()
    refused("holds no adapter_model.safetensors", lambda f: f.unlink())
    refused("cannot be read and may be truncated", lambda f: f.write_bytes(f.read_bytes()[:-9]))
    more = {"prompt_embeddings": torch.zeros(4, 32), "base_model.embed_tokens.weight": torch.zeros(97, 32)}
    refused("must hold the tensors .* and no others, found .*embed_tokens", lambda f: save_file(more, f))
    short = {"prompt_embeddings": torch.zeros(3, 32)}
    refused(r"holds prompts of shape \[3, 32\], its config says \[4, 32\]", lambda f: save_file(short, f))
    bank = saved(make("llama"), tmp_path / "bank_of_four")
    save_file(
        {"base_model.model.model.idp.idp_prompts.weight": torch.zeros(3, 32)}, f"{bank}/adapter_model.safetensors"
    )
    with pytest.raises(ValueError, match=r"bank_of_four holds prompts of shape \[3, 32\], expected \[16, 32\]"):
        idp_peft.compose([bank], tmp_path / "bank", base_model=base)
    with pytest.raises(ValueError, match=r"there is no adapter at .*nowhere: it is no folder or Hub id"):
        idp_peft.compose([tmp_path / "nowhere"], tmp_path / "bank", base_model=base)
    (tmp_path / "x" / "adapter_config.json").write_text('{"peft_type": "TELEPATHY"}')
    with pytest.raises(ValueError, match="a method that this version of PEFT does not know: 'TELEPATHY'"):
        idp_peft.compose([tmp_path / "x"], tmp_path / "bank", base_model=base)


def test_wrong_arguments_are_refused(make, tmp_path):
    bank = saved(make("llama", prompt_names=["a", "b", "c", "d"]), tmp_path / "bank")
    base = tiny("llama")

    def refused(message, adapters, output="out", error=ValueError, **arguments):
        with pytest.raises(error, match=message):
            idp_peft.compose(adapters, tmp_path / output, base_model=base, **arguments)

    refused("`adapters` must hold at least one adapter, got none", [])
    refused("`adapters` must be a list of adapters, got '.*bank'", bank)
    refused("`names` must be a list of one name per prompt, 4, got", [bank], names=["x"])
    refused("`prompt_names` must hold distinct names, got 'x' twice", [bank], names=["x", "y", "x", "z"])
    refused("`prompt_names` follows from `names`, it cannot be given to `compose`", [bank], prompt_names=list("abcd"))
    refused("`num_prompts` follows from `adapters`", [bank], num_prompts=3)
    refused("`task_type` follows from `adapters`", [bank], task_type="SEQ_CLS")
    refused("`selection_layer` must be between -3 and 2 for this model, got 7", [bank], selection_layer=7)
    refused(r"has no prompt 'e': take numbers from 0 to 3, or names of \['a', 'b', 'c', 'd'\]", [(bank, "e")])
    refused("has no prompt 4: take numbers from 0 to 3", [(bank, [0, 4])])
    refused("no prompt of .*bank is taken: name at least one", [(bank, [])])
    refused("a loaded PeftModel, or a pair .* got int", [3], error=TypeError)
    refused("`output_dir` would replace the adapter .*bank that is read: choose another folder", [bank], output="bank")
    with pytest.raises(ValueError, match=r"`output_dir` would replace the adapter .*a that is read"):
        idp_peft.split(idp_peft.split((bank, "a"), tmp_path)[0], tmp_path)


def test_the_hub_is_asked_for_what_is_no_folder(tmp_path, monkeypatch):
    """Offline, from a cache that already has the files: an adapter and the config of its base."""
    tiny("llama").config.save_pretrained(tmp_path / "base")
    model = prompt_tuned("llama")
    of_base("me/tiny-llama", saved(model, tmp_path / "prompt"))
    for repository, source in (("me/piqa-prompt", "prompt"), ("me/tiny-llama", "base")):
        cached = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text("0" * 40)
        (cached / "snapshots").mkdir()
        (tmp_path / source).rename(cached / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = idp_peft.compose(["me/piqa-prompt"], tmp_path / "bank")
    assert (config.prompt_names, config.base_model_name_or_path) == (["piqa-prompt"], "me/tiny-llama")
    assert torch.equal(tokens_in(tmp_path / "bank"), model.prompt_encoder["default"].embedding.weight)
