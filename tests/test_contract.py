"""The promises, on every architecture we name: a forced prompt is concatenation, a padded row is that row alone, the
choice is the definition, training is inference, the base is never touched."""

from __future__ import annotations

import pytest
import torch

from idp_peft.hosting.architectures import find_decoder, shares_keys_in_cache
from tests.reference import bank_of, brute_force_scores, concatenated_logits, plain_concatenated_logits
from tests.tiny import CHANGING_ROTARY, LEARNED_POSITIONS, NAMES, VOCAB, tiny, token_batch

EQUAL, UNEQUAL = [4, 4, 4, 4], [3, 5, 2, 5]
BANKS = {"one": [4], "equal": EQUAL, "unequal": UNEQUAL}
TOLERANCE = 1e-4  # fp32, docs/method.md, promise 1

architectures = pytest.mark.parametrize("name", NAMES)
attentions = pytest.mark.parametrize("attention", ["sdpa", "eager"])
banks = pytest.mark.parametrize("bank", list(BANKS))
sides = pytest.mark.parametrize("side", ["left", "right"])


def bank_config(bank: str) -> dict:
    return {"num_prompts": len(BANKS[bank]), "num_virtual_tokens": BANKS[bank]}


@architectures
@attentions
@banks
def test_a_forced_prompt_equals_concatenation(make, name, attention, bank):
    model, base = make(name, attention, **bank_config(bank)), tiny(name, attention)
    ids, _ = token_batch([9])
    for prompt, length in enumerate(BANKS[bank]):
        with torch.no_grad():
            logits = model(input_ids=ids, prompt_ids=torch.tensor([prompt])).logits
        assert logits.shape == (1, 9, VOCAB)
        expected = concatenated_logits(model, base, ids, prompt)
        assert (logits - expected).abs().max() <= TOLERANCE
        if name not in LEARNED_POSITIONS or length == max(BANKS[bank]):
            assert (logits - plain_concatenated_logits(model, base, ids, prompt)).abs().max() <= TOLERANCE
        with torch.no_grad():
            assert (logits - base(input_ids=ids).logits).abs().max() > 1e-2, "the prompt must matter"


@architectures
@attentions
@banks
@sides
def test_every_padded_row_equals_that_row_alone(make, name, attention, bank, side):
    model = make(name, attention, **bank_config(bank))
    lengths = [5, 9, 2, 7]
    ids, mask = token_batch(lengths, side)
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask).logits
        selection = model.last_selection
        for row in range(len(lengths)):
            real = mask[row].bool()
            alone = model(input_ids=ids[row][real][None]).logits[0]
            assert torch.equal(model.last_selection.prompt_ids, selection.prompt_ids[row : row + 1])
            assert (together[row][real] - alone).abs().max() <= TOLERANCE


@architectures
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_of_a_left_padded_batch_equals_each_row_alone(make, name, beams):
    model = make(name, num_virtual_tokens=UNEQUAL)
    ids, mask = token_batch([4, 9, 6])
    arguments = {"max_new_tokens": 8, "num_beams": beams, "do_sample": False}
    together = model.generate(input_ids=ids, attention_mask=mask, **arguments)
    assert together.shape == (3, 17)
    assert torch.equal(together[:, :9], ids)
    for row in range(3):
        alone = model.generate(input_ids=ids[row][mask[row].bool()][None], **arguments)
        assert torch.equal(together[row, 9:], alone[0, -8:])


