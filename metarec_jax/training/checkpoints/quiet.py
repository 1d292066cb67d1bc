"""Orbax and TensorStore log, trace and warn beside what they raise; here they are held to what is raised.

Only while they work for this library: the process's own logging and hooks are afterwards what they were.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

_LATE = 10.0
"""Seconds after a failure in which other writes of the same save may still end."""
_lock = threading.Lock()
_users = 0
_before: dict[str, Any] = {}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within it Orbax and TensorStore print nothing on stderr; what fails is raised, and reported by who catches it.

    It may be entered by several threads at once. After a failure it holds for some seconds longer, since what was begun
    with the save that failed ends later.
    """
    _enter()
    try:
        yield
    except BaseException:
        late = threading.Timer(_LATE, _leave)
        late.name, late.daemon = "quiet", True
        late.start()
        raise
    _leave()


def _enter() -> None:
    global _users
    with _lock:
        _users += 1
        if _users == 1:
            _before.update(hook=sys.unraisablehook, level=logging.getLogger("orbax").level)
            sys.unraisablehook = _before["ours"] = _Hook(sys.unraisablehook)
            logging.getLogger("orbax").setLevel(logging.ERROR)
            logging.getLogger("absl").addFilter(_not_of_orbax)


def _leave() -> None:
    global _users
    with _lock:
        _users -= 1
        if _users == 0:
            logging.getLogger("absl").removeFilter(_not_of_orbax)
            logging.getLogger("orbax").setLevel(_before["level"])
            if sys.unraisablehook is _before["ours"]:  # else somebody has set another meanwhile
                sys.unraisablehook = _before["hook"]
            _before.clear()


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in PurePath(record.pathname).parts


class _Hook:
    """Of a save that has failed, TensorStore's other writes end later and find that nobody waits: no news."""

    def __init__(self, before: Any) -> None:
        self._before = before

    def __call__(self, unraisable: Any) -> None:
        if not (isinstance(unraisable.exc_value, RuntimeError) and "loop is closed" in str(unraisable.exc_value)):
            self._before(unraisable)
