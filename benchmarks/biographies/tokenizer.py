"""One token per word."""

from __future__ import annotations

from benchmarks.biographies.text import START, all_words

PAD = "<pad>"


def make_tokenizer():
    """A `PreTrainedTokenizerFast` that splits at spaces; the same for every seed."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate([PAD, START, *all_words()])}
    model = Tokenizer(WordLevel(words, unk_token=PAD))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token=PAD, bos_token=START)
