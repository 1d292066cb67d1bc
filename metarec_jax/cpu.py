"""Settings of a CPU for embedding code: flags before XLA compiles, huge pages for large tables."""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from typing import Any

_UNROLL = "xla_cpu_disable_loop_unrolling"
"""LLVM unrolls a loop over a row of 32 numbers completely, and then no longer vectorises it: 3-5 times slower."""
_REDUCE = "--xla_cpu_experimental_ynn_fusion_type="
"""Sums over tasks by XLA's own loops: the library that XLA prefers took 480 us for [512, 64] -> [64]."""
THREADS_ENOUGH = 8
"""Threads that XLA's pool should have for a computation on several cores; ``NPROC`` sets them, else one per core.
jaxlib's batched Cholesky and triangular solves wait, in a thread of the pool, for other threads of the pool: with two
threads, two solves at once were seen to deadlock (jaxlib 0.10.2, ``ParallelBatchMap``)."""


def runs_together() -> int:
    """Number of programs that may run at once without waiting for each other's threads: 2, or 1 with few threads.

    >>> runs_together() in (1, 2)
    True
    """
    return 2 if threads() >= THREADS_ENOUGH else 1


def threads() -> int:
    """Number of threads that XLA's pool has, or will have once JAX computes."""
    setting = os.environ.get("NPROC", "")
    return int(setting) if setting.isdecimal() else cores()


def cores() -> int:
    """Number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tune_cpu() -> bool:
    """Let XLA vectorise loops over embedding rows on a CPU; call it before JAX computes anything.

    It adds to ``XLA_FLAGS``, which applies to the whole process and is read once, when JAX first computes; therefore
    the command line calls it, and the library does not. A flag that you set yourself is kept. Outer steps of the seed's
    model are 1.4 to 2 times as fast (``python -m benchmarks s1``). On few cores, but more than one, it also sets the
    number of threads to `THREADS_ENOUGH` (``NPROC``): with fewer, a program that solves linear systems twice, such as
    an `ensemble`, may deadlock. No effect on accelerators.

    Returns:
      Whether JAX computes with the flags, or will. False, with a warning, where JAX has already computed without them;
      the environment is then unchanged.

    >>> tune_cpu(), "xla_cpu_disable_loop_unrolling" in os.environ["XLA_FLAGS"]
    (True, True)
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _UNROLL not in flags and "jax" in sys.modules:
        from metarec_jax import jax_private

        if jax_private.backends_are_initialized():
            warnings.warn("tune_cpu() has no effect after JAX has begun to compute; call it first", stacklevel=2)
            return False
    if "xla_backend_extra_options" not in flags:
        flags = f"{flags} --xla_backend_extra_options={_UNROLL}"
    if _REDUCE not in flags and _knows_reduce():
        flags = f"{flags} {_REDUCE}"
    os.environ["XLA_FLAGS"] = flags.strip()
    if cores() > 1:
        os.environ.setdefault("NPROC", str(max(cores(), THREADS_ENOUGH)))
    return _UNROLL in flags


def missing_platform() -> str | None:
    """A message on the platforms in ``JAX_PLATFORMS`` that JAX cannot start, and what to do; None where all start.

    It is for callers that have seen JAX fail: JAX's own errors differ by platform, down to an empty AssertionError.
    """
    import jax

    setting = jax.config.jax_platforms  # type: ignore[attr-defined]
    if not setting:
        return None
    try:
        jax.devices()
    except (RuntimeError, AssertionError):
        jax.config.update("jax_platforms", None)
        try:
            started = ",".join(sorted({device.platform for device in jax.devices()}))
        finally:
            jax.config.update("jax_platforms", setting)
        return (
            f"JAX_PLATFORMS is {setting}, and JAX can start only {started} here; "
            f"unset it, or set JAX_PLATFORMS={started}"
        )
    return None


def _knows_reduce() -> bool:
    """Whether XLA has the flag: it ends the process on an unknown one, and the tested releases have this one."""
    from metarec_jax import jax_private

    return jax_private.is_tested()


_HUGEPAGE, _COLLAPSE = 14, 25
"""Advice of Linux's madvise: use huge pages here; turn pages that are already written into huge ones (Linux 6.1)."""


def huge_pages(arrays: Any, least: int = 32 * 2**20) -> int:
    """Ask Linux to keep the large arrays of a pytree in huge pages; returns the bytes for which it agreed.

    Rows of a large table are on different pages; with pages of 4 KiB each row also costs a walk through the page table.
    The contents do not change. It has no effect on other systems, on accelerators and on arrays below ``least`` bytes.

    >>> import jax.numpy as jnp
    >>> huge_pages({"small": jnp.zeros(3)})
    0
    """
    import jax

    if not sys.platform.startswith("linux"):
        return 0
    advise, agreed = ctypes.CDLL(None).madvise, 0
    for array in jax.tree.leaves(arrays):
        if (
            not isinstance(array, jax.Array)
            or array.nbytes < least
            or jax.dtypes.issubdtype(array.dtype, jax.dtypes.extended)
        ):
            continue
        for shard in array.addressable_shards:
            if shard.device.platform != "cpu":
                continue
            begin = shard.data.unsafe_buffer_pointer()
            first = -(-begin // 4096) * 4096
            length = (begin + shard.data.nbytes - first) // 4096 * 4096
            statuses = [advise(ctypes.c_void_p(first), ctypes.c_size_t(length), a) for a in (_HUGEPAGE, _COLLAPSE)]
            agreed += length if statuses[0] == 0 else 0
    return agreed
