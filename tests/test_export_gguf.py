"""A GGUF file that carries an adapter: an unmodified llama.cpp says what the adapter says, and nothing else in it changed."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from peft import PeftModel, get_peft_model

from idp_peft import IDPConfig, fit_centroids
from idp_peft.models.loading import load_model, load_tokenizer
from idp_peft.serving import ExportedModel, Router, export_to_gguf, gguf_types
from idp_peft.serving.gguf_types import decoded, encoded, mean_row, scaled
from idp_peft_cli import main
from tests.reference import bank_of
from tests.tiny_folder import tiny_folder
from tests.tiny_gguf import tiny_gguf

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} {{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
IDS = [5, 9, 30, 41, 7]


@dataclass
class OnFile:
    """An adapter on a GGUF file, in memory and as a folder."""

    model: PeftModel
    file: Path
    adapter: Path

    @torch.no_grad()
    def would_say(self, prompt: int, said: list[int]) -> bool:
        """Whether each of these tokens is the likeliest, with this prompt, behind those before; but for rounding."""
        ids = torch.tensor([IDS + said])
        logits = self.model(input_ids=ids, prompt_ids=torch.tensor([prompt])).logits[0, len(IDS) - 1 : -1]
        logits[:, fields(self.file)["tokenizer.ggml.eos_token_id"]] = -torch.inf  # as `ignore_eos` does there
        behind = logits.max(-1).values - logits.gather(-1, torch.tensor(said)[:, None])[:, 0]
        return len(said) == 8 and bool((behind <= 0.01).all())

    def export(self, folder: Path, **arguments) -> ExportedModel:
        return ExportedModel.from_folder(export_to_gguf(self.adapter, folder, **arguments))


def on_file(folder: Path, scales: bool = True, prompts: dict | None = None, **arguments) -> OnFile:
    file = tiny_gguf(folder / "base.gguf", **arguments)
    base = load_model(file)
    base.name_or_path = file
    config = {"num_prompts": 3, "num_virtual_tokens": 4, "scales": scales, **(prompts or {})}
    model = get_peft_model(base, IDPConfig(task_type="CAUSAL_LM", **config)).eval()
    bank = bank_of(model)
    with torch.no_grad():
        bank.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
        if scales:
            bank.scales.normal_(std=0.2, generator=torch.Generator().manual_seed(2))
    if config.get("selection") == "centroid":
        fit_centroids(
            model, [{"input_ids": [3 + 10 * kind + i for i in range(5)], "prompt_ids": kind} for kind in range(3)]
        )
    model.save_pretrained(folder / "adapter")
    return OnFile(model, Path(file), folder / "adapter")


def tensors(file: Path) -> dict:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def fields(file: Path) -> dict:
    return {
        field.name: field.contents() for field in gguf.GGUFReader(file).fields.values() if "GGUF." not in field.name
    }


# ---------------------------------------------------------------------- types


def packed_rows(kind: Kind, rows: int = 5) -> np.ndarray:
    """Random bytes with scales that are numbers."""
    numbers = np.random.default_rng(0)
    if kind.name in ("F32", "F16", "BF16"):
        return encoded(numbers.normal(size=(rows, 512)).astype(np.float32), kind)
    size = gguf.GGML_QUANT_SIZES[kind][1]
    data = numbers.integers(0, 256, size=(rows, 2, size), dtype=np.uint8)
    for place in gguf_types._SCALES[kind.name]:
        data[..., place : place + 2] = numbers.normal(size=(rows, 2, 1)).astype(np.float16).view(np.uint8)
    return data.reshape(rows, -1)


@pytest.mark.parametrize("name", [*gguf_types._SCALES, "F32", "F16", "BF16"])
def test_a_factor_per_row_goes_into_the_scales_of_its_blocks_alone(name):
    data, factors = packed_rows(Kind[name]), np.array([0.5, 1.25, -2, 1, 0], np.float32)
    after = scaled(data, Kind[name], factors, "it")
    before = decoded(data, Kind[name])
    expected = before * factors[:, None]
    assert np.abs(decoded(after, Kind[name]) - expected).max() <= np.abs(before).max() / 256
    if name in gguf_types._SCALES:
        places = {place + byte for place in gguf_types._SCALES[name] for byte in (0, 1)}
        changed = (after != data).reshape(len(data), 2, -1).any((0, 1))
        assert set(changed.nonzero()[0]) <= places, "quantised numbers stay as they are"
    assert np.array_equal(after[3], data[3]), "a factor of 1 changes nothing"
    by_group = np.stack([factors, factors[::-1]], axis=1)  # two of 256 numbers in a row of 512
    expected = before * by_group.repeat(before.shape[1] // 2, 1)
    assert (
        np.abs(decoded(scaled(data, Kind[name], by_group, "it"), Kind[name]) - expected).max()
        <= np.abs(before).max() / 256
    )
    with pytest.raises(ValueError, match=r"it of type \w+ has \d+ block\(s\) in a row, and 5 factors go in there"):
        scaled(data, Kind[name], np.ones((5, 5), np.float32), "it")


def test_what_cannot_take_a_factor_is_refused_by_name():
    with pytest.raises(ValueError, match="it is of type MXFP4, whose blocks cannot take a factor"):
        scaled(np.zeros((2, 17), np.uint8), Kind.MXFP4, np.ones(2, np.float32), "it")
    with pytest.raises(ValueError, match="it: a scale times its factor is too large for type Q8_0"):
        scaled(encoded(np.full((1, 32), 1e5, np.float32), Kind.Q8_0), Kind.Q8_0, np.full(1, 1e3, np.float32), "it")


@pytest.mark.parametrize(
    ("name", "most"), [("Q8_0", 0.01), ("Q6_K", 0.025), ("Q5_K", 0.05), ("Q4_K", 0.1), ("Q4_1", 0.1)]
)
def test_rows_are_encoded_as_llama_cpp_reads_them(name, most):
    rows = np.random.default_rng(0).normal(size=(7, 512)).astype(np.float32)
    rows[3] = 0
    rows[4, :256] *= 1e-3
    rows[5] = np.abs(rows[5]) + 1
    read = decoded(encoded(rows, Kind[name]), Kind[name])
    assert (np.linalg.norm(read - rows, axis=1) <= most * np.linalg.norm(rows, axis=1)).all()
    assert not read[3].any()


def test_a_type_without_an_encoder_and_rows_of_half_a_block_are_refused():
    with pytest.raises(ValueError, match="rows of type Q2_K cannot be written"):
        encoded(np.zeros((1, 256), np.float32), Kind.Q2_K)
    with pytest.raises(ValueError, match="rows of 100 numbers are no whole blocks of type Q6_K"):
        encoded(np.zeros((1, 100), np.float32), Kind.Q6_K)


# ---------------------------------------------------------------------- what an engine says


@pytest.mark.parametrize("scales", [None, {}, {"scale_group_size": 8}])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2"])
@torch.no_grad()
def test_llama_cpp_says_what_the_adapter_says(tmp_path, name, tied, scales):
    from tests.llama_cpp import LlamaServer

    one = on_file(tmp_path, scales is not None, scales, name=name, tied=tied, sentencepiece=name == "gemma2")
    exported = one.export(tmp_path / "served")
    server = LlamaServer(tmp_path / "served" / "model.gguf")
    for prompt, tokens in enumerate(exported.token_ids):
        assert one.would_say(prompt, server.says(tokens + IDS))
    if scales is None:
        assert one.would_say(-1, said := server.says(IDS))
        assert said == LlamaServer(one.file).says(IDS), "without a prompt it is the base"


@pytest.mark.parametrize("sentencepiece", [False, True])
@pytest.mark.parametrize("add_bos", [None, False, True])
def test_the_router_reads_text_as_the_base_does(tmp_path, sentencepiece, add_bos):
    from tests.llama_cpp import LlamaServer

    one = on_file(tmp_path, prompts={"selection": "centroid"}, sentencepiece=sentencepiece, add_bos=add_bos)
    exported = one.export(tmp_path / "served")
    router, text = Router.from_pretrained(tmp_path / "served"), "the w5 he"
    assert router.token_ids(text) == Router.from_pretrained(one.adapter).token_ids(text)
    assert router.route([[5, 6], [14, 15], [24, 25]]).prompt_ids.tolist() == [0, 1, 2]
    server = LlamaServer(tmp_path / "served" / "model.gguf")
    alone = LlamaServer(one.file).post("/tokenize", content=text, add_special=False)["tokens"]
    own = "".join(exported.tokens[1])
    assert server.post("/tokenize", content=own + text, add_special=True)["tokens"][:4] == exported.token_ids[1]
    if not sentencepiece:  # one of that kind puts a space in front of a text
        assert server.post("/tokenize", content=own + text, add_special=True)["tokens"][4:] == alone
    assert not fields(tmp_path / "served" / "model.gguf")["tokenizer.ggml.add_bos_token"]


@pytest.mark.parametrize("keep_tied", [False, True])
def test_a_new_token_is_never_generated(tmp_path, keep_tied):
    from tests.llama_cpp import LlamaServer

    one = on_file(tmp_path, tied=True)
    with torch.no_grad():
        bank_of(one.model).weight.mul_(30)  # of a tied head, the likeliest tokens by far
    one.model.save_pretrained(one.adapter)
    exported = one.export(tmp_path / "served", keep_tied=keep_tied)
    assert exported.tied is keep_tied
    assert ("output.weight" in tensors(tmp_path / "served" / "model.gguf")) is not keep_tied
    server = LlamaServer(tmp_path / "served" / "model.gguf")
    said = [server.says(exported.token_ids[i % 3] + IDS, 30, temperature=3.0, seed=i) for i in range(6)]
    assert not {token for tokens in said for token in tokens} & set(exported.never_generated)


@pytest.mark.parametrize("kind", ["Q6_K", "Q4_K", "Q5_K", "Q8_0", "F16"])
@torch.no_grad()
def test_a_packed_table_gets_rows_of_its_own_type(tmp_path, kind):
    from tests.llama_cpp import LlamaServer

    one = on_file(tmp_path, scales=False, width=256, table=Kind[kind])
    one.export(tmp_path / "served")
    table = tensors(tmp_path / "served" / "model.gguf")["token_embd.weight"]
    assert table.tensor_type == Kind[kind]
    bank_of(one.model).weight.copy_(torch.from_numpy(decoded(table.data[97:109], Kind[kind])))  # as rounded
    server = LlamaServer(tmp_path / "served" / "model.gguf")
    for prompt in range(3):
        assert one.would_say(prompt, server.says(list(range(97 + 4 * prompt, 101 + 4 * prompt)) + IDS))


# ---------------------------------------------------------------------- what is in the file


@pytest.mark.parametrize("packed", [None, Kind.Q8_0, Kind.Q4_1])
@pytest.mark.parametrize("tied", [False, True])
def test_old_bytes_stay_and_only_scales_of_rows_change(tmp_path, packed, tied):
    one = on_file(tmp_path, packed=packed, tied=tied)
    one.export(tmp_path / "served")
    before, after = tensors(one.file), tensors(tmp_path / "served" / "model.gguf")
    assert set(after) == {*before, "output.weight"}
    for name, old in before.items():
        new = after[name]
        assert new.tensor_type == old.tensor_type
        if name in ("token_embd.weight", "output.weight"):
            assert len(new.data) == 128
            assert np.array_equal(new.data[:97], old.data)
        elif "norm" in name:
            assert np.array_equal(new.data, old.data)
        else:
            assert not np.array_equal(new.data, old.data)
            if old.tensor_type in (Kind.Q8_0, Kind.Q4_1):
                quants = slice(2 if packed == Kind.Q8_0 else 4, None)
                size = gguf.GGML_QUANT_SIZES[packed][1]
                parts = [data.reshape(len(data), -1, size)[..., quants] for data in (new.data, old.data)]
                assert np.array_equal(*parts)
    head, old_head = after["output.weight"], before.get("output.weight", before["token_embd.weight"])
    assert np.array_equal(head.data[:97], old_head.data)
    expected = encoded(mean_row(old_head.data, old_head.tensor_type), head.tensor_type)
    assert all(np.array_equal(row, expected[0]) for row in head.data[97:])


def test_the_metadata_differs_in_the_vocabulary_alone(tmp_path):
    one = on_file(
        tmp_path, sentencepiece=True, add_bos=True, chat_template=CHATML, prompts={"prompt_names": ["a", "b", "c"]}
    )
    exported = one.export(tmp_path / "served")
    before, after = fields(one.file), fields(tmp_path / "served" / "model.gguf")
    tokens = [token for prompt in exported.tokens for token in prompt]
    first = exported.token_ids[0][0]  # transformers may know special tokens that the file has not
    gap = [f"<|idp:unused:{row}|>" for row in range(97, first)]
    unused = [f"<|idp:unused:{row}|>" for row in range(first + 12, 128)]
    assert after.pop("tokenizer.ggml.tokens") == before.pop("tokenizer.ggml.tokens") + gap + tokens + unused
    assert after.pop("tokenizer.ggml.token_type") == before.pop("tokenizer.ggml.token_type") + [5] * len(gap) + [
        3
    ] * 12 + [5] * len(unused)
    assert after.pop("tokenizer.ggml.scores") == before.pop("tokenizer.ggml.scores") + [0.0] * 31
    assert after.pop("tokenizer.ggml.suppress_tokens") == list(range(97, 128)) == exported.never_generated
    assert (before.pop("llama.vocab_size"), after.pop("llama.vocab_size")) == (97, 128)
    assert (before.pop("tokenizer.ggml.add_bos_token"), after.pop("tokenizer.ggml.add_bos_token")) == (True, False)
    assert after.pop("tokenizer.chat_template").endswith(before.pop("tokenizer.chat_template"))
    assert after == before
    assert exported.names == ["a", "b", "c"]


@pytest.mark.parametrize("default", [None, "b", "1"])
def test_chats_get_their_prompt_in_front(tmp_path, default):
    from tests.llama_cpp import LlamaServer

    one = on_file(tmp_path, chat_template=CHATML, prompts={"prompt_names": ["a", "b", "c"]})
    exported = one.export(tmp_path / "served", default_prompt=default)
    server, base = LlamaServer(tmp_path / "served" / "model.gguf"), LlamaServer(one.file)
    chat = {"messages": [{"role": "user", "content": "hello"}]}
    plain = base.post("/apply-template", **chat)["prompt"]

    def rendered(**variables) -> str:
        return server.post("/apply-template", **chat, chat_template_kwargs=variables)["prompt"]

    assert rendered(idp_prompt=2) == "".join(exported.tokens[2]) + plain
    assert rendered(idp_prompt=-1) == plain
    assert rendered() == ("" if default is None else "".join(exported.tokens[1])) + plain
    for prompt, tokens in enumerate(exported.tokens):
        modelfile = (tmp_path / "served" / f"Modelfile.{prompt}").read_text()
        assert "FROM ./model.gguf\n" in modelfile
        assert f'TEMPLATE """{"".join(tokens)}{{{{ range .Messages }}}}<|im_start|>' in modelfile


