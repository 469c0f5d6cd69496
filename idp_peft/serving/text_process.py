"""Tokenising and chat templates in a process that can be killed.

A chat template is a program, a tokenizer's patterns are one too, and both come from the base's folder: from a stranger. No
limit within a process holds them: a sandbox counts no steps, `'a' * 10**10` is one of them, and a thread cannot be ended.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import weakref

from idp_peft.serving import text_worker

SECONDS, MEMORY = 2.0, 512 * 2**20
_CHARACTERS = 100_000  # that may take as long
_PATIENCE = 30  # how much longer than its processor time a task may take, on a machine that is busy
_START = 300  # seconds, for imports on a machine that is busy
# Secrets stay here. One thread each, and no backtraces in the log.
_NOT_HANDED_ON = ("IDP_PROXY_API_KEY", "IDP_ENGINE_API_KEY")
_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "RUST_BACKTRACE": "0",
}
# The paths where this process finds its modules, and no others.
_RUN = "import sys, runpy; sys.argv[:] = sys.argv[1:]; sys.path[:] = sys.argv[3:]; runpy.run_path(sys.argv[0], run_name='__main__')"


class TextError(ValueError):
    """What a tokenizer or a chat template says of a text."""


class TextProcess:
    """Reads texts as a tokenizer does. Safe to be used by several threads, each with a process of its own.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): whose.
        seconds (`float`, defaults to `2`): of a processor that a chat, or 100,000 characters of a text, may take.
        memory (`int`, defaults to 512 MiB): bytes that a process may take beside what the tokenizer takes.

    Raises:
        `OSError`: where the system cannot fork.
    """

    def __init__(self, tokenizer, seconds: float = SECONDS, memory: int = MEMORY) -> None:
        if not hasattr(os, "fork"):
            raise OSError("chats and texts of strangers are read in a process that is forked: this system has no fork")
        self.seconds, self.memory = seconds, memory
        self._tokenizer = tokenizer
        self._idle: list[socket.socket] = []
        self._lock = threading.Lock()
        self._control: socket.socket | None = None

    def token_ids(self, texts: list[str], special: bool = True, max_tokens: int | None = None) -> list[list[int] | int]:
        """The token ids of each text, or how many there are where they are more than `max_tokens`.

        Raises:
            `TextError`: where the tokenizer refuses a text, or takes too much time or memory.
        """
        seconds = self.seconds * max(1, sum(map(len, texts)) / _CHARACTERS)
        return self._ask({"texts": texts, "special": special, "max_tokens": max_tokens}, seconds)

    def rendered(self, chat: dict, max_characters: int) -> str:
        """What a chat template makes of messages.

        Args:
            chat (`dict`): what `apply_chat_template` takes, all of JSON.
            max_characters (`int`): more are refused.

        Raises:
            `TextError`: as [`token_ids`].
        """
        return self._ask({"chat": chat, "max_characters": max_characters}, self.seconds)

    def start(self) -> None:
        """Start the imports early, so that the first text waits less."""
        with self._lock:
            self._start()

    def _ask(self, task: dict, seconds: float):
        line = json.dumps({**task, "seconds": seconds, "at_most": seconds * _PATIENCE}).encode() + b"\n"
        connection = self._connection()
        try:
            connection.settimeout(seconds * _PATIENCE + 1)
            connection.sendall(line)
            with connection.makefile("rb") as lines:
                answer = json.loads(lines.readline())
        except (OSError, ValueError) as error:
            connection.close()
            raise TextError(
                f"it needs more than {seconds:.3g} seconds of a processor, or {self.memory // 2**20} MiB of memory"
            ) from error
        with self._lock:
            self._idle.append(connection)
        if "error" in answer:
            raise TextError(answer["error"])
        return answer["answer"]

    def _connection(self) -> socket.socket:
        """The connection to a waiting process, or to a new one."""
        with self._lock:
            while self._idle:
                connection = self._idle.pop()
                if _waits(connection):
                    return connection
                connection.close()
            try:
                return self._forked()
            except OSError:  # somebody killed the one that forks
                self._control = None
                return self._forked()

    def _forked(self) -> socket.socket:
        self._start()
        if self._control.recv(1) != b"r":
            raise OSError("the process that reads texts did not start: see what it said above")
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._control, [b"f"], [theirs.fileno()])
        return ours

    def _start(self) -> None:
        if self._control is not None:
            return
        self._control, theirs = socket.socketpair()
        self._control.settimeout(_START)
        environment = {name: value for name, value in os.environ.items() if name not in _NOT_HANDED_ON}
        with theirs:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-I",
                    "-c",
                    _RUN,
                    text_worker.__file__,
                    str(theirs.fileno()),
                    str(self.memory),
                    *sys.path,
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**environment, **_ENVIRONMENT},
                start_new_session=True,  # Ctrl-C is for the proxy, which ends this one by going away
            )
        self.pid = process.pid
        weakref.finalize(self, _end, self._control, process)
        with process.stdin as pipe:
            pickle.dump(self._tokenizer, pipe)


def _waits(connection: socket.socket) -> bool:
    """Whether the process at the other end is alive: a waiting process sends nothing."""
    connection.settimeout(0)
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return True
    except OSError:
        return False


def _end(control: socket.socket, process: subprocess.Popen) -> None:
    control.close()
    process.kill()
    process.wait()
