"""The `idp-peft` command line.

A package of its own, because importing `idp_peft` imports torch, transformers and peft, which takes seconds: nothing of that
is needed for `--help` or to see that a flag is wrong.
"""

from __future__ import annotations

import os
import sys

_COMMANDS = {
    "compress": "compress a dense model with GPTQ or SparseGPT",
    "recover": "train prompts that repair a compressed model",
    "teach": "keep what a dense model predicts, so that recover needs no second model",
    "evaluate": "measure perplexity and zero-shot tasks",
    "report": "one page and one table from result files",
    "push": "upload an adapter to the Hub, with a model card",
    "export": "write a model that engines serve, the prompts in its vocabulary",
    "route": "choose a prompt for each text",
    "proxy": "an OpenAI-compatible proxy that chooses prompts for an engine",
}
_INTERRUPTED = 130  # what shells use for Ctrl-C


def main(arguments: list[str] | None = None) -> None:
    """Run one sub-command. Exit codes: 0 done, 2 wrong use, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return
    command, *rest = arguments
    if command not in _COMMANDS:
        _fail("", f"the sub-command must be one of {', '.join(_COMMANDS)}; got {command!r}")
    from idp_peft_cli.parsing import OPTIONS, WrongUseError, parse

    if "-h" in rest or "--help" in rest:
        from idp_peft_cli.help import help_text

        print(help_text(command, OPTIONS[command]))
        return
    # Torch's threads sleep while they wait for each other, and do not spin: beside a busy process spinning is up to a few
    # hundred times slower (benchmarks/threads). OpenMP reads this when torch is imported, which parsing may do.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        options = parse(command, rest)
    except WrongUseError as error:
        _fail(command, str(error))
    from idp_peft_cli import running

    try:
        running.run(command, *options)
    except KeyboardInterrupt as interrupt:
        print(f"\nidp-peft {command}: interrupted{f': {interrupt}' if str(interrupt) else ''}", file=sys.stderr)
        raise SystemExit(_INTERRUPTED) from None
    except Exception as error:
        if (trouble := running.trouble_with_a_file(error)) is not None:
            _fail(command, trouble)
        if not (isinstance(error, (ValueError, OSError, ImportError, RuntimeError)) and running.is_ours(error)):
            raise
        _fail(command, str(error))


def _help() -> str:
    width = max(map(len, _COMMANDS))
    return "\n".join(
        (
            "usage: idp-peft COMMAND [flags | --config FILE.yaml]\n",
            "Repair compressed language models with soft prompts, and show what was lost and what came back.\n",
            *(f"  {name:<{width}}  {text}" for name, text in _COMMANDS.items()),
            "\nidp-peft COMMAND --help lists the flags.",
        )
    )


def _fail(command: str, text: str) -> None:
    print(f"idp-peft{' ' + command if command else ''}: error: {' '.join(text.split())}", file=sys.stderr)
    raise SystemExit(2)
