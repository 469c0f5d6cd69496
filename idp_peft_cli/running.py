"""What the sub-commands do, and what they print when they are done."""

from __future__ import annotations

import errno
import logging
import sys
import traceback
from dataclasses import asdict
from pathlib import Path

_PACKAGES = ("idp_peft", "idp_peft_cli")


def run(command: str, options, *more) -> None:
    """Run one sub-command; results go to stdout, progress and remarks to stderr."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    for package in _PACKAGES:
        logging.getLogger(package).setLevel(logging.INFO)
    commands = {
        "compress": _compress,
        "recover": _recover,
        "teach": _teach,
        "evaluate": _evaluate,
        "report": _report,
        "push": _push,
        "export": _export,
        "route": _route,
        "proxy": _proxy,
    }
    commands[command](options, *more)


def _compress(options) -> None:
    from idp_peft.compression import compress
    from idp_peft.texts.data import load_texts

    texts = load_texts(options.dataset, options.dataset_split, options.text_column, options.dataset_config)
    names = ("calibration_samples", "calibration_tokens", "group_size", "symmetric", "backend", "seed")
    keywords = {name: getattr(options, name) for name in names}
    note = compress(options.model, options.recipe, options.output_dir, texts, **keywords)
    print(f"{options.recipe} model in {options.output_dir} ({note['seconds']:.0f} s)")


def _recover(options, arguments) -> None:
    from idp_peft.recover import recover

    print(f"adapter in {recover(arguments=arguments, **asdict(options))}")


def _teach(options) -> None:
    from idp_peft.recover import teach

    print(f"teacher in {teach(**asdict(options))}")


def _evaluate(options) -> None:
    from idp_peft.evaluation import evaluate

    print(f"result in {evaluate(**asdict(options))}")


def _report(options) -> None:
    from idp_peft.report import write_report

    print(f"report in {write_report(options.results, options.output_dir, options.seed)}")


def _push(options) -> None:
    from idp_peft.hub.adapter_folder import push_adapter

    commit = push_adapter(
        options.adapter,
        options.repo,
        options.results,
        private=options.private or None,
        revision=options.revision,
        commit_message=options.commit_message,
    )
    print(f"adapter in {commit.repo_url}")


def _export(options) -> None:
    from idp_peft.serving import export_folded, export_to_gguf, export_to_vocab

    if not (options.to_vocab or options.to_gguf or options.fold_scales):
        raise ValueError("say what to export: `--to-vocab`, `--fold_scales`, both, or `--to-gguf`")
    for name in ("default_prompt", "table_type"):
        if getattr(options, name) is not None and not options.to_gguf:
            raise ValueError(f"`--{name}` belongs to `--to-gguf`: leave it out")
    where = options.adapter, options.output_dir, options.model
    if options.to_gguf:
        if options.to_vocab:
            raise ValueError("`--to-vocab` and `--to-gguf` write two models: export them one after the other")
        tied = {"keep_tied": options.keep_tied, "default_prompt": options.default_prompt}
        folder = export_to_gguf(*where, **tied, table_type=options.table_type)
    elif options.to_vocab:
        folder = export_to_vocab(*where, keep_tied=options.keep_tied, fold_scales=options.fold_scales)
    elif options.keep_tied:
        raise ValueError("`--keep_tied` belongs to `--to-vocab` and `--to-gguf`: leave it out")
    else:
        folder = export_folded(*where)
    print(f"model in {folder}")


def _route(options) -> None:
    from idp_peft.serving import Router
    from idp_peft.serving.route_lines import route_lines

    if options.batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {options.batch_size}")
    router = Router.from_pretrained(options.adapter, options.model)
    route_lines(router, options.input, options.output, options.text_column, options.batch_size)


def _proxy(options) -> None:
    from idp_peft.serving.run_proxy import run_proxy

    run_proxy(**{**asdict(options), "engine_fields": options.engine_fields or ()})


# What libraries written in other languages say of a disk that is full, or of a file that may not be written.
_FULL = ("No space left on device", "Disk quota exceeded", "file write failed", "iostream error", "unexpected pos")


def trouble_with_a_file(error: BaseException) -> str | None:
    """One line for what the machine refused: a full disk, a missing permission, a folder that is none. `None` for anything
    else, and for errors whose text is for the user already."""
    chain = [error]
    if not (isinstance(error, OSError) and error.errno is not None):
        if is_ours(error):
            return None
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
            chain.append(cause)
    for one in chain:
        system = isinstance(one, OSError) and one.errno is not None
        if (system and one.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)) or any(
            text in str(one) for text in _FULL
        ):
            reason = str(one).splitlines()[0]
            return f"a file could not be written, the disk may be full ({reason}): make room and run the same command again"
        if system and one.filename is not None:
            return f"{one.filename}: {one.strerror}"
    return None


def is_ours(error: BaseException) -> bool:
    """Whether an error was raised on purpose by this project, with a text for the user, and not by a bug in some library."""
    *_, last = traceback.extract_tb(error.__traceback__)
    return any(package in Path(last.filename).parts for package in _PACKAGES)
