"""When one process of a run dies, the others end at once, in one plain line, and can be started again.

A collective whose peer has died may wait; JAX's own heartbeat ends it after some seconds, with a stack trace. The
kernel closes the sockets of a process at once, however it ends: so each holds a line to the first, which passes the
news on. The first listens where it is the coordinator, and takes those alone who know the token of the run, which goes
through the coordination service.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator

import jax

from metarec_jax.core import MetarecError
from metarec_jax.training.devices import processes

LOST = 75
"""Exit status where another process has gone: EX_TEMPFAIL, "start it again"."""
_BYE, _PATIENCE, _NEWS = b"bye\n", 30.0, 3.0
_GREETING = 32 + 8
"""Bytes with which a line begins: the token and the number of the process."""


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
    lines = _lines_to_all(host) if processes.is_first() else _line_to_first(host)
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


def _lines_to_all(host: str) -> dict[socket.socket, int]:
    """On the first process: a line from each of the others. One that cannot come is left to JAX's heartbeat.

    Whoever does not begin with the token of the run is not let in, and holds up nobody.
    """
    token, found, begun = secrets.token_hex(16), dict[socket.socket, int](), dict[socket.socket, bytes]()
    deadline = time.monotonic() + _PATIENCE
    with _server(host) as server, selectors.DefaultSelector() as waiting:
        waiting.register(server, selectors.EVENT_READ)
        processes.tell("metarec/watch", f"{server.getsockname()[1]} {token}")
        while len(found) < processes.count() - 1 and (left := deadline - time.monotonic()) > 0:
            for key, _ in waiting.select(left):
                if key.fileobj is server:
                    with contextlib.suppress(OSError):  # whoever came has left
                        line, _ = server.accept()
                        line.setblocking(False)
                        waiting.register(line, selectors.EVENT_READ)
                        begun[line] = b""
                    continue
                line = key.fileobj  # type: ignore[assignment]
                said = begun[line] + _received(line, _GREETING - len(begun[line]))
                if len(begun[line]) < len(said) < _GREETING:  # the rest is on its way
                    begun[line] = said
                    continue
                waiting.unregister(line)
                del begun[line]
                who = _who(said, token)
                if 0 < who < processes.count() and who not in found.values():
                    line.setblocking(True)
                    found[line] = who
                else:
                    line.close()
        for line in begun:
            line.close()
    return found


def _server(host: str) -> socket.socket:
    """A server at the coordinator's address; at all of this machine's where that is none of them, as behind a proxy."""
    with contextlib.suppress(OSError):
        family, *_, address = socket.getaddrinfo(host.strip("[]"), 0, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    return socket.create_server(("", 0))


def _received(line: socket.socket, most: int) -> bytes:
    try:
        return line.recv(most)
    except OSError:
        return b""


def _greeting(token: str, who: int) -> bytes:
    return f"{token}{who:08d}".encode()


def _who(said: bytes, token: str) -> int:
    """Which process has sent this greeting; -1 where it is none of this run.

    >>> _who(_greeting("5f" * 16, 3), "5f" * 16), _who(_greeting("00" * 16, 3), "5f" * 16)
    (3, -1)
    """
    known, number = said[:-8], said[-8:]
    right = len(said) == _GREETING and secrets.compare_digest(known, token.encode()) and number.isdigit()
    return int(number) if right else -1


def _line_to_first(host: str) -> dict[socket.socket, int]:
    port, token = processes.hear("metarec/watch").split()
    with contextlib.suppress(OSError):
        line = socket.create_connection((host.strip("[]"), int(port)), _PATIENCE)
        line.settimeout(None)
        line.sendall(_greeting(token, jax.process_index()))
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
