"""Flags and YAML files into dataclasses, by transformers' `HfArgumentParser`; every mistake is one line."""

from __future__ import annotations

import json
from pathlib import Path

from idp_peft_cli import options

OPTIONS = {
    "compress": options.CompressOptions,
    "recover": options.RecoverOptions,
    "teach": options.TeachOptions,
    "evaluate": options.EvaluateOptions,
    "report": options.ReportOptions,
    "push": options.PushOptions,
    "export": options.ExportOptions,
    "route": options.RouteOptions,
    "proxy": options.ProxyOptions,
}


class WrongUseError(Exception):
    """The command line cannot be understood; the text says what to change."""


def parse(command: str, arguments: list[str]) -> tuple:
    """The dataclasses of a sub-command: its options and, for `recover`, the training arguments.

    Args:
        command (`str`): name of the sub-command.
        arguments (`list[str]`): its flags. `--config FILE` reads flags from a YAML file; the command line's own win.

    Raises:
        `WrongUseError`: on an unknown or missing flag, a value of the wrong type, or a configuration file that is none.
    """
    classes = [OPTIONS[command]]
    if command == "recover":
        from idp_peft.recover.arguments import RecoverArguments

        classes.append(RecoverArguments)
    parser = _parser(command, classes)
    arguments = _with_config(arguments)
    try:
        return parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    except (ValueError, TypeError, ImportError) as error:
        text = str(error).replace("Some specified arguments are not used by the HfArgumentParser", "unknown flags")
        raise WrongUseError(text) from error


def _parser(command: str, classes: list[type]):
    from transformers.hf_argparser import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str):
            raise WrongUseError(message)

    return Parser(classes, prog=f"idp-peft {command}", allow_abbrev=False, add_help=False)


def _with_config(arguments: list[str]) -> list[str]:
    """The same flags, with those of a `--config FILE` put in front, where later ones override them."""
    rest, files = [], []
    words = iter(arguments)
    for word in words:
        name, has_value, value = word.partition("=")
        if name != "--config":
            rest.append(word)
        elif has_value or (value := next(words, "")):
            files.append(value)
        else:
            raise WrongUseError("`--config` needs a file")
    return [flag for file in files for flag in _flags(Path(file))] + rest


def _flags(file: Path) -> list[str]:
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise WrongUseError(f"`--config` {str(file)!r} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise WrongUseError(f"`--config` {str(file)!r} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise WrongUseError(
            f"`--config` {str(file)!r} must hold one `name: value` a line, got {type(content).__name__}"
        )
    flags = []
    for name, value in content.items():
        if value is None:
            continue
        flags.append(f"--{name}")
        values = value if isinstance(value, list) else [value]
        flags += [json.dumps(v) if isinstance(v, (dict, bool)) else str(v) for v in values]
    return flags
