"""When one process of a run dies, the others end at once, with one plain line, and can be started again.

A collective whose peer has died may wait; JAX's own heartbeat ends it after some seconds, with a stack trace. The
kernel closes the sockets of a process at once, however it ends: so each process keeps a connection to the first, which
informs the others. The first listens at the coordinator's address, and accepts only processes that know the token of
the run, which goes through the coordination service.
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
"""Exit status where another process has ended: EX_TEMPFAIL, "start it again"."""
_BYE, _PATIENCE, _NEWS = b"bye\n", 30.0, 3.0
_GREETING = 32 + 8
"""Length of the first message on a connection: the token and the number of the process."""


@contextlib.contextmanager
def watched(host: str, advice: str) -> Iterator[None]:
    """A context in which the death of another process ends this one with status `LOST`; no effect in a run of one.

    An exception in it ends the other processes, too, except `MetarecError`, which all of them raise.

    Args:
      host: host at which the first process can be reached.
      advice: end of the printed line: what to do.
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
    """Give the watch time to detect which process has ended, and to end this one. Returns where it detected none."""
    time.sleep(_NEWS)


def end(name: str, advice: str) -> None:
    """Print that the process ``name`` has ended, and end this one: an ordinary exit would wait for the others."""
    print(f"\nerror: {name} has ended; {advice}", file=sys.stderr, flush=True)
    os._exit(LOST)


def _lines_to_all(host: str) -> dict[socket.socket, int]:
    """In the first process: a connection from each of the others. JAX's heartbeat watches one that does not connect.

    A connection that does not begin with the token of the run is closed, and does not delay the others.
    """
    token, accepted, begun = secrets.token_hex(16), dict[socket.socket, int](), dict[socket.socket, bytes]()
    deadline = time.monotonic() + _PATIENCE
    with _server(host) as server, selectors.DefaultSelector() as waiting:
        waiting.register(server, selectors.EVENT_READ)
        processes.send("metarec/watch", f"{server.getsockname()[1]} {token}")
        while len(accepted) < processes.count() - 1 and (left := deadline - time.monotonic()) > 0:
            for key, _ in waiting.select(left):
                if key.fileobj is server:
                    with contextlib.suppress(OSError):  # it has disconnected already
                        line, _ = server.accept()
                        line.setblocking(False)
                        waiting.register(line, selectors.EVENT_READ)
                        begun[line] = b""
                    continue
                line = key.fileobj  # type: ignore[assignment]
                greeting = begun[line] + _received(line, _GREETING - len(begun[line]))
                if len(begun[line]) < len(greeting) < _GREETING:  # the rest is on its way
                    begun[line] = greeting
                    continue
                waiting.unregister(line)
                del begun[line]
                number = _number(greeting, token)
                if 0 < number < processes.count() and number not in accepted.values():
                    line.setblocking(True)
                    accepted[line] = number
                else:
                    line.close()
        for line in begun:
            line.close()
    return accepted


def _server(host: str) -> socket.socket:
    """A server at the coordinator's address, or, where that is not one of this machine (behind a proxy), at all."""
    with contextlib.suppress(OSError):
        family, *_, address = socket.getaddrinfo(host.strip("[]"), 0, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    return socket.create_server(("", 0))


def _received(line: socket.socket, most: int) -> bytes:
    try:
        return line.recv(most)
    except OSError:
        return b""


def _greeting(token: str, number: int) -> bytes:
    return f"{token}{number:08d}".encode()


def _number(greeting: bytes, token: str) -> int:
    """Number of the process that sent this greeting; -1 where it does not belong to this run.

    >>> _number(_greeting("5f" * 16, 3), "5f" * 16), _number(_greeting("00" * 16, 3), "5f" * 16)
    (3, -1)
    """
    sent, number = greeting[:-8], greeting[-8:]
    valid = len(greeting) == _GREETING and secrets.compare_digest(sent, token.encode()) and number.isdigit()
    return int(number) if valid else -1


def _line_to_first(host: str) -> dict[socket.socket, int]:
    port, token = processes.receive("metarec/watch").split()
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
                    message = line.recv(16)
                except OSError:
                    message = b""
                if message == _BYE or leaving.is_set():
                    watching.unregister(line)
                    continue
                lost = message.decode() if message else str(lines[line])
                for other in lines:
                    if processes.is_first() and other is not line:
                        with contextlib.suppress(OSError):
                            other.sendall(lost.encode())
                end(f"process {lost} of {processes.count()}", advice)
