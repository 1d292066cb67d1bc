"""The folders of checkpoints: marked when whole, checked by digest, deleted mark first.

A step is a folder named by its number. It is valid once it holds its mark: the sha256 of its files, written after all
of them have reached the disk. A folder without a mark is an incomplete save or deletion.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path

from metarec_jax import files

MARK = "sha256.json"
_OF_THE_MACHINE = frozenset({errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE})
"""Errors of reading that come from the machine, not from a file's contents."""


def steps(root: Path) -> list[int]:
    """Steps that were written whole, ascending."""
    return [step for step in numbered(root) if is_whole(root / str(step))]


def numbered(root: Path) -> list[int]:
    """Steps that have a folder, whole or not, ascending."""
    return sorted(int(p.name) for p in root.iterdir() if p.name.isdigit()) if root.is_dir() else []


def is_whole(folder: Path) -> bool:
    return (folder / MARK).exists()


def mark(folder: Path) -> None:
    """Write the mark, once the files are on the disk."""
    sums = _sums(folder, flush=True)
    files.write_atomically(folder / MARK, json.dumps(sums))
    _flush(folder)


def damage(folder: Path) -> str | None:
    """The damage of the files of a step, as text; None where they match the mark.

    Raises:
      OSError: the machine cannot read them at present, so that their contents are unknown.
    """
    if not is_whole(folder):
        return "its save, or its deletion, was interrupted"
    try:
        marked = json.loads((folder / MARK).read_text())
        sums = _sums(folder)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
            raise
        return str(error)
    if not isinstance(marked, dict):
        return f"{MARK} holds no digests"
    for name, digest in marked.items():
        if name not in sums:
            return f"{name} is missing"
        if sums[name] != digest:
            return f"the digest of {name} does not match"
    return None


def delete(folder: Path) -> None:
    """Delete a step, its mark first, so that a partly deleted one is not valid."""
    if folder.is_dir():
        (folder / MARK).unlink(missing_ok=True)
        shutil.rmtree(folder)


def make_way(folder: Path) -> None:
    """Delete a step where there is one, and check that its folder can be created."""
    delete(folder)
    folder.mkdir(parents=True)
    folder.rmdir()


def copy(source: Path, target: Path) -> None:
    """Copy a whole step atomically."""
    delete(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.copy")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    for file in partial.rglob("*"):
        _flush(file)
    os.replace(partial, target)
    _flush(target.parent)


def prune(root: Path, keep: int) -> None:
    """Delete all steps except the ``keep`` newest whole ones."""
    whole = steps(root)
    for step in numbered(root):
        if step not in whole[-keep:]:
            with contextlib.suppress(OSError):  # its mark is deleted, the rest is deleted the next time
                delete(root / str(step))


def sweep(root: Path) -> None:
    """Delete the temporary files and folders of incomplete saves."""
    for path in root.iterdir() if root.is_dir() else ():
        if not path.name.isdigit():
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _sums(folder: Path, *, flush: bool = False) -> dict[str, str]:
    """sha256 of every file of a step except its mark."""
    sums = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MARK):
        sums[path.relative_to(folder).as_posix()] = files.sha256(path)
        if flush:
            _flush(path)
    return sums


def _flush(path: Path) -> None:
    """Flush a file or a folder to the disk. A full or a failing disk may raise only here."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise  # other errors come from systems that do not flush files opened for reading
