"""Tiny random models of every architecture we name, built from configs: no download, milliseconds each."""

from __future__ import annotations

import os

import torch
import transformers as tf

# `make test SEED=1`: other weights and other tokens in every test, which must pass all the same.
SEED = 1000 * int(os.environ.get("SEED", "0"))
VOCAB = 97
_ROPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_MHA = {**_ROPE, "num_key_value_heads": 4}
_GPT = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_NO_DROP = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]

# name -> (config class, model class, config arguments)
ARCHITECTURES = {
    "llama": (tf.LlamaConfig, tf.LlamaForCausalLM, _ROPE),
    "mistral": (tf.MistralConfig, tf.MistralForCausalLM, {**_ROPE, "sliding_window": 60}),
    "mistral_small_window": (tf.MistralConfig, tf.MistralForCausalLM, {**_ROPE, "sliding_window": 8}),
    "qwen2": (tf.Qwen2Config, tf.Qwen2ForCausalLM, _ROPE),
    "qwen3": (tf.Qwen3Config, tf.Qwen3ForCausalLM, {**_ROPE, "head_dim": 8}),
    "gemma2": (
        tf.Gemma2Config,
        tf.Gemma2ForCausalLM,
        {**_ROPE, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16, "layer_types": _LAYERS},
    ),
    "gemma3": (
        tf.Gemma3TextConfig,
        tf.Gemma3ForCausalLM,
        {**_ROPE, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16, "layer_types": _LAYERS},
    ),
    "phi": (tf.PhiConfig, tf.PhiForCausalLM, {**_MHA, "partial_rotary_factor": 0.5}),
    "phi3": (tf.Phi3Config, tf.Phi3ForCausalLM, {**_ROPE, "original_max_position_embeddings": 64}),
    "opt": (
        tf.OPTConfig,
        tf.OPTForCausalLM,
        {**_MHA, "ffn_dim": 48, "word_embed_proj_dim": 24, "dropout": 0.0, "attention_dropout": 0.0},
    ),
    "gpt2": (tf.GPT2Config, tf.GPT2LMHeadModel, {**_GPT, **_NO_DROP}),
    "gpt_neox": (tf.GPTNeoXConfig, tf.GPTNeoXForCausalLM, {**_MHA, "rotary_pct": 0.5}),
    "bloom": (tf.BloomConfig, tf.BloomForCausalLM, {**_GPT, "hidden_size": 32}),
    "falcon": (tf.FalconConfig, tf.FalconForCausalLM, {**_MHA, "alibi": False, "multi_query": True}),
    "falcon_alibi": (tf.FalconConfig, tf.FalconForCausalLM, {**_MHA, "alibi": True, "multi_query": False}),
    "gptj": (tf.GPTJConfig, tf.GPTJForCausalLM, {**_GPT, **_NO_DROP, "rotary_dim": 4}),
    "olmo2": (tf.Olmo2Config, tf.Olmo2ForCausalLM, _ROPE),
    "smollm3": (tf.SmolLM3Config, tf.SmolLM3ForCausalLM, _ROPE),
    "granite": (
        tf.GraniteConfig,
        tf.GraniteForCausalLM,
        {**_ROPE, "embedding_multiplier": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5},
    ),
    "stablelm": (tf.StableLmConfig, tf.StableLmForCausalLM, {**_ROPE, "partial_rotary_factor": 0.5}),
    "mixtral": (
        tf.MixtralConfig,
        tf.MixtralForCausalLM,
        {**_ROPE, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "cohere": (tf.CohereConfig, tf.CohereForCausalLM, _ROPE),
    "gpt_bigcode": (tf.GPTBigCodeConfig, tf.GPTBigCodeForCausalLM, {**_GPT, **_NO_DROP, "multi_query": True}),
    "mpt": (
        tf.MptConfig,
        tf.MptForCausalLM,
        {
            "vocab_size": VOCAB,
            "d_model": 32,
            "n_layers": 3,
            "n_heads": 4,
            "max_seq_len": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": None,
        },
    ),
}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0, 4.0, 5.0, 6.0],
    "original_max_position_embeddings": 12,
}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
# Rotary frequencies that depend on the length of the sequence; a base with them is not itself in padded batches.
CHANGING_ROTARY = {
    "phi3_longrope": (
        tf.Phi3Config,
        tf.Phi3ForCausalLM,
        {**_ROPE, "original_max_position_embeddings": 12, "rope_parameters": _LONG},
    ),
    "llama_dynamic": (
        tf.LlamaConfig,
        tf.LlamaForCausalLM,
        {**_ROPE, "max_position_embeddings": 12, "rope_parameters": _DYNAMIC},
    ),
}
ARCHITECTURES_AND_MORE = {**ARCHITECTURES, **CHANGING_ROTARY}
NAMES = list(ARCHITECTURES)
LEARNED_POSITIONS = ("opt", "gpt2", "gpt_bigcode")


def tiny(name: str, attention: str = "sdpa", seed: int = 0, dtype: torch.dtype = torch.float32):
    """A tiny model in evaluation mode, with weights large enough that prompts and positions matter."""
    config_class, model_class, arguments = ARCHITECTURES_AND_MORE[name]
    config = config_class(**arguments)
    if attention == "sdpa" and not model_class._supports_sdpa:
        attention = "eager"
    config._attn_implementation = attention
    torch.manual_seed(SEED + seed)
    model = model_class._from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = VOCAB  # never generated; prompt lookup of transformers 5.0 needs one
    return model.eval().to(dtype)


def token_batch(lengths: list[int], side: str = "left", seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids and attention mask of rows with the given lengths, padded on one side: int64 `[rows, max]` each."""
    generator = torch.Generator().manual_seed(SEED + seed)
    width = max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        where = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, where] = torch.randint(2, VOCAB, (length,), generator=generator)
        mask[row, where] = 1
    return ids, mask
