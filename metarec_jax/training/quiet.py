"""Orbax and TensorStore log, trace and warn beside what they raise; here they are held to what is raised."""

from __future__ import annotations

import logging
import sys
from typing import Any


def hush() -> None:
    """Let Orbax and TensorStore say nothing on stderr; what fails is raised, and told by who catches it."""
    import absl.logging

    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("orbax").setLevel(logging.ERROR)
    if not isinstance(sys.unraisablehook, _Hook):
        sys.unraisablehook = _Hook(sys.unraisablehook)


def first_line(error: BaseException) -> str:
    """What an error says, cut in the middle where it is long: TensorStore puts the reason last.

    >>> first_line(OSError(28, "No space left on device")), first_line(TimeoutError())
    ('[Errno 28] No space left on device', 'TimeoutError')
    """
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 200 else f"{line[:80]} ... {line[-110:]}"


class _Hook:
    """Of a save that has failed, TensorStore's other writes end later and find that nobody waits: no news."""

    def __init__(self, before: Any) -> None:
        self._before = before

    def __call__(self, unraisable: Any) -> None:
        if not (isinstance(unraisable.exc_value, RuntimeError) and "loop is closed" in str(unraisable.exc_value)):
            self._before(unraisable)
