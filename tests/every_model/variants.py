"""Where the config of a class chooses what its attention, its positions or its cache are: class -> variant -> arguments."""

from __future__ import annotations

_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]

VARIANTS: dict[str, dict[str, dict]] = {
    "BertLMHeadModel": {"is_decoder": {"is_decoder": True}},
    "BloomForCausalLM": {
        "post-norm residual": {"apply_residual_connection_post_layernorm": True},
        "slow but exact": {"slow_but_exact": True, "pretraining_tp": 2},
    },
    "DeepseekV3ForCausalLM": {
        "queries of full rank": {"q_lora_rank": None},
        "more tokens": {"num_nextn_predict_layers": 1},
    },
    "DoryForCausalLM": {"cache of the last loop": {"recurrent_kv_cache_mode": "last_loop"}},
    "FalconForCausalLM": {
        "ALiBi": {"alibi": True, "multi_query": False, "num_kv_heads": 4},
        "new decoder": {"new_decoder_architecture": True, "num_kv_heads": 2},
        "sequential": {"parallel_attn": False, "bias": True},
    },
    "GPT2LMHeadModel": {
        "attention scaled by layer": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
        "cross-attention": {"add_cross_attention": True},
        "without a cache": {"use_cache": False},
    },
    "GPTBigCodeForCausalLM": {"keys of every head": {"multi_query": False}},
    "GPTNeoForCausalLM": {"global alone": {"attention_types": [[["global"], 3]]}},
    "GPTNeoXForCausalLM": {"sequential": {"use_parallel_residual": False, "rotary_pct": 1.0}},
    "Gemma2ForCausalLM": {
        "full attention": {"layer_types": ["full_attention"] * 3},
        "no softcap": {"attn_logit_softcapping": None},
    },
    "Gemma3ForCausalLM": {"both directions": {"use_bidirectional_attention": True}},
    "GraniteMoeHybridForCausalLM": {"attention alone": {"layer_types": ["attention"] * 3}},
    "Lfm2ForCausalLM": {"attention alone": {"layer_types": ["full_attention"] * 3}},
    "LlamaForCausalLM": {
        "biases, tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        "keys of every head": {"num_key_value_heads": 4},
        "one key head": {"num_key_value_heads": 1},
        "one layer": {"num_hidden_layers": 1},
        "wide heads": {"head_dim": 16},
        "without a cache": {"use_cache": False},
        "yarn": {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    },
    "Llama4ForCausalLM": {
        "full attention": {"layer_types": ["full_attention"] * 3},
        "all rotated": {"no_rope_layers": [1, 1, 1]},
    },
    "MiniMaxM3VLForCausalLM": {
        "sparse": {"layer_types": ["minimax_m3_sparse", "full_attention", "minimax_m3_sparse"], "index_topk_blocks": 1}
    },
    "MistralForCausalLM": {"no window": {"sliding_window": None}},
    "MoshiForCausalLM": {"short window": {"sliding_window": 8}},
    "OPTForCausalLM": {"post-norm, narrow embeddings": {"do_layer_norm_before": False, "word_embed_proj_dim": 16}},
    "Phi3ForCausalLM": {"no window, part rotated": {"sliding_window": None, "partial_rotary_factor": 0.5}},
    "Qwen2ForCausalLM": {"sliding": {"use_sliding_window": True, "max_window_layers": 1, "layer_types": _SLIDING}},
    "RobertaForCausalLM": {"is_decoder": {"is_decoder": True}},
    "SmolLM3ForCausalLM": {
        "sliding, no rotation": {"use_sliding_window": True, "layer_types": _SLIDING, "no_rope_layers": [1, 0, 1]}
    },
    "StableLmForCausalLM": {"parallel, normed": {"use_parallel_residual": True, "qk_layernorm": True}},
    "XGLMForCausalLM": {"cross-attention": {"add_cross_attention": True}},
}
