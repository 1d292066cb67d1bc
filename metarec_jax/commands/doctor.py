"""``metarec doctor``: installed versions, the resources of the machine, and missing packages."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from metarec_jax.experiment.compiled import compile_cache
from metarec_jax.learners import registry

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
    "duckdb": "metarec prepare, for data larger than memory: pip install 'metarec_jax[store]'",
    "grain": "streaming from a task store: pip install 'metarec_jax[store]'",
    "tensorboardX": "curves of a run in TensorBoard: pip install 'metarec_jax[tensorboard]'",
}


def doctor(data_dir: Path | None = None) -> int:
    """Print the facts, one per line. Returns 0."""
    import jax

    from metarec_jax.data.io.datasets import DATASETS, cache_directory

    line("python", f"{sys.version.split()[0]}, {platform.system()} {platform.machine()}")
    for name in _PARTS:
        line(name, _version(name) or "MISSING: pip install metarec_jax")
    line("devices", ", ".join(f"{d.device_kind} ({d.platform} {d.id})" for d in jax.devices()))
    line(
        "threads", f"{_cores()} usable cores of {os.cpu_count()}; XLA_FLAGS={os.environ.get('XLA_FLAGS', '(not set)')}"
    )
    line("memory", _memory())
    line("compiled", str(compile_cache()))
    folder = cache_directory(data_dir)
    line("data", f"{folder}, {_free(folder)}")
    for name, dataset in DATASETS.items():
        there = (folder / name).is_dir() and any((folder / name).iterdir())
        line(
            "", f"{name}: {'present' if there else f'not present; metarec data {name} downloads it'} ({dataset.title})"
        )
    line("runs", f"{Path('runs').absolute()}, {_free(Path.cwd())}")
    for number, family in enumerate(registry.FAMILIES):
        members = [name for name, row in registry.ROWS.items() if row.family == family]
        line("" if number else "learners", f"{family}: {', '.join(members)}")
    for name, what in _EXTRAS.items():
        line(name, _version(name) or f"not installed; required for {what}")
    return 0


def line(name: str, text: str) -> None:
    """Print one named fact."""
    print(f"{name:<17} {text}" if len(name) < 18 else f"{name}  {text}")


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
