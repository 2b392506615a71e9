"""SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 ask a run to stop: it finishes its step and saves first."""

import os
import signal
from collections.abc import Callable
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Listens from when it is made; `received` names the signal that came, which `answer` is called with."""

    def __init__(self, answer: Callable[[str], None] = lambda signal: None) -> None:
        self.received: str | None = None
        self.answer = answer
        for number in STOPPING:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # A second Ctrl-C is impatience; torchrun hands on a signal that has reached its ranks already.
        if self.received and number == signal.SIGINT and "RANK" not in os.environ:
            raise KeyboardInterrupt
        if self.received is None:
            self.answer(signal.Signals(number).name)
        self.received = signal.Signals(number).name
