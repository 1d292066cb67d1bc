"""What a CPU needs to be told for embedding code: flags before XLA compiles, huge pages under large tables."""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from typing import Any

_UNROLL = "xla_cpu_disable_loop_unrolling"
"""LLVM unrolls a loop over a row of 32 numbers whole, and then no longer finds vectors in it: 3-5 times slower."""
_REDUCE = "--xla_cpu_experimental_ynn_fusion_type="
"""Sums over tasks by XLA's own loops: the library that XLA prefers took 480 us for [512, 64] -> [64]."""
THREADS_ENOUGH = 8
"""Threads of XLA's pool that a computation on several cores should find; ``NPROC`` says how many, else one a core.
jaxlib's batched Cholesky and triangular solves wait, in a thread of the pool, for others of the pool: of two threads,
two solves at once were seen to wait for ever (jaxlib 0.10.2, ``ParallelBatchMap``)."""


def runs_together() -> int:
    """How many programs may run at once without waiting for each other's threads: 2, or 1 where there are few threads.

    >>> runs_together() in (1, 2)
    True
    """
    return 2 if threads() >= THREADS_ENOUGH else 1


def threads() -> int:
    """Threads that XLA's pool has, or will have once JAX computes."""
    given = os.environ.get("NPROC", "")
    return int(given) if given.isdecimal() else cores()


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tune_cpu() -> bool:
    """Let XLA vectorise loops over embedding rows on a CPU; call it before JAX computes anything.

    It adds to ``XLA_FLAGS``, which holds for the whole process and is read once, when JAX first computes; so the
    library never calls it by itself, and the command line does. A flag that you set yourself is left as it is. Outer
    steps of the seed's model are 1.4 to 2 times as fast (``python -m benchmarks s1``). On few cores, but more than one,
    it also asks for `THREADS_ENOUGH` threads (``NPROC``): without, what solves linear systems twice in one program,
    such as an `ensemble`, may wait for ever. No effect on accelerators.

    Returns:
      Whether JAX computes with the flags, or will. False, with a warning, where JAX has computed already without them;
      the environment is then left as it is.

    >>> tune_cpu(), "xla_cpu_disable_loop_unrolling" in os.environ["XLA_FLAGS"]
    (True, True)
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _UNROLL not in flags and "jax" in sys.modules:
        from metarec_jax import jax_private

        if jax_private.backends_are_initialized():
            warnings.warn(
                "tune_cpu() was called after JAX has begun to compute, and changes nothing; call it first", stacklevel=2
            )
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
    """What ``JAX_PLATFORMS`` asks for and JAX cannot start here, and what to do; None where all of it starts.

    It is for whoever has seen JAX fail: JAX's own errors differ by platform, down to an AssertionError without words.
    """
    import jax

    asked = jax.config.jax_platforms  # type: ignore[attr-defined]
    if not asked:
        return None
    try:
        jax.devices()
    except (RuntimeError, AssertionError):
        jax.config.update("jax_platforms", None)
        try:
            found = sorted({device.platform for device in jax.devices()})
        finally:
            jax.config.update("jax_platforms", asked)
        started = ",".join(found)
        return (
            f"JAX_PLATFORMS is {asked}, and JAX can start only {started} here; unset it, or set JAX_PLATFORMS={started}"
        )
    return None


def _knows_reduce() -> bool:
    """XLA ends the process on a flag that it does not know; this one is there in the releases that are tested."""
    from metarec_jax import jax_private

    return jax_private.is_tested()


_HUGEPAGE, _COLLAPSE = 14, 25
"""Advice of Linux's madvise: use huge pages here; make those that are already written into such (Linux 6.1)."""


def huge_pages(arrays: Any, least: int = 32 * 2**20) -> int:
    """Ask Linux to hold the large arrays of a pytree in huge pages; returns the bytes for which it agreed.

    Rows of a large table lie on pages of their own; with pages of 4 KiB each row also costs a walk through the page
    table. The contents do not change. Nothing happens on other systems, on accelerators and to arrays below ``least``
    bytes.

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
            given = [advise(ctypes.c_void_p(first), ctypes.c_size_t(length), a) for a in (_HUGEPAGE, _COLLAPSE)]
            agreed += length if given[0] == 0 else 0
    return agreed
