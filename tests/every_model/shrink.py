"""A tiny random model of any class, from its config class alone: fields are shrunk by their names."""

from __future__ import annotations

import inspect
from dataclasses import fields, is_dataclass

import torch
import transformers as tf

VOCAB = 97
LAYERS = 3

# Whatever a config calls it, this is how small it gets. Further names belong here, single models into EXCEPTIONS.
_BY_SIZE: dict[object, str] = {
    VOCAB: "vocab_size vocab_size_per_layer_input unpadded_vocab_size ngram_vocab_size_base",
    64: "max_position_embeddings n_positions max_seq_len max_target_positions max_source_positions "
    "num_position_embeddings position_embedding_size",
    48: "intermediate_size ffn_dim d_ff dff dim_ff d_inner ffn_hidden_size expert_ffn_hidden_size n_inner mlp_dim "
    "feed_forward_size moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size "
    "moe_shared_expert_intermediate_size shared_intermediate_size dense_intermediate_size intermediate_size_mlp "
    "encoder_ffn_dim decoder_ffn_dim alignment_intermediate_size projection_intermediate_size",
    32: "hidden_size n_embd d_model dim embed_dim emb_dim hidden_dim width embedding_size out_hidden_size output_dim "
    "text_hidden_size projection_dim projector_hidden_size projection_hidden_dim projection_hidden_size "
    "backbone_hidden_size adapter_out_dim adapter_in_dim adapter_input_size hidden_size_global moe_hidden_size "
    "vision_output_dim projector_input_dim projector_output_dim decoder_hidden_size output_channels "
    "audio_hidden_size thinker_hidden_size vision_hidden_size image_token_embed_dim image_size crop_size",
    16: "q_lora_rank kv_lora_rank o_lora_rank hc_lowrank d_rel rel_extent index_topk state_size ssm_state_size "
    "mamba_d_state chunk_size mamba_chunk_size adapter_rank laurel_rank loop_gate_rank mamba_dt_rank time_step_rank "
    "hidden_size_per_layer_input ple_embed_dim pronunciation_embed_dim shape_embed_dim router_hidden_size num_embeddings "
    "codebook_size num_centroids centroid_intermediate_top_k pronunciation_vocab_size shape_vocab_size latent_query_num "
    "base_channels latent_channels resolution downsample_hidden_size mamba_d_head mamba_head_dim "
    "local_attention_window_len max_image_size max_vit_seq_len",
    8: "head_dim attention_head_dim d_kv dim_head d_head swa_head_dim qk_nope_head_dim index_head_dim linear_head_dim "
    "linear_key_head_dim linear_value_head_dim attention_head_size resampler_head_dim resampler_dim_head patch_size "
    "sliding_window sliding_window_size attention_window attention_chunk_size window_size resampler_n_latents "
    "resampler_num_latents position_bias_num_buckets index_block_size",
    6: "v_head_dim",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
    "swa_num_attention_heads qk_rope_head_dim num_experts num_local_experts n_routed_experts moe_num_experts "
    "index_n_heads linear_num_heads linear_num_value_heads mamba_n_heads mamba_num_heads resampler_heads "
    "resampler_n_heads rotary_dim zero_expert_num",
    3: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers depth layers "
    "conf_num_hidden_layers decoder_num_layers",
    2: "num_key_value_heads num_kv_heads n_head_kv swa_num_key_value_heads num_experts_per_tok moe_topk "
    "num_experts_per_token top_k_experts moe_k linear_num_key_heads n_group topk_group n_groups o_groups",
    1: "num_kv_shared_layers first_k_dense_replace num_global_layers bos_token_id",
    0: "pad_token_id num_nextn_predict_layers",
    None: "eos_token_id",
}
SMALL = {name: size for size, names in _BY_SIZE.items() for name in names.split()}

_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
_ROPE = {"rope_type": "default", "rope_theta": 1e4}

