"""Adapter files and configs that were tampered with, from a fixed seed: a load ends in an adapter or in an error, and an
error leaves the model as it was. (`IDP_FUZZ` sets how many of each are tried.)"""

from __future__ import annotations

import json
import os
import random
import struct
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model

from idp_peft import IDPConfig
from idp_peft.models.fingerprint import fingerprint
from tests.tiny import tiny

TRIES = int(os.environ.get("IDP_FUZZ", 120))
_VALUES = [
    None, True, False, 0, 1, -1, 3, 2**31, 10**30, -(10**30), 0.5, float("nan"), float("inf"), "", "a", "../x", "IDP", "LORA",
    "CAUSAL_LM", "attention", "text", "\0", "x" * 10_000, [], [0], [1, 2], [[1]], [None], {}, {"a": 1}, {"trust_remote_code": True},
    ["a", "b"], ["a", "a"], [4, 4], [10**9, 10**9],
]  # fmt: skip


@pytest.fixture
def adapter(tmp_path):
    """A good adapter's config and file, and where the harmed one goes."""
    config = IDPConfig(task_type="CAUSAL_LM", num_prompts=2, num_virtual_tokens=4)
    get_peft_model(tiny("llama"), config).save_pretrained(tmp_path / "good")
    good = tmp_path / "good"
    (tmp_path / "bad").mkdir()
    return (
        (good / "adapter_config.json").read_text(),
        (good / "adapter_model.safetensors").read_bytes(),
        tmp_path / "bad",
    )


def try_to_load(folder, config: str, weights: bytes) -> bool:
    """Whether it loads; the base is the same either way."""
    (folder / "adapter_config.json").write_text(config)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    base = tiny("llama")
    before, names = fingerprint(base), [name for name, _ in base.named_modules()]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(base, folder)
    except MemoryError:
        raise
    except Exception:
        assert [name for name, _ in base.named_modules()] == names
        assert fingerprint(base) == before
        assert not hasattr(base, "peft_config")
        assert all(parameter.requires_grad for parameter in base.parameters())
        return False
    assert fingerprint(model) == before
    return True


def test_configs_that_were_tampered_with(adapter):
    config, weights, folder = adapter
    draw, loaded = random.Random(0), 0
    for _ in range(TRIES):
        content = json.loads(config)
        for _ in range(draw.randint(1, 2)):
            name = draw.choice([*content, "unknown", "auto_mapping", "runtime_config"])
            if draw.random() < 0.1:
                content.pop(name, None)
            else:
                content[name] = draw.choice(_VALUES)
        loaded += try_to_load(folder, json.dumps(content), weights)
    assert 0 < loaded < TRIES, "some harm nothing, some are refused"


def test_texts_that_are_no_config(adapter):
    config, weights, folder = adapter
    draw = random.Random(1)
    for _ in range(TRIES // 3):
        start, stop = sorted(draw.sample(range(len(config)), 2))
        text = draw.choice(
            [
                config[:start],
                config[stop:],
                config[:start] + config[stop:],
                "[" * 3000,
                "null",
                "3",
                f"[{config}]",
                "\x00" * 9,
            ]
        )
        if not is_an_object(text):  # a cut can leave a config that says less
            assert not try_to_load(folder, text, weights)


def is_an_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def test_files_that_were_tampered_with(adapter):
    config, weights, folder = adapter
    draw, loaded = random.Random(2), 0
    (length,) = struct.unpack("<Q", weights[:8])
    for _ in range(TRIES):
        content = bytearray(weights)
        kind = draw.randrange(5)
        if kind == 0:  # anywhere
            for _ in range(draw.randint(1, 8)):
                content[draw.randrange(len(content))] = draw.randrange(256)
        elif kind == 1:
            content = content[: draw.randrange(len(content))]
        elif kind == 2:
            content[:8] = struct.pack(
                "<Q", draw.choice([0, 1, length - 1, length + 1, 2**31, 2**63, draw.randrange(2**20)])
            )
        elif kind == 3:  # in the header
            content[8 + draw.randrange(length)] = draw.randrange(32, 127)
        else:
            header = json.loads(content[8 : 8 + length])
            entry = header[draw.choice([name for name in header if name != "__metadata__"])]
            entry[draw.choice(["dtype", "shape", "data_offsets"])] = draw.choice(
                [*_VALUES, "F16", [8, 32], [16, 16], [0, 8]]
            )
            text = json.dumps(header).encode()
            content = struct.pack("<Q", len(text)) + text + content[8 + length :]
        loaded += try_to_load(folder, config, bytes(content))
    assert 0 < loaded < TRIES, "a changed number is another prompt, a changed header is refused"


def test_a_load_that_is_refused_is_seen_to_leave_the_model_as_it_was(adapter, monkeypatch):
    config, weights, folder = adapter
    monkeypatch.setattr("idp_peft.model.remove_adapter", lambda *_, **__: None)
    half = json.loads(config) | {"num_virtual_tokens": 5}
    monkeypatch.setattr("idp_peft.model.check_weights", lambda *_, **__: None)
    with pytest.raises(AssertionError):
        try_to_load(folder, json.dumps(half), weights)


def test_the_numbers_of_a_tampered_file_are_those_of_the_file(adapter):
    config, weights, folder = adapter
    content = weights[:-4] + struct.pack("<f", 1.5)
    assert try_to_load(folder, config, content)
    model = PeftModel.from_pretrained(tiny("llama"), folder)
    (prompts,) = [tensor for name, tensor in model.named_parameters() if "idp_prompts" in name]
    assert prompts.flatten()[-1] == torch.tensor(1.5)
