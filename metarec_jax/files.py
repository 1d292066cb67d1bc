"""Files: written whole or not at all, known by their sha256; and what an `OSError` says of them, in words."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from pathlib import Path

_SPACE = "free some space there, or give a path on another disk"
_LIMIT = "raise the limit of open files: ulimit -n 4096"
_OTHER = "give another path"
_ADVICE = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: "raise the limit of file sizes: ulimit -f unlimited",
    errno.EACCES: "change its permissions (chmod), or give another path",
    errno.EPERM: "change its permissions (chmod), or give another path",
    errno.EROFS: _OTHER,
    errno.EMFILE: _LIMIT,
    errno.ENFILE: _LIMIT,
    errno.ENOENT: "check that it is there",
    errno.ENOTDIR: "a part of this path is a file, not a folder; give another path",
    errno.EISDIR: "give the path of a file",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.EIO: "the disk fails; give a path on another",
}


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file in one step, so that a reader, or a kill, never leaves half of it; text as UTF-8.

    It is on the disk before it gets its name. Several processes may write the same file: one of them stands.

    Raises:
      OSError: the folder is missing or cannot be written, or the disk is full; nothing is left behind.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with partial.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sha256(source: Path | bytes) -> str:
    """The digest of a file, which is read in parts, or of bytes.

    >>> sha256(b"")[:8]
    'e3b0c442'
    """
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    with source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cause(error: OSError | MemoryError) -> str:
    """The path, what the system says of it, and what to do, in one line.

    >>> cause(PermissionError(13, "Permission denied", "runs/a"))
    'runs/a: Permission denied; change its permissions (chmod), or give another path'
    """
    if isinstance(error, MemoryError):
        detail = f" ({error})" if str(error) else ""
        return f"the memory of this machine does not suffice{detail}; give a part of the data, or use a larger machine"
    if error.strerror is None:
        return " ".join(str(error).split()) or type(error).__name__
    paths = [str(path) for path in (error.filename, error.filename2) if path is not None]
    what = f"{' -> '.join(paths)}: {error.strerror}" if paths else error.strerror
    advice = _ADVICE.get(error.errno or 0)
    return what if advice is None else f"{what}; {advice}"