# Rotary positions in three axes, of which text uses one.
_THREE_AXES = {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}
_ERNIE = {"moe_intermediate_size": [48, 48], "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}}

# What a rule by names cannot know: config class -> arguments, in front of those above. Dicts are merged entry by entry.
EXCEPTIONS: dict[str, dict] = {
    **dict.fromkeys(
        [
            "Cosmos3EdgeTextConfig",
            "Glm46VTextConfig",
            "Glm4vTextConfig",
            "GlmOcrTextConfig",
            "PaddleOCRTextConfig",
            "Qwen2VLTextConfig",
            "Qwen2_5OmniTextConfig",
            "Qwen2_5_VLTextConfig",
            "Qwen3VLMoeTextConfig",
            "Qwen3VLTextConfig",
        ],
        _THREE_AXES,
    ),
    "BltConfig": {"encoder_hash_byte_group_vocab": 16, "encoder_hash_byte_group_size": [3, 4]},
    "Apertus1p5Config": {"image_token_offset": 60, "audio_token_offset": 76},
    "Apertus1p5VisionTokenizerConfig": {"base_channels": 32, "latent_channels": 32, "embed_dim": 32},
    "ChameleonConfig": {"vq_config": {"base_channels": 32, "resolution": 16}, "vocabulary_map": {"<image>": 5}},
    "CohereCompassTextConfig": {
        "layer_types": _SLIDING,
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "DbrxConfig": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8, "kv_n_heads": 2}},
    "DeepseekOcr2SamVisionConfig": {"downsample_channels": [32, 32]},
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense", "sparse", "sparse"], "n_group": 1, "topk_group": 1},
    "DoryConfig": {"n_input_layers": 1, "n_output_layers": 1},
    "Dots1Config": {"n_shared_experts": 1},
    "Dots3NoteTextConfig": {
        "n_group": 1,
        "topk_group": 1,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 12,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 6,
    },
    "Dots3NoteVisionConfig": {"mlp_layer_types": ["dense", "dense", "dense"], "per_layer_config": None},
    "Emu3Config": {"vocabulary_map": {"<image>": 5}},
    "Emu3VQVAEConfig": {"base_channels": 32},
    "Ernie4_5_VLMoeTextConfig": _ERNIE,
    "Ernie4_5_VL_MoeTextConfig": _ERNIE,
    "FalconH1Config": {"mamba_d_ssm": 64},
    "Florence2VisionConfig": {"embed_dim": [8, 16, 16, 32], "num_heads": [2, 2, 2, 2], "num_groups": [2, 2, 2, 2]},
    "FunAsrNanoAdaptorConfig": {"intermediate_size": 8},
    "GPTNeoConfig": {"attention_types": [[["global", "local", "global"], 1]]},
    "Gemma3nTextConfig": {"intermediate_size": 48},
    "Gemma4AssistantConfig": {
        "text_config": {
            "model_type": "gemma4_text",
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "head_dim": 8,
            "global_head_dim": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_hidden_layers": 3,
            "num_kv_shared_layers": 3,
            "layer_types": _SLIDING,
        }
    },
    "Gemma4TextConfig": {"global_head_dim": 16},
    "Gemma4UnifiedTextConfig": {"global_head_dim": 16},
    "Gemma4UnifiedVisionConfig": {"mm_embed_dim": 32, "mm_posemb_size": 16},
    "Glm4vMoeTextConfig": {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}},
    "Glm5NextTextConfig": {"qk_rope_head_dim": 0, "head_dim": 0},
    "GraniteMoeHybridConfig": {"layer_types": ["mamba", "attention", "mamba"]},
    "Granite4VisionConfig": {
        "vision_config": {"hidden_size": 64, "num_attention_heads": 4},
        "qformer_config": {"num_attention_heads": 4},
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[0, 0]],
        "spatial_target_layers": [1],
    },
    "HYV4VLTextConfig": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 0]}},
    "HunYuanVLTextConfig": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 1, 1]}},
    "JanusVQVAEConfig": {"base_channels": 32},
    "KyutaiSpeechToTextConfig": {"codebook_vocab_size": 16, "audio_pad_token_id": 3, "pad_token_id": 0},
    "Lfm2Config": {"layer_types": ["conv", "full_attention", "conv"]},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention", "conv"]},
    "MllamaTextConfig": {"cross_attention_layers": [1]},
    "Mamba2Config": {"num_heads": 8},
    "MimiConfig": {"upsample_groups": 32},
    "Molmo2AdapterConfig": {"vision_feature_layer": [2, 1]},
    "MoshiConfig": {"sliding_window": 64},
    "MuseSparkAudioConfig": {"num_hidden_layers": 4, "hidden_sizes": [8, 8, 8, 32], "depths": [1, 1, 1, 1]},
    "Nemotron3_5TranscribeWordTimestampConfig": {"blank_token_id": 5},
    "NemotronH_Omni_Reasoning_V3_Config": {"vision_config": {"video_temporal_patch_size": 2}},
    "OmniASRAudioConfig": {"conv_dim": (16, 16, 16, 16, 16, 16, 16)},
    "Qwen2_5OmniThinkerConfig": {"vision_start_token_id": 8, "vision_end_token_id": 9},
    "Qwen3OmniMoeThinkerConfig": {"vision_start_token_id": 8, "vision_end_token_id": 9},
    "Qwen3OmniMoeTextConfig": {**_THREE_AXES, "sliding_window": None},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "ReformerConfig": {"is_decoder": True, "axial_pos_shape": (8, 8), "axial_pos_embds_dim": (16, 16)},
    "UnlimitedOcrSamVisionConfig": {"downsample_channels": (32, 32)},
    "VibeVoiceAcousticTokenizerEncoderConfig": {"num_filters": 4, "depths": (1, 1, 1, 1, 1, 1, 1)},
    "WavTokenizerEncoderConfig": {"codebook_dim": 32},
    "Zamba2Config": {"layers_block_type": ["mamba", "hybrid", "mamba"]},
    "ZambaConfig": {"layers_block_type": ["hybrid", "mamba", "hybrid"]},
    "ZayaConfig": {"num_experts_per_tok": 1},
}


