"""A run directory: one process locks it, it belongs to one run, and all processes of the run see the same one."""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from metarec_jax import files
from metarec_jax.core import MetarecError
from metarec_jax.training.devices import processes

_FIRST, _OTHERS = ".lock", ".lock.others"
PATIENCE = 20.0
"""Seconds for which a run waits for the last process of an earlier one in its directory."""


def lock(directory: Path) -> tuple[int, str]:
    """Lock the directory, created if missing, until the handle is closed or this process ends, however it ends.

    Returns:
      The handle, and a token that is written into the directory.

    Raises:
      MetarecError: another process locks it, or takes part in a run that locked it; its file system has no locks.
    """
    directory.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(8)
    handle = _locked(directory, _FIRST, shared=False)
    try:
        _wait_for_others(directory)
        os.truncate(handle, 0)
        os.write(handle, f"{os.getpid()} {token}".encode())
        os.fsync(handle)
    except BaseException:
        os.close(handle)
        raise
    return handle, token


def join(directory: Path, token: str) -> int | None:
    """Take part in the run that the first process has locked; called by all, raises in all or in none.

    Returns:
      In the other processes, the handle by which each locks the directory, too, until it is closed; else None.

    Raises:
      MetarecError: a process has another directory under this name, or cannot lock it.
    """
    handle, failure = None, ""
    try:
        if (directory / _FIRST).read_text().split()[1:] != [token]:
            raise FileNotFoundError
        handle = None if processes.is_first() else _locked(directory, _OTHERS, shared=True)
    except FileNotFoundError:
        failure = (
            f"process {jax.process_index()} does not see in {directory} the run directory that process 0 has opened; "
            "give one on a file system that all processes share"
        )
    except (OSError, MetarecError) as error:
        failure = str(error)
    failures = [message for message in processes.gather(failure) if message]
    if failures:
        if handle is not None:
            os.close(handle)
        raise MetarecError(failures[0])
    return handle


class AnotherRun(MetarecError):
    """The directory holds another run.

    Attributes:
      other_data: whether the entry "data" of the two identities differs, which a caller with the data can explain.
    """

    def __init__(self, message: str, *, other_data: bool) -> None:
        super().__init__(message)
        self.other_data = other_data


def identify(directory: Path, identity: Mapping[str, Any], *, resumes: bool) -> None:
    """Record the run that the directory belongs to.

    Args:
      directory: the run directory.
      identity: JSON-able.
      resumes: whether the recorded run is resumed, and must have the same identity.

    Raises:
      AnotherRun: the recorded run has another identity; the message names the differences.
    """
    path, identity = directory / "identity.json", json.loads(json.dumps(identity))
    if resumes:
        try:
            recorded = json.loads(path.read_text())
        except (OSError, ValueError):
            recorded = {}
        if differ := different(recorded, identity):
            raise AnotherRun(
                f"{directory} holds another run: {'; '.join(differ)}. "
                "Give the old settings to resume it, another run directory, or start over (--fresh)",
                other_data=recorded.get("data", identity.get("data")) != identity.get("data"),
            )
    files.write_atomically(path, json.dumps(identity, indent=1))


def different(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One phrase for each entry in which two nested mappings differ.

    >>> different({"seed": 0, "model": {"size": 8}}, {"seed": 0, "model": {"size": 16}})
    ['model.size was 8, now 16']
    """
    lines = []
    for name in [*before, *(n for n in now if n not in before)]:
        old, new = before.get(name, "absent"), now.get(name, "absent")
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += different(old, new, f"{prefix}{name}.")
        elif old != new and _is_digest(old) and _is_digest(new):
            lines.append(f"{prefix}{name} has changed (sha256 {old[:8]}... then, {new[:8]}... now)")
        elif old != new:
            lines.append(f"{prefix}{name} was {old!r}, now {new!r}")
    return lines


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _wait_for_others(directory: Path) -> None:
    """Return once all processes of an earlier run have ended: they could still write into the saves of this one.

    JAX ends the processes of a run whose first one has ended, but some seconds later.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return os.close(_locked(directory, _OTHERS, shared=False))
        except MetarecError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _locked(directory: Path, name: str, *, shared: bool) -> int:
    handle = os.open(directory / name, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _flock(handle, shared)
    except OSError as error:
        holder = os.read(handle, 100).decode(errors="replace").split()
        os.close(handle)
        if not isinstance(error, BlockingIOError):
            raise MetarecError(
                f"{directory} cannot be locked ({error.strerror}), so two runs could train in it at once; "
                "name a run directory on a file system that has locks"
            ) from error
        raise MetarecError(
            f"{directory} is in use by another process{f' (pid {holder[0]})' if holder else ''}; "
            "wait for it, stop it, or name another run directory"
        ) from error
    return handle


def _flock(handle: int, shared: bool) -> None:
    try:
        import fcntl
    except ImportError:  # Windows has none: there the user must avoid two runs in one directory
        return
    fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
