"""Compiled programs, kept between runs: a second start need not compile what the first one did.

The library itself never touches JAX's configuration; only the commands call `compile_cache`.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import NamedTuple

LARGEST = 512 * 2**20
"""Bytes that the folder may hold when a command begins; what was not used for longest goes first."""

_OWN, _JAX = "METAREC_COMPILE_CACHE_DIR", "JAX_COMPILATION_CACHE_DIR"


class CompileCache(NamedTuple):
    """Where compiled programs are kept.

    Attributes:
      folder: None where none are.
      why: what chose the folder, or why there is none.
      entries, size: how many programs it holds, and their bytes.
    """

    folder: Path | None
    why: str
    entries: int = 0
    size: int = 0

    def __str__(self) -> str:
        if self.folder is None:
            return f"not kept, every run compiles again: {self.why}"
        return f"{self.folder}, {self.entries} programs, {self.size / 2**20:.1f} MiB ({self.why})"


def compile_cache() -> CompileCache:
    """Let JAX keep compiled programs: in ``compiled/`` of the user's cache directory, at most `LARGEST` bytes.

    METAREC_COMPILE_CACHE_DIR names another folder; ``off``, or nothing, keeps none. JAX_COMPILATION_CACHE_DIR comes
    before both, and what it holds is never deleted here. Other settings that the environment makes
    (JAX_PERSISTENT_CACHE_..., JAX_COMPILATION_CACHE_MAX_SIZE) stay as they are. A folder that cannot be made or
    written means no cache, and an entry that cannot be read or written a compilation: never an error, nor a warning.
    """
    import jax

    folder, why = _chosen()
    if folder is None:
        if _JAX not in os.environ:
            jax.config.update("jax_compilation_cache_dir", None)
        return CompileCache(None, why)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "it may not be written")
        kept = _entries(folder)
        if _JAX not in os.environ:
            kept = _pruned(kept, LARGEST)
    except OSError as error:
        jax.config.update("jax_compilation_cache_dir", None)
        return CompileCache(None, f"{folder} cannot be used ({error.strerror})")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES" not in os.environ:
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # A full disk, an entry cut short: JAX compiles instead and warns, once for each of hundreds of programs.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache entry")
    return CompileCache(folder, why, len(kept), sum(entry.size for entry in kept))


def _chosen() -> tuple[Path | None, str]:
    from metarec_jax.data.io.datasets import cache_directory

    if (given := os.environ.get(_JAX)) is not None:
        return (Path(given).expanduser() if given else None), f"{_JAX}={given}"
    if (given := os.environ.get(_OWN)) is not None:
        off = given.strip().lower() in ("", "off")
        return (None if off else Path(given).expanduser()), f"{_OWN}={given}"
    return cache_directory() / "compiled", f"{_OWN} moves it, or is off"


class _Entry(NamedTuple):
    used: float
    path: Path
    size: int


def _entries(folder: Path) -> list[_Entry]:
    """The programs in a folder, with when each was last written or read (as far as the file system notes that)."""
    found = []
    for path in folder.glob("*-cache"):
        try:
            about = path.stat()
        except OSError:  # another process has just deleted it
            continue
        found.append(_Entry(max(about.st_atime, about.st_mtime), path, about.st_size))
    return found


def _pruned(entries: list[_Entry], largest: int) -> list[_Entry]:
    """Delete what was not used for longest until at most ``largest`` bytes are left; returns what is left.

    Not jax_compilation_cache_max_size: it requires the package filelock, locks for every read, lists the folder for
    every write, and fails on entries that were written without it.
    """
    kept, total = [], 0
    for entry in sorted(entries, reverse=True):
        total += entry.size
        if total <= largest:
            kept.append(entry)
        else:
            entry.path.unlink(missing_ok=True)
    return kept
