"""Prompts of keys and values in a real vLLM, by its own KV connector: token for token what the adapter's model says."""

from __future__ import annotations

import json
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from peft import get_peft_model

pytest.importorskip("vllm", reason="`make test-serving` makes an environment with it")

from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec

import idp_peft
from benchmarks.serving.engines import VLLM_BLOCK
from idp_peft import IDPConfig
from idp_peft.models.loading import load_model, load_tokenizer
from idp_peft.serving import Router, VllmPrompts, vllm_connector
from tests.loopback import client
from tests.patience import PATIENCE
from tests.serving.vllm_server import VllmServer, random_model
from tests.tiny import VOCAB

TOKENS, PROMPTS, LENGTH = 12, 3, 2 * VLLM_BLOCK
GREEDY = {"model": "idp", "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "return_token_ids": True}


def connector(adapter) -> tuple[str, str]:
    settings = {
        "kv_connector": "IDPConnector",
        "kv_role": "kv_consumer",
        "kv_connector_module_path": "idp_peft.serving.vllm_connector",
        "kv_connector_extra_config": {"adapter": str(adapter)},
    }
    return "--kv-transfer-config", json.dumps(settings)


def save_adapter(base, folder, length: int = LENGTH, **config) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shape = {"num_prompts": PROMPTS, "num_virtual_tokens": length, "prompts": "key_values", "init_weights": False}
        model = get_peft_model(base, IDPConfig(task_type="CAUSAL_LM", **shape, **config))
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    texts = torch.randint(5, vocabulary, (PROMPTS, length), generator=generator).tolist()
    idp_peft.start_at(model, model.get_base_model(), texts)
    model.save_pretrained(folder)


class Subject:
    """A base, an adapter of key/value prompts on it, and the router of both."""

    def __init__(self, name: str, folder) -> None:
        if name == "default":
            load_model("default").save_pretrained(folder / "base")
            load_tokenizer("default").save_pretrained(folder / "base")
        else:
            random_model(name, folder / "base")
        self.base, self.adapter = folder / "base", folder / "adapter"
        save_adapter(tf.AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32), self.adapter)
        self.model, _ = idp_peft.load(self.adapter, self.base)
        self.model.generation_config.eos_token_id = (
            None  # says it like any other token, as the engine with `ignore_eos`
        )
        self.prompts = VllmPrompts(Router.from_pretrained(self.adapter, self.base))
        generator = torch.Generator().manual_seed(1)
        self.rows = [torch.randint(5, VOCAB, (n,), generator=generator).tolist() for n in (3, 17, 40, 70, 9, 33)]

    def say(self, ids: list[int], prompt: int, tokens: int = TOKENS) -> list[int]:
        """What the adapter's model says, greedily."""
        out = self.model.generate(
            input_ids=torch.tensor([ids]),
            prompt_ids=torch.tensor([prompt]),
            max_new_tokens=tokens,
            do_sample=False,
        )
        return out[0, len(ids) :].tolist()


@pytest.fixture(scope="module", params=["tiny", "tiny_qwen2", "default"])
def one(request, tmp_path_factory):
    return Subject(request.param, tmp_path_factory.mktemp(request.param))


def ask(http, body: dict) -> list[dict]:
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text[:200]
    return response.json()["choices"]


# Few tokens a step, so that prefills are cut into chunks; few blocks, so that requests are preempted.
SMALL = ("--max-num-batched-tokens", "48", "--num-gpu-blocks-override", "14", "--max-model-len", "256")


@pytest.fixture(scope="module")
def http(one, tmp_path_factory):
    log = tmp_path_factory.mktemp("engine") / "log"
    with (
        VllmServer(one.base, log, (*SMALL, *connector(one.adapter))) as server,
        client(server.url, timeout=PATIENCE) as http,
    ):
        yield http


def counted(http, name: str) -> float:
    """One of the engine's counters."""
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"vllm:{name}_total"))


def fresh(one, row, prompt: int, salt: str) -> dict:
    """A request whose blocks the engine shares with those of the same salt alone."""
    return {**one.prompts.completion_body([row], [prompt], **GREEDY), "cache_salt": salt}


def test_every_prompt_and_none_says_what_the_adapters_model_says(one, http):
    for prompt in [*range(PROMPTS), -1, 0]:  # the first one a second time, from the engine's own cache
        for row in one.rows[:3]:
            (choice,) = ask(http, one.prompts.completion_body([row], [prompt], **GREEDY))
            assert choice["token_ids"] == one.say(row, prompt), (prompt, len(row))


def test_a_batch_of_all_prompts_is_its_rows_alone(one, http):
    chosen = [0, 1, 2, -1, 1, 0]
    choices = ask(http, one.prompts.completion_body(one.rows, chosen, **GREEDY))
    for choice, row, prompt in zip(choices, one.rows, chosen, strict=True):
        assert choice["token_ids"] == one.say(row, prompt), (prompt, len(row))


