"""Activation and attention patterns of models on the same inputs, compared layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tqdm.auto import tqdm

from idp_peft.analysis.comparing import Comparing
from idp_peft.analysis.pattern_comparison import PatternComparison
from idp_peft.analysis.recording import PatternRecording, checked_parts, checked_size, patterns_of, unpadded
from idp_peft.analysis.taps import PARTS, ExamplePatterns
from idp_peft.texts.examples import Example, read_examples

_BAR_AFTER = 5  # seconds


def compare_patterns(
    reference,
    models: Mapping[str, object],
    dataset,
    *,
    tokenizer=None,
    start: str | None = None,
    parts=PARTS,
    prompt_ids: Mapping[str, int | str] | None = None,
    skip: int = 0,
    cka: bool = True,
    batch_size: int = 1,
    max_examples: int | None = None,
) -> PatternComparison:
    """How far models are from a reference in every layer, on the same inputs, at the input's own positions.

        compare_patterns(dense, {"compressed": compressed, "IDP": idp, "LoRA": lora}, blocks, start="compressed")

    Models go through the inputs side by side, a batch at a time, and only sums are kept. CKA keeps `[hidden, hidden]`
    numbers in float64, `8 x hidden^2 x layers x 3 x (1 + 2 x models)` bytes: for wide models choose fewer `parts`, or
    `cka=False`. Models that do not fit beside each other can be recorded one after the other ([`record_patterns`]), as can
    one model with its adapter on and off. Every model is left as it was.

    Args:
        reference: a model, or a [`PatternRecording`] of one.
        models (`dict`): name -> model or recording, of the reference's depth and width.
        start (`str`, *optional*): the name of the model that the others repair. Adds how much of the way from it to the
            reference each other model goes, how far it moves aside, and whether models move alike.
        prompt_ids (`dict`, *optional*): name -> a prompt to force.
        skip (`int`, defaults to `0`): so many first tokens of each example are left out of all measures, as queries and as
            keys. Most models park attention and a huge activation on the first token; a prompt takes that over, so with
            `skip=0` much of what is compared is this one token.
        cka (`bool`, defaults to `True`): whether to compute CKA.
        dataset, tokenizer, parts, batch_size, max_examples: as in [`record_patterns`].

    Returns:
        [`PatternComparison`].

    Raises:
        `ValueError`: as [`record_patterns`], for recordings of other tokens, and for models of another depth or width.
    """
    parts, forced = checked_parts(parts), dict(prompt_ids or {})
    examples = unpadded(read_examples(dataset, tokenizer, None, max_examples))
    _check_names(models, start, forced)
    _check_skip(skip, examples)
    chosen: dict[str, list[int]] = {name: [] for name in models}
    streams = [_read(reference, "reference", examples, parts, None, checked_size(batch_size), [])]
    streams += [_read(models[n], n, examples, parts, forced.get(n), batch_size, chosen[n]) for n in models]
    sums = Comparing(list(models), start, skip, cka)
    for of_reference, *of_models in tqdm(
        zip(*streams, strict=True), total=len(examples), desc="patterns", delay=_BAR_AFTER
    ):
        sums.add(of_reference, of_models)
    return sums.result(examples=len(examples), prompt_ids={name: ids for name, ids in chosen.items() if ids})


def _read(source, name: str, examples, parts, forced, batch_size: int, chosen: list[int]) -> Iterator[ExamplePatterns]:
    """The patterns of a model, run batch by batch as they are asked for, or of a recording."""
    if not isinstance(source, PatternRecording):
        return patterns_of(source, examples, parts, forced, batch_size, chosen)
    if forced is not None:
        raise ValueError(
            f"`prompt_ids` cannot force a prompt on {name!r}, which is recorded already: record it with one"
        )
    if missing := [part for part in parts if part not in source.parts]:
        raise ValueError(
            f"the recording of {name!r} holds {source.parts}, not {missing}: record them, or choose `parts`"
        )
    if source.input_ids != [example.input_ids for example in examples]:
        raise ValueError(f"the recording of {name!r} is of other tokens than `dataset`: record it on the same")
    chosen += source.prompt_ids or []
    return (example.only(parts) for example in source.examples)


def _check_names(models: Mapping[str, object], start: str | None, forced: dict) -> None:
    if not isinstance(models, Mapping) or not models:
        raise ValueError(f"`models` must be a dict of names and models, at least one, got {type(models).__name__}")
    if "reference" in models:
        raise ValueError("`models` must not have one named 'reference': that is what results call the reference")
    if start is not None and start not in models:
        raise ValueError(f"`start` must be one of `models` ({', '.join(map(repr, models))}), got {start!r}")
    if unknown := [name for name in forced if name not in models]:
        raise ValueError(f"`prompt_ids` names {unknown}, which `models` does not have ({', '.join(map(repr, models))})")


def _check_skip(skip: int, examples: list[Example]) -> None:
    shortest = min(len(example.input_ids) for example in examples)
    if not 0 <= skip < shortest:
        raise ValueError(
            f"`skip` must be at least 0 and less than the shortest example's {shortest} tokens, got {skip}"
        )
