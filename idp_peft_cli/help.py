"""`--help` of a sub-command, written from its dataclass alone: transformers' parser takes a second or more to import."""

from __future__ import annotations

import dataclasses
import textwrap
import typing

_WIDTH, _INDENT = 110, 26


def help_text(command: str, options: type) -> str:
    """Usage, the flags with their defaults, and what else is accepted."""
    fields = dataclasses.fields(options)
    needed = [f"--{field.name} {field.name.upper()}" for field in fields if _is_required(field)]
    needed += ["--output_dir OUTPUT_DIR"] if command == "recover" else []
    types = typing.get_type_hints(options)
    lines = [f"usage: idp-peft {command} {' '.join(needed)} [flags | --config FILE.yaml]", "", options.__doc__, ""]
    for field in fields:
        lines += _flag(field, types[field.name])
    lines += _entry("--config FILE", "Read flags from a YAML file; those on the command line win.")
    if command == "recover":
        lines += _entry(
            "--effort NAME",
            "How long to train: quick (30 steps), standard (100) or thorough (300). --max_steps and --num_train_epochs win. "
            "(default: standard)",
        )
        lines += _entry(
            "--output_dir ...",
            "And every flag of transformers.TrainingArguments: --output_dir (the run's folder), --max_steps, "
            "--learning_rate, --per_device_train_batch_size, --seed, --bf16, ...",
        )
    return "\n".join(lines)


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING


def _flag(field: dataclasses.Field, kind: type) -> list[str]:
    text = field.metadata["help"]
    if typing.get_origin(kind) is typing.Literal:
        text += f" One of {', '.join(typing.get_args(kind))}."
    if not _is_required(field) and field.default is not None and field.default is not False:
        text += f" (default: {field.default})"
    return _entry(f"--{field.name}", text)


def _entry(name: str, text: str) -> list[str]:
    wrapped = textwrap.wrap(text, _WIDTH - _INDENT)
    lead = f"  {name:<{_INDENT - 2}}"
    return [lead + wrapped[0], *(" " * _INDENT + line for line in wrapped[1:])]
