"""SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 stop a run after its step, with a checkpoint."""

import os
import signal
from collections.abc import Callable
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Handles the signals from its creation on. `received` is the name of the signal that came, or None.

    The first signal also calls `answer` with its name.
    """

    def __init__(self, answer: Callable[[str], None] = lambda signal: None) -> None:
        self.received: str | None = None
        self.answer = answer
        for number in STOPPING:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # A second Ctrl-C ends the run at once. Under torchrun it does not count: a Ctrl-C reaches the ranks
        # twice, from the terminal and from torchrun.
        if self.received and number == signal.SIGINT and "RANK" not in os.environ:
            raise KeyboardInterrupt
        if self.received is None:
            self.answer(signal.Signals(number).name)
        self.received = signal.Signals(number).name
