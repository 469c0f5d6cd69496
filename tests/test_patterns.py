"""Recorded patterns are what the models themselves report; a comparison is its definition over recordings."""

from __future__ import annotations

import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from idp_peft import IDPConfig
from idp_peft.analysis import PatternComparison, compare_patterns, record_patterns
from idp_peft.analysis.cka import Moments, cka
from idp_peft.analysis.similarity import jensen_shannon
from idp_peft.hosting.architectures import find_blocks, find_decoder, forward_parameters
from tests.reference import prompts_of
from tests.test_compressed_bases import three_bit, words
from tests.tiny import tiny
from tests.tiny_folder import tiny_texts, tiny_tokenizer

NAMES = ["llama", "gpt2", "opt", "qwen3", "gemma2", "bloom", "falcon", "mpt"]
PROMPTED = ["llama", "gpt2", "opt", "qwen3", "gemma2", "bloom"]
LENGTHS = [7, 3, 9, 5, 2]


def data(lengths=LENGTHS, seed=0) -> list[dict]:
    draw = random.Random(seed)
    return [{"input_ids": [draw.randrange(2, 97) for _ in range(length)]} for length in lengths]


def reported(base, row: list[int], front: torch.Tensor | None = None, masked: int = 0) -> SimpleNamespace:
    """What a plain eager model says of `[masked ; front ; row]`, by transformers' own outputs, at the row's positions:
    `hidden` [layers - 1] of `[n, d]` (the last is behind the norm), `own` and `prompt` [layers] of `[heads, n, n]` and
    `[heads, n]`."""
    embeds = base.get_input_embeddings()(torch.tensor([row]))
    front = embeds.new_zeros(0, embeds.shape[-1]) if front is None else front
    embeds = torch.cat([embeds.new_zeros(1, masked, embeds.shape[-1]), front[None], embeds], dim=1)
    mask = torch.ones(1, embeds.shape[1], dtype=torch.long)
    mask[:, :masked] = 0
    extra = {"use_cache": False, "output_hidden_states": True, "output_attentions": True}
    if "position_ids" in forward_parameters(type(base)):
        extra["position_ids"] = torch.arange(embeds.shape[1])[None]
    with torch.no_grad():
        out = base(inputs_embeds=embeds, attention_mask=mask, **extra)
    n = len(row)
    return SimpleNamespace(
        hidden=[states[0, -n:] for states in out.hidden_states[1:-1]],
        own=[weights[0, :, -n:, -n:] for weights in out.attentions],
        prompt=[weights[0, :, -n:, :-n].sum(-1) for weights in out.attentions],
    )


