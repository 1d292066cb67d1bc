"""What the processes of one run tell each other: one decides, all learn of it, and none waits for what cannot come.

Words go through the coordination service of `jax.distributed`, not through the devices: they may be sent from any
thread while the devices compute. All processes make these calls in the same order; a single process talks to itself.
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


_turns = itertools.count()
_POLL_MS = 5_000


def count() -> int:
    """How many processes run together. Starts no backend where `jax.distributed` was not initialised."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that decides."""
    return count() == 1 or jax.process_index() == 0


def decide(choose: Callable[[], Any]) -> Any:
    """``choose()`` of the first process, in all of them; what it raises is raised in all.

    Args:
      choose: gives something JSON-able.

    Raises:
      MetarecError: the first process could not choose; the others raise the same words.

    >>> decide(lambda: [1, 2])
    [1, 2]
    """
    if count() == 1:
        return choose()
    name = turn()
    if not is_first():
        told = json.loads(hear(name))
        if "error" in told:
            raise MetarecError(told["error"])
        return told["chosen"]
    try:
        chosen = choose()
    except BaseException as error:
        tell(name, json.dumps({"error": str(error) or type(error).__name__}))
        raise
    tell(name, json.dumps({"chosen": chosen}))
    return chosen


def gather(word: str) -> list[str]:
    """The word of each process, in the order of the processes, in all of them.

    >>> gather("here")
    ['here']
    """
    if count() == 1:
        return [word]
    name = turn()
    tell(f"{name}/{jax.process_index()}", word)
    return [hear(f"{name}/{k}") for k in range(count())]


def turn() -> str:
    """A name for the next thing said, the same in all processes."""
    return f"metarec/{next(_turns)}"


def tell(name: str, word: str) -> None:
    """Say ``word`` under a name; of several the first stands."""
    try:
        _client().key_value_set(name, word)
    except jax.errors.JaxRuntimeError as error:
        if "ALREADY_EXISTS" not in str(error):
            raise


def hear(name: str) -> str:
    """The word under a name, once it is said.

    Raises:
      jax.errors.JaxRuntimeError: process 0 has gone. JAX itself ends a process some seconds after another was lost.
    """
    while True:
        try:
            return _client().blocking_key_value_get(name, _POLL_MS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def leave(code: int) -> NoReturn:
    """End this process with an exit code, and, where there are several, at once.

    The usual end of one of several waits for all of them, for five minutes where one waits for a save that cannot end.
    """
    if count() == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _client() -> Any:
    return jax_private.key_value_client()