def test_the_proxy_serves_it(tmp_path):
    """The file's own default prompt stands in front of no chat that goes through the proxy."""
    from idp_peft.serving.prompted_request import RequestPrompter
    from tests.llama_cpp import LlamaServer
    from tests.tiny_proxy import starting

    one = on_file(tmp_path, chat_template=CHATML, prompts={"selection": "centroid"})
    exported = one.export(tmp_path / "served", default_prompt=2)
    engine = LlamaServer(tmp_path / "served" / "model.gguf")
    prompter = RequestPrompter(Router.from_pretrained(tmp_path / "served"), exported)
    with starting(prompter) as start:
        client = start(engine.url)
        for kind in range(3):
            ids = [3 + 10 * kind + i for i in range(5)]
            answer = client.post(
                "/v1/completions", json={"model": "tiny", "prompt": ids, "max_tokens": 6, "temperature": 0}
            )
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-idp-prompt"] == str(kind)
            alone = engine.post("/v1/completions", prompt=exported.token_ids[kind] + ids, max_tokens=6, temperature=0)
            assert answer.json()["choices"][0]["text"] == alone["choices"][0]["text"]
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "temperature": 0}
        lengths = {}
        for prompt in (1, -1):
            answer = client.post("/v1/chat/completions", json={**chat, "idp_prompt": prompt})
            assert answer.status_code == 200, answer.text
            alone = engine.post("/v1/chat/completions", **chat, chat_template_kwargs={"idp_prompt": prompt})
            assert answer.json()["choices"][0]["message"] == alone["choices"][0]["message"]
            lengths[prompt] = answer.json()["usage"]["prompt_tokens"]
        assert lengths[1] == lengths[-1] + 4


