"""When one process of a run dies, the others end at once, in one plain line, and can be started again.

A collective whose peer has died may wait; JAX's own heartbeat ends it after some seconds, with a stack trace. The
kernel closes the sockets of a process at once, however it ends: so each holds a line to the first, which passes the
news on.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator

import jax

from metarec_jax.core import MetarecError
from metarec_jax.training import processes

LOST = 75
"""Exit status where another process has gone: EX_TEMPFAIL, "start it again"."""
_BYE, _PATIENCE, _NEWS = b"bye\n", 30.0, 3.0


@contextlib.contextmanager
def watched(host: str, advice: str) -> Iterator[None]:
    """Within it, the death of another process ends this one with status `LOST`. Nothing happens in a run of one.

    What is raised in it is news for the others, too, and ends them; but for `MetarecError`, which all of them raise.

    Args:
      host: where the first process can be reached.
      advice: what to do, for the line.
    """
    if processes.count() == 1:
        yield
        return
    lines = _lines_to_all() if processes.is_first() else _line_to_first(host)
    leaving = threading.Event()
    threading.Thread(target=_listen, args=(lines, leaving, advice), daemon=True, name="watch").start()
    last = b""
    try:
        yield
        last = _BYE
    except MetarecError:
        last = _BYE
        raise
    finally:
        leaving.set()
        for line in lines:
            with contextlib.suppress(OSError):
                line.sendall(last)
                line.shutdown(socket.SHUT_WR)


def wait_for_news() -> None:
    """Give the watch a moment to hear which process has gone: it ends this one. Returns where it heard of none."""
    time.sleep(_NEWS)


def end(who: str, advice: str) -> None:
    """Say that ``who`` has gone, and end this process: an ordinary exit would wait for the others."""
    print(f"\nerror: {who} has gone; {advice}", file=sys.stderr, flush=True)
    os._exit(LOST)


def _lines_to_all() -> dict[socket.socket, int]:
    """On the first process: a line from each of the others. One that cannot come is left to JAX's heartbeat."""
    found: dict[socket.socket, int] = {}
    with socket.create_server(("", 0)) as server:
        server.settimeout(_PATIENCE)
        processes.tell("metarec/watch", str(server.getsockname()[1]))
        with contextlib.suppress(OSError, ValueError):
            while len(found) < processes.count() - 1:
                line, _ = server.accept()
                line.settimeout(_PATIENCE)
                found[line] = int(line.recv(16))
                line.settimeout(None)
    return found


def _line_to_first(host: str) -> dict[socket.socket, int]:
    port = int(processes.hear("metarec/watch"))
    with contextlib.suppress(OSError):
        line = socket.create_connection((host, port), _PATIENCE)
        line.settimeout(None)
        line.sendall(str(jax.process_index()).encode())
        return {line: 0}
    return {}


def _listen(lines: dict[socket.socket, int], leaving: threading.Event, advice: str) -> None:
    with selectors.DefaultSelector() as watching:
        for each in lines:
            watching.register(each, selectors.EVENT_READ)
        while watching.get_map():
            for key, _ in watching.select():
                line: socket.socket = key.fileobj  # type: ignore[assignment]
                try:
                    said = line.recv(16)
                except OSError:
                    said = b""
                if said == _BYE or leaving.is_set():
                    watching.unregister(line)
                    continue
                gone = said.decode() if said else str(lines[line])
                for other in lines:
                    if processes.is_first() and other is not line:
                        with contextlib.suppress(OSError):
                            other.sendall(gone.encode())
                end(f"process {gone} of {processes.count()}", advice)
