"""The folders of checkpoints: marked when whole, checked by digest, deleted mark first.

A step is a folder named by its number. It counts from the moment its mark stands in it: the sha256 of its files,
written after all of them and after they have reached the disk. What has no mark is what a kill left of a save or of a
deletion.
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
"""Errors of reading that say nothing of a file's contents."""


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
    """What is wrong with the files of a step, in words; None where they are those that were marked.

    Raises:
      OSError: the machine cannot read them at present, so that nothing is known of them.
    """
    if not is_whole(folder):
        return "its save, or its deletion, was cut short"
    try:
        marked = json.loads((folder / MARK).read_text())
        found = _sums(folder)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
            raise
        return str(error)
    if not isinstance(marked, dict):
        return f"{MARK} holds no digests"
    for name, digest in marked.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != digest:
            return f"the digest of {name} does not match"
    return None


def delete(folder: Path) -> None:
    """Delete a step, its mark first: half of it is never taken for a step."""
    if folder.is_dir():
        (folder / MARK).unlink(missing_ok=True)
        shutil.rmtree(folder)


def make_way(folder: Path) -> None:
    """Delete a step where there is one, and make sure that its folder can be made."""
    delete(folder)
    folder.mkdir(parents=True)
    folder.rmdir()


def copy(source: Path, target: Path) -> None:
    """A copy of a whole step, there at once or not at all."""
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
    """Leave the ``keep`` newest whole steps, and nothing that is not whole."""
    whole = steps(root)
    for step in numbered(root):
        if step not in whole[-keep:]:
            with contextlib.suppress(OSError):  # its mark is off, the rest goes the next time
                delete(root / str(step))


def sweep(root: Path) -> None:
    """Delete what saves that did not end have left beside the steps."""
    for path in root.iterdir() if root.is_dir() else ():
        if not path.name.isdigit():
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _sums(folder: Path, *, flush: bool = False) -> dict[str, str]:
    """sha256 of every file of a step but its mark."""
    sums = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MARK):
        sums[path.relative_to(folder).as_posix()] = files.sha256(path)
        if flush:
            _flush(path)
    return sums


def _flush(path: Path) -> None:
    """Bring a file or a folder to the disk. A full or a failing disk may say so only here."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise  # any other: a system that does not flush what was opened for reading
