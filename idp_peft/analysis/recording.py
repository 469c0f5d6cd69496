"""Recording what a model does with examples, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from tqdm.auto import tqdm

from idp_peft.analysis.quietly import quietly, same_random_numbers
from idp_peft.analysis.taps import PARTS, ExamplePatterns, tapped
from idp_peft.evaluation.prompted import idp_layer
from idp_peft.hosting.architectures import find_decoder, forward_parameters
from idp_peft.selection import context_tokens
from idp_peft.texts.examples import Example, collate, read_examples

_BAR_AFTER = 5  # seconds


@dataclass(frozen=True, repr=False)
class PatternRecording:
    """What one model did with N examples, in the order of the dataset.

    Args:
        examples (`list[ExamplePatterns]`): per example, see [`ExamplePatterns`].
        input_ids (`list[list[int]]`): its tokens, without padding.
        parts (`tuple[str]`): what was recorded.
        prompt_ids (`list[int]`, *optional*): the prompt of each example, -1 for none; `None` for a model without a bank.
    """

    examples: list[ExamplePatterns]
    input_ids: list[list[int]]
    parts: tuple[str, ...]
    prompt_ids: list[int] | None = field(default=None)

    def activations(self, part: str, layer: int) -> torch.Tensor:
        """float32 `[tokens, hidden]`: one layer's activations of all examples, one after the other."""
        if part not in self.parts or part == "attention":
            raise ValueError(f"`part` must be one of the activations that were recorded ({self.parts}), got {part!r}")
        return torch.cat([example.activations[part][layer] for example in self.examples])

    def __repr__(self) -> str:
        tokens = sum(map(len, self.input_ids))
        return f"PatternRecording({len(self.examples)} examples, {tokens} tokens, {', '.join(self.parts)})"


def record_patterns(
    model,
    dataset,
    *,
    tokenizer=None,
    parts=PARTS,
    prompt_ids=None,
    batch_size: int = 4,
    max_examples: int | None = None,
) -> PatternRecording:
    """Activations and attention of a model at the input's positions, as float32 on the CPU.

    A prompt's positions never enter as rows: what stands there are the input's tokens alone, so recordings of models with
    and without prompts line up token by token. Padding is left out. The model is left as it was: weights, modes, configs,
    hooks, `last_selection`, random numbers. Size: per token `4 x layers x (3 x hidden + heads x n)` bytes.

    Args:
        model: any decoder-only model: plain, compressed, with an IDP adapter or one of PEFT's.
        dataset, tokenizer, max_examples: as in [`selection_report`]; masked tokens are dropped.
        parts (`tuple[str]`, defaults to all): of `"hidden"` (the residual stream behind each layer, before the decoder's
            last norm), `"attention_output"`, `"mlp_output"` and `"attention"`. Only with the last does the model run eager
            attention, which is the one that reports its weights, instead of its own; other threads that use it do so, too.
        prompt_ids (`int` or `str`, *optional*): a prompt to force, for a model with an IDP adapter. By default each example
            chooses: by `selection_mask`, or by what stands before its first label, where the dataset has these.
        batch_size (`int`, defaults to `4`): examples per pass, at least 1.

    Returns:
        [`PatternRecording`].

    Raises:
        `ValueError`: for examples that cannot be read, `prompt_ids` without an IDP adapter, parts that there are not, and
            architectures that do not report attention or whose MLP is not found.
    """
    parts = checked_parts(parts)
    examples = unpadded(read_examples(dataset, tokenizer, None, max_examples))
    chosen: list[int] = []
    stream = patterns_of(model, examples, parts, prompt_ids, checked_size(batch_size), chosen)
    recorded = list(tqdm(stream, total=len(examples), desc="patterns", delay=_BAR_AFTER))
    return PatternRecording(recorded, [example.input_ids for example in examples], parts, chosen or None)


def patterns_of(model, examples, parts, forced, batch_size: int, chosen: list[int]) -> Iterator[ExamplePatterns]:
    """The patterns of a model's examples, run batch by batch as they are asked for; what can be refused is refused now.

    Args:
        chosen (`list[int]`): grows by the prompt of each example, of a model with an IDP adapter.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder, layer = find_decoder(base), idp_layer(model)
    if forced is not None and layer is None:
        raise ValueError(
            f"`prompt_ids` needs a model with an active IDP adapter, got {type(model).__name__} without one"
        )
    return _run(model, base, decoder, layer, examples, parts, forced, batch_size, chosen)


def _run(model, base, decoder, layer, examples, parts, forced, batch_size, chosen) -> Iterator[ExamplePatterns]:
    device = base.get_input_embeddings().weight.device
    for begin in range(0, len(examples), batch_size):
        rows = examples[begin : begin + batch_size]
        batch = {name: value.to(device) for name, value in collate(rows).items()}
        call = {name: batch[name] for name in ("input_ids", "attention_mask")} | {"use_cache": False}
        if "logits_to_keep" in forward_parameters(type(base)):
            call["logits_to_keep"] = 1
        if layer is not None and forced is not None:
            call["prompt_ids"] = forced
        elif layer is not None and ("labels" in batch or "selection_mask" in batch):
            masks = batch["attention_mask"], batch.get("selection_mask"), batch.get("labels")
            call["selection_mask"] = context_tokens(*masks)
        # Nothing may be left on the model while the caller holds what is handed out: other models share its weights.
        lengths = [len(row.input_ids) for row in rows]
        with same_random_numbers(device), quietly(model, layer), tapped(decoder, parts, lengths) as tap:
            model(**call)
            if layer is not None:
                chosen += layer.last_selection.prompt_ids.tolist()
        yield from tap.examples()


def unpadded(examples: list[Example]) -> list[Example]:
    """Examples without what the mask leaves out."""
    kept = []
    for example in examples:
        real = [index for index, is_real in enumerate(example.attention_mask) if is_real]
        columns = {
            name: None if values is None else [values[index] for index in real]
            for name, values in vars(example).items()
            if name != "group"
        }
        kept.append(Example(**columns))
    return kept


def checked_parts(parts) -> tuple[str, ...]:
    parts = (parts,) if isinstance(parts, str) else tuple(parts)
    if not parts or not set(parts) <= set(PARTS):
        raise ValueError(f"`parts` must be some of {', '.join(map(repr, PARTS))}, got {parts}")
    return tuple(part for part in PARTS if part in parts)


def checked_size(batch_size: int) -> int:
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}")
    return batch_size
