"""A run directory: one process holds it, it belongs to one run, and all processes of the run see the same one."""

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
    """Hold the directory, made if missing, until the handle is closed or this process ends, however it ends.

    Returns:
      The handle, and a token that whoever sees the directory finds in it.

    Raises:
      MetarecError: another process holds it, or takes part in a run that held it; its file system knows no locks.
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
      Of the other processes the handle by which each holds the directory, too, until it is closed.

    Raises:
      MetarecError: one of them has another directory under this name, or cannot hold it.
    """
    handle, wrong = None, ""
    try:
        if (directory / _FIRST).read_text().split()[1:] != [token]:
            raise FileNotFoundError
        handle = None if processes.is_first() else _locked(directory, _OTHERS, shared=True)
    except FileNotFoundError:
        wrong = (
            f"process {jax.process_index()} does not find in {directory} the run directory that process 0 has opened; "
            "give one on a file system that all processes share"
        )
    except (OSError, MetarecError) as error:
        wrong = str(error)
    failures = [word for word in processes.gather(wrong) if word]
    if failures:
        if handle is not None:
            os.close(handle)
        raise MetarecError(failures[0])
    return handle


class AnotherRun(MetarecError):
    """The directory holds another run.

    Attributes:
      other_data: whether the entry "data" of the two identities differs, which whoever knows the data can explain.
    """

    def __init__(self, message: str, *, other_data: bool) -> None:
        super().__init__(message)
        self.other_data = other_data


def identify(directory: Path, identity: Mapping[str, Any], *, resumes: bool) -> None:
    """Record what run the directory belongs to.

    Args:
      identity: JSON-able.
      resumes: whether the run that is recorded there goes on, and so must be the same.

    Raises:
      AnotherRun: the run that is recorded there is another one; the differences are named.
    """
    path, identity = directory / "identity.json", json.loads(json.dumps(identity))
    if resumes:
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError):
            found = {}
        if differ := different(found, identity):
            raise AnotherRun(
                f"{directory} holds another run: {'; '.join(differ)}. "
                "Give the old settings to resume it, another run directory, or start over (--fresh)",
                other_data=found.get("data", identity.get("data")) != identity.get("data"),
            )
    files.write_atomically(path, json.dumps(identity, indent=1))


def different(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One phrase for each entry in which two nested mappings differ.

    >>> different({"seed": 0, "model": {"size": 8}}, {"seed": 0, "model": {"size": 16}})
    ['model.size was 8, now 16']
    """
    lines = []
    for name in [*found, *(n for n in wanted if n not in found)]:
        old, new = found.get(name, "absent"), wanted.get(name, "absent")
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
    """Return when no process lives that took part in an earlier run: it could still write, into the saves of this one.

    JAX ends a process whose first one has gone, but some seconds later.
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
    except ImportError:  # Windows has none: two runs in one directory are then the user's care
        return
    fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