@pytest.mark.parametrize(
    "name",
    ["mistral_small_window", "gemma2", "gemma3", "mpt", "gemma3_multimodal", "gemma3n", "gemma4", "gemma4_multimodal"],
)
def test_padding_takes_no_room_in_a_sliding_window_or_a_bias(make, name):
    """Far past the window, every step's scores are those of the row alone."""
    model = make(name, num_virtual_tokens=UNEQUAL)
    ids, mask = token_batch([3, 9])
    arguments = {"max_new_tokens": 14, "output_logits": True, "return_dict_in_generate": True}
    together = torch.stack(model.generate(input_ids=ids, attention_mask=mask, **arguments).logits, dim=1)
    for row in range(2):
        alone = model.generate(input_ids=ids[row][mask[row].bool()][None], **arguments).logits
        assert (together[row] - torch.stack(alone, dim=1)[0]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", list(CHANGING_ROTARY))
@pytest.mark.parametrize("tokens", [6, 9, 20])
def test_frequencies_that_follow_the_length_are_those_of_the_concatenation(make, name, tokens):
    ids, mask = token_batch([tokens])
    for bank in (EQUAL, UNEQUAL):
        for prompt in (1, 2):
            model = make(name, num_virtual_tokens=bank)
            expected = concatenated_logits(model, tiny(name), ids, prompt)
            call = {"input_ids": ids, "prompt_ids": torch.tensor([prompt])}
            with torch.no_grad():
                model(input_ids=ids[:, :2])  # a short request first, whose prompt cache must not be used
                assert (model(**call).logits - expected).abs().max() <= TOLERANCE
            model = make(name, num_virtual_tokens=bank)
            model.train()
            assert (model(**call).logits - expected).abs().max() <= TOLERANCE
    for layer in (0, 1, -1):
        model = make(name, num_virtual_tokens=UNEQUAL, selection_layer=layer)
        with torch.no_grad():
            model(input_ids=ids)
        expected = brute_force_scores(model, tiny(name, "eager"), ids, mask, mask, layer, "mean")
        assert torch.allclose(model.last_selection.scores, expected, atol=1e-5, rtol=1e-4)


@architectures
def test_greedy_generation_equals_the_base_model_on_the_concatenation(make, name):
    model, base = make(name, num_virtual_tokens=UNEQUAL), tiny(name)
    ids, _ = token_batch([7])
    for prompt in range(4):
        generated = model.generate(input_ids=ids, prompt_ids=torch.tensor([prompt]), max_new_tokens=6)
        expected = ids
        for _ in range(6):
            step = concatenated_logits(model, base, expected, prompt)[:, -1].argmax(-1)
            expected = torch.cat([expected, step[:, None]], dim=1)
        assert torch.equal(generated, expected)


@architectures
@pytest.mark.parametrize("layer", [0, 1, -1])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_choice_is_the_definition(make, name, layer, reduction):
    if name == "falcon_alibi" or name == "mpt" or (name == "bloom" and layer):
        if layer:
            with pytest.raises(ValueError, match=r"`selection_layer` must be 0 on .* a model with ALiBi"):
                make(name, selection_layer=layer)
            return
        if name != "bloom":
            pytest.skip("its eager model has no way to be shown several prompts at the same distance")
    model = make(name, num_virtual_tokens=UNEQUAL, selection_layer=layer, selection_reduction=reduction)
    ids, mask = token_batch([9, 4, 7])
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    scores = model.last_selection.scores
    expected = brute_force_scores(model, tiny(name, "eager"), ids, mask, mask, layer, reduction)
    assert scores.shape == (3, 4)
    assert torch.allclose(scores, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(model.last_selection.prompt_ids, expected.argmax(-1))


@architectures
def test_the_selection_mask_decides_which_tokens_steer(make, name):
    model = make(name, num_virtual_tokens=UNEQUAL)
    ids, mask = token_batch([9, 6])
    context = mask.clone()
    context[:, -3:] = 0
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, selection_mask=context)
        masked = model.last_selection.scores
        changed = ids.clone()
        changed[:, -3:] = 5
        model(input_ids=changed, attention_mask=mask, selection_mask=context)
        assert torch.allclose(model.last_selection.scores, masked, atol=1e-6), "tokens outside the mask steered"
        model(input_ids=ids, attention_mask=mask)
        assert not torch.allclose(model.last_selection.scores, masked, atol=1e-5)


def gradients(model, **call):
    model.zero_grad()
    loss = model(**call).loss
    loss.backward()
    return loss.detach(), bank_of(model).weight.grad.clone()


@architectures
@pytest.mark.parametrize("bank", ["equal", "unequal"])
@sides
def test_training_equals_inference_in_loss_and_gradient(make, name, bank, side):
    model = make(name, **bank_config(bank))
    ids, mask = token_batch([5, 9, 7], side)
    call = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    call["prompt_ids"] = torch.tensor([2, 0, 2])
    with torch.no_grad():
        cached = model(**call).loss
    model.train()
    shared, shared_gradient = gradients(model, **call)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if shares_keys_in_cache(find_decoder(model.get_base_model())):
        with pytest.raises(ValueError, match="shares keys and values between layers in its cache alone"):
            model(**call)
        return
    prepended, prepended_gradient = gradients(model, **call)
    assert torch.allclose(shared, cached, rtol=1e-5)
    assert torch.allclose(prepended, cached, rtol=1e-5)
    scale = shared_gradient.abs().max()
    assert scale > 1e-4
    assert (shared_gradient - prepended_gradient).abs().max() <= 1e-5 * scale + 1e-7
    rows = bank_of(model).weight.split(bank_of(model).lengths)
    unused = [1, 3]
    parts = shared_gradient.split([len(r) for r in rows])
    assert all(parts[i].abs().max() == 0 for i in unused)


@architectures
def test_the_base_is_never_touched(make, name, tmp_path):
    untouched = tiny(name)
    model = make(name)
    ids, mask = token_batch([5, 8])
    model.train()
    optimizer = torch.optim.SGD(bank_of(model).parameters(), lr=0.1)
    model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    optimizer.step()
    model.eval()
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
        expected = untouched(input_ids=ids, attention_mask=mask).logits
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)
    model.save_pretrained(tmp_path)
    base = model.unload()
    assert base.state_dict().keys() == untouched.state_dict().keys()
    for key, value in untouched.state_dict().items():
        assert torch.equal(base.state_dict()[key], value), key
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert not any(len(module._forward_hooks) or len(module._forward_pre_hooks) for module in base.modules())
    with torch.no_grad():
        assert torch.equal(base(input_ids=ids, attention_mask=mask).logits, expected)


