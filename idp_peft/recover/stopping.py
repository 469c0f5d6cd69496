"""Ctrl-C, and the polite kill, end a run after its current step with a checkpoint to go on from."""

from __future__ import annotations

import signal
import threading

from transformers import TrainerCallback


class StopAtSignal(TrainerCallback):
    """Saves and stops at the end of the step in which SIGINT or SIGTERM came; a second one interrupts at once.

    As a context manager it takes the signals, and gives them back on leaving. Outside the main thread, where Python
    delivers no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopAtSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.asked and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
        return control
