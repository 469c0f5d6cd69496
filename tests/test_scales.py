"""Scales: an adapter that has them is the same adapter without, on a base whose rows were multiplied by hand."""

from __future__ import annotations

import copy
import json
import shutil
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, LogitsProcessor, Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

from idp_peft import IDPConfig, fit_centroids
from idp_peft.composition import compose, split
from idp_peft.hosting.architectures import find_decoder, shares_keys_in_cache
from idp_peft.recover.two_rates import RepairTrainer
from idp_peft.scales import LinearScaling, Scaling
from idp_peft.serving import Router
from tests.hosts import needs_transformers_adapter_methods
from tests.reference import bank_of
from tests.test_key_values import COUNTS_SLOTS
from tests.tiny import NAMES, VOCAB, tiny, token_batch
from tests.tiny_folder import tiny_folder

TOLERANCE = 1e-4  # fp32, docs/method.md, promise 1
KEY_VALUES = {"prompts": "key_values", "init_weights": False}
GROUPS = {"scale_group_size": 8}
OLD = Path(__file__).parent / "files" / "adapter-before-centroids"
architectures = pytest.mark.parametrize("name", NAMES)
sides = pytest.mark.parametrize("side", ["left", "right"])


def linears(base) -> dict[str, nn.Module]:
    """The linear layers that the decoder calls, by their names in the model and in its order. (Gemma 3n reads the weight of one
    in training, and does not call it.)"""
    inside = {id(module) for module in find_decoder(base).modules()}
    return {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and id(module) in inside and not name.endswith("correction_coefs")
    }


