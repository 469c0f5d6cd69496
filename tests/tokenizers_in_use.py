"""Tokenizers as people's models have them, tiny: what each puts in front of a text and behind it."""

from __future__ import annotations

from tokenizers import Tokenizer, processors
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from tests.tiny import VOCAB

BOS, EOS, ROLE = 1, 2, 3
WORDS = {"<pad>": 0, "<s>": BOS, "</s>": EOS, "<sop>": ROLE, **{f"w{index}": index for index in range(4, VOCAB)}}


def make(template: str | None = None, **settings) -> PreTrainedTokenizerFast:
    """One token per word, `w4`, `w5`, ...; `template` says what is put around a text, `$A`."""
    model = Tokenizer(WordLevel(WORDS, unk_token="<pad>"))
    model.pre_tokenizer = WhitespaceSplit()
    if template is not None:
        tokens = [("<s>", BOS), ("</s>", EOS), ("<sop>", ROLE)]
        model.post_processor = processors.TemplateProcessing(single=template, special_tokens=tokens)
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", **settings}
    return PreTrainedTokenizerFast(tokenizer_object=model, **special)


# name -> (a function that makes it, the tokens in front of every text, the tokens behind it)
IN_USE = {
    "SmolLM2's and Qwen's: nothing added": (make, [], []),
    "no beginning-of-sequence token at all": (lambda: make(bos_token=None), [], []),
    "beginning and end are one token, not added": (lambda: make(bos_token="</s>"), [], []),
    "Llama 3's: by the post-processor": (lambda: make("<s> $A"), [BOS], []),
    "Llama 2's and Gemma's: add_bos_token": (lambda: make(add_bos_token=True), [BOS], []),
    "by the post-processor, without a name": (lambda: make("<s> $A", bos_token=None), [BOS], []),
    "one that adds an end, too": (lambda: make("<s> $A </s>"), [BOS], [EOS]),
    "one that adds an end alone": (lambda: make("$A </s>"), [], [EOS]),
    "GLM's: two tokens in front": (lambda: make("<s> <sop> $A"), [BOS, ROLE], []),
    "padding is the end": (lambda: make("<s> $A", pad_token="</s>"), [BOS], []),
    "cannot spell the text": (lambda: make("<s> $A", unk_token="<pad>"), [BOS], []),
}
