"""A question's own process: pinned to the core, one thread, told a cell as JSON, answering with one JSON object."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.harness import ROOT, Options, Unavailable

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def ask(
    module: str,
    cell: Mapping[str, Any],
    options: Options,
    *,
    env: Mapping[str, str] | None = None,
    pinned: bool = True,
    timeout: float = 1200.0,
) -> dict[str, Any]:
    """What ``python -m module`` answers to ``cell``. Compiled programs of other processes are out of its reach.

    Args:
      env: added to its environment; ``METAREC_COMPILE_CACHE_DIR`` here gives it a cache.
      pinned: to the core of the options, with one thread; else it has the whole machine.

    Raises:
      Unavailable: it failed; the end of what it said is told.
    """
    cores = [options.core] if pinned and options.core is not None else []
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION_CACHE")}
    threads = dict.fromkeys(_THREADS, "1") if cores else {}
    command = [sys.executable, "-W", "ignore", "-m", module, json.dumps({**cell, "cores": cores})]
    given = {**inherited, **threads, "METAREC_COMPILE_CACHE_DIR": "off", **(env or {})}
    try:
        done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as late:
        raise Unavailable(f"{module} {dict(cell)}: not done after {timeout:.0f} s") from late
    if done.returncode or not done.stdout.strip():
        raise Unavailable(f"{module} {dict(cell)}: {' '.join(done.stderr.split())[-400:]}")
    return json.loads(done.stdout.splitlines()[-1])


def answer(measure: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Be that process: pin, measure, print."""
    cell = json.loads(sys.argv[1])
    cores = cell.pop("cores", None)
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    print(json.dumps(measure(cell)))
