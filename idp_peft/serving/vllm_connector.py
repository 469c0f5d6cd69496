"""Prompts of keys and values in vLLM: a KV connector that puts the chosen prompt's into a request's first cache blocks.

    vllm serve base --kv-transfer-config '{"kv_connector": "IDPConnector", "kv_role": "kv_consumer",
        "kv_connector_module_path": "idp_peft.serving.vllm_connector", "kv_connector_extra_config": {"adapter": "run/adapter"}}'

A request begins with `placeholder(i, k)`: k times token id i, for prompt i. No token of it is ever computed: the connector says
that these k tokens are in the cache, and writes the prompt's keys and values there, by the attention layer's own function. The
engine's prefix cache tells prompts apart by these ids, so what it keeps is right. Imported by vLLM alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata

from idp_peft.composition.prompt_sources import read_prompts
from idp_peft.key_values import unpack
from idp_peft.serving.vllm_prompts import placeholder


class _Load(NamedTuple):
    """Tokens of a prompt that go into a request's cache: from `start` on, into these blocks."""

    prompt: int
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
        source = read_prompts(str(adapter))
        self.block_size = vllm_config.cache_config.block_size
        layout = _layout(vllm_config, kv_cache_config)
        _check(source, self.block_size, layout, vllm_config)
        self.count, self.length = len(source.prompts), len(source.prompts[0])
        tokens = torch.stack(source.prompts)  # [M, k, P]
        self.keys, self.values = unpack(tokens, layout)  # per layer [M, kv_heads, k, head_dim]
        self._waiting: list[_Load] = []

    # ------------------------------------------------------------------ in the scheduler

    def get_num_new_matched_tokens(self, request, num_computed_tokens: int) -> tuple[int, bool]:
        """How many tokens of a request's prompt are loaded beyond those that the engine's own cache holds."""
        return (0 if self._prompt_of(request) is None else max(0, self.length - num_computed_tokens)), False

    def update_state_after_alloc(self, request, blocks, num_external_tokens: int) -> None:
        if num_external_tokens:
            (ids,) = blocks.get_block_ids()
            start = self.length - num_external_tokens
            here = ids[start // self.block_size : self.length // self.block_size]
            self._waiting.append(_Load(self._prompt_of(request), start, list(here)))

    def build_connector_meta(self, scheduler_output) -> _Loads:
        loads, self._waiting = self._waiting, []
        return _Loads(loads)

    def _prompt_of(self, request) -> int | None:
        """The prompt whose placeholder a request begins with, where any text follows it."""
        ids = request.prompt_token_ids or []
        if len(ids) <= self.length or ids[0] >= self.count:
            return None
        return ids[0] if list(ids[: self.length]) == placeholder(ids[0], self.length) else None

    # ------------------------------------------------------------------ in the worker

    def start_load_kv(self, forward_context, **kwargs) -> None:
        """Write what this step loads into the caches of all layers."""
        if not (loads := self._get_connector_metadata().loads):
            return
        layers = forward_context.no_compile_layers
        named = sorted(
            (_number(name), layers[name]) for name in layers if getattr(layers[name], "kv_cache", None) is not None
        )
        for (_, layer), keys, values in zip(named, self.keys, self.values, strict=True):
            cache = layer.kv_cache
            for load in loads:
                slots = torch.tensor(load.blocks)[:, None] * self.block_size + torch.arange(self.block_size)
                given = [
                    part[load.prompt, :, load.start :].transpose(0, 1) for part in (keys, values)
                ]  # [tokens, heads, width]
                given = [part.to(cache.device, _type_of(cache, part)).contiguous() for part in given]
                layer.impl.do_kv_cache_update(layer, *given, cache, slots.flatten().to(cache.device))

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer, attn_metadata, **kwargs) -> None:
        return

    def wait_for_save(self) -> None:
        return


def _layout(vllm_config, kv_cache_config) -> list[tuple[int, int, int]]:
    """`(kv_heads, key_dim, value_dim)` of each layer, as the engine has them."""
    groups = kv_cache_config.kv_cache_groups
    kinds = {type(group.kv_cache_spec).__name__ for group in groups}
    if len(groups) != 1 or kinds != {"FullAttentionSpec"}:
        raise ValueError(
            f"prompts of keys and values need full attention in every layer, and this model has {sorted(kinds)}"
        )
    spec = groups[0].kv_cache_spec
    if getattr(spec, "sliding_window", None) is not None:
        raise ValueError(
            "prompts of keys and values need full attention in every layer, and this model has a sliding window"
        )
    return [(spec.num_kv_heads, spec.head_size, spec.head_size)] * len(groups[0].layer_names)


def _check(source, block_size: int, layout: list[tuple[int, int, int]], vllm_config) -> None:
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
    parallel = vllm_config.parallel_config
    if parallel.tensor_parallel_size > 1 or parallel.pipeline_parallel_size > 1:
        raise ValueError(
            "prompts of keys and values are served by one process: leave out tensor and pipeline parallelism"
        )
    if vllm_config.cache_config.cache_dtype not in ("auto", "bfloat16", "float16", "float32"):
        raise ValueError(
            f"prompts of keys and values need a cache of floating point numbers, not {vllm_config.cache_config.cache_dtype!r}"
        )
    wanted = sum(heads * (key + value) for heads, key, value in layout)
    if wanted != source.width:
        raise ValueError(
            f"the prompts of {source.label} have {source.width} numbers a token, the layers of the engine's model {wanted}: it is for "
            "another base"
        )


def _number(name: str) -> int:
    """The layer's place in the model: `model.layers.7.self_attn.attn` is 7."""
    return next(int(part) for part in name.split(".") if part.isdecimal())


def _type_of(cache: torch.Tensor, part: torch.Tensor) -> torch.dtype:
    return cache.dtype if cache.is_floating_point() else part.dtype
