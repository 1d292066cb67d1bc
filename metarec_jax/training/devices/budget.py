"""How much memory a run takes, told by the compiler before it runs, and how much there is.

What is not known (no such file, a device that does not say) is None, and refuses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from metarec_jax.core import MetarecError

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


class Estimate(NamedTuple):
    """Bytes of a compiled program.

    Attributes:
      held: of its arguments: the parameters, their optimisers' state, the data. They are there already.
      working: of what it makes: temporaries, and the outputs that reuse no argument.
    """

    held: int
    working: int


def size_of(values: Any) -> int:
    """Bytes of the arrays of a pytree; of their shapes alone, as `jax.eval_shape` gives them, too.

    >>> size_of({"a": jax.ShapeDtypeStruct((3, 2), np.float32), "b": np.zeros(2, np.int32)})
    32
    """
    total = 0
    for leaf in jax.tree.leaves(values):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        total += int(np.prod(leaf.shape, dtype=np.int64)) * leaf.dtype.itemsize
    return total


def estimate(compiled: jax.stages.Compiled) -> Estimate | None:
    """What the compiler says that a program takes on a device; None where it does not say."""
    try:
        said = compiled.memory_analysis()
    except NotImplementedError:
        return None
    if said is None:
        return None
    made = said.temp_size_in_bytes + said.output_size_in_bytes - said.alias_size_in_bytes
    return Estimate(said.argument_size_in_bytes, made)


def free(device: jax.Device) -> int | None:
    """Bytes that can still be had on a device; None where that is unknown.

    Of an accelerator: its limit less what is in use. Of a CPU under Linux: what the machine has available, swap
    included, or what the process's control groups leave, whichever is less.
    """
    if device.platform != "cpu":
        stats: Mapping[str, int] = device.memory_stats() or {}
        known = "bytes_limit" in stats and "bytes_in_use" in stats
        return stats["bytes_limit"] - stats["bytes_in_use"] if known else None
    return host_free()


def host_free(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int | None:
    """Bytes that this process can still have, by Linux's files; None where they do not say."""
    machine = _machine(proc / "meminfo")
    if machine is None:
        return None
    available, swap = machine
    rooms = [_room(group, swap) for group in _groups(proc / "self" / "cgroup", cgroups)]
    return min([available + swap, *(room for room in rooms if room is not None)])


def refuse_what_does_not_fit(needed: int, there: int | None, what: str, remedy: str) -> None:
    """Raise where ``needed`` bytes are more than are ``there``.

    Raises:
      MetarecError: what takes how much, how much there is, and the remedy.

    >>> refuse_what_does_not_fit(2**30, 2**31, "a batch", "draw fewer tasks")
    >>> refuse_what_does_not_fit(2**30, None, "a batch", "draw fewer tasks")
    >>> refuse_what_does_not_fit(2**31, 2**30, "a batch", "draw fewer tasks")
    Traceback (most recent call last):
    metarec_jax.core.MetarecError: a batch would take another 2.0 GiB of memory, and 1.0 GiB are free; draw fewer tasks
    """
    if there is not None and needed > there:
        raise MetarecError(
            f"{what} would take another {spoken(needed)} of memory, and {spoken(max(there, 0))} are free; {remedy}"
        )


def spoken(size: int) -> str:
    """
    >>> spoken(3 * 2**30), spoken(5_000_000), spoken(700)
    ('3.0 GiB', '4.8 MiB', '0.7 KiB')
    """
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 2**10:.1f} KiB"


def _machine(meminfo: Path) -> tuple[int, int] | None:
    """Bytes available without swapping, and bytes of swap that are free."""
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
    """The memory control groups of this process, the inmost first, up to the root of what it can see."""
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return []
    found = []
    for number, controllers, path in (line for line in lines if len(line) == 3):
        if number == "0":
            base, names = root, _V2
        elif "memory" in controllers.split(","):
            base, names = root / "memory", _V1
        else:
            continue
        inmost = base / path.strip("/")
        found += [(group, names) for group in (inmost, *inmost.parents) if group == base or base in group.parents]
    return found


def _room(group: tuple[Path, _Names], swap: int) -> int | None:
    """Bytes below a control group's limit: cached files can be dropped, and free swap might take the rest."""
    folder, names = group
    try:
        limit, used = (int((folder / name).read_text()) for name in names[:2])
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return limit - used + int(stat[names.inactive]) + swap
    except (OSError, ValueError, KeyError):  # "max": no limit
        return None
