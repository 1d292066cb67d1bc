"""Orbax and TensorStore log, trace and warn in addition to what they raise; here they only raise.

Only while they work for this library: afterwards the process's own logging and hooks are restored.
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
    """A context in which Orbax and TensorStore print nothing on stderr; errors are raised, for the caller to report.

    Several threads may enter it at once. After a failure it lasts some seconds longer, since other writes of the failed
    save end later.
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
            if sys.unraisablehook is _before["ours"]:  # else another one has been set meanwhile
                sys.unraisablehook = _before["hook"]
            _before.clear()


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in PurePath(record.pathname).parts


class _Hook:
    """Ignores the errors of TensorStore's other writes after a failed save, when no task waits for them any more."""

    def __init__(self, before: Any) -> None:
        self._before = before

    def __call__(self, unraisable: Any) -> None:
        if not (isinstance(unraisable.exc_value, RuntimeError) and "loop is closed" in str(unraisable.exc_value)):
            self._before(unraisable)
