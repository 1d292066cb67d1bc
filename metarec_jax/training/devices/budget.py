"""How much memory a run takes, as estimated by the compiler, and how much is free.

An unknown amount (no such file, a device without statistics) is None, and nothing is refused because of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from metarec_jax.core import MetarecError

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


class ProgramMemory(NamedTuple):
    """Bytes that a compiled program takes on a device.

    Attributes:
      arguments: its arguments, which are allocated already: the parameters, their optimisers' state, the data.
      working: what it allocates: temporaries, and outputs that do not reuse an argument.
    """

    arguments: int
    working: int


def size_of(values: Any) -> int:
    """Bytes of the arrays of a pytree, which may be shapes from `jax.eval_shape`.

    >>> size_of({"a": jax.ShapeDtypeStruct((3, 2), np.float32), "b": np.zeros(2, np.int32)})
    32
    """
    total = 0
    for leaf in jax.tree.leaves(values):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        total += int(np.prod(leaf.shape, dtype=np.int64)) * leaf.dtype.itemsize
    return total


def estimate(compiled: jax.stages.Compiled) -> ProgramMemory | None:
    """The compiler's estimate of the memory of a program on a device; None where it has none."""
    try:
        analysis = compiled.memory_analysis()
    except NotImplementedError:
        return None
    if analysis is None:
        return None
    working = analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return ProgramMemory(analysis.argument_size_in_bytes, working)


def free(device: jax.Device) -> int | None:
    """Bytes that are free on a device; None where that is unknown.

    For an accelerator: its limit less the bytes in use. For a CPU under Linux: the available memory of the machine,
    swap included, or what the process's control groups leave, whichever is less.
    """
    if device.platform != "cpu":
        stats: Mapping[str, int] = device.memory_stats() or {}
        complete = "bytes_limit" in stats and "bytes_in_use" in stats
        return stats["bytes_limit"] - stats["bytes_in_use"] if complete else None
    return host_free()


def host_free(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int | None:
    """Bytes that this process can still allocate, by Linux's files; None where these are missing."""
    machine = _machine(proc / "meminfo")
    if machine is None:
        return None
    available, swap = machine
    rooms = [_room(group, swap) for group in _groups(proc / "self" / "cgroup", cgroups)]
    return min([available + swap, *(room for room in rooms if room is not None)])


def check_fits(needed: int, free: int | None, name: str, remedy: str) -> None:
    """Raise where more bytes are ``needed`` than ``free``; nothing is checked where ``free`` is None.

    Raises:
      MetarecError: the message has ``name``, both amounts and the remedy.

    >>> check_fits(2**30, 2**31, "a batch", "draw fewer tasks")
    >>> check_fits(2**30, None, "a batch", "draw fewer tasks")
    >>> check_fits(2**31, 2**30, "a batch", "draw fewer tasks")
    Traceback (most recent call last):
    metarec_jax.core.MetarecError: a batch would take another 2.0 GiB of memory, and 1.0 GiB are free; draw fewer tasks
    """
    if free is not None and needed > free:
        raise MetarecError(
            f"{name} would take another {format_bytes(needed)} of memory, and {format_bytes(max(free, 0))} are "
            f"free; {remedy}"
        )


def format_bytes(size: int) -> str:
    """A number of bytes as text, with a binary unit.

    >>> format_bytes(3 * 2**30), format_bytes(5_000_000), format_bytes(700)
    ('3.0 GiB', '4.8 MiB', '0.7 KiB')
    """
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 2**10:.1f} KiB"


def _machine(meminfo: Path) -> tuple[int, int] | None:
    """Bytes available without swapping, and free bytes of swap."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        available, swap = (int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "SwapFree"))
    except (OSError, ValueError, KeyError, IndexError):
        return None
    return available, swap


class _Names(NamedTuple):
    limit: str
    used: str
    inactive: str


_V2 = _Names("memory.max", "memory.current", "inactive_file")
_V1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _groups(membership: Path, root: Path) -> list[tuple[Path, _Names]]:
    """The memory control groups of this process, the innermost first, up to the root that it can see."""
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return []
    groups = []
    for number, controllers, path in (line for line in lines if len(line) == 3):
        if number == "0":
            base, names = root, _V2
        elif "memory" in controllers.split(","):
            base, names = root / "memory", _V1
        else:
            continue
        innermost = base / path.strip("/")
        ancestors = (innermost, *innermost.parents)
        groups += [(group, names) for group in ancestors if group == base or base in group.parents]
    return groups


def _room(group: tuple[Path, _Names], swap: int) -> int | None:
    """Bytes that a control group's limit leaves, counting cached files, which can be dropped, and free swap."""
    folder, names = group
    try:
        limit, used = (int((folder / name).read_text()) for name in names[:2])
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return limit - used + int(stat[names.inactive]) + swap
    except (OSError, ValueError, KeyError):  # "max": no limit
        return None
