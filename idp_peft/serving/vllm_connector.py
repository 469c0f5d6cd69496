"""Prompts of keys and values in vLLM: a KV connector that puts the chosen prompt's into a request's first cache blocks.

    vllm serve base --kv-transfer-config '{"kv_connector": "IDPConnector", "kv_role": "kv_consumer",
        "kv_connector_module_path": "idp_peft.serving.vllm_connector", "kv_connector_extra_config": {"adapter": "run/adapter"}}'

A request begins with `placeholder(i, k)`: k times token id i, for prompt i. No token of it is ever computed: the connector says
that these k tokens are in the cache, and writes the prompt's keys and values there, by the attention layer's own function. So blocks
of the same ids hold other keys in a request that the connector does not load. It marks the requests that it loads with a salt of its
own, which no client knows: the engine's prefix cache never takes one for the other. Imported by vLLM alone.
"""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata

from idp_peft.composition.prompt_sources import read_prompts
from idp_peft.key_values import layout_width, unpack
from idp_peft.serving.vllm_prompts import placeholder

logger = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Load(NamedTuple):
    """Tokens of a prompt that go into a request's cache: from `start` on, into these blocks. Without a prompt: the request fails."""

    prompt: int | None
    start: int
    blocks: list[int]


@dataclass
class _Loads(KVConnectorMetadata):
    """What a step loads before its forward."""

    loads: list[_Load] = field(default_factory=list)


class IDPConnector(KVConnectorBase_V1):
    """See the module. `kv_connector_extra_config` holds `adapter`, a folder or Hub id.

    Raises:
        `ValueError`: for an adapter that is none of keys and values, has scales, or does not fit the engine: the text says why.
    """

    def __init__(self, vllm_config, role, kv_cache_config) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        adapter = self._kv_transfer_config.get_from_extra_config("adapter", None)
        if not adapter:
            raise ValueError('`kv_connector_extra_config` must hold `adapter`: {"adapter": "run/adapter"}')
        _check_engine(vllm_config)
        self.names, layout, dtype = _layers(kv_cache_config)
        self.block_size = vllm_config.cache_config.block_size
        source = read_prompts(str(adapter))
        _check_adapter(source, self.block_size, layout)
        self.count, self.length = len(source.prompts), len(source.prompts[0])
        # Per layer [M, kv_heads, k, head_dim], in the memory of the host: what lies beside a cache is lost when an engine sleeps.
        self.keys, self.values = unpack(torch.stack(source.prompts).to(dtype), layout)
        self._salt = secrets.token_hex()
        self._requests: dict[
            str, int | None
        ] = {}  # the prompts of requests that are loaded, None of those that must fail
        self._waiting: list[_Load] = []
        self._failed: set[int] = set()

    # ------------------------------------------------------------------ in the scheduler

    def on_new_request(self, request) -> None:
        """Mark a request that begins with a placeholder, before the engine looks for its blocks."""
        ids = request.prompt_token_ids
        if request.prompt_embeds is not None or not ids or ids[0] >= self.count:
            return
        prompt, salt = ids[0], f"{self._salt} {request.cache_salt or ''}"
        if ids[: self.length] != placeholder(prompt, self.length):
            return
        if request.skip_reading_prefix_cache or len(ids) == self.length:
            # The engine would compute the placeholder's own tokens.
            logger.warning(
                "request %s fails: behind a prompt of keys and values must stand a token, and the prompt's own tokens have no "
                "log-probabilities",
                request.request_id,
            )
            request.skip_reading_prefix_cache = False
            prompt, salt = None, f"{salt} {request.request_id}"
        self._requests[request.request_id] = prompt
        request.cache_salt = salt
        request.block_hashes.clear()
        request.update_block_hashes()

    def get_num_new_matched_tokens(self, request, num_computed_tokens: int) -> tuple[int, bool]:
        """How many tokens of a request's prompt are loaded beyond those that the engine's own cache holds."""
        if request.request_id not in self._requests:
            return 0, False
        return max(0, min(self.length, request.num_tokens - 1) - num_computed_tokens), False

    def update_state_after_alloc(self, request, blocks, num_external_tokens: int) -> None:
        if num_external_tokens:
            (ids,) = blocks.get_block_ids()
            start = self.length - num_external_tokens
            here = ids[start // self.block_size : self.length // self.block_size]
            self._waiting.append(_Load(self._requests[request.request_id], start, list(here)))

    def build_connector_meta(self, scheduler_output) -> _Loads:
        loads, self._waiting = self._waiting, []
        return _Loads(loads)

    def request_finished(self, request, block_ids) -> tuple[bool, None]:
        self._requests.pop(request.request_id, None)
        return False, None

    # ------------------------------------------------------------------ in the worker

    def register_kv_caches(self, kv_caches) -> None:
        """Refuse attention that has no function of its own to write into the cache."""
        layers = self._vllm_config.compilation_config.static_forward_context
        self.layers = [layers[name] for name in self.names]
        for layer in self.layers:
            if not hasattr(layer.impl, "do_kv_cache_update"):
                raise ValueError(
                    f"{type(layer.impl).__name__} does not say how it writes keys and values into its cache: choose another "
                    "--attention-backend"
                )

    def start_load_kv(self, forward_context, **kwargs) -> None:
        """Write what this step loads into the caches of all layers."""
        for load in self._get_connector_metadata().loads:
            if load.prompt is None:
                self._failed.update(load.blocks)
                continue
            slots = torch.tensor(load.blocks)[:, None] * self.block_size + torch.arange(self.block_size)
            for layer, *parts in zip(self.layers, self.keys, self.values, strict=True):
                cache = layer.kv_cache
                parts = [part[load.prompt, :, load.start :].transpose(0, 1) for part in parts]  # [tokens, heads, width]
                parts = [part.to(cache.device).contiguous() for part in parts]
                layer.impl.do_kv_cache_update(layer, *parts, cache, slots.flatten().to(cache.device))

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self._failed = self._failed, set()
        return failed

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer, attn_metadata, **kwargs) -> None:
        return

    def wait_for_save(self) -> None:
        return