# ---------------------------------------------------------------------- refusals


def refuse(one: OnFile, folder: Path, text: str, **arguments) -> None:
    with pytest.raises(ValueError, match=text):
        export_to_gguf(one.adapter, folder, **arguments)
    assert not folder.exists()


def rewritten(file: Path, target: Path, **changes) -> Path:
    """A copy of a file with other metadata or more tensors."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", *changes):
            sub = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub)
    for name, value in changes.items():
        if isinstance(value, np.ndarray):
            writer.add_tensor(name, value)
        else:
            writer.add_key_value(name, value, gguf.GGUFValueType.UINT16)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_what_would_come_out_wrong_is_refused_with_the_reason(tmp_path):
    one, out = on_file(tmp_path / "one"), tmp_path / "served"
    split = rewritten(one.file, tmp_path / "split.gguf", **{"split.count": 2})
    refuse(one, out, "split.gguf is one of 2 files: put them together", base=split)
    second = rewritten(
        one.file, tmp_path / "second.gguf", **{"per_layer_token_embd.weight": np.zeros((97, 8), np.float32)}
    )
    refuse(one, out, "more than one table that is looked up by token id", base=second)
    wide = tiny_gguf(tmp_path / "wide.gguf", width=256)
    refuse(one, out, "have width 32, the embeddings of the base model in .*wide.gguf 256", base=wide)
    dense = tiny_folder(tmp_path / "dense")
    refuse(one, out, r"`--to-gguf` needs a base in a GGUF file.*convert_hf_to_gguf.py.*`--to-vocab`", base=dense)
    refuse(one, out, "`default_prompt`: .*'d'", default_prompt="d")
    refuse(one, out, "`default_prompt` must name one prompt, got -1", default_prompt=-1)
    refuse(one, out, "`table_type` must be a type of GGUF files", table_type="q9")
    exported = one.export(tmp_path / "first")
    refuse(one, out, "already has a token named", base=exported.folder / "model.gguf")
    with torch.no_grad():
        bank_of(one.model).weight[3, 3] = torch.nan
    one.model.save_pretrained(one.adapter)
    refuse(one, out, "hold NaN or infinity")


def test_an_adapter_whose_file_is_a_link_to_elsewhere_is_not_copied(tmp_path):
    one = on_file(tmp_path)
    weights = one.adapter / "adapter_model.safetensors"
    weights.rename(tmp_path / "elsewhere.safetensors")
    weights.symlink_to(tmp_path / "elsewhere.safetensors")
    refuse(one, tmp_path / "served", "is a link that leads out of its folder")


def test_prompts_of_keys_and_values_are_no_tokens(tmp_path):
    file = tiny_gguf(tmp_path / "base.gguf")
    base = load_model(file)
    base.name_or_path = file
    config = IDPConfig(task_type="CAUSAL_LM", prompts="key_values", num_virtual_tokens=4, init_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="no token of a vocabulary has these"):
        export_to_gguf(tmp_path / "adapter", tmp_path / "served")


def test_a_table_without_an_encoder_names_the_way_out(tmp_path, monkeypatch):
    one = on_file(tmp_path, scales=False, width=256, table=Kind.Q6_K, tied=True)
    monkeypatch.setattr(gguf_types, "_ENCODED", ("F32", "Q8_0"))
    refuse(one, tmp_path / "served", "rows of type Q6_K cannot be written.*`--table_type q8_0`")
    one.export(tmp_path / "served", table_type="q8_0")
    after = tensors(tmp_path / "served" / "model.gguf")
    assert after["token_embd.weight"].tensor_type == after["output.weight"].tensor_type == Kind.Q8_0
    old = tensors(one.file)["token_embd.weight"]
    read, was = decoded(after["token_embd.weight"].data[:97], Kind.Q8_0), decoded(old.data, Kind.Q6_K)
    assert np.linalg.norm(read - was) <= 0.01 * np.linalg.norm(was)


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    one = on_file(tmp_path)
    monkeypatch.setattr("idp_peft.serving.export_gguf.write_adapter", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        one.export(tmp_path / "served")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base.gguf"]


def test_the_command_exports(tmp_path, capsys, monkeypatch):
    one = on_file(tmp_path)
    main(
        [
            "export",
            "--to-gguf",
            "--adapter",
            str(one.adapter),
            "--output_dir",
            str(tmp_path / "served"),
            "--default_prompt",
            "2",
        ]
    )
    assert f"model in {tmp_path / 'served'}" in capsys.readouterr().out
    names = {"model.gguf", "idp_prompts.json", "idp_adapter", "Modelfile.0", "Modelfile.1", "Modelfile.2"}
    assert {path.name for path in (tmp_path / "served").iterdir()} == names
    kept = json.loads((tmp_path / "served" / "idp_adapter" / "adapter_config.json").read_text())
    assert kept["scales"] is False
    shutil.rmtree(tmp_path / "served")
    for flags, text in (
        (["--to-gguf", "--to-vocab"], "write two models"),
        (["--to-vocab", "--table_type", "q8_0"], "`--table_type` belongs to `--to-gguf`"),
    ):
        with pytest.raises(SystemExit):
            main(["export", *flags, "--adapter", str(one.adapter), "--output_dir", str(tmp_path / "served")])
        assert text in capsys.readouterr().err


def test_the_whole_way_from_a_file_to_an_answer(tmp_path, monkeypatch):
    """README's commands: recover, export, engine, proxy, answer."""
    from idp_peft.serving.prompted_request import RequestPrompter
    from tests.llama_cpp import LlamaServer
    from tests.tiny_proxy import starting

    monkeypatch.chdir(tmp_path)
    tiny_gguf(Path("small.gguf"), packed=Kind.Q8_0, chat_template=CHATML)
    dense = load_model(tiny_gguf(Path("dense.gguf")))
    dense.save_pretrained("dense")
    load_tokenizer("small.gguf").save_pretrained("dense")
    letters = "".join(map(chr, range(97, 123)))
    Path("text.jsonl").write_text("".join(json.dumps({"text": letters[i % 9 :] * 2}) + "\n" for i in range(20)))
    small = [
        "--block_tokens",
        "16",
        "--context_tokens",
        "4",
        "--min_tokens",
        "4",
        "--max_steps",
        "2",
        "--disable_tqdm",
        "true",
    ]
    recover = [
        "recover",
        "--model",
        "small.gguf",
        "--teacher",
        "dense",
        "--dataset",
        "text.jsonl",
        "--output_dir",
        "run",
    ]
    main([*recover, "--num_prompts", "2", "--num_virtual_tokens", "4", *small])
    main(["export", "--to-gguf", "--adapter", "run/adapter", "--output_dir", "served"])
    engine, exported = LlamaServer(Path("served/model.gguf")), ExportedModel.from_folder("served")
    with starting(RequestPrompter(Router.from_pretrained("served"), exported)) as start:
        body = {"model": "tiny", "prompt": "the letters", "max_tokens": 4, "temperature": 0}
        answer = start(engine.url).post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-idp-prompt"] in ("0", "1")
        assert answer.json()["usage"]["completion_tokens"] == 4
