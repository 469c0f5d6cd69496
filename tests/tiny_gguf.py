"""Tiny models as GGUF files, with a tokenizer in the file, as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path

from tests.tiny import tiny


def tiny_gguf(file: Path, seed: int = 0, packed=None) -> str:
    """A tiny Llama with one token per printable character; returns the file as a user would write it.

    Args:
        packed (`gguf.GGMLQuantizationType`, *optional*): of matrices whose rows are whole blocks of it; float32 by default.
    """
    import gguf

    file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(file, "llama")
    for setting, value in (
        *(("context_length", 64), ("embedding_length", 32), ("block_count", 3), ("feed_forward_length", 48)),
        *(("head_count", 4), ("head_count_kv", 2), ("rope_dimension_count", 8), ("layer_norm_rms_eps", 1e-6)),
        *(("vocab_size", 97), ("tokenizer_model", "gpt2"), ("token_list", _tokens()), ("token_merges", ["t h", "h e"])),
        *(("token_types", [3, 3] + [1] * 95), ("pad_token_id", 0), ("bos_token_id", 1), ("eos_token_id", 1)),
    ):
        getattr(writer, f"add_{setting}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    for name, tensor in tiny("llama", seed=seed).state_dict().items():
        fits = packed is not None and tensor.ndim == 2 and tensor.shape[1] % 32 == 0
        data = gguf.quants.quantize(tensor.numpy(), packed) if fits else tensor.numpy()
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=packed if fits else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(file)


def _tokens() -> list[str]:
    """Of a byte-level tokenizer: a space is written as a letter of its own."""
    return ["<pad>", "<|endoftext|>", "\u0120", *map(chr, range(33, 125)), "th", "he"]