def test_a_preempted_request_is_loaded_again(tmp_path):
    """More tokens than there are cache blocks for, and no blocks that outlive a request."""
    one, chosen = Subject("tiny", tmp_path), [0, 1, 2, 0, 1, 2]
    flags = (*SMALL, "--no-enable-prefix-caching", *connector(one.adapter))
    with (
        VllmServer(one.base, tmp_path / "log", flags) as server,
        client(server.url, timeout=PATIENCE) as http,
    ):
        choices = ask(http, one.prompts.completion_body(one.rows, chosen, **{**GREEDY, "max_tokens": 60}))
        assert counted(http, "num_preemptions") > 0, "the engine had blocks enough"
    assert [choice["token_ids"] for choice in choices] == [
        one.say(row, prompt, 60) for row, prompt in zip(one.rows, chosen, strict=True)
    ]


def test_the_router_chooses_for_it(one, http):
    chosen = one.prompts.router.route(one.rows).prompt_ids.tolist()
    for choice, row, prompt in zip(
        ask(http, one.prompts.completion_body(one.rows, **GREEDY)), one.rows, chosen, strict=True
    ):
        assert choice["token_ids"] == one.say(row, prompt)


def test_a_prompt_is_found_in_the_engines_cache_the_second_time(one, http):
    body = fresh(one, one.rows[1], 2, "once")
    for found, loaded in ((0, LENGTH), (LENGTH, 0)):
        before = {name: counted(http, name) for name in ("prefix_cache_hits", "external_prefix_cache_hits")}
        (choice,) = ask(http, body)
        assert choice["token_ids"] == one.say(one.rows[1], 2)
        assert counted(http, "prefix_cache_hits") - before["prefix_cache_hits"] == found
        assert counted(http, "external_prefix_cache_hits") - before["external_prefix_cache_hits"] == loaded


@pytest.mark.parametrize("length", [VLLM_BLOCK, VLLM_BLOCK + 8, LENGTH - 1])
def test_text_of_a_placeholders_token_is_text(one, http, length):
    """Neither does it get the prompt's blocks, nor does a prompt get its."""
    text, row = [1] * length, one.rows[1]
    for salt, order in (("text first", (-1, 1)), ("prompt first", (1, -1))):
        for prompt in order:
            ids = text if prompt == -1 else row
            (choice,) = ask(http, fresh(one, ids, prompt, f"{salt} {length}"))
            assert choice["token_ids"] == one.say(ids, prompt), (salt, prompt)


FAILING = {
    "log-probabilities of the prompt": lambda one: fresh(one, one.rows[1], 2, "a") | {"prompt_logprobs": 0},
    "an echo with log-probabilities": lambda one: fresh(one, one.rows[1], 2, "a") | {"echo": True, "logprobs": 1},
    "a prompt without text": lambda one: fresh(one, [], 2, "a"),
}


@pytest.mark.parametrize("why", FAILING)
def test_a_request_that_would_compute_the_placeholder_fails_alone(one, http, why):
    rows = one.rows[:3]
    with ThreadPoolExecutor() as pool:
        failing = pool.submit(http.post, "/v1/completions", json=FAILING[why](one))
        others = [pool.submit(ask, http, fresh(one, row, 2, "a")) for row in rows]
    assert failing.result().status_code == 500, failing.result().text[:200]
    said = [other.result()[0]["token_ids"] for other in others]
    assert said == [one.say(row, 2) for row in rows]
    assert said[:1] == [choice["token_ids"] for choice in ask(http, fresh(one, rows[0], 2, "a"))]


REFUSED = {
    "a length of no whole blocks": (
        lambda base, folder: save_adapter(base, folder, 40),
        "40 tokens, no whole number of cache blocks of 32",
    ),
    "scales": (lambda base, folder: save_adapter(base, folder, scales=True), "has scales, which no engine applies"),
    "token prompts": (
        lambda base, folder: get_peft_model(base, IDPConfig(task_type="CAUSAL_LM")).save_pretrained(folder),
        "has token prompts, which an exported vocabulary serves",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_served_stops_the_engine_with_the_reason(tmp_path, why):
    make, message = REFUSED[why]
    random_model("tiny", tmp_path / "base")
    make(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    server = VllmServer(tmp_path / "base", tmp_path / "log", connector(tmp_path / "adapter"))
    with pytest.raises(RuntimeError, match="did not start"), server:
        pass
    assert message in (tmp_path / "log").read_text()


# ---------------------------------------------------------------------- without an engine


def cache(*groups) -> SimpleNamespace:
    """What vLLM says of a model's cache: `(spec, layer names)` of each group."""
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=s, layer_names=n) for s, n in groups])


def spec(kind=FullAttentionSpec, **settings):
    return kind(**{"block_size": VLLM_BLOCK, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16, **settings})


NAMES = ["model.layers.10.self_attn.attn", "model.layers.9.self_attn.attn"]


def test_layers_are_read_in_the_models_order():
    names, layout, dtype = vllm_connector._layers(cache((spec(head_size_v=32), NAMES)))
    assert names == NAMES[::-1]
    assert layout == [(2, 64, 32)] * 2
    assert dtype == torch.bfloat16