def _check_engine(vllm_config) -> None:
    if not hasattr(KVConnectorBase_V1, "on_new_request"):
        raise ValueError("this vLLM does not tell a connector of new requests: 0.32 does")
    if vllm_config.parallel_config.world_size > 1:
        raise ValueError(
            "prompts of keys and values are served by one process: leave out tensor and pipeline parallelism"
        )
    if vllm_config.kv_transfer_config.kv_load_failure_policy != "fail":
        raise ValueError(
            "requests that prompts of keys and values cannot serve must fail: leave out `kv_load_failure_policy`"
        )


def _layers(kv_cache_config) -> tuple[list[str], list[tuple[int, int, int]], torch.dtype]:
    """The names of the engine's layers in the model's order, `(kv_heads, key_dim, value_dim)` of each, and their cache's type."""
    groups = kv_cache_config.kv_cache_groups
    found = {type(group.kv_cache_spec).__name__ for group in groups}
    windows = ("sliding_window", "attention_chunk_size")
    found |= {name for name in windows for group in groups if getattr(group.kv_cache_spec, name, None)}
    if found != {"FullAttentionSpec"} or len(groups) != 1:
        raise ValueError(
            "prompts of keys and values need layers of full attention and of one shape, and this model has "
            f"{sorted(found)} in {len(groups)} groups"
        )
    (group,) = groups
    spec = group.kv_cache_spec
    if spec.dtype not in _DTYPES:
        raise ValueError(
            f"prompts of keys and values need a cache of floating point numbers of 16 or 32 bits, not {spec.dtype}"
        )
    names = {_number(name): name for name in group.layer_names}
    if len(names) < len(group.layer_names):
        raise ValueError(f"the order of these layers is unknown: {', '.join(group.layer_names)}")
    shape = (spec.num_kv_heads, spec.head_size, spec.head_size_v)
    return [names[number] for number in sorted(names)], [shape] * len(names), spec.dtype


def _number(name: str) -> int:
    """The layer's place in the model: `model.layers.7.self_attn.attn` is 7."""
    return next(int(part) for part in name.split(".") if part.isdecimal())


def _check_adapter(source, block_size: int, layout: list[tuple[int, int, int]]) -> None:
    if not source.holds_keys:
        raise ValueError(
            f"{source.label} has token prompts, which an exported vocabulary serves: `idp-peft export --to-vocab`"
        )
    if source.scales is not None:
        raise ValueError(
            f"{source.label} has scales, which no engine applies: `idp-peft export --fold_scales` writes a base with them folded in, "
            "and the adapter without"
        )
    if (length := len(source.prompts[0])) % block_size:
        raise ValueError(
            f"the prompts of {source.label} have {length} tokens, no whole number of cache blocks of {block_size}: train with another "
            "`num_virtual_tokens`, or start the engine with another --block-size"
        )
    wanted = layout_width(layout)
    if wanted != source.width:
        raise ValueError(
            f"the prompts of {source.label} have {source.width} numbers a token, the layers of the engine's model {wanted}: it is for "
            "another base"
        )
