"""Why runs end before they are done. On a signal the update at hand is finished and a checkpoint
written, so that the same command goes on."""

import signal
import threading
from types import FrameType

# what schedulers send before they take a machine away, and Ctrl-C
SIGNALS = (
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGINT,
)


class TrainingError(RuntimeError):
    """A run cannot go on, through no fault of its settings; the message is a sentence that says
    what to do."""


class TrainingStopped(Exception):
    """A signal asked the run to end; a checkpoint was written, and the same command continues from
    it."""


class StopSignals:
    """As a context, notes `SIGNALS` instead of ending at once; `number` is the last one, or 0. A
    second Ctrl-C interrupts.

    Only the main thread of Python hears signals, so in another thread nothing changes.
    """

    def __init__(self):
        self.number = 0
        self._before = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # somebody who presses Ctrl-C twice does not want to wait for the checkpoint
        if number == signal.SIGINT and self.number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            print("\nstopping after this update; press Ctrl-C again to stop at once", flush=True)
        # only noted: a checkpoint cannot be written in the middle of an update
        self.number = number


def signal_name(number: int) -> str:
    """`"SIGTERM"`, ..."""
    return signal.Signals(number).name
