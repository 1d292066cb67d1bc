"""A worker's half of the harness, for any interpreter: imports nothing but the standard library.

A worker is told its cell as JSON in its first argument, sets it up, and answers on what was its stdout, one JSON object a
line: first what setting up cost, then, for each line ``{"seconds": s}`` on stdin, what a timed block of about s seconds
gave. An empty line ends it.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Cell(NamedTuple):
    """A cell that is ready to run.

    Attributes:
      run: ``run(blocks)`` does that many blocks of ``steps`` outer steps and waits until they are done.
      steps: outer steps in a block.
      compile_s: wall seconds of the first call, compilation included.
      extra: further keys for the row.
      device_peak: peak bytes on the accelerator; None on a CPU.
    """

    run: Callable[[int], Any]
    steps: int
    compile_s: float
    extra: dict[str, Any] = {}  # noqa: RUF012
    device_peak: Callable[[], int] | None = None


def resident_mib() -> float:
    """Memory of this process now."""
    return _status("VmRSS")


def peak_mib() -> float:
    """Peak memory of this process since it was started (not of what started it, which ``ru_maxrss`` may count in)."""
    return _status("VmHWM")


def _status(name: str) -> float:
    try:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(cell: Cell, seconds: float) -> dict[str, float]:
    """Blocks until ``seconds`` have passed, after one that is not counted; wall and CPU seconds of a step."""
    cell.run(1)
    blocks, begin, cpu = 0, time.perf_counter(), time.process_time()
    while blocks == 0 or time.perf_counter() - begin < seconds:
        cell.run(1)
        blocks += 1
    wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
    steps = blocks * cell.steps
    peak = cell.device_peak() / 2**20 if cell.device_peak else peak_mib()
    return {"step_s": wall / steps, "cpu_s": cpu / steps, "steps": steps, "peak_mib": peak}


def serve(setup: Callable[[dict[str, Any]], Cell]) -> None:
    """Answer the harness until it hangs up. What libraries print goes to stderr."""
    answers, sys.stdout = os.fdopen(os.dup(1), "w", buffering=1), sys.stderr
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")

    told = json.loads(sys.argv[1])
    if told.pop("cores", None) and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, json.loads(sys.argv[1])["cores"])
    try:
        cell = setup(told)
    except (ImportError, MemoryError, ValueError, RuntimeError) as error:
        answer({"unavailable": f"{type(error).__name__}: {error}"[:400]})
        return
    answer({"compile_s": cell.compile_s, **cell.extra})
    for line in sys.stdin:
        if not line.strip():
            break
        answer(timed(cell, json.loads(line)["seconds"]))
