"""A compressed base stays as it is: packed low-bit words and the zeros of a sparse model, through training and back."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup, quantize_

from idp_peft import IDPConfig
from tests.reference import bank_of, concatenated_logits
from tests.tiny import tiny, token_batch


def three_bit():
    model = tiny("llama")
    quantize_(
        model,
        IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=PerGroup(16), mapping_type=MappingType.ASYMMETRIC),
        filter_fn=lambda module, _: isinstance(module, torch.nn.Linear) and module is not model.lm_head,
    )
    return model


def half_zeros():
    model = tiny("llama")
    with torch.no_grad():
        for module in model.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                threshold = module.weight.abs().median()
                module.weight.masked_fill_(module.weight.abs() <= threshold, 0)
    return model


def words(model) -> dict[str, torch.Tensor]:
    """Every plain tensor of a model's base, those inside a quantised one included, as copies."""

    def parts(name, tensor):
        if not hasattr(tensor, "__tensor_flatten__"):
            yield name, tensor.detach().clone()
            return
        for inner in tensor.__tensor_flatten__()[0]:
            yield from parts(f"{name}.{inner}", getattr(tensor, inner))

    state = {name: tensor for name, tensor in model.state_dict().items() if ".idp." not in name}
    return {part: value for name, tensor in state.items() for part, value in parts(name, tensor)}


@pytest.mark.parametrize("compress", [three_bit, half_zeros])
def test_a_compressed_base_is_prompted_and_never_touched(compress, tmp_path):
    before = words(compress())
    assert any(value.dtype == torch.int8 for value in before.values()) or compress is half_zeros
    model = get_peft_model(compress(), IDPConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    ids, mask = token_batch([5, 9])
    for prompt in range(4):
        with torch.no_grad():
            logits = model(input_ids=ids[1:], prompt_ids=torch.tensor([prompt])).logits
        assert (logits - concatenated_logits(model, compress(), ids[1:], prompt)).abs().max() <= 1e-4
    model.train()
    optimizer = torch.optim.AdamW(bank_of(model).parameters(), lr=0.05)
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids[1:], labels=ids[1:], prompt_ids=torch.tensor([1])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    model.eval()
    model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3)
    model.save_pretrained(tmp_path)
    after = words(model.unload())
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    if compress is half_zeros:
        zeros = [(value == 0).float().mean() for name, value in after.items() if "proj" in name]
        assert min(zeros) >= 0.5
