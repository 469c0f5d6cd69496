"""The reason of an error, in one line: all errors of its chain. A library's outermost error often says least."""

from __future__ import annotations

import textwrap

_LONGEST = 300  # characters of one error's text


def reason(error: BaseException) -> str:
    """The texts of an error and of all errors behind it, outermost first, in one line.

    `datasets` says "An error occurred while generating the dataset", and only the error that it was raised from says
    which line of the file is wrong. A text that another one already holds is left out.

    Args:
        error (`BaseException`): as it was caught.
    """
    texts: list[str] = []
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        text = textwrap.shorten(str(error), _LONGEST, placeholder=" ...") or type(error).__name__
        if not any(text in other for other in texts):
            texts.append(text)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return ": ".join(texts)


def missing(text: str, error: ImportError) -> ImportError:
    """The error that asks to install a library, with the import's own words where the library is there and does not work.

    Args:
        text (`str`): what needs it, and the command that installs it.
        error (`ImportError`): as it was caught.
    """
    is_broken = error.__cause__ is not None or not (error.name is None or isinstance(error, ModuleNotFoundError))
    return ImportError(f"{text} ({reason(error)})" if is_broken else text)