def accepted(config_class: type) -> list[str]:
    """Names of the arguments that a config class takes itself."""
    if is_dataclass(config_class):
        return [field.name for field in fields(config_class)]
    return list(inspect.signature(config_class.__init__).parameters)


def tiny_arguments(config_class: type) -> dict:
    """Arguments that make a tiny config of this class, sub-configs as dicts."""
    names, usual = accepted(config_class), _usual(config_class)
    arguments = {
        name: SMALL[name] for name in names if name in SMALL and not isinstance(usual.get(name), (list, tuple, dict))
    }
    special = [name for name in names if name.endswith(("_token_id", "_token_index")) and name not in SMALL]
    outside = [name for name in special if isinstance(usual.get(name), int) and usual[name] >= VOCAB]
    arguments |= {name: 2 + number for number, name in enumerate(outside)}  # below those of a text, see `check.LOW`
    if "vocab_size" in names:  # configs of transformers 5.0 may lack one, and models read it
        arguments |= {name: SMALL[name] for name in ("pad_token_id", "bos_token_id") if name not in arguments}
    if "kv_lora_rank" in names:  # latent attention: every head has its own keys
        arguments["num_key_value_heads"] = arguments["num_attention_heads"]
    # A gradient is compared, so nothing may be random.
    arguments |= {
        name: 0.0 for name in names if ("drop" in name or "jitter" in name) and type(usual.get(name)) is float
    }
    for name, kind in (getattr(config_class, "sub_configs", None) or {}).items():
        if isinstance(usual.get(name), tf.PreTrainedConfig):
            kind = type(usual[name])
        if isinstance(kind, type) and issubclass(kind, tf.PreTrainedConfig) and kind is not tf.PreTrainedConfig:
            arguments[name] = {"model_type": kind.model_type, **tiny_arguments(kind)}
    kinds = list(dict.fromkeys(usual.get("layer_types") or []))
    if "layer_types" in names and len(kinds) > 1:  # every kind of layer that the usual model has, the first kind again
        arguments["layer_types"] = (kinds * LAYERS)[: max(LAYERS, len(kinds))]
        arguments["num_hidden_layers"] = len(arguments["layer_types"])
    return merged(arguments, EXCEPTIONS.get(config_class.__name__, {}))


def merged(arguments: dict, others: dict) -> dict:
    """Arguments with others in front of them, dicts entry by entry."""
    both = dict(arguments)
    for name, value in others.items():
        known = both.get(name)
        both[name] = merged(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return both


def _usual(config_class: type) -> dict:
    """The attributes of a config of the usual size; none where it cannot be made without arguments."""
    try:
        return vars(config_class())
    except Exception:  # whatever a config refuses to be made without
        return {}


def tiny_config(config_class: type, **arguments):
    """A tiny config; `arguments` go in front of the tiny ones, dicts entry by entry."""
    return config_class(**merged(tiny_arguments(config_class), arguments))


def tiny_model(model_class: type, attention: str = "sdpa", seed: int = 0, **arguments):
    """A tiny model in evaluation mode, with weights large enough that prompts and positions matter."""
    config = tiny_config(model_class.config_class, **arguments)
    torch.manual_seed(seed)
    model = model_class._from_config(config, **({"attn_implementation": "eager"} if attention == "eager" else {}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    if model.can_generate():
        model.generation_config.pad_token_id = 0
        model.generation_config.eos_token_id = VOCAB  # never generated
    return model.eval()