def scaled_weights(base, factors: torch.Tensor, group: int | None = None) -> dict[str, torch.Tensor]:
    """The weights of the linear layers, each row times its factor, or each group of a row: a row makes one output channel. With
    gradients."""
    modules = linears(base)
    rows = [module.weight.T if isinstance(module, Conv1D) else module.weight for module in modules.values()]
    groups = [1 if group is None or weight.shape[1] % group else weight.shape[1] // group for weight in rows]
    parts = factors.split([len(weight) * count for weight, count in zip(rows, groups, strict=True)])
    scaled = {}
    for (name, module), weight, count, factor in zip(modules.items(), rows, groups, parts, strict=True):
        weight = weight * factor.view(-1, count).repeat_interleave(weight.shape[1] // count, 1)
        scaled[f"{name}.weight"] = weight.T if isinstance(module, Conv1D) else weight
        if module.bias is not None and group is None:
            scaled[f"{name}.bias"] = module.bias * factor
    return scaled


@torch.no_grad()
def multiply_by_hand(base, factors: torch.Tensor, group: int | None = None):
    parameters = dict(base.named_parameters())
    for name, value in scaled_weights(base, factors, group).items():
        parameters[name].copy_(value)
    return base


@torch.no_grad()
def start(model, name: str = "default", seed: int = 0, spread: float = 0.3) -> None:
    """Scales away from 0, and key/value prompts away from nothing."""
    bank, generator = bank_of(model, name), torch.Generator().manual_seed(seed)
    if bank.scales is not None:
        bank.scales.copy_(spread * torch.randn(bank.scales.shape, generator=generator))
    if bank.holds_keys:
        bank.weight.copy_(torch.randn(bank.weight.shape, generator=generator))


@pytest.fixture
def scaled(make):
    """scaled(name, ...) -> a tiny model whose adapter has scales that matter."""

    def build(name: str = "llama", *args, **config):
        model = make(name, *args, scales=True, **config)
        start(model)
        return model

    return build


@pytest.fixture
def plain(make):
    """plain(model, name, ...) -> the reference of a model with scales: the same prompts without scales, on a base of its own
    whose rows were multiplied by hand. (By ones: a base as it was.)"""

    def build(model, name: str = "llama", *args, by_hand: bool = True, scale_group_size: int | None = None, **config):
        reference, bank = make(name, *args, **config), bank_of(model)
        with torch.no_grad():
            bank_of(reference).weight.copy_(bank.weight)
            if by_hand:
                multiply_by_hand(reference.get_base_model(), 1 + bank.scales, scale_group_size)
        return reference

    return build


def differ(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (found - expected).abs().max().item()


def hooks_of(model) -> int:
    """How many hooks there are on the linear layers."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in linears(model).values())


# ---------------------------------------------------------------------- the definition

BANKS = {
    "four token prompts": ("sdpa", {"num_virtual_tokens": [3, 5, 2, 5]}),
    "one token prompt": ("eager", {"num_prompts": 1}),
    "four key/value prompts": ("eager", KEY_VALUES),
    "one key/value prompt": ("sdpa", {**KEY_VALUES, "num_prompts": 1}),
    "token prompts, factors of groups": ("sdpa", GROUPS),
    "key/value prompts, factors of groups": ("eager", {**KEY_VALUES, **GROUPS}),
}


@architectures
@pytest.mark.parametrize("bank", list(BANKS))
@torch.no_grad()
def test_an_adapter_with_scales_is_the_one_without_on_a_base_with_scaled_rows(scaled, plain, name, bank):
    attention, config = BANKS[bank]
    model, chooses = scaled(name, attention, **config), config.get("num_prompts") != 1
    reference = plain(model, name, attention, **config)
    refuses_left = config.get("prompts") == "key_values" and name in ("mistral", *COUNTS_SLOTS)
    for side in ["right"] if refuses_left else ["left", "right"]:
        ids, mask = token_batch([5, 9, 2, 7], side)
        found, expected = (each(input_ids=ids, attention_mask=mask).logits for each in (model, reference))
        chosen, should = model.last_selection, reference.last_selection
        assert torch.equal(chosen.prompt_ids, should.prompt_ids)
        if should.scores is not None:
            assert torch.allclose(chosen.scores, should.scores, rtol=1e-4, atol=1e-5)
        real = mask.bool()
        assert differ(found[real], expected[real]) <= TOLERANCE
        for row in range(4 if chooses else 0):
            alone = model(input_ids=ids[row][real[row]][None]).logits[0]
            assert differ(alone, found[row][real[row]]) <= TOLERANCE
    if chooses:
        ids, mask = token_batch([6, 6, 6] if refuses_left else [4, 9, 6])
        call = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
        assert torch.equal(model.generate(**call), reference.generate(**call))
    bank_of(model).scales.zero_()
    unscaled = model(input_ids=ids[:1], prompt_ids=[0]).logits
    assert differ(reference(input_ids=ids[:1], prompt_ids=[0]).logits, unscaled) > 1e-2, "the scales must matter"


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral", "gemma3"])
def test_beams_are_those_of_a_base_with_scaled_rows(scaled, plain, name):
    model = scaled(name)
    reference = plain(model, name)
    ids, mask = token_batch([4, 9, 6])
    call = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    assert torch.equal(model.generate(**call), reference.generate(**call))
    assert torch.equal(model.last_selection.prompt_ids, reference.last_selection.prompt_ids)


# A product is rounded to bf16 once more than in a base whose rows were multiplied, so the distance from the exact numbers
# is at most twice as large.
@architectures
@torch.no_grad()
def test_bfloat16_is_as_near_to_float32_as_a_base_with_scaled_rows_is(scaled, plain, name):
    model = scaled(name, dtype=torch.bfloat16)
    by_hand = plain(model, name, dtype=torch.bfloat16)
    exact = plain(model, name, dtype=torch.bfloat16, by_hand=False).float()
    multiply_by_hand(exact.get_base_model(), 1 + bank_of(model).scales)
    assert bank_of(model).scales.dtype == torch.float32
    ids, _ = token_batch([9])
    ours, theirs = [], []
    for prompt in range(4):
        found, hand, expected = (each(input_ids=ids, prompt_ids=[prompt]).logits for each in (model, by_hand, exact))
        assert found.dtype == torch.bfloat16
        ours.append((found - expected).norm(dim=-1))
        theirs.append((hand - expected).norm(dim=-1))
    # The median over tokens, since a mixture may send a few of them to another expert.
    assert 0 < torch.cat(ours).median() < 2 * torch.cat(theirs).median()


@torch.no_grad()
def test_every_linear_layer_of_the_decoder_is_scaled_and_the_head_is_not(scaled):
    for name in ("llama", "gpt2", "bloom", "mixtral"):
        model = scaled(name)
        bank = bank_of(model)
        modules = linears(model.get_base_model())
        assert len(bank.factor_shapes) == len(modules)
        assert bank.num_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert all(len(module._forward_hooks) == 1 for module in modules.values())
        assert not model.get_output_embeddings()._forward_hooks


FITS_NOT = {
    "a size that does not divide": (
        lambda base: None,
        7,
        "`scale_group_size` must divide the inputs of linear layers, got 7",
    ),
    "packed weights": (
        lambda base: setattr(
            base.model.layers[1].mlp.up_proj, "weight", nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), False)
        ),
        8,
        r"factors of groups read the weights, and those of layers\.1\.mlp\.up_proj are packed \(Linear\)",
    ),
}


@pytest.mark.parametrize("why", FITS_NOT)
def test_factors_of_groups_that_do_not_fit_are_refused_and_the_base_stays_as_it_was(why):
    change, size, message = FITS_NOT[why]
    base = tiny("llama")
    change(base)
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, IDPConfig(task_type="CAUSAL_LM", scales=True, scale_group_size=size))
    assert not any(module._forward_hooks for module in base.modules())
    assert not hasattr(base.model, "idp")


@torch.no_grad()
def test_factors_of_groups_without_a_weight_at_hand_are_one_error(scaled):
    model = scaled(**GROUPS)
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    layer.weight, layer.forward = (
        nn.Parameter(layer.weight.to("meta"), False),
        lambda hidden: hidden.repeat(1, 1, 2)[..., :48],
    )
    with pytest.raises(ValueError, match="factors of groups read the weights, and a layer's are not here"):
        model(input_ids=token_batch([5])[0])


def test_factors_of_groups_start_as_the_base_exactly(make):
    model, base = make("llama", scales=True, **GROUPS), tiny("llama")
    hidden = torch.randn(2, 5, 32)
    layer = model.base_model.layer
    with torch.no_grad(), layer.scaling.everywhere():
        assert torch.equal(model.get_base_model().model.layers[0].mlp(hidden), base.model.layers[0].mlp(hidden))


@pytest.mark.parametrize("layer", [1, -1])
@torch.no_grad()
def test_a_deeper_choice_reads_scaled_layers(scaled, plain, layer):
    for name in ("llama", "gpt2"):
        model = scaled(name, selection_layer=layer)
        reference = plain(model, name, selection_layer=layer)
        ids, mask = token_batch([5, 9, 2, 7])
        for each in (model, reference):
            each(input_ids=ids, attention_mask=mask)
        assert torch.allclose(model.last_selection.scores, reference.last_selection.scores, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------- rows without a prompt, and the base


@architectures
def test_the_base_is_never_touched(scaled, tmp_path, name):
    untouched, model = tiny(name), scaled(name)
    before = {key: value.clone() for key, value in untouched.state_dict().items()}
    ids, mask = token_batch([6, 9, 4])
    with torch.no_grad():
        expected = untouched(input_ids=ids, attention_mask=mask).logits
        model(input_ids=ids, attention_mask=mask)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)
        alone = untouched(input_ids=ids[1:2]).logits
        assert torch.equal(model(input_ids=ids[1:2], prompt_ids=[-1]).logits, alone)
        mixed = model(input_ids=ids, attention_mask=mask, prompt_ids=[-1, 1, -1]).logits
        assert differ(mixed[1], model(input_ids=ids[1:2], prompt_ids=[1]).logits[0]) <= TOLERANCE
        for row in (0, 2):
            base = untouched(input_ids=ids[row][mask[row].bool()][None]).logits[0]
            assert differ(mixed[row][mask[row].bool()], base) <= TOLERANCE
    model.train()
    optimizer = torch.optim.SGD(bank_of(model).parameters(), lr=0.1)
    scales, prompts = (tensor.detach().clone() for tensor in (bank_of(model).scales, bank_of(model).weight))
    model(input_ids=ids, attention_mask=mask, labels=ids, prompt_ids=[0, 1, 2]).loss.backward()
    optimizer.step()
    assert differ(bank_of(model).scales, scales) > 0
    assert differ(bank_of(model).weight, prompts) > 0
    model.save_pretrained(tmp_path)
    base = model.eval().unload()
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(base.state_dict()[key], value) for key, value in before.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())
    with torch.no_grad():
        assert torch.equal(base(input_ids=ids, attention_mask=mask).logits, expected)


@pytest.mark.parametrize("name", ["llama", "opt", "bloom", "gemma2", "mixtral"])
def test_rows_without_a_prompt_generate_what_the_base_generates(scaled, name):
    model, base = scaled(name), tiny(name)
    ids, mask = token_batch([4, 9, 6])
    call = {"max_new_tokens": 6, "do_sample": False}
    for more in ({}, {"num_beams": 2}, {"use_cache": False}):
        found = model.generate(input_ids=ids, attention_mask=mask, prompt_ids=[-1, 2, -1], **call, **more)
        for row, prompt in ((0, -1), (1, 2), (2, -1)):
            alone = {"input_ids": ids[row][mask[row].bool()][None]}
            expected = (
                base.generate(**alone, **call, **more)
                if prompt < 0
                else model.generate(**alone, prompt_ids=[prompt], **call, **more)
            )
            assert torch.equal(found[row, -6:], expected[0, -6:])


class Routed(nn.Module):
    """A layer that takes tokens out of their rows, as a router of experts does."""

    def __init__(self, mlp: nn.Module, tokens: slice) -> None:
        super().__init__()
        self.mlp, self.tokens = mlp, tokens

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.flatten(0, 1)
        some = torch.zeros_like(flat)
        some[self.tokens] = self.mlp(flat[self.tokens])
        return some.view_as(hidden)


@torch.no_grad()
def test_rows_that_a_layer_does_not_tell_apart_are_refused_by_name(scaled):
    model = scaled("llama")
    layer = model.get_base_model().model.layers[1]
    layer.mlp = Routed(layer.mlp, slice(3, 8))
    ids, _ = token_batch([6, 6])
    assert model(input_ids=ids, prompt_ids=[0, 1]).logits.isfinite().all()
    assert model(input_ids=ids, prompt_ids=[-1, -1]).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"cannot stand beside others here: .* does not say which of its 2 rows"):
        model(input_ids=ids, prompt_ids=[0, -1])
    layer.mlp = layer.mlp.mlp
    assert model(input_ids=ids, prompt_ids=[0, -1]).logits.isfinite().all(), "a call that failed leaves nothing behind"


@torch.no_grad()
def test_experts_of_their_own_never_pass_for_rows():
    """Of as many tokens as the batch has, a router may hand an expert those in another order."""

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 4)])
            self.shared_experts = nn.ModuleList([nn.Linear(4, 4)])

    class Owner:
        decoder = nn.ModuleDict({"mlp": Mixture()})

    scaling = LinearScaling(Owner())
    scaling.hook()
    in_force = Scaling(tuple(torch.full((4,), 2.0) for _ in range(2)), torch.tensor([True, False]), tokens=3)
    scaling_of = type("Fixed", (LinearScaling,), {"in_force": in_force})
    scaling.__class__ = scaling_of
    mixture, tokens = Owner.decoder["mlp"], torch.ones(6, 4)
    shared = mixture.shared_experts[0](tokens)
    assert torch.allclose(shared[:3], 2 * shared[3:])
    with pytest.raises(ValueError, match="cannot stand beside others"):
        mixture.experts[0](tokens)


# ---------------------------------------------------------------------- several adapters, threads, copies


@pytest.fixture
def two(scaled):
    """A model with an adapter "default" that has scales and one "other" that has none."""
    model = scaled()
    model.add_adapter("other", IDPConfig(task_type="CAUSAL_LM", num_prompts=2, num_virtual_tokens=[6, 2]))
    with torch.no_grad():
        bank_of(model, "other").weight.normal_()
    return model.eval()


@torch.no_grad()
def test_adapters_with_and_without_scales_take_turns(two, make):
    ids, mask = token_batch([7, 4])
    call = {"input_ids": ids, "attention_mask": mask, "prompt_ids": [1, 0]}
    other = make("llama", num_prompts=2, num_virtual_tokens=[6, 2])
    bank_of(other).weight.copy_(bank_of(two, "other").weight)
    first = two(**call).logits
    for _ in range(2):
        two.set_adapter("other")
        assert torch.equal(two(**call).logits, other(**call).logits)
        two.set_adapter("default")
        assert torch.equal(two(**call).logits, first)
    assert hooks_of(two) == len(linears(two))


@pytest.mark.filterwarnings("ignore:Adapter default was active")
@torch.no_grad()
def test_a_deleted_adapter_takes_its_hooks_with_it(two):
    two.set_adapter("other")
    ids, _ = token_batch([7])
    expected = two(input_ids=ids).logits
    two.add_adapter("third", IDPConfig(task_type="CAUSAL_LM", scales=True))
    two.delete_adapter("default")
    assert hooks_of(two) == len(linears(two)), "the third needs them"
    two.delete_adapter("third")
    assert hooks_of(two) == 0
    assert torch.equal(two(input_ids=ids).logits, expected)
    two.add_adapter("fourth", IDPConfig(task_type="CAUSAL_LM", scales=True))
    start(two, "fourth")
    two.set_adapter("fourth")
    found = two(input_ids=ids, prompt_ids=[0]).logits
    bank_of(two, "fourth").scales.zero_()
    assert differ(two(input_ids=ids, prompt_ids=[0]).logits, found) > 1e-2, "hooked again"


class Meets(LogitsProcessor):
    """Lets two generating threads take every step by turns."""

    def __init__(self, barrier: threading.Barrier, begun: threading.Event) -> None:
        self.barrier, self.begun = barrier, begun

    def __call__(self, input_ids, scores):
        self.begun.set()
        self.barrier.wait(timeout=60)
        return scores


def test_threads_with_different_adapters_get_what_they_get_alone(two):
    ids, mask = token_batch([7, 4])
    call = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    alone, found, threads, barrier = {}, {}, [], threading.Barrier(2)
    for name in ("default", "other"):
        two.set_adapter(name)
        alone[name] = two.generate(**call)
    for name in ("default", "other"):
        two.set_adapter(name)
        begun = threading.Event()

        def generate(name=name, begun=begun):
            found[name] = two.generate(**call, logits_processor=[Meets(barrier, begun)])

        threads.append(threading.Thread(target=generate))
        threads[-1].start()
        assert begun.wait(timeout=60)
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[name], alone[name]) for name in alone)
    assert not torch.equal(alone["default"], alone["other"])


@pytest.mark.parametrize("trained", [False, True])
def test_a_copy_has_scales_of_its_own(scaled, trained):
    model = scaled()
    ids, _ = token_batch([7])
    if trained:
        model.train()
        model(input_ids=ids, labels=ids, prompt_ids=[0]).loss.backward()
        model.eval()
    expected = model(input_ids=ids).logits
    other = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(other(input_ids=ids).logits, expected)
        bank_of(other).scales.zero_()
        assert differ(other(input_ids=ids).logits, expected) > 1e-2
        assert torch.equal(model(input_ids=ids).logits, expected)
        bank_of(other).scales.copy_(bank_of(model).scales)
        bank_of(model).scales.zero_()
        assert torch.equal(other(input_ids=ids).logits, expected)
    other.unload()
    assert hooks_of(model) == len(linears(model))
    assert hooks_of(other) == 0


# ---------------------------------------------------------------------- caches, turns, compiling


def test_caches_and_turns(scaled, plain):
    model = scaled()
    reference = plain(model)
    ids, mask = token_batch([6, 6])
    call = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    expected = reference.generate(input_ids=ids, **call)
    chosen = reference.last_selection.prompt_ids
    assert torch.equal(model.generate(input_ids=ids, cache_implementation="static", **call), expected)
    assert torch.equal(model.generate(input_ids=ids, use_cache=False, **call), expected)
    cache = DynamicCache()
    first = model.generate(input_ids=ids, past_key_values=cache, **call)
    more = torch.cat([first, ids[:, :3]], 1)
    later = {"attention_mask": torch.ones_like(more), "max_new_tokens": 3, "do_sample": False}
    again = model.generate(input_ids=more, past_key_values=cache, **later)
    assert torch.equal(again, reference.generate(input_ids=more, prompt_ids=chosen, **later))


@torch.no_grad()
def test_the_prompt_cache_follows_the_scales(scaled, plain):
    model = scaled()
    ids, _ = token_batch([6])
    model(input_ids=ids)
    for write in (lambda s: s.mul_(-1), lambda s: s.data.add_(0.1), lambda s: s.zero_()):
        write(bank_of(model).scales)
        assert differ(model(input_ids=ids).logits, plain(model)(input_ids=ids).logits) <= TOLERANCE


@torch.no_grad()
def test_a_compiled_decoder_is_scaled():
    base = tiny("llama")
    base.model.layers, base.config.num_hidden_layers = base.model.layers[:2], 2
    config = IDPConfig(task_type="CAUSAL_LM", num_prompts=4, num_virtual_tokens=4, scales=True)
    model = get_peft_model(base, config).eval()
    start(model)
    ids, mask = token_batch([5, 9])
    calls = [{"prompt_ids": prompts} for prompts in ([1, 2], [0, -1])]
    expected = [model(input_ids=ids, attention_mask=mask, **call).logits for call in calls]
    decoder = find_decoder(model.get_base_model())
    decoder.forward = torch.compile(decoder.forward, backend="eager")
    try:
        for call, logits in zip(calls, expected, strict=True):
            assert differ(model(input_ids=ids, attention_mask=mask, **call).logits, logits) <= TOLERANCE
    finally:
        torch.compiler.reset()


# ---------------------------------------------------------------------- gradients


def labelled() -> dict:
    ids, mask = token_batch([5, 9, 7], "right")
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def gradients(model, loss: torch.Tensor) -> list[torch.Tensor]:
    """Of the scales and of the prompts."""
    model.zero_grad()
    loss.backward()
    return [bank_of(model).scales.grad.clone(), bank_of(model).weight.grad.clone()]


def expected_of(
    reference, scales: torch.Tensor, loss_of, group: int | None = None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A loss and its gradients, by autograd alone: of the adapter without scales on weights that are a function of them.

    Args:
        reference: it, on a base that nobody multiplied.
        loss_of: the loss, of a function that calls the model.
    """
    leaf = scales.detach().clone().requires_grad_()
    weights = scaled_weights(reference, 1 + leaf, group)

    def call(**arguments):
        return torch.func.functional_call(reference, weights, kwargs=arguments)

    loss = loss_of(call)
    return loss.detach(), list(torch.autograd.grad(loss, [leaf, bank_of(reference).weight]))


def same(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 1e-5) -> bool:
    return all(differ(a, b) <= tolerance * b.abs().max() + 1e-7 for a, b in zip(found, expected, strict=True))


CHECKPOINTING = {"not reentrant": {"use_reentrant": False}, "reentrant": {"use_reentrant": True}}


@architectures
@pytest.mark.parametrize("group", [None, 8])
def test_gradients_are_those_of_the_scaled_rows_on_every_path(scaled, plain, name, group):
    """Behind a shared prompt cache, and prepended under both kinds of gradient checkpointing."""
    model = scaled(name, scale_group_size=group).train()
    reference = plain(model, name, by_hand=False).train()
    call = labelled() | {"prompt_ids": torch.tensor([2, 0, 2])}
    loss, expected = expected_of(reference, bank_of(model).scales, lambda model: model(**call).loss, group)
    assert all(gradient.abs().max() > 1e-4 for gradient in expected)
    with torch.no_grad():
        assert torch.allclose(model.eval()(**call).loss, loss, rtol=1e-5), "training is inference"
    model.train()
    # Rounding grows on the way down through Gemma 4's layers.
    tolerance = 1e-4 if name.startswith("gemma4") else 1e-5
    assert same(gradients(model, model(**call).loss), expected, tolerance)
    if shares_keys_in_cache(find_decoder(model.get_base_model())):
        return
    for kind, arguments in CHECKPOINTING.items():
        if kind == "reentrant" and name in ("gemma3n", "gemma4", "gemma4_multimodal"):
            continue  # transformers itself loses gradients there, of the keys and values that layers share
        model.gradient_checkpointing_enable(arguments)
        checkpointed = model(**call).loss
        assert torch.allclose(checkpointed, loss, rtol=1e-5)
        assert same(gradients(model, checkpointed), expected, tolerance)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "config", [{"assignment": "all"}, KEY_VALUES, {"assignment": "selected"}, {**KEY_VALUES, **GROUPS}]
)
def test_gradients_of_other_banks_and_assignments(scaled, plain, name, config):
    model = scaled(name, **config).train()
    reference = plain(model, name, by_hand=False, **config).train()
    group = config.get("scale_group_size")
    loss, expected = expected_of(reference, bank_of(model).scales, lambda model: model(**labelled()).loss, group)
    found = model(**labelled()).loss
    assert torch.allclose(found, loss, rtol=1e-5)
    assert same(gradients(model, found), expected)
    if "prompts" not in config:
        model.gradient_checkpointing_enable(CHECKPOINTING["not reentrant"])
        assert same(gradients(model, model(**labelled()).loss), expected)


def nats(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


# Prompts of the first and of the second forward. Rows without one have no gradient, so those that have one are the reference.
FORWARDS = {
    "all rows with a prompt": ([0, 2], [1, 1]),
    "a row without one, first": ([0, -1], [1, 2]),
    "a row without one, second": ([0, 2], [1, -1]),
    "other rows without one": ([-1, 2], [1, -1]),
    "none with one, first": ([-1, -1], [1, 2]),
    "none with one, second": ([0, 2], [-1, -1]),
}


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("way", ["shared cache", *CHECKPOINTING])
@pytest.mark.parametrize("forwards", list(FORWARDS))
def test_two_forwards_before_one_backward_have_their_own_scales(scaled, plain, name, way, forwards):
    model = scaled(name).train()
    reference = plain(model, name, by_hand=False).train()
    if way in CHECKPOINTING:
        model.gradient_checkpointing_enable(CHECKPOINTING[way])
    texts = [token_batch([8, 8], seed=seed)[0] for seed in range(2)]

    def rows_with_a_prompt(call):
        total = 0.0
        for ids, prompts in zip(texts, FORWARDS[forwards], strict=True):
            rows = [row for row, prompt in enumerate(prompts) if prompt >= 0]
            if rows:
                chosen = torch.tensor(prompts)[rows]
                total = total + nats(call(input_ids=ids[rows], prompt_ids=chosen).logits, ids[rows])
        return total

    _, expected = expected_of(reference, bank_of(model).scales, rows_with_a_prompt)
    logits = [
        model(input_ids=ids, prompt_ids=torch.tensor(prompts), use_cache=False).logits
        for ids, prompts in zip(texts, FORWARDS[forwards], strict=True)
    ]
    with torch.no_grad(), model.disable_adapter():  # a teacher, as some losses have it
        model(input_ids=texts[0])
    total = sum(nats(one, ids) for one, ids in zip(logits, texts, strict=True))
    assert same(gradients(model, total), expected)


@pytest.mark.parametrize("way", list(CHECKPOINTING))
def test_forwards_of_two_adapters_before_one_backward_have_their_own_scales(two, plain, way):
    reference = plain(two, by_hand=False).train()
    ids, _ = token_batch([8, 8])
    _, expected = expected_of(
        reference,
        bank_of(two).scales,
        lambda model: nats(model(input_ids=ids, prompt_ids=torch.tensor([0, 2])).logits, ids),
    )
    two.train().gradient_checkpointing_enable(CHECKPOINTING[way])
    first = nats(two(input_ids=ids, prompt_ids=torch.tensor([0, 2])).logits, ids)
    two.set_adapter("other")
    second = nats(two(input_ids=ids, prompt_ids=torch.tensor([0, 1])).logits, ids)
    two.set_adapter("default")
    assert same(gradients(two, first + second), expected)


def test_nothing_of_a_backward_stays_behind(scaled):
    model = scaled().train()
    model.gradient_checkpointing_enable(CHECKPOINTING["not reentrant"])
    model(**labelled()).loss.backward()
    assert model.base_model.layer.scaling._of_graph is None
    copy.deepcopy(model)
    base = tiny("llama")
    plain_layer = model.get_base_model().model.layers[0].mlp
    hidden = torch.randn(1, 7, 32)
    assert torch.equal(plain_layer(hidden), base.model.layers[0].mlp(hidden)), "a layer called by itself is the base's"


def test_scales_that_are_not_finite_are_one_clear_error(scaled):
    model = scaled()
    ids, _ = token_batch([7])
    with torch.no_grad():
        bank_of(model).scales[5] = float("nan")
    message = "the adapter's scales hold NaN or infinity: reload the adapter or lower the learning rate"
    for call in (
        lambda: model(input_ids=ids),
        lambda: model.generate(input_ids=ids, max_new_tokens=2),
        lambda: model.train()(input_ids=ids, labels=ids),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with torch.no_grad():
        bank_of(model).scales[5] = 0.0
    assert model.eval()(input_ids=ids).logits.isfinite().all()


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_a_saved_adapter_answers_as_it_did_however_it_is_loaded(scaled, tmp_path, name):
    model = scaled(name)
    ids, mask = token_batch([5, 9])
    call = {"input_ids": ids, "attention_mask": mask}
    expected = model(**call).logits
    tiny(name).save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    (key,) = [key for key in stored if key.endswith(".scales")]
    assert stored[key].dtype == torch.float32
    assert len(stored) == 2
    for low_memory in (False, True):
        again = PeftModel.from_pretrained(tiny(name), tmp_path / "adapter", low_cpu_mem_usage=low_memory).eval()
        assert torch.equal(again(**call).logits, expected)
        assert not bank_of(again).scales.requires_grad
        again = get_peft_model(tiny(name), IDPConfig(task_type="CAUSAL_LM")).eval()
        again.load_adapter(tmp_path / "adapter", "more", low_cpu_mem_usage=low_memory, is_trainable=True)
        again.set_adapter("more")
        assert torch.equal(again(**call).logits, expected)
        assert bank_of(again, "more").scales.requires_grad
    auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(auto(**call).logits, expected)


@needs_transformers_adapter_methods
@torch.no_grad()
def test_transformers_own_adapter_methods_bring_scales(scaled, tmp_path):
    model = scaled()
    ids, mask = token_batch([5, 9])
    call = {"input_ids": ids, "attention_mask": mask}
    expected = model(**call).logits
    tiny("llama").save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    base = tiny("llama")
    base.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(base.eval()(**call).logits, expected)
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(auto(**call).logits, expected)
    base.disable_adapters()
    assert torch.equal(base(**call).logits, tiny("llama")(**call).logits)
    fresh = tiny("llama")
    fresh.add_adapter(IDPConfig(task_type="CAUSAL_LM", num_prompts=4, num_virtual_tokens=4, scales=True))
    bank = find_decoder(fresh).idp.idp_prompts["default"]
    bank.load({"weight": bank_of(model).weight, "scales": bank_of(model).scales})
    assert torch.equal(fresh.eval()(**call).logits, expected)


def edit(folder: Path, change=None, **fields) -> None:
    """Change a saved adapter: its tensors by name, its config by field."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    if change is not None:
        (key,) = [key for key in tensors if key.endswith(".scales")]
        change(tensors, key)
        save_file(tensors, path, {"format": "pt"})
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))


BROKEN = {
    "no scales": (
        {"change": lambda tensors, key: tensors.pop(key)},
        r"must hold '.*scales' .* scales=True.* found none",
    ),
    "a wrong length": (
        {"change": lambda tensors, key: tensors.update({key: tensors[key][1:].clone()})},
        r"must hold '.*scales' of shape \[(\d+)\].* found \[\d+\]",
    ),
    "scales that the config denies": ({"scales": False}, r"unexpected tensors \['.*scales'\]"),
    "no truth value": ({"scales": "yes"}, "`scales` must be True or False, got 'yes'"),
}


@pytest.mark.parametrize("fault", list(BROKEN))
@pytest.mark.parametrize("way", ["from_pretrained", "load_adapter", "transformers"])
@torch.no_grad()
def test_a_file_that_does_not_fit_is_refused_and_the_model_stays_as_it_was(scaled, make, tmp_path, fault, way):
    changes, message = BROKEN[fault]
    scaled().save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    base = tiny("llama")
    before = {key: value.clone() for key, value in base.state_dict().items()}
    if way == "load_adapter":
        model = make("llama")
        kept = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            model.load_adapter(tmp_path, "other")
        assert model.state_dict().keys() == kept.keys()
        assert all(torch.equal(model.state_dict()[key], value) for key, value in kept.items())
        assert list(model.peft_config) == ["default"]
        assert hooks_of(model) == 0
        return
    load = base.load_adapter if way == "transformers" else partial(PeftModel.from_pretrained, base)
    with pytest.raises(ValueError, match=message):
        load(str(tmp_path))
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(base.state_dict()[key], value) for key, value in before.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


@torch.no_grad()
def test_an_adapter_from_before_scales_loads_as_it_is(scaled, tmp_path):
    folder = shutil.copytree(OLD, tmp_path / "old")
    assert "scales" not in json.loads((folder / "adapter_config.json").read_text())
    model = PeftModel.from_pretrained(tiny("llama"), folder).eval()
    assert model.peft_config["default"].scales is False
    assert bank_of(model).scales is None
    assert hooks_of(model) == 0
    ids, _ = token_batch([7])
    other = scaled()
    other.load_adapter(folder, "old")
    other.set_adapter("old")
    assert torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits)


@torch.no_grad()
def test_scales_in_the_bases_type_keep_small_changes_of_a_factor(make):
    """bfloat16 has no number between 1 and 1.0078."""
    base = tiny("llama", dtype=torch.bfloat16)
    config = IDPConfig(task_type="CAUSAL_LM", scales=True, num_virtual_tokens=4)
    model = get_peft_model(base, config, autocast_adapter_dtype=False).eval()
    bank = bank_of(model)
    assert bank.scales.dtype == bank.weight.dtype == torch.bfloat16
    bank.scales.fill_(0.001)
    assert torch.equal(bank.factors(), torch.full_like(bank.scales, 0.001).float() + 1)
    ids, _ = token_batch([7])
    assert model(input_ids=ids).logits.dtype == torch.bfloat16


@torch.no_grad()
def test_an_adapter_may_have_any_name(make, tmp_path):
    for name in ("scales", "other"):
        base = tiny("llama")
        config = IDPConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, scales=True)
        model = get_peft_model(base, config, adapter_name=name).eval()
        start(model, name)
        ids, _ = token_batch([7])
        expected = model(input_ids=ids).logits
        model.save_pretrained(tmp_path)
        folder = tmp_path / name
        again = PeftModel.from_pretrained(tiny("llama"), folder, adapter_name=name).eval()
        assert torch.equal(again(input_ids=ids).logits, expected)


# ---------------------------------------------------------------------- trainers


def examples(count: int = 16, length: int = 12) -> list[dict]:
    ids = torch.randint(2, VOCAB, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": row, "labels": [-100] * 5 + row[5:], "attention_mask": [1] * length} for row in ids]


def a_trainer(model, folder, kind=Trainer, callbacks=(), scales_learning_rate=None, **arguments):
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 0.05,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        **arguments,
    }
    more = {} if kind is Trainer else {"scales_learning_rate": scales_learning_rate}
    args = TrainingArguments(str(folder), **settings)
    return kind(model=model, args=args, train_dataset=examples(), callbacks=list(callbacks), **more)


def test_weight_decay_draws_scales_towards_the_base(scaled, tmp_path):
    """AdamW's decay is apart from its step: lr * decay * scales of what there was."""
    after = []
    for decay in (0.0, 0.5):
        model = scaled()
        before = bank_of(model).scales.detach().clone()
        a_trainer(model, tmp_path, weight_decay=decay, max_steps=1, seed=3).train()
        after.append(bank_of(model).scales.detach())
    assert torch.allclose(after[0] - after[1], 0.05 * 0.5 * before, atol=1e-6)
    assert differ(after[0], before) > 0.01


def test_scales_have_a_learning_rate_of_their_own_that_follows_the_schedule(scaled, tmp_path):
    model = scaled()
    trainer = a_trainer(model, tmp_path, RepairTrainer, scales_learning_rate=0.002, weight_decay=0.1)
    trainer.create_optimizer_and_scheduler(4)
    bank, groups = bank_of(model), trainer.optimizer.param_groups
    rate_of = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == 2
    assert (rate_of[id(bank.weight)], rate_of[id(bank.scales)]) == (0.05, 0.002)
    (own,) = [group for group in groups if group["lr"] == 0.002]
    assert own["weight_decay"] == 0.1
    seen = []
    for _ in range(4):
        seen.append({id(p): group["lr"] for group in groups for p in group["params"]})
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    for step, rates in enumerate(seen):
        assert rates[id(bank.weight)] == pytest.approx(0.05 * (1 - step / 4))
        assert rates[id(bank.scales)] == pytest.approx(0.002 * (1 - step / 4))


def test_a_rate_of_zero_leaves_scales_and_no_rate_is_the_common_one(scaled, tmp_path):
    for rate, moves in ((0.0, False), (None, True)):
        model = scaled()
        scales, prompts = bank_of(model).scales.detach().clone(), bank_of(model).weight.detach().clone()
        a_trainer(model, tmp_path, RepairTrainer, scales_learning_rate=rate, max_steps=1).train()
        assert (differ(bank_of(model).scales, scales) > 0) == moves
        assert differ(bank_of(model).weight, prompts) > 0
    alone = scaled()
    start(alone)
    a_trainer(alone, tmp_path, max_steps=1).train()
    assert torch.equal(bank_of(alone).scales, bank_of(model).scales)


@pytest.mark.parametrize("kind", [Trainer, RepairTrainer])
def test_a_run_that_resumes_ends_with_the_same_scales(scaled, tmp_path, kind):
    def train(model, **how):
        settings = {"save_strategy": "steps", "save_steps": 2, "seed": 3}
        trainer = a_trainer(model, tmp_path, kind, scales_learning_rate=0.002, **settings)
        trainer.train(**how)
        return bank_of(trainer.model).state_dict()

    whole = train(scaled())
    blank = scaled()
    with torch.no_grad():
        bank_of(blank).scales.zero_()
    resumed = train(blank, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert whole.keys() == resumed.keys() == {"weight", "scales"}
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_trl_trains_scales(make, tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed")
    from tests.test_trl import pairs, sft
    from tests.tiny_chats import tiny_answers, tiny_questions

    model, questions = make("llama", scales=True), tiny_questions(4)
    data = pairs(questions, tiny_answers(model, questions))
    sft(model, tmp_path, data).train()
    assert bank_of(model).scales.abs().max() > 0.01


# ---------------------------------------------------------------------- router and composition


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3n"])
@pytest.mark.parametrize("layer", [0, 1])
@torch.no_grad()
def test_the_router_chooses_as_the_full_model(scaled, tmp_path, name, layer):
    model = scaled(name, selection_layer=layer)
    tiny_folder(tmp_path / "base", name)
    model.save_pretrained(tmp_path / "adapter")
    router = Router.from_pretrained(tmp_path / "adapter", tmp_path / "base")
    ids, mask = token_batch([5, 9, 2, 7])
    model(input_ids=ids, attention_mask=mask)
    expected, found = model.last_selection, router.select(ids, mask)
    assert torch.equal(found.prompt_ids, expected.prompt_ids)
    assert torch.equal(found.scores, expected.scores)


@torch.no_grad()
def test_a_router_by_centroids_loads_no_layer_and_a_router_refuses_scales_of_another_base(scaled, tmp_path):
    model = scaled(selection="centroid")
    rows = token_batch([9] * 20, seed=3)[0]
    fit_centroids(model, [{"input_ids": row.tolist()} for row in rows])
    tiny_folder(tmp_path / "base")
    model.save_pretrained(tmp_path / "centroid")
    router = Router.from_pretrained(tmp_path / "centroid", tmp_path / "base")
    assert len(router.layer.decoder.layers) == 0
    ids, mask = token_batch([5, 9, 2, 7])
    model(input_ids=ids, attention_mask=mask)
    assert torch.equal(router.select(ids, mask).prompt_ids, model.last_selection.prompt_ids)
    scaled("phi").save_pretrained(tmp_path / "phi")
    with pytest.raises(ValueError, match=r"has \d+ scales, the base's linear layers have \d+ factors"):
        Router.from_pretrained(tmp_path / "phi", tmp_path / "base")


@torch.no_grad()
def test_composition_keeps_scales_that_are_alike_and_refuses_others(scaled, make, tmp_path):
    base = tiny("llama")
    for number in range(2):
        model = scaled(num_prompts=2, prompt_names=[f"a{number}", f"b{number}"])
        bank_of(model).weight.normal_(generator=torch.Generator().manual_seed(number))
        model.save_pretrained(tmp_path / f"{number}")
    folders = [str(tmp_path / f"{number}") for number in range(2)]
    config = compose(folders, tmp_path / "bank", base_model=base)
    assert config.scales is True
    composed = PeftModel.from_pretrained(tiny("llama"), tmp_path / "bank").eval()
    assert torch.equal(bank_of(composed).scales, bank_of(model).scales)
    ids, _ = token_batch([7])
    found = composed(input_ids=ids, prompt_ids=["b1"]).logits
    assert torch.equal(found, model(input_ids=ids, prompt_ids=["b1"]).logits)
    start(model, seed=1)
    model.save_pretrained(tmp_path / "unlike")
    make("llama").save_pretrained(tmp_path / "none")
    for other in ("unlike", "none"):
        with pytest.raises(ValueError, match="share their scales"):
            compose([folders[0], str(tmp_path / other)], tmp_path / "refused", base_model=base)
    assert not (tmp_path / "refused").exists()
    with pytest.raises(ValueError, match="has scales, which PEFT's prompt adapters have not"):
        split(folders[0], tmp_path / "apart", base_model=base)
    assert not (tmp_path / "apart").exists()
