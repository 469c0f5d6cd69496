"""Tiny random models of every architecture we name, built from configs: no download, milliseconds each."""

from __future__ import annotations

import copy
import os

import pytest
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
_GEMMA = {**_ROPE, "head_dim": 8, "sliding_window": 16, "tie_word_embeddings": True}
_SHARED = {  # the last two layers have no keys of their own, and every layer looks up an embedding of each token
    **_GEMMA,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
IMAGE = 1  # the token whose embedding a picture takes the place of; `token_batch` never draws it
_QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "patch_size": 14,
    "out_hidden_size": 32,
}
_QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VOCAB - 1,
    "vision_start_token_id": VOCAB - 2,
    "vision_end_token_id": VOCAB - 3,
}
# Multimodal models used for text, and decoders that look up more than input embeddings. Classes by name: not every version
# of transformers has them all.
ARCHITECTURES |= {
    "gemma3_multimodal": (
        "Gemma3Config",
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**_GEMMA, "query_pre_attn_scalar": 8, "layer_types": _LAYERS},
            "vision_config": _VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE,
            "boi_token_index": VOCAB,
            "eoi_token_index": VOCAB + 1,
        },
    ),
    "gemma3n": (
        "Gemma3nTextConfig",
        "Gemma3nForCausalLM",
        {**_SHARED, "laurel_rank": 8, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
    ),
    "gemma4": ("Gemma4TextConfig", "Gemma4ForCausalLM", {**_SHARED, "global_head_dim": 16}),
    "gemma4_multimodal": (
        "Gemma4Config",
        "Gemma4ForConditionalGeneration",
        {
            "text_config": {**_SHARED, "global_head_dim": 16, "use_bidirectional_attention": "vision"},
            "vision_config": {
                **_VISION,
                "num_key_value_heads": 4,
                "head_dim": 8,
                "pooling_kernel_size": 2,
                "position_embedding_size": 16,
            },
            "audio_config": None,
            "image_token_id": IMAGE,
            "video_token_id": IMAGE,
            "audio_token_id": IMAGE,
        },
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLConfig",
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": {**_ROPE, "rope_parameters": _MROPE},
            "vision_config": {**_QWEN_VISION, "window_size": 28, "fullatt_block_indexes": [0]},
            **_QWEN_TOKENS,
        },
    ),
}
_SIGLIP = {**_VISION, "model_type": "siglip_vision_model"}
_CLIP = {**_VISION, "model_type": "clip_vision_model"}
# More of them, for what the model around a decoder does to a call: masks, positions, caches and inputs that it makes itself.
AROUND_A_DECODER = {
    "gemma4_unified": (  # masks and positions
        "Gemma4UnifiedConfig",
        "Gemma4UnifiedForConditionalGeneration",
        {
            "text_config": {**_GEMMA, "num_hidden_layers": 2, "layer_types": _LAYERS[:2], "global_head_dim": 16},
            "image_token_id": IMAGE,
            "video_token_id": IMAGE,
            "audio_token_id": IMAGE,
        },
    ),
    "molmo2": (  # one mask for all layers; token types are wanted in training
        "Molmo2Config",
        "Molmo2ForConditionalGeneration",
        {
            "text_config": {**_ROPE, "head_dim": 8, "additional_vocab_size": 4},
            "vision_config": {**_VISION, "image_size": [28, 28], "num_key_value_heads": 4, "head_dim": 8},
            "adapter_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "text_hidden_size": 32,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "head_dim": 8,
                "vision_feature_layer": [0],
            },
            "image_patch_id": IMAGE,
        },
    ),
    "exaone4_5": (  # positions that count padding, in generation too
        "Exaone4_5_Config",
        "Exaone4_5_ForConditionalGeneration",
        {
            "text_config": {
                **_ROPE,
                "model_type": "exaone4",
                "head_dim": 8,
                "sliding_window": 16,
                "layer_types": _LAYERS,
            },
            "vision_config": {
                **_QWEN_VISION,
                "num_key_value_heads": 2,
                "window_size": 28,
                "fullatt_block_indexes": [0],
            },
        },
    ),
    "fuyu": (  # positions that count padding
        "FuyuConfig",
        "FuyuForCausalLM",
        {**_MHA, "text_config": {**_MHA, "model_type": "persimmon"}, "patch_size": 4, "image_token_id": IMAGE},
    ),
    "smolvlm": (  # a cache, also where training drops it
        "SmolVLMConfig",
        "SmolVLMForConditionalGeneration",
        {
            "text_config": {**_ROPE, "model_type": "llama"},
            "vision_config": _VISION,
            "scale_factor": 2,
            "image_token_id": IMAGE,
            "pad_token_id": 0,
        },
    ),
    "llava": (  # nothing but embeddings
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        {
            "text_config": {**_ROPE, "model_type": "llama"},
            "vision_config": _CLIP,
            "image_token_index": IMAGE,
            "vision_feature_layer": -1,
        },
    ),
    "qwen3_vl": (  # features of a picture that go into later layers
        "Qwen3VLConfig",
        "Qwen3VLForConditionalGeneration",
        {
            "text_config": {**_ROPE, "head_dim": 8, "rope_parameters": _MROPE},
            "vision_config": {**_QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
            **_QWEN_TOKENS,
        },
    ),
}
PREFIX = {  # attends in both directions over a picture and the question about it
    "paligemma": (
        "PaliGemmaConfig",
        "PaliGemmaForConditionalGeneration",
        {
            "text_config": {**_ROPE, "model_type": "gemma", "head_dim": 8},
            "vision_config": _SIGLIP,
            "projection_dim": 32,
            "image_token_index": IMAGE,
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
    "llama_longrope": (tf.LlamaConfig, tf.LlamaForCausalLM, {**_ROPE, "rope_parameters": _LONG}),
    "falcon_dynamic": (
        tf.FalconConfig,
        tf.FalconForCausalLM,
        {**_MHA, "alibi": False, "multi_query": True, "max_position_embeddings": 12, "rope_parameters": _DYNAMIC},
    ),
    "gemma3_dynamic": (
        tf.Gemma3TextConfig,
        tf.Gemma3ForCausalLM,
        {
            **_ROPE,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "max_position_embeddings": 12,
            "sliding_window": 60,
            "layer_types": _LAYERS,
            "rope_parameters": {
                "full_attention": _DYNAMIC,
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
}
ARCHITECTURES_AND_MORE = {**ARCHITECTURES, **CHANGING_ROTARY, **AROUND_A_DECODER, **PREFIX}
NAMES = list(ARCHITECTURES)
LEARNED_POSITIONS = ("opt", "gpt2", "gpt_bigcode")


def tiny(name: str, attention: str = "sdpa", seed: int = 0, dtype: torch.dtype = torch.float32):
    """A tiny model in evaluation mode, with weights large enough that prompts and positions matter."""
    config_class, model_class, arguments = ARCHITECTURES_AND_MORE[name]
    if isinstance(model_class, str):
        if not hasattr(tf, model_class):
            pytest.skip(f"transformers {tf.__version__} has no {model_class}")
        config_class, model_class = getattr(tf, config_class), getattr(tf, model_class)
    config = config_class(**copy.deepcopy(arguments))
    if attention == "sdpa" and not model_class._supports_sdpa:
        attention = "eager"
    config._attn_implementation = attention
    torch.manual_seed(SEED + seed)
    model = model_class._from_config(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
            elif key.endswith(
                "correct_output_scale"
            ):  # zeros at first, and then Gemma 3n's embeddings per layer do nothing
                parameter.fill_(1.0)
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
