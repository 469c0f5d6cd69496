"""Tiny models as GGUF files, with a tokenizer in the file, as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.tiny import tiny

_SHAPE = {"context_length": 64, "block_count": 3, "head_count": 4}
_ROPE = {**_SHAPE, "feed_forward_length": 48, "head_count_kv": 2, "rope_dimension_count": 8, "layer_norm_rms_eps": 1e-6}
_SETTINGS = {
    "llama": _ROPE,
    "qwen2": _ROPE,
    "gemma2": {
        **_ROPE,
        # Transformers does not read from a file what attention is divided by: it takes that of heads of 256.
        **{"key_length": 256, "value_length": 256, "rope_dimension_count": 256, "sliding_window": 16},
        **{"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    },
    "gpt2": {**_SHAPE, "feed_forward_length": 128, "layer_norm_eps": 1e-5, "context_length": 1024},
}


def tiny_gguf(
    file: Path,
    seed: int = 0,
    packed=None,
    *,
    name: str = "llama",
    width: int = 32,
    tied: bool = False,
    table=None,
    sentencepiece: bool = False,
    add_bos: bool | None = None,
    chat_template: str | None = None,
    positions: int | None = None,
    tool_call: bool = False,
) -> str:
    """A tiny model with one token per printable character; returns the file as a user would write it.

    Args:
        packed (`gguf.GGMLQuantizationType`, *optional*): of matrices whose rows are whole blocks of it; float32 by default.
        name (`str`): the architecture.
        width (`int`): of the embeddings.
        tied (`bool`): whether the output head is the embedding table.
        table (`gguf.GGMLQuantizationType`, *optional*): of the embedding table, in place of `packed`.
        sentencepiece (`bool`): a tokenizer of that kind, with scores; else a byte-level one with merges.
        add_bos (`bool`, *optional*), chat_template (`str`, *optional*): what the file says of them; nothing by default.
        positions (`int`, *optional*): that the file says the model has; as many as `_SETTINGS` by default.
        tool_call (`bool`): a vocabulary with `<tool_call>` as one token, number 3, and with all that JSON needs.
    """
    import gguf

    from idp_peft.serving.gguf_types import encoded

    file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(file, name)
    settings = _SETTINGS[name] if positions is None else {**_SETTINGS[name], "context_length": positions}
    for setting, value in (
        *(("embedding_length", width), *settings.items(), ("vocab_size", 97)),
        *(("tokenizer_model", "llama"), ("token_scores", [float(-i) for i in range(97)])) * sentencepiece,
        *(("tokenizer_model", "gpt2"), ("token_merges", ["t h", "h e"])) * (not sentencepiece),
        *(("token_list", [name for name, _ in _tokens(sentencepiece, tool_call)]),),
        *(("token_types", [kind for _, kind in _tokens(sentencepiece, tool_call)]),),
        *(("pad_token_id", 0), ("bos_token_id", 1), ("eos_token_id", 2 if sentencepiece else 1)),
        *((("key_length", 8), ("value_length", 8)) * (width != 32)),
        *((("add_bos_token", add_bos),) * (add_bos is not None)),
        *((("chat_template", chat_template),) * (chat_template is not None)),
    ):
        getattr(writer, f"add_{setting}")(value)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, name.upper()), 3)
    for hf_name, tensor in _weights(name, seed, width, tied).items():
        place = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        kind = table if place == "token_embd.weight" and table is not None else packed
        fits = kind is not None and tensor.ndim == 2 and tensor.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
        data = encoded(tensor.numpy(), kind) if fits else tensor.numpy()
        writer.add_tensor(place, data, raw_dtype=kind if fits else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(file)


def _weights(name: str, seed: int, width: int, tied: bool) -> dict[str, torch.Tensor]:
    model = tiny(name, seed=seed)
    if width != model.config.hidden_size or name == "gemma2":
        model.config.hidden_size = width
        model.config.head_dim = 256 if name == "gemma2" else 8
        model = type(model)(model.config)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    weights = dict(model.state_dict())
    if tied or model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    for key in weights if name == "gemma2" else ():
        if "norm" in key:
            weights[key] = weights[key] + 1  # a file has the factor itself
    if name == "gpt2":  # transformers reads no GPT-2 with another number of positions
        generator = torch.Generator().manual_seed(seed)
        weights["transformer.wpe.weight"] = 0.2 * torch.randn(1024, width, generator=generator)
    for key in weights if name == "gpt2" else ():
        if key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            weights[key] = weights[key].T.contiguous()  # a file has [out, in] always
    return weights


def _tokens(sentencepiece: bool, tool_call: bool) -> list[tuple[str, int]]:
    """Names and llama.cpp's types. A tokenizer writes a space as a letter of its own; SentencePiece's has bytes, too."""
    if sentencepiece:
        special = [("<unk>", 2), ("<s>", 3), ("</s>", 3), ("\u2581", 1), ("<0x0A>", 6)]
    else:
        special = [("<pad>", 3), ("<|endoftext|>", 3), ("\u0120", 1), *[("<tool_call>", 4)] * tool_call]
    letters = [(chr(code), 1) for code in range(33, 127) if not (tool_call and chr(code) in "^`~")]
    return [*special, *letters[: 95 - len(special)], ("th", 1), ("he", 1)]
