"""The dense model's keys and values as a prefix of the compressed one: its definition, and as the start of a training."""

from __future__ import annotations

import inspect

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from idp_peft.evaluation.prompted import input_logits
from idp_peft.models.fingerprint import fingerprint
from idp_peft.recover.adapter import opening
from idp_peft.recover.intact_prefix import intact_prefix, start_prefix
from tests.test_recover import here, run, weights  # noqa: F401  (`here` is a fixture)
from tests.tiny import tiny
from tests.tiny_folder import tiny_tokenizer


def behind_cache(model, dense, front: list[int], ids: torch.Tensor) -> torch.Tensor:
    """The definition: `model` goes on from the cache that `dense` fills with `front`."""
    name = "past_key_values" if "past_key_values" in inspect.signature(type(model).forward).parameters else "cache"
    with torch.no_grad():
        outputs = dense(torch.tensor([front]), use_cache=True)
        cache = outputs.past_key_values if "past_key_values" in outputs else outputs.cache
        positions = torch.arange(len(front), len(front) + ids.shape[1])[None]
        return model(ids, **{name: cache}, use_cache=True, position_ids=positions).logits


@pytest.mark.parametrize("name", ["llama", "qwen3", "opt"])
@pytest.mark.parametrize("front", [[1], [1, 5, 9]])
def test_the_compressed_model_goes_on_from_the_dense_models_cache(name, front):
    dense, compressed = tiny(name, seed=0), tiny(name, seed=1)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    expected = behind_cache(tiny(name, seed=1), dense, front, ids)
    before = fingerprint(compressed)
    repaired = intact_prefix(compressed, dense, front)
    with torch.no_grad():
        assert torch.allclose(repaired(ids).logits[:, -5:], expected, atol=1e-5)
        assert not torch.allclose(behind_cache(compressed, compressed, front, ids), expected, atol=1e-3)
    assert not any(parameter.requires_grad for parameter in repaired.parameters())
    assert fingerprint(repaired.get_base_model()) == before


def test_rows_of_a_padded_batch_are_the_rows_alone():
    repaired = intact_prefix(tiny("llama", seed=1), tiny("llama", seed=0), [1])
    ids, mask = torch.tensor([[5, 6, 7, 8], [9, 4, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    together = input_logits(repaired, ids, mask)
    assert torch.allclose(together[1, :2], input_logits(repaired, ids[1:, :2], mask[1:, :2])[0], atol=1e-5)


def test_a_dense_model_of_another_shape_is_refused():
    smaller = tiny("llama").config.to_diff_dict() | {"num_hidden_layers": 1}
    with pytest.raises(ValueError, match="`dense` must be the model that was compressed"):
        intact_prefix(tiny("llama", seed=1), LlamaForCausalLM(LlamaConfig(**smaller)), [1])
    with pytest.raises(ValueError, match="`token_ids` must hold at least one token, got none"):
        intact_prefix(tiny("llama"), tiny("llama"), [])
    repaired = get_peft_model(tiny("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="cannot hold keys and values of shape"):
        start_prefix(repaired, tiny("llama"), [1, 5, 6])


def test_with_a_teacher_prefix_tuning_starts_at_the_teachers_keys_and_values(here):  # noqa: F811
    options = {"method": "prefix_tuning", "max_steps": 1, "learning_rate": 1e-12, "num_virtual_tokens": 5}
    (started,) = weights(run("a", teacher="teacher", **options)).values()
    (again,) = weights(run("b", teacher="teacher", **options)).values()
    (other,) = weights(run("c", teacher="teacher", seed=1, **options)).values()
    (random,) = weights(run("d", teacher="teacher", init="vocab", **options)).values()
    teacher = tiny("llama", seed=1)
    expected = get_peft_model(tiny("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=1))
    start_prefix(expected, teacher, [1])
    first = expected.prompt_encoder["default"].embedding.weight[0]
    assert torch.allclose(started[0], first, atol=1e-5)  # the first token is the tokenizer's own first one
    assert torch.equal(started, again)
    assert torch.allclose(other[0], first, atol=1e-5)
    assert not torch.allclose(other[1:], started[1:], atol=1e-3)  # what follows is another text
    assert not torch.allclose(random[0], first, atol=1e-3)


def test_beside_a_teacher_of_another_shape_a_prefix_starts_at_random_and_says_so(here, caplog):  # noqa: F811
    deeper = tiny("llama", seed=1).config.to_diff_dict() | {"num_hidden_layers": 4}
    LlamaForCausalLM(LlamaConfig(**deeper)).save_pretrained(here / "deeper")
    tiny_tokenizer().save_pretrained(here / "deeper")
    (started,) = weights(run("a", teacher="deeper", method="prefix_tuning", max_steps=1, learning_rate=1e-12)).values()
    (random,) = weights(run("b", method="prefix_tuning", max_steps=1, learning_rate=1e-12)).values()
    assert torch.equal(started, random)
    assert "the teacher has other keys and values than the model: the prefix starts at random" in caplog.text


def test_a_prefix_longer_than_any_block_goes_on_with_the_next_one():
    found = opening(tiny_tokenizer(), [[5, 6], [7, 8, 9]], 6)
    assert found[0] == 1
    assert sorted(found[1:]) == [5, 6, 7, 8, 9]
    assert found[1:] in ([5, 6, 7, 8, 9], [7, 8, 9, 5, 6])
