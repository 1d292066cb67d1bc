"""``metarec doctor``: what is installed, what the machine offers, and what is missing."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PARTS = (
    "metarec_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "rax",
    "numpy",
    "pandas",
    "pyarrow",
    "tyro",
)
_EXTRAS = {
    "tensorboardX": "curves of a run in TensorBoard: pip install 'metarec_jax[tensorboard]'",
}


def compile_cache() -> Path | None:
    """Keep compiled programs between runs, in JAX_COMPILATION_CACHE_DIR or the user's cache; None where it cannot be.

    Settings that the environment makes (JAX_PERSISTENT_CACHE_...) are left as they are.
    """
    import jax

    from metarec_jax.data.datasets import cache_directory

    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if given == "":
        return None
    folder = Path(given) if given else cache_directory() / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(folder, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES" not in os.environ:
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


def doctor(data_dir: Path | None = None) -> int:
    """Print the facts, one a line. Returns 0."""
    import jax

    from metarec_jax.data.datasets import DATASETS, cache_directory

    line("python", f"{sys.version.split()[0]}, {platform.system()} {platform.machine()}")
    for name in _PARTS:
        line(name, _version(name) or "MISSING: pip install metarec_jax")
    line("devices", ", ".join(f"{d.device_kind} ({d.platform} {d.id})" for d in jax.devices()))
    line(
        "threads", f"{_cores()} usable cores of {os.cpu_count()}; XLA_FLAGS={os.environ.get('XLA_FLAGS', '(not set)')}"
    )
    line("memory", _memory())
    cache = compile_cache()
    kept = 0 if cache is None else sum(1 for _ in cache.iterdir())
    line("compiled", "not kept: every run compiles anew" if cache is None else f"{cache}, {kept} entries")
    folder = cache_directory(data_dir)
    line("data", f"{folder}, {_free(folder)}")
    for name, dataset in DATASETS.items():
        there = (folder / name).is_dir() and any((folder / name).iterdir())
        line("", f"{name}: {'here' if there else f'not here; metarec data {name} fetches it'} ({dataset.title})")
    line("runs", f"{Path('runs').absolute()}, {_free(Path.cwd())}")
    for name, what in _EXTRAS.items():
        found = _version(name)
        line(name, found or f"not installed; it brings {what}")
    return 0


def line(name: str, text: str) -> None:
    """Print a fact."""
    print(f"{name:<18}{text}")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> str:
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return "unknown"
    return f"{pages * size / 2**30:.1f} GiB"


def _free(folder: Path) -> str:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    writable = "" if os.access(folder, os.W_OK) else ", NOT WRITABLE"
    return f"{shutil.disk_usage(folder).free / 2**30:.1f} GiB free{writable}"
