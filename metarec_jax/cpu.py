"""What XLA should know before it compiles small embedding code for a CPU."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

_UNROLL = "xla_cpu_disable_loop_unrolling"
"""LLVM unrolls a loop over a row of 32 numbers whole, and then no longer finds vectors in it: 3-5 times slower."""
_REDUCE = "--xla_cpu_experimental_ynn_fusion_type="
"""Sums over tasks by XLA's own loops: the library that XLA prefers took 480 us for [512, 64] -> [64]."""


def tune_cpu() -> bool:
    """Let XLA vectorise loops over embedding rows on a CPU; call it before JAX computes anything.

    It adds to ``XLA_FLAGS``, which holds for the whole process and is read once, when JAX first computes; so the
    library never calls it by itself, and the command line does. A flag that you set yourself is left as it is. Outer
    steps of the seed's model are 1.4 to 2 times as fast (``python -m benchmarks s1``). No effect on accelerators.

    Returns:
      Whether the flags stand in the environment now.

    >>> tune_cpu(), "xla_cpu_disable_loop_unrolling" in os.environ["XLA_FLAGS"]
    (True, True)
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_backend_extra_options" not in flags:
        flags = f"{flags} --xla_backend_extra_options={_UNROLL}"
    if _REDUCE not in flags and _knows_reduce():
        flags = f"{flags} {_REDUCE}"
    os.environ["XLA_FLAGS"] = flags.strip()
    return _UNROLL in flags


def _knows_reduce() -> bool:
    """XLA ends the process on a flag that it does not know; this one is known to be there in these versions."""
    try:
        major, minor, *_ = (int(part) for part in version("jaxlib").split(".")[:2])
    except (PackageNotFoundError, ValueError):
        return False
    return (0, 10) <= (major, minor) <= (0, 12)
