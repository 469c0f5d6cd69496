"""Every invalid value and combination is refused with the field, the rule and the value."""

from __future__ import annotations

import json

import pytest
from peft import PeftConfig

from idp_peft import IDPConfig, IDPPeftType

INVALID = [
    ({"num_prompts": 0}, r"`num_prompts` must be an int of at least 1, got 0"),
    ({"num_prompts": 2.0}, r"`num_prompts` must be an int of at least 1, got 2.0"),
    ({"num_prompts": True}, r"`num_prompts` must be an int of at least 1, got True"),
    ({"num_virtual_tokens": 0}, r"`num_virtual_tokens` must be an int of at least 1, got 0"),
    (
        {"num_prompts": 3, "num_virtual_tokens": [26, 100]},
        r"`num_virtual_tokens` must have one length per prompt \(num_prompts=3\), got 2 lengths \[26, 100\]",
    ),
    ({"num_prompts": 2, "num_virtual_tokens": [4, 0]}, r"`num_virtual_tokens` must be an int of at least 1, got 0"),
    ({"num_virtual_tokens": None}, r"`num_virtual_tokens` may be None with init='text' alone, got init='vocab'"),
    (
        {"num_prompts": 3, "prompt_names": ["arc", "boolq"]},
        r"`prompt_names` must be a list of one name per prompt \(num_prompts=3\), got 2 names \['arc', 'boolq'\]",
    ),
    ({"prompt_names": "arc"}, r"`prompt_names` must be a list of one name per prompt \(num_prompts=4\), got 'arc'"),
    (
        {"num_prompts": 2, "prompt_names": ["a", "a"]},
        r"`prompt_names` must hold distinct names, got 'a' twice",
    ),
    ({"num_prompts": 2, "prompt_names": ["a", " "]}, r"`prompt_names` must hold texts that are not empty, got ' '"),
    ({"num_prompts": 2, "prompt_names": ["a", 1]}, r"`prompt_names` must hold texts that are not empty, got 1"),
    ({"num_prompts": 1, "prompt_names": ["auto"]}, r"`prompt_names` must not hold 'auto', which .* lets a row choose"),
    ({"selection": "best"}, r"`selection` must be one of 'attention', 'centroid', 'random', 'fixed', got 'best'"),
    ({"selection_layer": 1.5}, r"`selection_layer` must be an int, got 1.5"),
    ({"selection_reduction": "max"}, r"`selection_reduction` must be one of 'mean', 'sum', got 'max'"),
    ({"selection_seed": -1}, r"`selection_seed` must be an int of at least 0 and at most 9223372036854775807, got -1"),
    ({"selection": "fixed", "fixed_prompt": 4}, r"`fixed_prompt` must be below num_prompts=4, got 4"),
    ({"fixed_prompt": 1}, "`fixed_prompt` 1 needs selection='fixed', got 'attention'"),
    ({"assignment": "some"}, r"`assignment` must be one of 'uniform', 'selected', 'all', got 'some'"),
    ({"init": "zeros"}, r"`init` must be one of 'vocab', 'random', 'text', got 'zeros'"),
    ({"init": "text"}, r"`init_text` must be a list of one text per prompt \(num_prompts=4\), got None"),
    (
        {"init": "text", "init_text": ["a"], "tokenizer_name_or_path": "t"},
        r"`init_text` must be a list of one text per prompt \(num_prompts=4\), got 1",
    ),
    (
        {"num_prompts": 1, "init": "text", "init_text": [" "], "tokenizer_name_or_path": "t"},
        r"`init_text` must hold texts that are not empty, got ' '",
    ),
    (
        {"num_prompts": 1, "init": "text", "init_text": ["a"]},
        r"`tokenizer_name_or_path` must be given with init='text', got None",
    ),
    (
        {"num_prompts": 1, "init": "text", "init_text": ["a"], "tokenizer_name_or_path": "t", "tokenizer_kwargs": 3},
        r"`tokenizer_kwargs` must be a dict, got 3",
    ),
    ({"init_text": ["a"]}, r"`init_text` needs init='text', got \['a'\] with init='vocab'"),
    ({"tokenizer_name_or_path": "t"}, r"`tokenizer_name_or_path` needs init='text', got 't' with init='vocab'"),
    ({"task_type": "SEQ_CLS"}, r"`task_type` must be 'CAUSAL_LM' \(or None\), got 'SEQ_CLS'"),
    ({"task_type": "SEQ_2_SEQ_LM"}, r"`task_type` must be 'CAUSAL_LM' \(or None\), got 'SEQ_2_SEQ_LM'"),
    ({"task_type": "NONSENSE"}, r"Invalid task type: 'NONSENSE'"),
    ({"target_modules": ["q_proj"]}, r"`target_modules` must be None, got \['q_proj'\]"),
    ({"modules_to_save": ["lm_head"]}, r"`modules_to_save` must be None, got \['lm_head'\]"),
    ({"trainable_token_indices": [1]}, r"`trainable_token_indices` must be None, got \[1\]"),
]


@pytest.mark.parametrize(("arguments", "message"), INVALID, ids=[str(a) for a, _ in INVALID])
def test_an_invalid_config_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        IDPConfig(**arguments)


def test_a_config_survives_saving_and_loading(tmp_path):
    config = IDPConfig(
        task_type="CAUSAL_LM",
        num_prompts=3,
        num_virtual_tokens=[2, 7, 1],
        selection="fixed",
        fixed_prompt=2,
        selection_layer=-1,
        selection_reduction="sum",
        assignment="all",
        init="random",
    )
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == "IDP"
    assert stored["num_virtual_tokens"] == [2, 7, 1]
    assert stored["target_modules"] is None
    for config_class in (IDPConfig, PeftConfig):
        loaded = config_class.from_pretrained(tmp_path)
        assert type(loaded) is IDPConfig
        assert loaded.to_dict() == config.to_dict()


def test_it_is_a_tuner_and_no_prompt_learning_method():
    config = IDPConfig()
    assert config.peft_type is IDPPeftType.IDP
    assert not config.is_prompt_learning
    assert config.prompt_lengths == [32] * 4


def test_a_prompt_is_found_by_its_name(tmp_path):
    config = IDPConfig(num_prompts=2, prompt_names=("arc", "boolq"))
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["prompt_names"] == ["arc", "boolq"]
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert [loaded.prompt_id(name) for name in ("boolq", "arc", None)] == [1, 0, -1]
    with pytest.raises(ValueError, match="'wic', which is no prompt of this adapter: it has 'arc', 'boolq'"):
        loaded.prompt_id("wic")