@architectures
def test_a_row_without_a_prompt_equals_the_base_model(make, name):
    model, base = make(name, num_virtual_tokens=UNEQUAL), tiny(name)
    ids, mask = token_batch([6, 9, 4])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, prompt_ids=torch.tensor([-1, 1, -1])).logits
        for row in (0, 2):
            alone = ids[row][mask[row].bool()][None]
            assert (logits[row][mask[row].bool()] - base(input_ids=alone).logits[0]).abs().max() <= TOLERANCE
        none = model(input_ids=ids[1:2], prompt_ids=torch.tensor([-1])).logits
        assert torch.equal(none, base(input_ids=ids[1:2]).logits)


# How processors round in bf16 differs, and so do the paths; how far they are from float32 does not.
@architectures
def test_bfloat16_is_as_near_to_float32_as_concatenation_is(make, name):
    model, base = make(name, dtype=torch.bfloat16, num_virtual_tokens=UNEQUAL), tiny(name, dtype=torch.bfloat16)
    exact_base = tiny(name, dtype=torch.bfloat16).float()
    assert bank_of(model).weight.dtype == torch.float32
    ids, _ = token_batch([9])
    ours, theirs = [], []
    for prompt in range(4):
        with torch.no_grad():
            logits = model(input_ids=ids, prompt_ids=torch.tensor([prompt])).logits
        assert logits.dtype == torch.bfloat16
        exact = concatenated_logits(model, exact_base, ids, prompt)
        ours.append((logits - exact).norm(dim=-1))
        theirs.append((concatenated_logits(model, base, ids, prompt) - exact).norm(dim=-1))
    # The median over tokens, since a mixture may send a few of them to another expert.
    assert 0 < torch.cat(ours).median() < 2 * torch.cat(theirs).median()
