"""Tiny models as folders with a tokenizer, and text for them: what a command takes that begins at a file."""

from __future__ import annotations

import random
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from tests.tiny import SEED, VOCAB, tiny


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word: `w0`, `w1`, ..."""
    words = {"<pad>": 0, "<s>": 1, **{f"w{index}": index for index in range(2, VOCAB)}}
    model = Tokenizer(WordLevel(words, unk_token="<pad>"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="<s>")


def tiny_folder(folder: Path, name: str = "llama", seed: int = 0) -> str:
    """A tiny model and its tokenizer, saved; returns the folder as a user would write it."""
    tiny(name, seed=seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def tiny_texts(count: int = 40, words: int = 30, seed: int = 0) -> list[str]:
    """Random words of the tiny tokenizer."""
    draw = random.Random(SEED + seed)
    return [" ".join(f"w{draw.randrange(2, VOCAB)}" for _ in range(words)) for _ in range(count)]