def assert_recorded(example, expected, atol=1e-5) -> None:
    assert len(example.activations["hidden"]) == len(example.attention) == len(expected.own) == 3
    for layer, states in enumerate(expected.hidden):
        torch.testing.assert_close(example.activations["hidden"][layer], states, atol=atol, rtol=1e-4)
    for layer in range(3):
        torch.testing.assert_close(example.attention[layer], expected.own[layer], atol=atol, rtol=1e-4)
        torch.testing.assert_close(example.prompt_attention[layer], expected.prompt[layer], atol=atol, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_recorded_is_what_the_model_itself_reports_of_each_row_alone(name):
    base, rows = tiny(name, "eager"), data()
    recording = record_patterns(tiny(name), rows, batch_size=3)
    assert [example.tokens for example in recording.examples] == LENGTHS
    assert recording.prompt_ids is None
    for example, row in zip(recording.examples, rows, strict=True):
        assert_recorded(example, reported(base, row["input_ids"]))
        assert all(weights.abs().max() == 0 for weights in example.prompt_attention)
    assert recording.activations("mlp_output", 2).shape == (sum(LENGTHS), 32)
    assert recording.activations("hidden", 0).dtype == torch.float32


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen3", "bloom", "mpt", "falcon"])
def test_the_outputs_of_both_blocks_are_what_a_layer_adds_to_the_residual_stream(name):
    recording = record_patterns(tiny(name), data(), batch_size=3)
    for layer in (1, 2):
        before, after = (recording.activations("hidden", i) for i in (layer - 1, layer))
        added = sum(recording.activations(part, layer) for part in ("attention_output", "mlp_output"))
        torch.testing.assert_close(after - before, added, atol=1e-5, rtol=1e-4)
        assert recording.activations("attention_output", layer).abs().max() > 0.01


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out(side):
    model, rows = tiny("llama"), data()
    width, padded = max(LENGTHS), []
    for row in rows:
        ids, fill = row["input_ids"], width - len(row["input_ids"])
        front, back = (fill, 0) if side == "left" else (0, fill)
        padded.append({
            "input_ids": [0] * front + ids + [0] * back, "attention_mask": [0] * front + [1] * len(ids) + [0] * back
        })  # fmt: skip
    for one, other in zip(
        record_patterns(model, padded, batch_size=5).examples, record_patterns(model, rows).examples, strict=True
    ):
        torch.testing.assert_close(one.activations, other.activations, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one.attention, other.attention, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", PROMPTED)
@pytest.mark.parametrize("prompt", [0, 1])
def test_a_forced_prompt_gives_what_the_plain_model_does_behind_it(make, name, prompt):
    """Promise 1, for activations and attention."""
    model, base, rows = make(name, num_prompts=2, num_virtual_tokens=[3, 5]), tiny(name, "eager"), data()
    recording = record_patterns(model, rows, prompt_ids=prompt, batch_size=3)
    assert recording.prompt_ids == [prompt] * 5
    tokens = prompts_of(model)[prompt]
    for example, row in zip(recording.examples, rows, strict=True):
        expected = reported(base, row["input_ids"], tokens, masked=5 - len(tokens))
        assert 0.05 < float(torch.stack(expected.prompt).mean()) < 0.95
        assert_recorded(example, expected)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_free_choice_is_the_models_own_and_the_run_that_makes_it_is_not_recorded(make, layer):
    """Deeper selection layers run the layers below with all prompts; nothing of that may be recorded."""
    model, rows = make("llama", selection_layer=layer), data([7, 3, 9, 5, 2, 8, 6])
    recording = record_patterns(model, rows, batch_size=3)
    for row, chosen, example in zip(rows, recording.prompt_ids, recording.examples, strict=True):
        with torch.no_grad():
            model(torch.tensor([row["input_ids"]]))
        assert model.last_selection.prompt_ids.tolist() == [chosen]
        (forced,) = record_patterns(model, [row], prompt_ids=chosen).examples
        assert {part: len(layers) for part, layers in example.activations.items()} == dict.fromkeys(
            forced.activations, 3
        )
        torch.testing.assert_close(example.activations, forced.activations, atol=1e-5, rtol=1e-4)
    assert len(set(recording.prompt_ids)) > 1, "a choice that is always the same shows nothing"


def test_labels_and_selection_masks_steer_the_choice_as_they_steer_the_model(make):
    model, rows = make("llama", num_virtual_tokens=[3, 5, 2, 5]), data([9] * 8)
    for row in rows:
        row["labels"] = [-100] * 2 + row["input_ids"][2:]
    by_labels = record_patterns(model, rows, parts="hidden").prompt_ids
    expected = []
    for row in rows:
        with torch.no_grad():
            model(**{name: torch.tensor([value]) for name, value in row.items()})
        expected += model.last_selection.prompt_ids.tolist()
    assert by_labels == expected
    for row in rows:
        row["selection_mask"] = [0] * 8 + [1]
    assert record_patterns(model, rows, parts="hidden").prompt_ids != by_labels


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_prompt_tuning_of_peft_is_recorded_without_its_prompts_positions(name):
    base, rows = tiny(name, "eager"), data()
    model = get_peft_model(tiny(name), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    prompt = model.get_prompt(1)[0].detach()
    for example, row in zip(record_patterns(model, rows, batch_size=3).examples, rows, strict=True):
        assert_recorded(example, reported(base, row["input_ids"], prompt))


def test_prefix_tuning_of_peft_has_attention_on_a_prompt_that_is_nowhere_else():
    model = get_peft_model(tiny("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    for example in record_patterns(model, data(), batch_size=3).examples:
        n = example.tokens
        assert example.activations["hidden"][0].shape == (n, 32)
        for own, prompt in zip(example.attention, example.prompt_attention, strict=True):
            assert own.shape == (4, n, n)
            assert prompt.min() > 0
            torch.testing.assert_close(own.sum(-1) + prompt, torch.ones(4, n))


def lora_on(base):
    torch.manual_seed(0)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.5
    )
    return get_peft_model(base, config)


def test_a_lora_is_recorded_as_the_model_with_its_weights_merged():
    rows, model = data(), lora_on(tiny("llama")).train()  # in training mode, dropout would show
    merged = lora_on(tiny("llama", "eager")).merge_and_unload()
    for example, row in zip(record_patterns(model, rows, batch_size=3).examples, rows, strict=True):
        assert_recorded(example, reported(merged, row["input_ids"]), atol=1e-4)


@pytest.mark.parametrize("kind", ["IDP", "LoRA"])
def test_a_compressed_base_is_recorded_and_stays_as_it_is(kind):
    before = words(three_bit())
    config = IDPConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(three_bit(), config) if kind == "IDP" else lora_on(three_bit())
    result = compare_patterns(tiny("llama"), {"compressed": three_bit(), kind: model}, data(), start="compressed")
    assert result.activations["hidden"]["cosine"]["compressed"].max() < 0.9999
    after = {name.replace(".base_layer", ""): value for name, value in words(model.get_base_model()).items()}
    assert all(torch.equal(value, after[name]) for name, value in before.items())


# ---------------------------------------------------------------------- nothing is left behind


def state_of(model) -> dict:
    """Everything that recording might leave behind."""
    tables = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    tables += ("_forward_hooks_always_called",)
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    return {
        "hooks": [[list(getattr(module, table)) for table in tables] for module in model.modules()],
        "modes": [module.training for module in model.modules()],
        "configs": [config.to_dict() for config in configs],
        "attention": [config._attn_implementation for config in configs],
        "attributes": [sorted(vars(module)) for module in find_decoder(model.get_base_model()).modules()],
    }


@pytest.mark.parametrize("kind", ["IDP", "LoRA"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_model_is_left_as_it_was(make, kind, fails, monkeypatch):
    model = make("llama") if kind == "IDP" else lora_on(tiny("llama"))
    model.train()
    find_blocks(find_decoder(model.get_base_model()))[1][1].eval()  # a mode of its own
    if kind == "IDP":
        with torch.no_grad():
            model(torch.tensor([data()[0]["input_ids"]]), prompt_ids=torch.tensor([2]))
        selection = model.last_selection
    state, weights = state_of(model), {name: value.clone() for name, value in model.state_dict().items()}
    numbers = torch.get_rng_state(), random.getstate()
    if fails:
        attention = type(model.get_base_model().model.layers[2].self_attn)
        forward = attention.forward

        def breaks(self, *args, **kwargs):
            if self.layer_idx == 2:
                raise RuntimeError("in the middle")
            return forward(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(attention, "forward", breaks)
            with pytest.raises(RuntimeError, match="in the middle"):
                compare_patterns(model, {"itself": model}, data())
    else:
        compare_patterns(model, {"itself": model}, data())
    assert state_of(model) == state
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), numbers[0])
    assert random.getstate() == numbers[1]
    if kind == "IDP":
        assert model.last_selection is selection


def test_eager_attention_is_run_only_for_attention(monkeypatch):
    model, seen = tiny("llama"), []
    find_blocks(find_decoder(model))[1][0].register_forward_pre_hook(
        lambda *_: seen.append(model.config._attn_implementation)
    )
    record_patterns(model, data(), parts=("hidden", "mlp_output"), batch_size=5)
    record_patterns(model, data(), batch_size=5)
    assert seen == ["sdpa", "eager"]


# ---------------------------------------------------------------------- comparing


def test_a_model_is_equal_to_itself():
    model, other = tiny("llama"), tiny("llama", seed=1)
    result = compare_patterns(model, {"itself": model, "other": other}, data(), start="other")
    for measures in result.activations.values():
        assert np.allclose(measures["cosine"]["itself"], 1, atol=1e-12)
        assert np.allclose(measures["cka"]["itself"], 1, atol=1e-12)
        assert np.allclose(measures["cka_debiased"]["itself"], 1, atol=1e-12)
        assert not measures["distance"]["itself"].any()
        assert np.allclose(measures["closed"]["itself"], 1)
        assert np.allclose(measures["aside"]["itself"], 0, atol=1e-6)
        assert np.all(measures["cosine"]["other"] < 0.9)
        assert np.all(measures["cka"]["other"] < 0.98)
        assert "other" not in measures["closed"]
    assert not result.attention["distance"]["itself"].any()
    assert np.allclose(result.attention["cosine"]["itself"], 1, atol=1e-6)
    assert np.all(result.attention["distance"]["other"] > 0.05)
    assert np.allclose(result.attention["moved"]["itself"], result.attention["distance"]["other"])
    assert "other" not in result.attention["moved"]
    assert not result.attention["prompt_share"]["itself"].any()
    shares = result.attention["first_token_share"]
    assert np.array_equal(shares["reference"], shares["itself"])


@pytest.mark.parametrize("skip", [0, 2])
def test_a_comparison_is_its_definition_over_recordings(make, skip):
    lengths = [7, 4, 9, 5]
    idp, models = make("llama", seed=1), {"start": tiny("llama", seed=2), "LoRA": lora_on(tiny("llama", seed=1))}
    models["IDP"] = idp
    rows, dense = data(lengths), tiny("llama")
    result = compare_patterns(dense, models, rows, start="start", skip=skip, prompt_ids={"IDP": 3}, batch_size=3)
    kept = {name: record_patterns(model, rows) for name, model in {"dense": dense, **models}.items()}
    kept["IDP"] = record_patterns(idp, rows, prompt_ids=3)
    assert (result.tokens, result.examples) == (sum(lengths) - 4 * skip, 4)
    assert result.prompt_ids == {"IDP": [3] * 4}

    def features(name, part, layer):
        return torch.cat([e.activations[part][layer][skip:] for e in kept[name].examples]).double()

    for part in ("hidden", "attention_output", "mlp_output"):
        for layer in range(3):
            x, c, a, b = (features(name, part, layer) for name in ("dense", "start", "LoRA", "IDP"))
            measures = {name: values["IDP"][layer] for name, values in result.activations[part].items()}
            moments = [Moments() for _ in range(3)]
            for sums, pair in zip(moments, ((x, x), (x, b), (b, b)), strict=True):
                sums.add(*pair)
            scale = x.norm(dim=1, keepdim=True)
            gap, step, step_a = (((end - c) / scale).flatten() for end in (x, b, a))
            closed = step @ gap / (gap @ gap)
            expected = {
                "cosine": torch.cosine_similarity(x, b).mean(),
                "distance": ((b - x).norm(dim=1) / x.norm(dim=1)).mean(),
                "cka": cka(*moments),
                "cka_debiased": cka(*moments, debiased=True),
                "closed": closed,
                "aside": (step - closed * gap).norm() / gap.norm(),
                "towards": torch.cosine_similarity(step, gap, dim=0),
            }
            assert measures == pytest.approx(
                {name: float(value) for name, value in expected.items()}, rel=1e-4, abs=1e-5
            )
            agreement = float(torch.cosine_similarity(step, step_a, dim=0))
            assert result.agreement[part]["LoRA / IDP"][layer] == pytest.approx(agreement, rel=1e-4, abs=1e-5)

    def renormalised(example, layer):
        weights = example.attention[layer][:, skip + 1 :, skip:]
        return weights / weights.sum(-1, keepdim=True)

    for layer in range(3):
        sums = {name: [] for name in ("distance", "cosine", "prompt_share", "first_token_share", "moved")}
        for example, of_dense, of_start in zip(*(kept[n].examples for n in ("IDP", "dense", "start")), strict=True):
            p, q, r = (renormalised(each, layer) for each in (example, of_dense, of_start))
            sums["distance"].append(jensen_shannon(p, q).flatten())
            sums["moved"].append(jensen_shannon(p, r).flatten())
            sums["cosine"].append(torch.cosine_similarity(p, q, dim=-1).flatten())
            sums["prompt_share"].append(example.prompt_attention[layer][:, skip + 1 :].flatten())
            sums["first_token_share"].append(example.attention[layer][:, skip + 1 :, 0].flatten())
        expected = {name: float(torch.cat(values).mean()) for name, values in sums.items()}
        found = {name: values["IDP"][layer] for name, values in result.attention.items()}
        assert found == pytest.approx(expected, rel=1e-4)
        assert found["prompt_share"] > 0.05


def test_a_recording_stands_for_its_model(make):
    """Also for one model with its adapter on and off."""
    idp, dense, rows = make("llama", seed=1), tiny("llama"), data()
    with idp.disable_adapter():
        alone = record_patterns(idp, rows)
    from_recordings = compare_patterns(
        record_patterns(dense, rows, batch_size=5),
        {"compressed": alone, "IDP": record_patterns(idp, rows)},
        rows,
        start="compressed",
        parts=("hidden", "attention"),
    )
    models = {"compressed": tiny("llama", seed=1), "IDP": idp}
    from_models = compare_patterns(dense, models, rows, start="compressed", parts=("attention", "hidden"))
    assert from_recordings.prompt_ids == from_models.prompt_ids
    assert json.loads(json.dumps(from_recordings.to_dict())) == _close(from_models.to_dict())
    assert list(from_models.activations) == ["hidden"]


def _close(content):
    if isinstance(content, dict):
        return {name: _close(value) for name, value in content.items()}
    if isinstance(content, list) and content and isinstance(content[0], float):
        return pytest.approx(content, rel=1e-4, abs=1e-5)
    return content


@pytest.mark.parametrize("parts", ["hidden", "attention", ("mlp_output", "attention")])
def test_parts_can_be_chosen(parts):
    result = compare_patterns(tiny("llama"), {"b": tiny("llama", seed=1)}, data(), parts=parts, cka=False)
    asked = {parts} if isinstance(parts, str) else set(parts)
    assert set(result.activations) == asked - {"attention"}
    assert bool(result.attention) == ("attention" in asked)
    assert result.tokens == sum(LENGTHS)
    assert all(set(measures) == {"cosine", "distance"} for measures in result.activations.values())
    assert result.plot().axes
    assert "tokens of 5 examples" in str(result)


def test_texts_are_read_with_a_tokenizer():
    texts = tiny_texts(3, words=6)
    result = compare_patterns(
        tiny("llama"), {"b": tiny("llama", seed=1)}, texts, tokenizer=tiny_tokenizer(), max_examples=2
    )
    assert (result.examples, result.tokens) == (2, 12)


# ---------------------------------------------------------------------- the result


@pytest.fixture(scope="module")
def comparison():
    idp = get_peft_model(tiny("llama", seed=1), IDPConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    models = {"compressed": tiny("llama", seed=1), "IDP": idp, "again": tiny("llama", seed=1)}
    return compare_patterns(tiny("llama"), models, data(), start="compressed", skip=1)


def test_a_comparison_goes_through_a_json_file(comparison):
    text = json.dumps(comparison.to_dict(), allow_nan=False)
    read = PatternComparison.from_dict(json.loads(text))
    assert repr(read) == repr(comparison)
    assert math.isnan(read.activations["hidden"]["towards"]["again"][0])
    for measure, models in comparison.activations["hidden"].items():
        for name, values in models.items():
            np.testing.assert_array_equal(read.activations["hidden"][measure][name], values)
    assert read.to_markdown() == comparison.to_markdown()


def test_the_table_has_means_over_layers(comparison):
    text = comparison.to_markdown()
    cosine = comparison.activations["hidden"]["cosine"]["IDP"].mean()
    first = next(line for line in text.splitlines() if line.startswith("| IDP |"))
    assert first.startswith(f"| IDP | {cosine:.4f} |")
    shares = comparison.attention["first_token_share"]
    assert next(line for line in text.splitlines() if line.startswith("| reference |")).split("|")[-2].strip() == (
        f"{shares['reference'].mean():.4f}"
    )
    assert "21 tokens of 5 examples, the first 1 of each left out" in text
    assert "| IDP / again |" in text


def test_the_figure_has_a_panel_per_measure_and_part(comparison):
    figure = comparison.plot()
    assert len(figure.axes) == 4 * 3 + 3
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert len(set(titles)) == len(titles)
    drawn = {line.get_label() for line in figure.axes[0].get_lines()}
    assert drawn == {"compressed", "IDP", "again"}
    cosine = comparison.activations["hidden"]["cosine"]["IDP"]
    line = next(line for line in figure.axes[0].get_lines() if line.get_label() == "IDP")
    assert line.get_ydata().tolist() == cosine.tolist()
    assert figure._repr_png_().startswith(b"\x89PNG")
    few = comparison.plot(["closed", "prompt_share"])
    assert len(few.axes) == 4
    assert {line.get_label() for line in few.axes[0].get_lines()} >= {"IDP", "again"}
    with pytest.raises(ValueError, match=r"`measures` must be some of 'cosine', .*, got \['loss'\]"):
        comparison.plot(["loss"])


def test_a_figure_of_what_was_not_measured_is_refused():
    result = compare_patterns(tiny("llama"), {"b": tiny("llama", seed=1)}, data(), parts="hidden", cka=False)
    with pytest.raises(ValueError, match=r"`measures` \['closed', 'distance'\] are not in this comparison"):
        result.plot(["closed", "distance"])


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"parts": ("hidden", "logits")}, r"`parts` must be some of 'hidden', .*, got \('hidden', 'logits'\)"),
        ({"parts": ()}, r"`parts` must be some of"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"prompt_ids": 1}, "`prompt_ids` needs a model with an active IDP adapter, got LlamaForCausalLM without one"),
    ],
)
def test_wrong_arguments_of_a_recording_are_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        record_patterns(tiny("llama"), data(), **arguments)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"models": {}}, "`models` must be a dict of names and models, at least one"),
        ({"models": {"reference": None}}, "`models` must not have one named 'reference'"),
        ({"start": "dense"}, r"`start` must be one of `models` \('other'\), got 'dense'"),
        ({"prompt_ids": {"IDP": 1}}, r"`prompt_ids` names \['IDP'\], which `models` does not have \('other'\)"),
        ({"prompt_ids": {"other": 1}}, "`prompt_ids` needs a model with an active IDP adapter"),
        ({"skip": 2}, "`skip` must be at least 0 and less than the shortest example's 2 tokens, got 2"),
        ({"skip": -1}, "`skip` must be at least 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_of_a_comparison_are_refused(arguments, text):
    given = {"models": {"other": tiny("llama", seed=1)}, "dataset": data(), **arguments}
    with pytest.raises(ValueError, match=text):
        compare_patterns(tiny("llama"), given.pop("models"), given.pop("dataset"), **given)


def test_recordings_of_something_else_are_refused():
    model, rows = tiny("llama"), data()
    recording = record_patterns(model, rows, parts="hidden")
    with pytest.raises(ValueError, match=r"the recording of 'b' holds \('hidden',\), not \['attention_output', "):
        compare_patterns(model, {"b": recording}, rows)
    with pytest.raises(ValueError, match="the recording of 'reference' is of other tokens than `dataset`"):
        compare_patterns(recording, {"b": model}, data(seed=1), parts="hidden")
    with pytest.raises(ValueError, match="`prompt_ids` cannot force a prompt on 'b', which is recorded already"):
        compare_patterns(model, {"b": recording}, rows, parts="hidden", prompt_ids={"b": 0})
    with pytest.raises(
        ValueError, match=r"`part` must be one of the activations that were recorded .* got 'mlp_output'"
    ):
        recording.activations("mlp_output", 0)


def test_models_of_another_shape_are_refused():
    text = r"'b' must have the reference's layers, width and heads .*\(3, 32\).*, got .*\(3, 48\).* feature by feature"
    with pytest.raises(ValueError, match=text):
        compare_patterns(tiny("llama"), {"b": wider()}, data())


def wider():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=97, **sizes)).eval()


def test_what_an_architecture_cannot_say_is_refused(monkeypatch):
    model = tiny("llama")
    attention = type(model.model.layers[0].self_attn)
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", lambda self, *args, **kwargs: (forward(self, *args, **kwargs)[0], None))
    with pytest.raises(ValueError, match="LlamaAttention does not report its attention weights: leave 'attention' out"):
        record_patterns(model, data())
    for layer in model.model.layers:
        layer.experts = layer._modules.pop("mlp")
    with pytest.raises(
        ValueError, match="the MLP of a LlamaDecoderLayer was not found: leave 'mlp_output' out of `parts`"
    ):
        record_patterns(model, data(), parts=("mlp_output",))
