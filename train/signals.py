"""SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 ask a run to stop: it finishes its step and saves first."""

import os
import signal
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Listens from when it is made; `received` names the signal that came."""

    def __init__(self) -> None:
        self.received: str | None = None
        for number in STOPPING:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # A second Ctrl-C is impatience; torchrun hands on a signal that has reached its ranks already.
        if self.received and number == signal.SIGINT and "RANK" not in os.environ:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
