"""Messages between the processes of one run: one decides, all receive it, and none waits for one that has ended.

Messages go through the coordination service of `jax.distributed`, not through the devices: they may be sent from any
thread while the devices compute. All processes make these calls in the same order; a single process sends nothing.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import jax

from metarec_jax import jax_private
from metarec_jax.core import MetarecError


class Lost(MetarecError):
    """Another process of the run has ended."""


_numbers = itertools.count()
_POLL_MS = 5_000


def count() -> int:
    """Number of processes of the run. Starts no backend where `jax.distributed` was not initialised."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that decides."""
    return count() == 1 or jax.process_index() == 0


def decide(choose: Callable[[], Any]) -> Any:
    """The result of ``choose()`` in the first process, in all of them; an error there is raised in all.

    Args:
      choose: returns a JSON-able value.

    Raises:
      MetarecError: ``choose()`` failed in the first process; the others raise the same message.

    >>> decide(lambda: [1, 2])
    [1, 2]
    """
    if count() == 1:
        return choose()
    name = next_name()
    if not is_first():
        message = json.loads(receive(name))
        if "error" in message:
            raise MetarecError(message["error"])
        return message["chosen"]
    try:
        chosen = choose()
    except BaseException as error:
        send(name, json.dumps({"error": str(error) or type(error).__name__}))
        raise
    send(name, json.dumps({"chosen": chosen}))
    return chosen


def gather(message: str) -> list[str]:
    """The message of each process, in the order of the processes, in all of them.

    >>> gather("here")
    ['here']
    """
    if count() == 1:
        return [message]
    name = next_name()
    send(f"{name}/{jax.process_index()}", message)
    return [receive(f"{name}/{k}") for k in range(count())]


def next_name() -> str:
    """A name for the next message, the same in all processes."""
    return f"metarec/{next(_numbers)}"


def send(name: str, message: str) -> None:
    """Publish a message under a name; of several the first is kept."""
    try:
        _client().key_value_set(name, message)
    except jax.errors.JaxRuntimeError as error:
        if "ALREADY_EXISTS" not in str(error):
            raise


def receive(name: str) -> str:
    """The message under a name; waits until it is published.

    Raises:
      jax.errors.JaxRuntimeError: process 0 has ended. JAX itself ends a process some seconds after another was lost.
    """
    while True:
        try:
            return _client().blocking_key_value_get(name, _POLL_MS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def leave(code: int) -> NoReturn:
    """End this process with an exit code; one of several processes ends at once.

    The ordinary exit of one of several waits for all: for five minutes where one waits for a save that cannot end.
    """
    if count() == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _client() -> Any:
    return jax_private.key_value_client()
