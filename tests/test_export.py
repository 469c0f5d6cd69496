"""An exported model: any engine that puts the prompt's token ids in front gets what the adapter gives."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from idp_peft.models.loading import load_model
from idp_peft.serving import ExportedModel, export_to_vocab
from idp_peft.serving.tensor_files import read_header, weight_files
from idp_peft_cli import main
from tests.reference import looks_up_in_layers
from tests.tiny import LEARNED_POSITIONS, NAMES, VOCAB, tiny
from tests.tiny_chats import chat_tokenizer
from tests.tiny_folder import tiny_tokenizer
from tests.tiny_serving import Saved, saved, say

TEXT = [5, 11, 7, 30, 2, 64, 9]


def exported(one: Saved, **arguments) -> tuple[ExportedModel, torch.nn.Module]:
    folder = export_to_vocab(one.adapter, one.base.parent / "exported", one.base, **arguments)
    return ExportedModel.from_folder(folder), load_model(folder)


def is_tied(model) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def as_bytes(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


def edit(folder, change) -> None:
    """Change the tensors of a saved base."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "changed", metadata={"format": "pt"})
    (folder / "changed").replace(folder / "model.safetensors")  # a model in memory may have the old file mapped


# ---------------------------------------------------------------------- the promise


@pytest.mark.parametrize("name", NAMES)
def test_the_exported_model_says_what_the_adapter_says_with_that_prompt(tmp_path, name):
    lengths = 4 if name in LEARNED_POSITIONS else [3, 5, 2]
    one = saved(tmp_path, name, num_virtual_tokens=lengths)
    if looks_up_in_layers(one.model.get_base_model().get_decoder()):
        with pytest.raises(ValueError, match=r"more than one table .*embed_tokens_per_layer"):
            exported(one)
        return
    model, plain = exported(one)
    for prompt in range(3):
        said = one.generate(TEXT, prompt)
        assert say(plain, model.token_ids[prompt] + TEXT) == said
        assert max(said) < VOCAB
    assert say(plain, TEXT) == one.generate(TEXT, -1), "the rows that were there are as they were"


@pytest.mark.parametrize("keep_tied", [False, True])
def test_tied_embeddings_are_untied_unless_told_otherwise(tmp_path, keep_tied):
    one = saved(tmp_path, "llama", tied=True)
    model, plain = exported(one, keep_tied=keep_tied)
    assert is_tied(plain) == model.tied == keep_tied
    assert ("lm_head.weight" in load_file(model.folder / "model.safetensors")) != keep_tied
    for prompt in range(3):
        assert say(plain, model.token_ids[prompt] + TEXT) == one.generate(TEXT, prompt)


@pytest.mark.parametrize(("name", "stays"), [("gemma2", True), ("cohere", True), ("gemma3", False), ("gpt2", False)])
def test_what_engines_always_tie_stays_tied(tmp_path, name, stays):
    model, plain = exported(saved(tmp_path, name))
    assert is_tied(plain) == model.tied == stays


def test_the_logits_are_those_of_the_adapter_and_nothing_else_got_a_chance(tmp_path):
    one = saved(tmp_path, "gemma3")
    model, plain = exported(one)
    with torch.no_grad():
        expected = one.model(input_ids=torch.tensor([TEXT]), prompt_ids=torch.tensor([1])).logits[0]
        found = plain(input_ids=torch.tensor([model.token_ids[1] + TEXT])).logits[0, 4:]
    assert (found[:, :VOCAB] - expected).abs().max() <= 1e-4
    assert (found[:, VOCAB:] < expected.max(-1, keepdim=True).values).all()


