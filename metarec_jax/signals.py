"""Ctrl-C and SIGTERM end a command within a second, whatever it is doing, and never in the middle of a save.

Python runs a signal's handler in the main thread, between two of its own instructions: not while XLA compiles or
computes, nor during a large product. So the signal also wakes a second thread (`signal.set_wakeup_fd`). It gives the
main thread `PATIENCE` seconds, then prints what is kept and ends the process. It waits for two things, and prints that
it does: a save that is being written (`saving`), and training, which finishes the steps under way and saves
(`StopSignal`). Files of this program are written whole or not at all, so the process may end at any other point.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

PATIENCE = 0.6
"""Seconds that the main thread has to end by itself, by an exception."""
_NUMBERS = (signal.SIGINT, signal.SIGTERM)
STATUSES = tuple(128 + number for number in _NUMBERS)
"""Exit statuses of a command that a signal ended: 130 and 143, as in shells."""
_POLL = 0.05

_lock = threading.Lock()
_saves: list[tuple[str, int]] = []
"""Name of each save that is being written, and its thread."""
_stops: list[StopSignal] = []
_kept: str | Callable[[], str] = ""
_pending: list[int] = []
"""A signal that came while the main thread was saving."""
_ended: list[int] = []
"""The signal whose last line has been printed."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the command. ``status`` is the exit status: 130 for SIGINT, 143 for SIGTERM."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.status = 128 + number


def keep(text: str | Callable[[], str]) -> None:
    """Set the part of an interrupted command's last line that says what is kept; a function is called at the end."""
    global _kept
    _kept = text


def print_end(number: int) -> None:
    """Print that the signal ended the command and what is kept, once in a process."""
    with _lock:
        if _ended:
            return
        _ended.append(number)
    kept = _kept if isinstance(_kept, str) else _kept()
    show_cursor = "\033[?25h" if sys.stderr.isatty() else ""  # a progress bar hides it
    print(
        f"{show_cursor}{signal.Signals(number).name}: ended{f'; {kept}' if kept else ''}", file=sys.stderr, flush=True
    )


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """A context in which SIGINT and SIGTERM raise `Interrupted` in the main thread, or end a process that is busy.

    For a program: the command line, an example. A signal that the process ignores (``nohup``) stays ignored.
    Outside of the main thread, where Python does not handle signals, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    raised: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if raised:  # a second signal must not interrupt the clean-up after the first
            return
        raised.append(number)
        if any(thread == threading.get_ident() for _, thread in _saves):
            _pending.append(number)
            return
        raise Interrupted(number)

    here, there = socket.socketpair()
    there.setblocking(False)
    keep("")
    _ended.clear()
    _pending.clear()
    old = _handled_by(handle)
    wakeup = signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(here,), daemon=True, name="signals").start()
    try:
        yield
    finally:
        while raised and _saves:  # of other threads; the listener prints meanwhile what this waits for
            time.sleep(_POLL)
        signal.set_wakeup_fd(wakeup)
        for number, before in old.items():
            signal.signal(number, before)
        there.close()


@contextlib.contextmanager
def saving(name: str) -> Iterator[None]:
    """A context, in any thread, in which a signal waits until the file or folder ``name`` is written."""
    entry = (name, threading.get_ident())
    _saves.append(entry)
    try:
        yield
    finally:
        _saves.remove(entry)
    if _pending and threading.current_thread() is threading.main_thread() and entry not in _saves:
        raise Interrupted(_pending.pop())


class StopSignal:
    """Turns SIGINT and SIGTERM into a flag, so that a run saves and ends. A second signal raises `Interrupted`.

    Outside of the main thread, where Python does not handle signals, it does nothing and is never set.

    >>> with StopSignal() as stop:
    ...     bool(stop)
    False
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.saves = True
        self._old: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.number is not None

    @property
    def name(self) -> str | None:
        """Name of the signal that came, such as "SIGTERM"; None before that."""
        return None if self.number is None else signal.Signals(self.number).name

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._old = _handled_by(self._handle)
            _stops.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        for number, old in self._old.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)
        self._old = {}
        if self in _stops:
            _stops.remove(self)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.number = self.number is not None, self.number or number
        if again or not self.saves:
            raise Interrupted(self.number)


@contextlib.contextmanager
def nothing_to_save() -> Iterator[None]:
    """A context for a part of training, such as compiling, that a signal ends at once: nothing would be lost."""
    stop = _stops[-1] if _stops and threading.current_thread() is threading.main_thread() else None
    if stop is None:
        yield
        return
    stop.saves = False
    try:
        if stop.number is not None:
            raise Interrupted(stop.number)
        yield
    finally:
        stop.saves = True


def _handled_by(handle: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Install a handler for each of the signals that the process does not ignore; returns the previous handlers."""
    numbers = [number for number in _NUMBERS if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handle) for number in numbers}


def _listen(pipe: socket.socket) -> None:
    """Wait for a signal, then for the main thread to end, then end the process. Returns when the pipe is closed."""
    number, count, deadline, printed = 0, 0, 0.0, ""
    with pipe:
        while True:
            if select.select([pipe], [], [], _POLL if number else None)[0]:
                if not (received := pipe.recv(64)):
                    return
                for each in received:
                    if each in _NUMBERS:
                        number, count = number or each, count + 1
                        deadline = deadline or time.monotonic() + PATIENCE
            if not number or time.monotonic() < deadline:
                continue
            waits = _waits_for(again=count > 1)
            if not waits:
                _flushed(functools.partial(print_end, number))
                os._exit(128 + number)
            if waits != printed:
                printed = waits
                _flushed(functools.partial(print, f"{signal.Signals(number).name}: {waits}", file=sys.stderr))
            deadline = time.monotonic() + PATIENCE


def _waits_for(*, again: bool) -> str:
    """Why the process does not end yet; "" where nothing would be lost, or a second signal came."""
    if _saves:
        return f"{_saves[-1][0]} is being written; the program ends when that is done"
    if _stops and _stops[-1].saves and not again:
        return "training stops after the steps under way and saves; a second signal ends it at once"
    return ""


def _flushed(write: Callable[[], None]) -> None:
    """Call ``write`` and flush stdout; in a thread, since another one may hold the stream for ever."""

    def work() -> None:
        with contextlib.suppress(OSError, ValueError):
            write()
            sys.stdout.flush()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(0.2)
