"""Wall-clock seconds of the parts of a command, and a line of progress from each that takes long."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator


class Phases:
    """Times the parts of a command. A part that takes long prints a line every few seconds.

    Args:
      every: seconds between two lines.
      say: called with each line, in a thread; by default it is printed on stderr.
    """

    def __init__(self, every: float = 5.0, say: Callable[[str], None] | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._every, self._done = every, ""
        self._say = say or on_stderr

    def progress(self, done: int, total: int) -> None:
        """Set what the next line reports of the part that is running."""
        self._done = f"{done:,} of {total:,} tasks, "

    @contextlib.contextmanager
    def __call__(self, name: str, *, silent: bool = False) -> Iterator[None]:
        """Time a part; ``silent``: it prints progress of its own."""
        began, ended, self._done = time.perf_counter(), threading.Event(), ""

        def report() -> None:
            while not ended.wait(self._every):
                self._say(f"{name}: {self._done}{time.perf_counter() - began:.0f} s so far")

        reporter = threading.Thread(target=report, daemon=True)
        if not silent:
            reporter.start()
        try:
            yield
        finally:
            ended.set()
            if not silent:
                reporter.join()
        self.seconds[name] = self.seconds.get(name, 0.0) + round(time.perf_counter() - began, 2)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        return f"{parts}; {sum(self.seconds.values()):.1f} s in all"


def on_stderr(line: str) -> None:
    """Print a line of progress."""
    print(line, file=sys.stderr, flush=True)