CACHES = {
    "a sliding window": ([(spec(SlidingWindowSpec, sliding_window=64), NAMES)], "SlidingWindowSpec"),
    "one in full attention's clothes": ([(spec(sliding_window=64), NAMES)], "sliding_window"),
    "chunks": ([(spec(attention_chunk_size=64), NAMES)], "attention_chunk_size"),
    "latents": ([(spec(MLAAttentionSpec, num_kv_heads=1), NAMES)], "MLAAttentionSpec"),
    "two shapes": ([(spec(), NAMES[:1]), (spec(head_size=32), NAMES[1:])], "in 2 groups"),
    "no cache": ([], "in 0 groups"),
    "8 bits": ([(spec(dtype=torch.uint8), NAMES)], "not torch.uint8"),
    "two layers of one number": ([(spec(), ["a.3.attn", "b.3.attn"])], "the order of these layers is unknown: a.3"),
}


@pytest.mark.parametrize("why", CACHES)
def test_caches_that_a_prompt_does_not_fit_are_refused(why):
    groups, message = CACHES[why]
    with pytest.raises(ValueError, match=re.escape(message)):
        vllm_connector._layers(cache(*groups))


def test_engines_that_would_serve_a_prompt_wrongly_are_refused():
    def engine(world_size=1, policy="fail"):
        return SimpleNamespace(
            parallel_config=SimpleNamespace(world_size=world_size),
            kv_transfer_config=SimpleNamespace(kv_load_failure_policy=policy),
        )

    vllm_connector._check_engine(engine())
    with pytest.raises(ValueError, match="served by one process"):
        vllm_connector._check_engine(engine(world_size=2))
    with pytest.raises(ValueError, match="kv_load_failure_policy"):
        vllm_connector._check_engine(engine(policy="recompute"))


def test_an_adapter_of_another_base_is_refused():
    source = SimpleNamespace(
        holds_keys=True, scales=None, prompts=[torch.zeros(VLLM_BLOCK, 512)], width=512, label="it"
    )
    vllm_connector._check_adapter(source, VLLM_BLOCK, [(2, 64, 64)] * 2)
    with pytest.raises(ValueError, match="512 numbers a token, the layers of the engine's model 768"):
        vllm_connector._check_adapter(source, VLLM_BLOCK, [(2, 64, 64)] * 3)


def bare_connector() -> vllm_connector.IDPConnector:
    """One of three prompts, as a scheduler and a worker use it, without either."""
    connector = object.__new__(vllm_connector.IDPConnector)
    connector.count, connector.length, connector.block_size = PROMPTS, LENGTH, VLLM_BLOCK
    connector._salt, connector._requests, connector._waiting = "salt", {}, []
    return connector


def request(name: str, embeds=None) -> SimpleNamespace:
    """A request for prompt 1, as the scheduler holds it."""
    ids = [1] * LENGTH + [7]
    state = {"cache_salt": None, "block_hashes": [], "skip_reading_prefix_cache": False, "num_tokens": len(ids)}
    return SimpleNamespace(
        request_id=name, prompt_token_ids=ids, prompt_embeds=embeds, update_block_hashes=lambda: None, **state
    )


def test_a_request_of_embeddings_is_no_prompts_whatever_token_stands_for_its_vectors():
    connector = bare_connector()
    connector.on_new_request(request("vectors", torch.zeros(LENGTH + 1, 64)))
    connector.on_new_request(request("tokens"))
    assert connector._requests == {"tokens": 1}
    connector.request_finished(request("vectors"), [])
    connector.request_finished(request("tokens"), [])
    assert connector._requests == {}


def test_of_a_prompt_that_the_engine_half_kept_the_other_half_is_loaded():
    connector, one = bare_connector(), request("one")
    connector.on_new_request(one)
    assert connector.get_num_new_matched_tokens(one, LENGTH) == (0, False)
    assert connector.get_num_new_matched_tokens(one, VLLM_BLOCK) == (LENGTH - VLLM_BLOCK, False)
    blocks = SimpleNamespace(get_block_ids=lambda: ([9, 4, 6],))
    connector.update_state_after_alloc(one, blocks, LENGTH - VLLM_BLOCK)
    connector.bind_connector_metadata(connector.build_connector_meta(None))
    assert connector._waiting == []

    written = []
    impl = SimpleNamespace(do_kv_cache_update=lambda layer, *given: written.append(given))
    connector.layers = [SimpleNamespace(impl=impl, kv_cache=torch.zeros(1))]
    connector.keys = [torch.arange(PROMPTS * 2 * LENGTH * 4.0).view(PROMPTS, 2, LENGTH, 4)]
    connector.values = [-part for part in connector.keys]
    connector.start_load_kv(None)
    ((keys, values, _, slots),) = written
    assert torch.equal(keys, connector.keys[0][1, :, VLLM_BLOCK:].transpose(0, 1))
    assert torch.equal(values, -keys)
    assert slots.tolist() == list(range(4 * VLLM_BLOCK, 5 * VLLM_BLOCK))
