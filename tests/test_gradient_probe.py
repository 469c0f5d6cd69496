"""What the probe says of layers that hand gradients on, cut them, or get them wrong, and that it leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from idp_peft.models.fingerprint import fingerprint
from idp_peft.models.gradient_probe import probe_gradients
from tests.tiny import NAMES, tiny


class Replaced(nn.Module):
    """A linear layer of another class, as quantisation libraries put in place of `nn.Linear`."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("words", layer.weight.detach().clone())

    def forward(self, x):
        return x @ self.words.T


class Severed(Replaced):
    def forward(self, x):
        return super().forward(x.detach())


class SeveredOnceUsed(Replaced):
    """Keeps the mode of its first call in evaluation mode, as some kernels do."""

    used = False

    def forward(self, x):
        self.used = self.used or not self.training
        return super().forward(x.detach() if self.used else x)


class Kernel(torch.autograd.Function):
    """Right forward; `backward` makes of the gradient `[..., out]` what `answer` says."""

    @staticmethod
    def forward(ctx, x, words, answer):
        ctx.save_for_backward(words)
        ctx.answer = answer
        return x @ words.T

    @staticmethod
    def backward(ctx, gradient):
        return ctx.answer(gradient, *ctx.saved_tensors), None, None


class ClaimsOnly(Replaced):
    """The output says that it wants a gradient, and none comes back."""

    def forward(self, x):
        return Kernel.apply(x, self.words, lambda gradient, words: None)


class Skewed(Replaced):
    """The rows of the weight stand in the wrong order on the way back."""

    def forward(self, x):
        return Kernel.apply(x, self.words, lambda gradient, words: gradient @ words.flip(0))


class TenPercent(Replaced):
    def forward(self, x):
        return Kernel.apply(x, self.words, lambda gradient, words: 1.1 * gradient @ words)


class Unknown(Replaced):
    def forward(self, x):
        return Kernel.apply(x, self.words, lambda gradient, words: gradient @ words * float("nan"))


class NoBackward(Replaced):
    def forward(self, x):
        def refuse(gradient, words):
            raise NotImplementedError("no backward on this processor\nsecond line")

        return Kernel.apply(x, self.words, refuse)


def with_layer(kind):
    """A tiny Llama whose three last MLP layers are of another class."""
    model = tiny("llama")
    for block in model.model.layers:
        block.mlp.down_proj = kind(block.mlp.down_proj)
    return model.eval()


@pytest.mark.parametrize("name", NAMES)
def test_every_dense_architecture_is_trainable(name):
    probe = probe_gradients(tiny(name))
    assert probe.trainable, probe
    assert str(probe).startswith("trainable: ")
    assert max(probe.relative_errors.values()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_rounding_in_half_precision_is_no_wrong_gradient_even_beside_a_large_bias(name, dtype):
    model = tiny(name, dtype=dtype)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(std=3.0)
    probe = probe_gradients(model)
    assert probe.trainable, probe
    assert 0 < max(probe.relative_errors.values()) < 0.006


def test_a_layer_of_another_class_that_is_right_is_trainable():
    probe = probe_gradients(with_layer(Replaced), token_ids=[3, 5, 7])
    assert probe.trainable
    assert "Replaced 48x32" in probe.relative_errors


@pytest.mark.parametrize("kind", [Severed, SeveredOnceUsed, ClaimsOnly])
def test_layers_that_cut_the_gradient_are_counted_and_named(kind):
    probe = probe_gradients(with_layer(kind))
    assert probe.verdict == "inference only"
    assert str(probe) == (
        f"inference only, because 3 of 22 linear layers ({kind.__name__}) cut the gradient, "
        "model.layers.0.mlp.down_proj first"
    )
    assert len(probe.severed) == 3


def test_a_layer_whose_own_weight_wants_a_gradient_is_seen_to_cut_it():
    class SeveredLinear(nn.Linear):
        def forward(self, x):
            return super().forward(x.detach())

    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.__class__ = SeveredLinear
    assert probe_gradients(model).severed == ("model.layers.1.mlp.up_proj",)


def test_a_layer_behind_one_that_cuts_is_asked_too():
    model = with_layer(Severed)
    for block in model.model.layers:
        block.mlp.gate_proj, block.mlp.up_proj = Severed(block.mlp.gate_proj), Severed(block.mlp.up_proj)
    assert len(probe_gradients(model).severed) == 9


@pytest.mark.parametrize(("kind", "error"), [(Skewed, "1."), (TenPercent, "0.1,"), (Unknown, "nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_gradient_is_found_and_the_kernel_named(kind, error, dtype):
    probe = probe_gradients(with_layer(kind).to(dtype))
    assert probe.verdict == "wrong gradients"
    assert str(probe).startswith(f"wrong gradients from kernel {kind.__name__} 48x32 (relative error {error}")
    assert "\n" not in str(probe)


def test_a_kernel_without_a_backward_is_for_inference_only():
    assert str(probe_gradients(with_layer(NoBackward))) == (
        "inference only, because the backward pass of NoBackward (model.layers.0.mlp.down_proj) fails: "
        "NotImplementedError: no backward on this processor second line"
    )


def test_a_forward_that_fails_when_gradients_are_recorded_is_for_inference_only():
    class Refuses(Replaced):
        def forward(self, x):
            if torch.is_grad_enabled():
                raise RuntimeError("inference kernel")
            return super().forward(x)

    assert "a forward pass that records gradients fails: RuntimeError: inference kernel" in str(
        probe_gradients(with_layer(Refuses))
    )


@pytest.mark.parametrize("kind", [Replaced, Severed, NoBackward])
def test_the_model_is_as_it_was_afterwards(kind):
    model = with_layer(kind).train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones(32)
    before, modes = fingerprint(model), [module.training for module in model.modules()]
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    state = torch.get_rng_state()
    probe_gradients(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert fingerprint(model) == before
    assert [module.training for module in model.modules()] == modes
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted
    assert [name for name, value in model.named_parameters() if value.grad is not None] == ["model.norm.weight"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_int8_with_dynamic_activations_is_for_inference_only():
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    model = tiny("llama")
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    probe = probe_gradients(model)
    kind = type(model.lm_head.weight).__name__  # torchao 0.18 has renamed it
    assert str(probe).startswith(f"inference only, because 22 of 22 linear layers ({kind}) cut the gradient")


@pytest.mark.parametrize("bits", ["int3", "int4"])
def test_weights_rounded_by_torchao_are_trainable(bits):
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    model = tiny("llama")
    rule = quantization.IntxWeightOnlyConfig(weight_dtype=getattr(torch, bits), granularity=quantization.PerGroup(16))
    quantization.quantize_(model, rule)
    before = fingerprint(model)
    assert probe_gradients(model).trainable
    assert fingerprint(model) == before


def test_a_fingerprint_sees_one_bit_and_no_adapter():
    from peft import LoraConfig, get_peft_model

    from idp_peft import IDPConfig

    before = fingerprint(tiny("llama"))
    for config in (IDPConfig(task_type="CAUSAL_LM"), LoraConfig(task_type="CAUSAL_LM", r=2)):
        assert fingerprint(get_peft_model(tiny("llama"), config)) == before
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.view(torch.int32)[0, 0] ^= 1
    assert fingerprint(model) != before
