"""What a command line means, run through the public functions in this process."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from idp_peft_cli.parsing import parse


def run_recover(words: list[str], recover) -> Path:
    """`idp-peft recover WORDS`.

    Args:
        recover: the function that it calls.
    """
    options, arguments = parse("recover", words)
    return recover(arguments=arguments, **asdict(options))


def run_evaluate(words: list[str], evaluate) -> Path:
    """`idp-peft evaluate WORDS`."""
    (options,) = parse("evaluate", words)
    return evaluate(**asdict(options))
