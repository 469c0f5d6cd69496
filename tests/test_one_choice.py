"""One choice for one input: every way into the method makes the one that `model(...)` makes of the input alone."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from transformers import Cache, DynamicCache

from idp_peft.analysis import attention_map, selection_report
from idp_peft.evaluation.prompted import select_prompts
from idp_peft.selection import select
from idp_peft.serving import ExportedModel, Router, VllmPrompts, export_to_vocab
from idp_peft.serving.prompted_request import RequestPrompter
from tests.reference import concatenated_logits
from tests.test_harness import tokenizer
from tests.tiny import ARCHITECTURES, AROUND_A_DECODER, CHANGING_ROTARY, VOCAB, tiny, token_batch
from tests.tiny_serving import Saved, saved

K, SWITCH = 4, 12  # a prompt's tokens, and the length at which the frequencies of `CHANGING_ROTARY` change
NOT_EXPORTED = ("gemma3n", "gemma4", "gemma4_multimodal", "molmo2")  # their vocabulary has no place for a prompt
CLEAR = 1e-5  # a best score stands so far before the next that no rounding turns them round


@dataclass
class Case:
    """A model, its parts that serve, and inputs with the choice that each makes alone."""

    name: str
    one: Saved
    rows: list[list[int]]
    expected: list[int]

    @cached_property
    def router(self) -> Router:
        return Router.from_pretrained(self.one.adapter, self.one.base)

    @cached_property
    def prompter(self) -> RequestPrompter:
        try:
            folder = export_to_vocab(self.one.adapter, self.one.base.parent / "exported", self.one.base)
        except ValueError as error:
            if self.name in NOT_EXPORTED:
                pytest.skip(str(error))
            raise
        return RequestPrompter(self.router, ExportedModel.from_folder(folder), max_tokens=32)


@pytest.fixture(scope="module")
def case(request, tmp_path_factory) -> Case:
    name, _, by_centroid = request.param.partition(" by ")
    folder = tmp_path_factory.mktemp(name)
    selection = by_centroid or "attention"
    one = saved(folder, name, tokenizer=tokenizer(), num_prompts=4, num_virtual_tokens=K, selection=selection)
    rows, expected = clear_choices(one.model, candidates(4 if name in ("phi3_longrope", "llama_dynamic") else 1))
    return Case(name, one, rows, expected)


def candidates(of_each_length: int) -> list[list[int]]:
    """Texts of 2 to 19 tokens: behind a prompt, some end before the switch and some after; long and short by turns."""
    generator = torch.Generator().manual_seed(0)
    lengths = [length for pair in zip(range(2, 11), range(19, 10, -1), strict=True) for length in pair]
    return [torch.randint(2, VOCAB, (n,), generator=generator).tolist() for n in lengths * of_each_length]


def clear_choices(model, rows: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """The rows whose best prompt is clearly the best, and that prompt."""
    clear, expected = [], []
    for row in rows:
        with torch.no_grad():
            model(input_ids=torch.tensor([row]))
        scores = model.last_selection.scores[0]
        best, second = scores.topk(2).values
        if best - second > CLEAR * best:
            clear.append(row)
            expected.append(int(scores.argmax()))
    assert len(clear) > 0.9 * len(rows), "else little would be compared"
    assert len(set(expected)) > 1, "else any choice would do"
    return clear, expected


def batches(rows: list[list[int]], side: str = "left", size: int = 7):
    """The rows in their order, `size` at once: `input_ids` and `attention_mask`, padded on one side."""
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        width = max(map(len, some))
        padded = [[0] * (width - len(row)) + row if side == "left" else row + [0] * (width - len(row)) for row in some]
        ones = [[1] * len(row) + [0] * (width - len(row)) for row in some]
        masks = [mask[::-1] if side == "left" else mask for mask in ones]
        yield {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(masks)}


# ---------------------------------------------------------------------- the ways in


def forward(side: str, native: bool = False, **settings):
    def choices(case: Case) -> list[int]:
        model, chosen = case.one.model.get_base_model() if native else case.one.model, []
        for batch in batches(case.rows, side):
            with torch.no_grad():
                model(**batch, **settings)
            chosen += case.one.model.last_selection.prompt_ids.tolist()
        return chosen

    return choices


def beside_forced_rows(case: Case) -> list[int]:
    chosen = []
    for row in case.rows:
        ids = torch.tensor([row, row, [1] * len(row)])
        with torch.no_grad():
            case.one.model(input_ids=ids, prompt_ids=["auto", 0, -1])
        chosen.append(int(case.one.model.last_selection.prompt_ids[0]))
    return chosen


def training(case: Case) -> list[int]:
    """In a training step that assigns each row the prompt it chooses."""
    model, chosen = case.one.model, []
    config = model.base_model.layer.active_config
    model.train()
    config.assignment, before = "selected", config.assignment
    try:
        for batch in batches(case.rows, "right"):
            model(**batch, selection_mask=batch["attention_mask"])
            chosen += model.last_selection.prompt_ids.tolist()
    finally:
        model.eval()
        config.assignment = before
    return chosen


def generate(native: bool = False, one_by_one: bool = False, embeds: bool = False, chunked: bool = False, **settings):
    def choices(case: Case) -> list[int]:
        model, chosen = case.one.model.get_base_model() if native else case.one.model, []
        for batch in batches(case.rows, size=1 if one_by_one else 7):
            if embeds:
                base = case.one.model.get_base_model()
                if "inputs_embeds" not in inspect.signature(base.prepare_inputs_for_generation).parameters:
                    pytest.skip(f"`generate` of {type(base).__name__} takes no embeddings")
                batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids"))
            if chunked:  # transformers 5.0 wants the cache to be given
                batch |= {"past_key_values": DynamicCache(), "prefill_chunk_size": 3}
            model.generate(**batch, max_new_tokens=2, do_sample=False, **{"use_cache": True, **settings})
            chosen += case.one.model.last_selection.prompt_ids.tolist()
        return chosen

    return choices


def evaluation(case: Case) -> list[int]:
    return select_prompts(case.one.model, case.rows, 7)


def as_text(row: list[int]) -> str:
    return " ".join(f"w{token}" for token in row)


def log_likelihoods(case: Case) -> list[int]:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    from lm_eval.api.instance import Instance

    from idp_peft.evaluation.harness import HarnessModel

    lm = HarnessModel(case.one.model, tokenizer(), batch_size=7, max_length=32)
    requests = [
        Instance("loglikelihood", {}, (as_text(row), f" w{answer} w9"), answer, metadata=("t", number, 1))
        for number, row in enumerate(case.rows)
        for answer in (2, 3)
    ]
    lm.loglikelihood(requests, disable_tqdm=True)
    return [lm.prompts["t", number] for number in range(len(case.rows))]


def generate_until(case: Case) -> list[int]:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    from lm_eval.api.instance import Instance

    from idp_peft.evaluation.harness import HarnessModel

    lm = HarnessModel(case.one.model, tokenizer(), batch_size=7, max_length=32)
    settings = {"until": ["<s>"], "max_gen_toks": 1}
    requests = [
        Instance("generate_until", {}, (as_text(row), settings), 0, metadata=("t", number, 1))
        for number, row in enumerate(case.rows)
    ]
    lm.generate_until(requests, disable_tqdm=True)
    return [lm.prompts["t", number] for number in range(len(case.rows))]


def report(case: Case) -> list[int]:
    rows = [{"input_ids": row} for row in case.rows]
    return selection_report(case.one.model, rows, batch_size=7).prompt_ids.tolist()


def map_of_attention(case: Case) -> list[int]:
    chosen = []
    for batch in batches(case.rows):
        shares = attention_map(case.one.model, **batch) * batch["attention_mask"][..., None]
        chosen += shares.sum(1).argmax(-1).tolist()
    return chosen


def router_batch(side: str):
    def choices(case: Case) -> list[int]:
        return [int(i) for batch in batches(case.rows, side) for i in case.router.select(**batch).prompt_ids]

    return choices


def route(case: Case) -> list[int]:
    return case.router.route(case.rows, batch_size=7).prompt_ids.tolist()


def proxy(case: Case) -> list[int]:
    return case.prompter.completion({"prompt": case.rows})[1]


def vllm_embeddings(case: Case) -> list[int]:
    made = VllmPrompts(case.router).for_llm(case.rows)
    fronts = [one["prompt_embeds"][:K] for one in made]
    return [next(i for i, prompt in enumerate(case.router.prompts) if torch.equal(prompt, f)) for f in fronts]


WAYS = {
    "forward, padded on the left": forward("left"),
    "forward, padded on the right": forward("right"),
    "forward without a cache": forward("right", use_cache=False),
    "forward of transformers' own adapter": forward("left", native=True),
    "beside forced rows": beside_forced_rows,
    "a training step": training,
    "generate": generate(),
    "generate from embeddings": generate(embeds=True),
    "generate of transformers' own adapter": generate(native=True),
    "generate with a static cache": generate(cache_implementation="static"),
    "generate without a cache": generate(use_cache=False),
    "generate with a prefill in chunks": generate(chunked=True),
    "generate with drafted tokens": generate(one_by_one=True, prompt_lookup_num_tokens=3),
    "beams": generate(num_beams=2),
    "evaluation": evaluation,
    "lm-eval, log-likelihoods": log_likelihoods,
    "lm-eval, generation": generate_until,
    "selection report": report,
    "attention map": map_of_attention,
    "router, a batch padded on the left": router_batch("left"),
    "router, a batch padded on the right": router_batch("right"),
    "router, texts": route,
    "proxy": proxy,
    "vLLM prompts": vllm_embeddings,
}


# What transformers 5.0 cannot do with the base alone.
SLIDING = ("mistral_small_window", "gemma2", "gemma3", "gemma3_multimodal", "gemma3n")
LIMITS = {
    **{(name, "generate with drafted tokens"): "it cannot crop a sliding window that is full" for name in SLIDING},
    ("phi3_longrope", "generate with drafted tokens"): "it loses the cache where the frequencies change",
    ("mpt", "generate with a static cache"): "its masks have the wrong size",
}


# By attention every way on every architecture. By centroid no way reads anything of the architecture but its embeddings, so
# those that load a part of the model run on all, and the others on one.
CASES = [(name, way) for name in (*ARCHITECTURES, *CHANGING_ROTARY, *AROUND_A_DECODER) for way in WAYS]
CASES += [("llama by centroid", way) for way in WAYS if way != "attention map"]
CASES += [
    (f"{name} by centroid", way)
    for name in (*ARCHITECTURES, *AROUND_A_DECODER)
    for way in ("forward, padded on the left", "router, texts", "proxy")
    if name != "llama"
]


@pytest.mark.parametrize(("case", "way"), CASES, indirect=["case"])
def test_every_way_in_chooses_as_the_model_does_for_the_input_alone(case, way):
    if (limit := LIMITS.get((case.name, way))) and not hasattr(Cache, "activate_past_recording"):
        pytest.skip(f"this transformers is too old: {limit}")
    assert WAYS[way](case) == case.expected


# ---------------------------------------------------------------------- what ran before


@pytest.mark.parametrize("name", list(CHANGING_ROTARY))
@pytest.mark.parametrize("layer", [0, 1])
def test_what_the_model_ran_before_steers_no_choice(make, name, layer):
    """A base with "dynamic" keeps the frequencies of the longest text."""
    model = make(name, num_virtual_tokens=K, selection_layer=layer)
    for tokens in (6, 8, 9, 15):
        ids = token_batch([tokens])[0]
        expected = make(name, num_virtual_tokens=K, selection_layer=layer)
        with torch.no_grad():
            expected(input_ids=ids)
            with model.disable_adapter():
                model(input_ids=token_batch([40])[0])
            model(input_ids=ids)
        assert torch.equal(model.last_selection.scores, expected.last_selection.scores)


def test_choosing_leaves_the_frequencies_that_a_base_keeps(make):
    model = make("llama_dynamic", num_virtual_tokens=K)
    rotary = model.get_base_model().model.rotary_emb
    for tokens in (3, 20, 6):
        before = rotary.inv_freq.clone()
        select(model.base_model.layer, {"input_ids": token_batch([tokens, 4])[0]})
        assert torch.equal(rotary.inv_freq, before)


@pytest.mark.parametrize("name", list(CHANGING_ROTARY))
@pytest.mark.parametrize("tokens", [6, 8, 9, 15])
def test_a_prompt_has_the_frequencies_that_the_base_has_by_then(make, name, tokens):
    """Whatever ran before: prompt and text are one text of the base."""
    model, base = make(name, num_virtual_tokens=K), tiny(name)
    ids, long = token_batch([tokens])[0], token_batch([40])[0]
    with torch.no_grad():
        model(input_ids=ids, prompt_ids=1)
        with model.disable_adapter():
            model(input_ids=long)
        base(input_ids=long)
        found = model(input_ids=ids, prompt_ids=1).logits
    assert (found - concatenated_logits(model, base, ids, 1)).abs().max() <= 1e-4


# ---------------------------------------------------------------------- texts that grow past the switch


def tokens_as_prompts(make, name: str):
    """A model whose prompts are words, so that its definition is a text of the base; and those words, `[M, K]`."""
    model = make(name, num_virtual_tokens=K, dtype=torch.float64)  # so that no sum's order decides between two words
    words = torch.randint(2, VOCAB, (4, K), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model.base_model.layer.active_bank.weight.copy_(model.get_input_embeddings()(words.flatten()))
    return model, words


@pytest.mark.parametrize("tokens", [2, 7, 8, 9, 13])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {}) for name in CHANGING_ROTARY),
        ("phi3_longrope", {"num_beams": 3}),
        ("phi3_longrope", {"cache_implementation": "static"}),
    ],
)
def test_a_text_that_grows_past_the_switch_is_the_bases_own(make, name, tokens, settings):
    ids = token_batch([tokens])[0]
    arguments = {"max_new_tokens": 14, "do_sample": False, **settings}
    for prompt in range(2):
        model, words = tokens_as_prompts(make, name)  # anew: a base with "dynamic" keeps the longest text's frequencies
        if name == "phi3_longrope" and tokens <= SWITCH and not phi3_reads_again():
            with pytest.raises(ValueError, match="`generate` of Phi3ForCausalLM dropped the cache and passed 1 of"):
                model.generate(input_ids=ids, **arguments)
            return
        found = model.generate(input_ids=ids, prompt_ids=prompt, **arguments)
        base, whole = tiny(name, dtype=torch.float64), torch.cat([words[prompt][None], ids], dim=1)
        expected = base.generate(input_ids=whole, **arguments)
        assert torch.equal(found, expected[:, K:])


@pytest.mark.parametrize("tokens", [4, 6, 10])
def test_a_choice_is_kept_where_the_base_drops_its_cache(make, tokens):
    """Phi-3's own `generate` reads a text again where its frequencies change, within a turn and between two."""
    if not phi3_reads_again():
        pytest.skip("this transformers loses the text with the cache")
    model = make("phi3_longrope", num_virtual_tokens=K, dtype=torch.float64)
    native = model.get_base_model()
    long, short = {"max_new_tokens": 12, "do_sample": False}, {"max_new_tokens": 2, "do_sample": False}
    dropped, would_differ = "dropped the cache that holds its prompt, and would choose again", 0
    for seed in range(4):
        ids = token_batch([tokens], seed=seed)[0]
        whole, kept = model.generate(input_ids=ids, **long), int(model.last_selection.prompt_ids)
        assert torch.equal(whole, model.generate(input_ids=ids, prompt_ids=kept, **long))
        with pytest.raises(ValueError, match=dropped):
            native.generate(input_ids=ids, **long)
        first = model.generate(input_ids=ids, return_dict_in_generate=True, **short)
        longer = torch.cat([first.sequences, token_batch([9], seed=9 + seed)[0]], dim=1)
        second = model.generate(input_ids=longer, past_key_values=first.past_key_values, **short)
        assert torch.equal(second, model.generate(input_ids=longer, prompt_ids=kept, **short))
        first = native.generate(input_ids=ids, return_dict_in_generate=True, **short)
        with pytest.raises(ValueError, match=dropped):
            native.generate(input_ids=longer, past_key_values=first.past_key_values, **short)
        model.generate(input_ids=longer, **short)
        would_differ += int(model.last_selection.prompt_ids) != kept
    assert would_differ, "else choosing again would not be seen"


def phi3_reads_again() -> bool:
    """Whether this transformers' own `generate` gets over the switch: 5.0 drops Phi-3's cache and the text with it."""
    base, ids = tiny("phi3_longrope"), token_batch([SWITCH])[0]
    arguments = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    found = base.generate(input_ids=ids, **arguments)
    with torch.no_grad():
        expected = tiny("phi3_longrope")(input_ids=found.sequences[:, :-1]).logits[:, -1]
    return torch.allclose(found.logits[-1], expected, atol=1e-4)
