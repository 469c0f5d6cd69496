"""Every cache and every generation loop: what the base would generate behind the prompt, or an error that says why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from transformers import Cache, DynamicCache, EncoderDecoderCache, GenerationConfig, StaticCache, cache_utils
from transformers.cache_utils import DynamicLayer, QuantizedLayer, StaticLayer
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from tests.reference import prompts_of
from tests.tiny import VOCAB, tiny, token_batch

LAYERS, ROOM, NEW = 3, 40, 12
TOLERANCE = 1e-9  # float64: so that rounding to few bits never falls differently by a sum's order
STATIC = r"generate\(cache_implementation='static'\) sizes a static cache without room for the prompt"
CONTINUOUS = (
    r"IDP cannot run in transformers' continuous batching .* which packs the tokens of several texts into one row over "
    r"paged memory: there is no place in front of each text for its own prompt\. Use `generate`"
)
FOREIGN = r"IDP needs a cache of the decoder's own keys and values .*, got a {name}: pass one of these, or none"


class OwnLayer(DynamicLayer):
    """Someone's own layer, as plain as they come."""


class CountingCache(DynamicCache):
    """Someone's own cache, which notes down how much it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        self.seen += key_states.shape[-2] if layer_idx == 0 else 0
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen


class RoundedLayer(QuantizedLayer):
    """Keys and values in steps of a hundredth of the largest, as the packages that quantise them do it."""

    def __init__(self) -> None:
        super().__init__(residual_length=4)

    def _quantize(self, tensor, axis):
        scale = tensor.abs().amax() / 100
        return (tensor / scale).round(), scale

    def _dequantize(self, quantized):
        values, scale = quantized
        return values * scale


def own_loop(model, input_ids, generation_config, **model_kwargs):
    """Greedy decoding as people write it: no cache, the whole text at every step."""
    attention_mask = model_kwargs["attention_mask"]
    for _ in range(generation_config.max_new_tokens):
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        input_ids = torch.cat([input_ids, logits[:, -1:].argmax(-1)], dim=1)
        attention_mask = torch.cat([attention_mask, torch.ones_like(attention_mask[:, :1])], dim=1)
    return input_ids


@dataclass(frozen=True)
class Way:
    """Arguments of `generate`, and what they meet.

    Args:
        arguments: from the model's config to the arguments.
        native (*optional*): how the error begins without PEFT's wrapper; `None` where it works there too.
        lossy: whether what the cache gives back depends on all that it was given, so that a padded batch is not its rows.
    """

    arguments: Callable[[object], dict]
    native: str | None = None
    lossy: bool = False


def given(make: Callable[[object], object], **settings) -> Way:
    return Way(lambda config: {"past_key_values": make(config)}, **settings)


def layers_of(kind: Callable[[], object], **settings) -> Way:
    return given(lambda _: Cache(layers=[kind() for _ in range(LAYERS)]), **settings)


WAYS = {
    "nothing": Way(lambda _: {}),
    "DynamicCache": given(lambda _: DynamicCache()),
    "DynamicCache of the config": given(lambda config: DynamicCache(config=config)),
    "StaticCache": given(lambda config: StaticCache(config=config, max_cache_len=ROOM), native=STATIC),
    "own static layers": layers_of(lambda: StaticLayer(max_cache_len=ROOM), native=STATIC),
    "own layers": layers_of(OwnLayer),
    "own layers, made as they are needed": given(lambda _: Cache(layer_class_to_replicate=OwnLayer)),
    "own cache with a state": given(lambda _: CountingCache()),
    "own quantised layers": layers_of(RoundedLayer, lossy=True),
    "own loop": Way(
        lambda _: {"custom_generate": own_loop}, native=r"generate\(custom_generate=...\) may choose again"
    ),
    **{
        f"cache_implementation={name!r}": Way(
            lambda _, name=name: {"cache_implementation": name},
            # "hybrid" is taken as what the model's own config would say, and left out
            native=None if name in ("dynamic", "dynamic_full", "hybrid") else STATIC,
        )
        for name in ALL_CACHE_IMPLEMENTATIONS
        if not name.startswith("offloaded") and name != "quantized"
    },
}
if hasattr(cache_utils, "Fp8QuantizedLayer"):
    WAYS["FP8 layers"] = layers_of(lambda: cache_utils.Fp8QuantizedLayer(), lossy=True)
if torch.cuda.is_available():
    for name in (name for name in ALL_CACHE_IMPLEMENTATIONS if name.startswith("offloaded")):
        native = None if name == "offloaded" else STATIC
        WAYS[f"cache_implementation={name!r}"] = Way(lambda _, name=name: {"cache_implementation": name}, native=native)

paths = pytest.mark.parametrize("path", ["peft", "native"])


def concatenated(model, base, ids: torch.Tensor, arguments: dict) -> torch.Tensor:
    """The definition: the base's own `generate` behind the chosen prompt and one text, int64 `[1, new]`."""
    with torch.no_grad():
        model(input_ids=ids)
    prompt = prompts_of(model)[int(model.last_selection.prompt_ids)].to(base.dtype)
    embeds = torch.cat([prompt[None], base.get_input_embeddings()(ids)], dim=1)
    return base.generate(inputs_embeds=embeds, **arguments)