def test_an_adapter_of_prompt_tuning_is_exported_as_well(tmp_path):
    one = saved(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(one.base).eval()
    tuned = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    tuned.save_pretrained(tmp_path / "tuned")
    folder = export_to_vocab(tmp_path / "tuned", tmp_path / "exported", one.base)
    (tokens,) = ExportedModel.from_folder(folder).token_ids
    text = base.get_input_embeddings()(torch.tensor([TEXT]))
    vectors = torch.cat([tuned.get_prompt(batch_size=1), text], dim=1).detach()
    said = base.generate(inputs_embeds=vectors, max_new_tokens=8, do_sample=False)[0].tolist()
    assert say(AutoModelForCausalLM.from_pretrained(folder), tokens + TEXT) == said


# ---------------------------------------------------------------------- what is copied


@pytest.mark.parametrize("tied", [False, True])
def test_all_other_weights_are_byte_equal_and_the_tables_only_get_rows(tmp_path, tied):
    one = saved(tmp_path, tied=tied)
    exported(one)
    before, after = (load_file(tmp_path / part / "model.safetensors") for part in ("base", "exported"))
    tables = {"model.embed_tokens.weight", "lm_head.weight"}
    assert set(after) - set(before) == ({"lm_head.weight"} if tied else set())
    others = set(before) - tables
    assert as_bytes({name: after[name] for name in others}) == as_bytes({name: before[name] for name in others})
    for name in tables:
        old = before.get(name, before["model.embed_tokens.weight"])
        assert torch.equal(after[name][:VOCAB], old)
        assert after[name].shape[0] == 128, "a multiple of 64"


def test_packed_words_and_types_that_torch_does_not_know_are_copied_byte_for_byte(tmp_path):
    one = saved(tmp_path)
    packed = {
        "model.layers.0.mlp.up_proj.weight_packed": torch.arange(-40, 41, dtype=torch.int32).view(9, 9),
        "model.layers.0.mlp.up_proj.scale": torch.randn(7).to(torch.float8_e4m3fn),
        "model.layers.0.mlp.up_proj.flag": torch.tensor([True, False, True]),
    }
    edit(one.base, lambda tensors: tensors.update(packed))
    source = one.base / "model.safetensors"
    data = source.read_bytes()
    source.write_bytes(data.replace(b'"F8_E4M3"', b'"F8_E8M0"'))  # as many bits, a type of microscaling formats
    folder = export_to_vocab(one.adapter, tmp_path / "exported", one.base)

    def raw(path) -> dict[str, tuple]:
        content, tensors = path.read_bytes(), read_header(path)[0]
        pieces = {name: tensor.pieces[0] for name, tensor in tensors.items()}
        return {
            name: (tensors[name].dtype, content[piece.start : piece.start + piece.length])
            for name, piece in pieces.items()
            if name not in ("model.embed_tokens.weight", "lm_head.weight")
        }

    assert raw(folder / "model.safetensors") == raw(source)
    assert raw(source)["model.layers.0.mlp.up_proj.scale"][0] == "F8_E8M0"


def test_a_base_in_several_files_stays_in_several_files(tmp_path):
    one = saved(tmp_path, tied=True)
    AutoModelForCausalLM.from_pretrained(one.base).save_pretrained(one.base, max_shard_size="20KB")
    (one.base / "model.safetensors").unlink(missing_ok=True)
    model, plain = exported(one)
    files = weight_files(model.folder)
    assert len(files.files) > 2
    assert files.places["lm_head.weight"] == files.places["model.embed_tokens.weight"]
    untouched = set(files.files) - {files.places["model.embed_tokens.weight"]}
    assert all((model.folder / name).read_bytes() == (one.base / name).read_bytes() for name in untouched)
    total = json.loads((model.folder / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert total == sum(tensor.nbytes for name in files.files for tensor in files.tensors(name).values())
    assert say(plain, model.token_ids[2] + TEXT) == one.generate(TEXT, 2)


def test_tables_of_half_precision_stay_so(tmp_path):
    one = saved(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(one.base, dtype=torch.bfloat16)
    half.save_pretrained(one.base)
    folder = export_to_vocab(one.adapter, tmp_path / "exported", one.base)
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert table.dtype == torch.bfloat16
    bank = one.model.base_model.layer.active_bank.embeddings().detach()
    assert torch.equal(table[VOCAB : VOCAB + 12], bank.to(torch.bfloat16))


def test_the_config_differs_in_the_vocabulary_alone(tmp_path):
    one = saved(tmp_path, tied=True)
    config = json.loads((one.base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "ignore": ["re:.*norm"]}
    config["of_an_engine"] = {"kept": [1, 2]}
    (one.base / "config.json").write_text(json.dumps(config))
    (one.base / "LICENSE.txt").write_text("as it was")
    folder = export_to_vocab(one.adapter, tmp_path / "exported", one.base)
    expected = {**config, "vocab_size": 128, "tie_word_embeddings": False}
    expected["quantization_config"] = {**config["quantization_config"], "ignore": ["re:.*norm", "lm_head"]}
    assert json.loads((folder / "config.json").read_text()) == expected
    assert (folder / "LICENSE.txt").read_text() == "as it was"
    assert (folder / "idp_adapter/adapter_model.safetensors").read_bytes() == (
        one.adapter / "adapter_model.safetensors"
    ).read_bytes()


# ---------------------------------------------------------------------- new tokens must not come out


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_no_hidden_state_makes_a_new_token_the_likeliest(tmp_path, name):
    """Whatever the engine: the logits themselves rule it out, also where all old ones are negative."""
    one = saved(tmp_path, name)

    def move(tensors):  # away from zero, so that there are states where every old logit is negative
        for table in (tensor for tensor in tensors.values() if tensor.shape[0] == VOCAB):
            table += 3

    edit(one.base, move)
    _, plain = exported(one)
    head = plain.get_output_embeddings()
    torch.manual_seed(0)
    states = torch.randn(4000, head.in_features) * torch.logspace(-2, 2, 4000)[:, None]
    with torch.no_grad():
        logits = head(states)
    old, new = logits[:, :VOCAB].max(-1).values, logits[:, VOCAB:].max(-1).values
    assert (new < old).all()
    assert (old < 0).sum() > 100, "else rows of zeros would have passed"


def test_a_head_with_a_bias_rules_new_tokens_out_by_it(tmp_path):
    one = saved(tmp_path, "phi")
    _, plain = exported(one)
    assert (plain.lm_head.bias[VOCAB:] == -10_000).all()
    assert torch.equal(plain.lm_head.bias[:VOCAB], one.model.get_base_model().lm_head.bias)


@pytest.mark.parametrize("keep_tied", [False, True])
def test_sampling_never_picks_a_new_token(tmp_path, keep_tied):
    one = saved(tmp_path, tied=True)
    model, plain = exported(one, keep_tied=keep_tied)
    ids = torch.tensor([model.token_ids[0] + TEXT]).repeat(64, 1)
    settings = {"max_new_tokens": 12, "do_sample": True, "temperature": 50.0, "top_k": 0}
    torch.manual_seed(0)
    assert plain.generate(input_ids=ids, **settings)[:, ids.shape[1] :].max() < VOCAB
    free = plain.generate(input_ids=ids, **settings, suppress_tokens=[VOCAB])[:, ids.shape[1] :]
    assert free.max() >= VOCAB, "without the setting in the folder they come out"


def test_a_bias_for_requests_names_every_new_row(tmp_path):
    model, plain = exported(saved(tmp_path))
    assert model.never_generated == list(range(VOCAB, 128)) == plain.generation_config.suppress_tokens
    assert model.logit_bias == {str(token): -100.0 for token in range(VOCAB, 128)}


def test_what_the_base_says_of_generation_is_kept(tmp_path):
    one = saved(tmp_path)
    settings = json.loads((one.base / "generation_config.json").read_text())
    settings |= {"temperature": 0.7, "do_sample": True, "suppress_tokens": [3]}
    (one.base / "generation_config.json").write_text(json.dumps(settings))
    folder = export_to_vocab(one.adapter, tmp_path / "one", one.base)
    found = json.loads((folder / "generation_config.json").read_text())
    assert (found["temperature"], found["suppress_tokens"][:2]) == (0.7, [3, VOCAB])
    (one.base / "generation_config.json").unlink()
    folder = export_to_vocab(one.adapter, tmp_path / "two", one.base)
    found = json.loads((folder / "generation_config.json").read_text())
    assert (found["bos_token_id"], found["pad_token_id"]) == (1, 0), "of the model's config"


# ---------------------------------------------------------------------- tokens and chats


def test_prompt_tokens_are_special_tokens_with_telling_names(tmp_path):
    one = saved(tmp_path, num_prompts=2, num_virtual_tokens=[3, 2], prompt_names=["law", "code"])
    model, _ = exported(one)
    tokenizer = AutoTokenizer.from_pretrained(model.folder)
    assert model.tokens == [["<|idp:0:00|>", "<|idp:0:01|>", "<|idp:0:02|>"], ["<|idp:1:00|>", "<|idp:1:01|>"]]
    assert model.names == ["law", "code"]
    text = "".join(model.tokens[1]) + "w5 w6"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == [*model.token_ids[1], 5, 6]
    assert tokenizer.decode([*model.token_ids[1], 5, 6], skip_special_tokens=True).split() == ["w5", "w6"]


def test_a_table_with_more_rows_than_tokens_gets_its_new_ones_behind_the_last(tmp_path):
    tokenizer = chat_tokenizer()
    words = json.loads(tokenizer.backend_tokenizer.to_str())
    words["model"]["vocab"] = {word: index for word, index in words["model"]["vocab"].items() if index < 90}
    smaller = type(tokenizer.backend_tokenizer).from_str(json.dumps(words))
    tokenizer = type(tokenizer)(tokenizer_object=smaller, pad_token="<pad>", bos_token="<s>", eos_token="<s>")
    one = saved(tmp_path, tokenizer=tokenizer)
    model, plain = exported(one)
    assert model.token_ids[0] == [97, 98, 99, 100]
    assert say(plain, model.token_ids[1] + TEXT) == one.generate(TEXT, 1)


def test_a_tokenizer_with_more_tokens_than_the_table_has_rows_keeps_them(tmp_path):
    tokenizer = chat_tokenizer()
    tokenizer.add_tokens(["<|extra|>"])
    one = saved(tmp_path, tokenizer=tokenizer)
    model, plain = exported(one)
    assert model.token_ids[0] == [98, 99, 100, 101]
    assert AutoTokenizer.from_pretrained(model.folder).convert_tokens_to_ids("<|extra|>") == 97
    assert say(plain, model.token_ids[1] + TEXT) == one.generate(TEXT, 1)


@pytest.mark.parametrize(
    "template",
    [
        chat_tokenizer().chat_template,
        "\n  {%- for message in messages %}\n{{ message['content'] }}\n{% endfor %}",
        "  {% if messages %}\n w2 {{ messages[0]['content'] }}\n{% endif %}\n",
    ],
)
def test_the_chat_template_puts_a_prompt_in_front_and_changes_nothing_else(tmp_path, template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    one = saved(tmp_path, tokenizer=tokenizer)
    model, _ = exported(one)
    new = AutoTokenizer.from_pretrained(model.folder)
    chat = [{"role": "user", "content": "w7 w8"}, {"role": "assistant", "content": "w9"}]
    plain = tokenizer.apply_chat_template(chat, tokenize=False)
    for none in ({}, {"idp_prompt": None}, {"idp_prompt": -1}):
        assert new.apply_chat_template(chat, tokenize=False, **none) == plain
    for prompt in range(3):
        rendered = new.apply_chat_template(chat, tokenize=False, idp_prompt=prompt)
        assert rendered == "".join(model.tokens[prompt]) + plain


# ---------------------------------------------------------------------- refusals


def refuse(one: Saved, text: str, **arguments) -> None:
    target = one.base.parent / "exported"
    with pytest.raises(ValueError, match=text):
        export_to_vocab(one.adapter, target, **{"base": one.base, **arguments})
    assert not target.exists()
    assert {path.name for path in one.base.parent.iterdir()} <= {"base", "adapter"}, "nothing half-made is left"


def test_a_quantised_embedding_table_is_refused(tmp_path):
    one = saved(tmp_path)

    def pack(tensors):
        tensors["model.embed_tokens.weight_packed"] = tensors.pop("model.embed_tokens.weight").int()

    edit(one.base, pack)
    refuse(
        one,
        r"the embedding table of the base model is itself quantised \(it is stored as model.embed_tokens.weight_packed",
    )


@pytest.mark.parametrize(
    ("name", "what"), [("model.embed_tokens.weight", "embedding table"), ("lm_head.weight", "output head")]
)
def test_a_table_of_integers_is_refused(tmp_path, name, what):
    one = saved(tmp_path)
    edit(one.base, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    refuse(one, rf"the {what} of the base model \({name}\) is I8 of shape \[97, 32\], expected one of F32")


def test_a_model_that_was_exported_before_is_refused(tmp_path):
    one = saved(tmp_path)
    folder = export_to_vocab(one.adapter, tmp_path / "first", one.base)
    with pytest.raises(ValueError, match=r"the tokenizer already has a token named '<\|idp:0:00\|>'"):
        export_to_vocab(one.adapter, tmp_path / "second", folder)


@pytest.mark.parametrize("name", LEARNED_POSITIONS)
def test_prompts_of_unequal_lengths_are_refused_where_positions_are_learned(tmp_path, name):
    one = saved(tmp_path, name, num_virtual_tokens=[3, 5, 2])
    refuse(
        one, r"prompts of unequal lengths \[3, 5, 2\] cannot be exported for .*: every input starts at position 5 there"
    )


def test_an_embedding_module_that_is_more_than_a_table_is_refused(tmp_path, monkeypatch):
    class Shifted(torch.nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) + 1

    from idp_peft.serving import export

    def shifted(folder):
        model = tiny("llama")
        model.model.embed_tokens = Shifted(VOCAB, 32)
        return model

    monkeypatch.setattr(export, "skeleton", shifted)
    refuse(saved(tmp_path), "Shifted is neither a plain table nor one with a known scale")


def test_a_base_whose_weights_are_pickled_is_refused(tmp_path):
    one = saved(tmp_path)
    (one.base / "model.safetensors").rename(one.base / "pytorch_model.bin")
    refuse(one, "has no model.safetensors: only safetensors files can be copied byte for byte")


def test_a_truncated_base_is_refused(tmp_path):
    one = saved(tmp_path)
    data = (one.base / "model.safetensors").read_bytes()
    (one.base / "model.safetensors").write_bytes(data[:-100])
    refuse(one, "cannot be read and may be truncated")


def test_a_base_of_another_width_is_refused(tmp_path):
    one = saved(tmp_path)
    config = type(one.model.config)(**{**one.model.config.to_dict(), "hidden_size": 16, "head_dim": 4})
    AutoModelForCausalLM.from_config(config).save_pretrained(one.base)
    refuse(one, r"have width 32, the embeddings of the base model in .* 16")


def test_prompts_that_are_no_numbers_are_refused(tmp_path):
    one = saved(tmp_path)
    tensors = load_file(one.adapter / "adapter_model.safetensors")
    next(iter(tensors.values()))[2] = torch.nan
    save_file(tensors, one.adapter / "adapter_model.safetensors")
    refuse(one, "hold NaN or infinity")


def test_an_adapter_without_a_base_asks_for_it(tmp_path):
    one = saved(tmp_path)
    config = json.loads((one.adapter / "adapter_config.json").read_text())
    (one.adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    refuse(one, "does not say what its base is: pass `base`", base=None)


def test_a_folder_with_files_in_it_is_refused(tmp_path):
    one = saved(tmp_path)
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported/mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="`output_dir` must be new or empty"):
        export_to_vocab(one.adapter, tmp_path / "exported", one.base)
    assert [path.name for path in (tmp_path / "exported").iterdir()] == ["mine.txt"]


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    from idp_peft.serving import export

    one = saved(tmp_path)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "_write_generation_config", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_to_vocab(one.adapter, tmp_path / "exported", one.base)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_a_folder_that_was_not_exported_is_no_exported_model(tmp_path):
    with pytest.raises(ValueError, match=r"is no model that `idp-peft export` wrote"):
        ExportedModel.from_folder(saved(tmp_path).base)


# ---------------------------------------------------------------------- the command


def test_the_command_exports(tmp_path, capsys):
    one = saved(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main(["export", "--to-vocab", "--adapter", str(one.adapter), "--output_dir", str(tmp_path / "out")])
    assert capsys.readouterr().out == f"model in {tmp_path / 'out'}\n"
    assert ExportedModel.from_folder(tmp_path / "out").token_ids[2] == [105, 106, 107, 108]


def test_the_command_asks_what_to_export_to(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["export", "--adapter", "a", "--output_dir", str(tmp_path / "out")])
    assert "say what to export: `--to-vocab`, `--fold_scales`, both, or `--to-gguf`" in capsys.readouterr().err
