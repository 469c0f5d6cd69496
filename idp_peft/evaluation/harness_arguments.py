"""`model_args` of the model type `idp`: what it takes, and what it refuses by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

TAKEN = (
    "pretrained",
    "peft",
    "prompt_id",
    "revision",
    "peft_revision",
    "subfolder",
    "gguf_file",
    "tokenizer",
    "use_fast_tokenizer",
    "add_bos_token",
    "prefix_token_id",
    "truncation",
    "max_length",
    "batch_size",
    "max_batch_size",
    "device",
    "dtype",
    "attn_implementation",
    "trust_remote_code",
    "parallelize",
    "max_memory_per_gpu",
    "max_cpu_memory",
    "offload_folder",
    "think_end_token",
    "enable_thinking",
    "chat_template_args",
)
# What the type `hf` takes and this one cannot.
_REFUSED = {
    "backend": "a prompt stands in front of a causal language model, so there is one backend",
    "delta": "give the model that the delta makes",
    "autogptq": "a quantised base is recognised by its own config",
    "gptqmodel": "a quantised base is recognised by its own config",
    "load_in_4bit": "give a base that was saved quantised: it is recognised by its own config",
    "load_in_8bit": "give a base that was saved quantised: it is recognised by its own config",
    "logits_cache": "rows that read the same are always shared",
    "softmax_dtype": "log-softmax is always taken in float32",
    "mixed_precision_dtype": "give `dtype`",
    "tp_plan": "use `parallelize=True`",
}


def check_arguments(names: Iterable[str]) -> None:
    """
    Raises:
        `ValueError`: naming the first argument that is unknown or refused, and what to do, in one line.
    """
    for name in names:
        if name in _REFUSED:
            raise ValueError(f"`model_args`: the model type 'idp' does not take {name!r}: {_REFUSED[name]}")
        if name not in TAKEN:
            near = difflib.get_close_matches(name, TAKEN, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"`model_args`: the model type 'idp' knows no {name!r}: {hint}It takes {', '.join(TAKEN)}")


def whole_number(name: str, value) -> int | None:
    """An integer argument; the harness's parser makes a float of a negative one.

    Raises:
        `ValueError`: for anything else.
    """
    if isinstance(value, bool) or (value is not None and (not isinstance(value, (int, float)) or value != int(value))):
        raise ValueError(f"`model_args`: {name!r} must be an integer, got {value!r}")
    return None if value is None else int(value)
