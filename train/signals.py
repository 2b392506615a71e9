"""SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 stop a run after the current step, with a checkpoint."""

import os
import signal
from collections.abc import Callable
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Handles the signals as soon as it is created. `received` is the name of the last signal, or None.

    The first signal calls `on_first` with its name.
    """

    def __init__(self, on_first: Callable[[str], None] = lambda signal: None) -> None:
        self.received: str | None = None
        self.on_first = on_first
        for number in STOPPING:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # A second Ctrl-C ends the run at once. This does not work under torchrun, where one Ctrl-C reaches
        # each rank twice: from the terminal and from torchrun.
        if self.received and number == signal.SIGINT and "RANK" not in os.environ:
            raise KeyboardInterrupt
        if self.received is None:
            self.on_first(signal.Signals(number).name)
        self.received = signal.Signals(number).name
