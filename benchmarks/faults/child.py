"""One `idp-peft` command as a child process that can be killed at any moment."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Ended:
    """How a child ended.

    Args:
        code (`int`): its exit code, negative for a signal.
        errors (`str`): what it wrote to stderr.
    """

    code: int
    errors: str

    @property
    def said_one_line(self) -> bool:
        """Whether it ended with one line for the user and no traceback."""
        return self.code == 2 and self.errors.count(": error: ") == 1 and "Traceback" not in self.errors


class Forked:
    """A command in a fork of this process, which has imported everything: it starts at once."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        from idp_peft_cli import main

        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the child)
        self.pid = os.fork()
        if self.pid:
            return
        code = 70
        try:
            os.chdir(folder)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(self._errors.fileno(), 2)
            main(arguments)
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            sys.stderr.flush()
            os._exit(code)

    def wait(self) -> Ended:
        _, status = os.waitpid(self.pid, 0)
        self._errors.seek(0)
        return Ended(os.waitstatus_to_exitcode(status), self._errors.read().decode(errors="replace"))

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)


class Started:
    """A command in a process of its own, which begins with its imports."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "idp_peft_cli", *arguments],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(["", os.getcwd(), *sys.path])},
        )

    def wait(self) -> Ended:
        errors = self._process.communicate()[1].decode(errors="replace")
        return Ended(self._process.returncode, errors)

    def signal(self, number: int) -> None:
        self._process.send_signal(number)
