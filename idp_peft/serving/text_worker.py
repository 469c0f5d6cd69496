"""The worker of `text_process.py`, run as a file: it imports once, then forks a process for each connection.

Each of those answers one task a line, JSON both ways, and is ended by the kernel where a task takes more than it may.
Forking is safe here: this process has no thread but its first.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import socket
import sys


def serve(control: socket.socket, tokenizer, memory: int) -> None:
    """Fork for each connection that arrives, until the proxy is gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    while connections := _next(control):
        with socket.socket(fileno=connections[0]) as connection:
            if os.fork() == 0:
                control.close()
                try:
                    _limit(memory)
                    _answer_all(connection, tokenizer)
                finally:
                    os._exit(0)


def _next(control: socket.socket) -> list[int]:
    try:
        control.sendall(b"r")  # ready
        return socket.recv_fds(control, 1, 1)[1]
    except ConnectionError:  # the proxy went away
        return []


def _limit(memory: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    with contextlib.suppress(OSError, ValueError):  # not on every system; time bounds it there, too
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))


def _answer_all(connection: socket.socket, tokenizer) -> None:
    with connection.makefile("rwb") as lines:
        for line in lines:
            task = json.loads(line)
            # Processor time, so that a busy machine refuses nothing; nothing handles the signals, so they kill.
            signal.setitimer(signal.ITIMER_PROF, task["seconds"])
            signal.setitimer(signal.ITIMER_REAL, task["at_most"])
            answer = json.dumps(_answer(task, tokenizer)).encode()
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            lines.write(answer + b"\n")
            lines.flush()


def _answer(task: dict, tokenizer) -> dict:
    try:
        if "texts" in task:
            return {"answer": [_token_ids(text, task, tokenizer) for text in task["texts"]]}
        text = tokenizer.apply_chat_template(**task["chat"], tokenize=False)
        if len(text) > task["max_characters"]:
            return {"error": f"it makes {len(text)} characters of them, at most {task['max_characters']} are served"}
        return {"answer": text}
    except MemoryError:
        raise
    except BaseException as error:  # a template is a program and raises what it likes, and so does Rust when it panics
        return {"error": str(error)[:1000] or type(error).__name__}


def _token_ids(text: str, task: dict, tokenizer) -> list[int] | int:
    """The token ids of a text, or how many there are where they are too many."""
    ids = tokenizer(text, add_special_tokens=task["special"])["input_ids"]
    return len(ids) if task["max_tokens"] is not None and len(ids) > task["max_tokens"] else ids


if __name__ == "__main__":
    pickled = sys.stdin.buffer.read()  # all of it before the imports that it causes: the proxy waits for this
    serve(socket.socket(fileno=int(sys.argv[1])), pickle.loads(pickled), int(sys.argv[2]))
