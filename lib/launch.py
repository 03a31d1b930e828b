"""How a process hears that it has to stop: signals set a flag, and the loop leaves at a place from which it can go on."""

import signal
from dataclasses import dataclass, field

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass
class StopFlag:
    """Set by Ctrl-C, SIGTERM (preemption, scancel) or SIGUSR1 (time limit ahead). A second Ctrl-C does not wait."""

    signal: int | None = None
    previous: dict = field(default_factory=dict)

    def __enter__(self):
        for number in STOP_SIGNALS:
            self.previous[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def receive(self, number, _frame):
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signal = number

    def __bool__(self):
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as a shell reports it: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + int(self.signal)
