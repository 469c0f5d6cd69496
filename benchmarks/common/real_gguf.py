"""The packaged 135M model as a GGUF file, as llama.cpp's converter writes it."""

from __future__ import annotations

import json
from pathlib import Path

_NORMAL, _CONTROL = 1, 3


def write_gguf(file: Path, model: str = "default", matrices: str = "Q4_0", table: str = "Q8_0") -> Path:
    """Write a Llama with a byte-level tokenizer into a GGUF file.

    Args:
        file (`Path`): where.
        model (`str`): what [`load_model`] takes.
        matrices (`str`), table (`str`): number types of the linear layers and of the embedding table, by llama.cpp's names.
    """
    import gguf

    from idp_peft.models.loading import load_model, load_tokenizer

    network, tokenizer = load_model(model), load_tokenizer(model)
    config, vocabulary = network.config, tokenizer.get_vocab()
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(file, "llama")
    names = sorted(vocabulary, key=vocabulary.get)
    special = set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab())
    pairs = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    for setting, value in {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "rope_dimension_count": config.head_dim,
        "rope_freq_base": float(config.rope_parameters["rope_theta"]),
        "layer_norm_rms_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "smollm",
        "token_list": names,
        "token_types": [_CONTROL if name in special else _NORMAL for name in names],
        "token_merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs],
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "add_bos_token": False,
        "chat_template": tokenizer.chat_template,
    }.items():
        getattr(writer, f"add_{setting}")(value)
    places = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in network.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = tensor.float()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads is not None:  # llama.cpp turns neighbouring numbers, transformers the halves of a head
            data = data.view(heads, 2, -1, data.shape[1]).transpose(1, 2).reshape(data.shape)
        place = places.get_name(name, try_suffixes=(".weight",))
        kind = None if data.ndim == 1 else gguf.GGMLQuantizationType[table if "token_embd" in place else matrices]
        data = data.contiguous().numpy()
        writer.add_tensor(place, data if kind is None else gguf.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