@paths
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("way", list(WAYS))
def test_it_generates_what_the_base_generates_behind_the_prompt_or_says_why_not(make, name, way, path):
    wrapped, base, way = make(name, dtype=torch.float64), tiny(name, dtype=torch.float64), WAYS[way]
    model, config = wrapped if path == "peft" else wrapped.get_base_model(), base.config
    settings = {"max_new_tokens": NEW, "do_sample": False}
    ids, mask = token_batch([9] if way.lossy else [5, 9])
    arguments = way.arguments(config)
    if path == "native" and way.native is not None:
        with pytest.raises(ValueError, match=way.native):
            model.generate(input_ids=ids, attention_mask=mask, **settings, **arguments)
        return
    found = model.generate(input_ids=ids, attention_mask=mask, **settings, **arguments)[:, ids.shape[1] :]
    for row in range(len(ids)):
        lossy = way.arguments(config) if way.lossy else {}
        expected = concatenated(wrapped, base, ids[row][mask[row].bool()][None], {**settings, **lossy})
        assert torch.equal(found[row], expected[0])


@paths
@pytest.mark.parametrize("way", [way for way in WAYS if WAYS[way].lossy])
def test_what_a_quantised_cache_loses_is_what_it_loses_for_the_base(make, way, path):
    """Prompt and text go in together, so that scales and groups are those of the whole."""
    wrapped, base = make("llama", dtype=torch.float64), tiny("llama", dtype=torch.float64)
    model, ids = wrapped if path == "peft" else wrapped.get_base_model(), token_batch([9])[0]
    settings = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = model.generate(input_ids=ids, **settings, **WAYS[way].arguments(base.config)).logits
    expected = concatenated(wrapped, base, ids, {**settings, **WAYS[way].arguments(base.config)}).logits
    exact = model.generate(input_ids=ids, **settings).logits
    assert max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) <= TOLERANCE
    assert max(float((a - b).abs().max()) for a, b in zip(found, exact, strict=True)) > 1e-3, "else nothing is lost"


@paths
@pytest.mark.parametrize("way", ["own cache with a state", "own quantised layers"])
def test_beams_and_further_turns_follow_an_own_cache(make, way, path):
    wrapped, base = make("llama", dtype=torch.float64), tiny("llama", dtype=torch.float64)
    model, ids = wrapped if path == "peft" else wrapped.get_base_model(), token_batch([9])[0]
    arguments = {"max_new_tokens": 6, "do_sample": False}
    if not WAYS[way].lossy or hasattr(QuantizedLayer, "_apply_pending_reorder"):  # else transformers cannot reorder it
        beams = {**arguments, "num_beams": 3}
        found = model.generate(input_ids=ids, **beams, **WAYS[way].arguments(base.config))[:, 9:]
        assert torch.equal(found, concatenated(wrapped, base, ids, {**beams, **WAYS[way].arguments(base.config)}))
    cache = WAYS[way].arguments(base.config)["past_key_values"]
    first = model.generate(input_ids=ids, past_key_values=cache, **arguments)
    assert cache.get_seq_length() == 14, "in tokens of the text: the last new one was not read yet"
    again = model.generate(input_ids=first, past_key_values=cache, **arguments)[:, 15:]
    whole = WAYS[way].arguments(base.config)
    assert torch.equal(again, concatenated(wrapped, base, ids, {**arguments, "max_new_tokens": 12, **whole})[:, 6:])


@paths
@pytest.mark.parametrize(
    ("cache", "name"),
    [
        (lambda: EncoderDecoderCache(DynamicCache(), DynamicCache()), "EncoderDecoderCache"),
        (lambda: ((torch.zeros(1, 2, 0, 8),) * 2,) * LAYERS, "tuple"),
        (lambda: object(), "object"),
    ],
)
def test_what_is_no_cache_of_a_decoder_is_refused(make, cache, name, path):
    wrapped = make("llama")
    model = wrapped if path == "peft" else wrapped.get_base_model()
    with torch.no_grad(), pytest.raises(ValueError, match=FOREIGN.format(name=name)):
        model(input_ids=token_batch([5])[0], past_key_values=cache())


# ---------------------------------------------------------------------- continuous batching

SETTINGS = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=VOCAB, pad_token_id=0)


def enter(model) -> None:
    with model.continuous_batching_context_manager(generation_config=SETTINGS):
        raise AssertionError("it began")


CONTINUOUS_WAYS = {
    "generate_batch": lambda model: model.generate_batch([[5, 6, 7], [8, 9]], generation_config=SETTINGS),
    "init_continuous_batching": lambda model: model.init_continuous_batching(generation_config=SETTINGS),
    "continuous_batching_context_manager": enter,
    "cache_implementation='paged'": lambda model: model.generate(
        input_ids=torch.tensor([[5, 6, 7]]), cache_implementation="paged", max_new_tokens=3
    ),
}


@paths
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("way", list(CONTINUOUS_WAYS))
def test_continuous_batching_is_refused_before_it_begins(make, way, attention, path):
    wrapped = make("llama", attention)
    model, ids = wrapped if path == "peft" else wrapped.get_base_model(), token_batch([9])[0]
    expected = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    with pytest.raises(ValueError, match=CONTINUOUS):
        CONTINUOUS_WAYS[way](model)
    assert model.config._attn_implementation == attention, "the model is as it was"
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=3, do_sample=False), expected)


@paths
def test_a_paged_cache_is_refused_wherever_it_comes_from(make, path):
    """A manager that was made while the adapter was off runs in a thread, where this ends its requests."""
    wrapped = make("llama")
    model = wrapped if path == "peft" else wrapped.get_base_model()
    with torch.no_grad(), pytest.raises(ValueError, match=CONTINUOUS):
        model(input_ids=token_batch([5])[0], past_key_values=PagedAttentionCache.__new__(PagedAttentionCache))
