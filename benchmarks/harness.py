"""What the questions share: options, rows, and workers that take turns on one core.

A question is a module of this folder whose docstring's first line is the question, with
``run(options: Options) -> list[Row]``. `Unavailable` ends a question with a note in place of rows.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
Side = Literal["ours", "torch", "library", "floor"]
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Unavailable(Exception):
    """A question (or a variant) that cannot be asked here, and why: it becomes a note."""


@dataclass
class Options:
    """What the command line asked for.

    Attributes:
      quick: fewer cells and short blocks; the whole run ends within five minutes on two cores.
      rounds: how often the sides of a cell take turns.
      core: the CPU core that every worker is pinned to; None leaves it to the system.
      torch_python: interpreter that has torch; None skips PyTorch's rows.
      done: rows that earlier questions of this run gave.
      notes: what was left out and why; see `note`.
    """

    quick: bool = False
    rounds: int = 5
    core: int | None = None
    torch_python: str | None = None
    done: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Say on stderr, and keep for the results, that something was left out."""
        print(f"note: {text}", file=sys.stderr, flush=True)
        self.notes.append(text)

    @property
    def seconds(self) -> float:
        """Length of one timed block."""
        return 0.25 if self.quick else 0.8


@dataclass
class Row:
    """One line of the results. None where a field does not apply.

    Attributes:
      question: "s1" ... "s6", "costs".
      variant: what ran, in a few words.
      side: "ours", "torch" (hand-written PyTorch), "library" (others' libraries), "floor" (what the hardware allows).
      tasks, inner_steps, items: the cell.
      tasks_per_s: median over the rounds.
      compile_s: wall seconds until the first result, compilation included, data and import not.
      peak_mib: peak memory of the process; on an accelerator, of the device.
      ratio_to_best_torch: tasks_per_s over that of the best PyTorch row of the same cell, median of paired rounds.
      extra: further keys, written beside the others.
    """

    question: str
    variant: str
    side: Side
    tasks: int | None = None
    inner_steps: int | None = None
    items: int | None = None
    tasks_per_s: float | None = None
    compile_s: float | None = None
    peak_mib: float | None = None
    ratio_to_best_torch: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The row as one flat object of the results' JSON."""
        flat = asdict(self)
        return {**flat.pop("extra"), **flat}


def cores() -> list[int]:
    """The CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


@dataclass(frozen=True)
class Contender:
    """One side of a pair: what to start, and how its row is named.

    Attributes:
      variant, side: of its row.
      module: run as ``python -m module``; it calls `protocol.serve`.
      cell: what the module is told, a JSON object.
      python: the interpreter; None is this one.
      cores: the cores it is pinned to; None leaves it to the system.
      env: added to its environment.
      counts: whether it may be the best PyTorch of its cell.
      note: written into its row.
    """

    variant: str
    side: Side
    module: str
    cell: Mapping[str, Any]
    python: str | None = None
    cores: Sequence[int] | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    counts: bool = True
    note: str | None = None


class Worker:
    """A contender's process, alive between its turns.

    Raises:
      Unavailable: it cannot be set up (no such library, not enough memory, too slow to set up).
    """

    def __init__(self, contender: Contender, setup_core: int | None = None, setup_timeout: float = 900.0) -> None:
        """Start it and wait until it is set up, on ``setup_core`` where given, on its own cores otherwise."""
        self.contender = contender
        python = contender.python or sys.executable
        told = {**contender.cell, "cores": [setup_core] if setup_core is not None else list(contender.cores or [])}
        threads = {} if not contender.cores else dict.fromkeys(_THREADS, str(len(contender.cores)))
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION_CACHE")}
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [python, "-W", "ignore", "-m", contender.module, json.dumps(told)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=ROOT,
            env={**inherited, **threads, **contender.env},
        )
        self.turns: list[dict[str, float]] = []
        self.ready = self._read(setup_timeout)
        if "unavailable" in self.ready:
            self.close()
            raise Unavailable(f"{contender.variant}: {self.ready['unavailable']}")
        if setup_core is not None and contender.cores:
            for thread in os.listdir(f"/proc/{self.process.pid}/task"):
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(int(thread), contender.cores)

    def turn(self, seconds: float) -> None:
        """One timed block of about ``seconds``."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"seconds": seconds}) + "\n")
        self.process.stdin.flush()
        self.turns.append(self._read(600.0))

    def close(self) -> None:
        """Hang up and wait."""
        with contextlib.suppress(OSError, ValueError):
            self.process.communicate("\n", timeout=20)
        self.process.kill()
        self.process.wait()
        self.log.close()

    def _read(self, timeout: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        waiting, _, _ = select.select([self.process.stdout], [], [], timeout)
        line = self.process.stdout.readline() if waiting else ""
        if line:
            return json.loads(line)
        self.process.kill()
        self.log.seek(0)
        said = " ".join(self.log.read().split())[-400:]
        reason = f"said nothing for {timeout:.0f} s" if not waiting else "ended early"
        raise Unavailable(f"{self.contender.variant}: its process {reason}. {said}")


def compare(options: Options, question: str, contenders: Sequence[Contender]) -> list[Row]:
    """Rows of one or more cells: every contender set up, then all in turns, ``options.rounds`` times round.

    Speeds are medians over the rounds. The ratio of two sides is the median of the ratios within each round.
    """
    workers: list[Worker] = []
    try:
        workers += _start(options, question, contenders)
        for _ in range(options.rounds):
            for worker in list(workers):
                try:
                    worker.turn(options.seconds)
                except Unavailable as reason:
                    options.note(f"{question} {name_of(worker.contender.cell)}: {reason}")
                    workers.remove(worker)
                    worker.close()
    finally:
        for worker in workers:
            worker.close()
    rows = [_row(question, worker, _best(workers, worker)) for worker in workers]
    for row in rows:
        print(describe(row), file=sys.stderr, flush=True)
    return rows


def _start(options: Options, question: str, contenders: Sequence[Contender]) -> list[Worker]:
    """One after the other, on the core where they will be timed; with ``--quick`` PyTorch's side by side with ours."""

    def lane(some: Sequence[Contender], core: int | None) -> dict[int, Worker]:
        made = {}
        for contender in some:
            try:
                made[id(contender)] = Worker(contender, core)
            except Unavailable as reason:
                options.note(f"{question} {name_of(contender.cell)}: {reason}")
        return made

    spare = [core for core in cores() if core != options.core]
    if options.quick and options.core is not None and spare:
        lanes = [
            ([c for c in contenders if c.side == "ours"], None),
            ([c for c in contenders if c.side != "ours"], spare[0]),
        ]
        with ThreadPoolExecutor(2) as pool:
            first, second = pool.map(lambda given: lane(*given), lanes)
        made = {**first, **second}
    else:
        made = lane(contenders, None)
    return [made[id(c)] for c in contenders if id(c) in made]


def _best(workers: Sequence[Worker], beside: Worker) -> Worker | None:
    """The fastest PyTorch of the same cell."""
    cell = name_of(beside.contender.cell)
    rivals = [w for w in workers if w.contender.side == "torch" and w.contender.counts]
    same = [w for w in rivals if name_of(w.contender.cell) == cell]
    return min(same, key=lambda w: statistics.median(_steps(w)), default=None)


def describe(row: Row) -> str:
    """A row in one line of progress."""
    cell = [f"{value:,} {name}" for name, value in (("tasks", row.tasks), ("steps", row.inner_steps)) if value]
    cell += [f"{row.items:,} items"] if row.items else []
    speed = f"{row.tasks_per_s:,.0f} tasks/s" if row.tasks_per_s else ""
    ratio = f"{row.ratio_to_best_torch:.2f} x best torch" if row.ratio_to_best_torch else ""
    return f"{row.question} {' x '.join(cell):28s} {row.side:8s}{row.variant:30s} {speed:>16s} {ratio}".rstrip()


def name_of(cell: Mapping[str, Any]) -> str:
    """A cell in a few words."""
    items = f", {cell['items']:,} items" if cell.get("items") else ""
    return f"{cell.get('tasks')} tasks x {cell.get('inner_steps')} inner steps{items}"


def _steps(worker: Worker) -> list[float]:
    return [turn["step_s"] for turn in worker.turns]


def _row(question: str, worker: Worker, best: Worker | None) -> Row:
    contender, steps, tasks = worker.contender, _steps(worker), worker.contender.cell["tasks"]
    median = statistics.median(steps)
    ratios = [theirs / own for theirs, own in zip(_steps(best), steps, strict=True)] if best else []
    extra: dict[str, Any] = {
        "us_per_step": round(1e6 * median, 1),
        "us_per_step_range": [round(1e6 * min(steps), 1), round(1e6 * max(steps), 1)],
        "cpu_us_per_step": round(1e6 * statistics.median(t["cpu_s"] for t in worker.turns), 1),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)] if ratios else None,
        "rounds": len(steps),
        **{k: v for k, v in worker.ready.items() if k != "compile_s"},
    }
    if contender.note:
        extra["note"] = contender.note
    return Row(
        question,
        contender.variant,
        contender.side,
        tasks=tasks,
        inner_steps=contender.cell["inner_steps"],
        items=contender.cell.get("items"),
        tasks_per_s=round(tasks / median, 1),
        compile_s=round(worker.ready["compile_s"], 2),
        peak_mib=round(max(t["peak_mib"] for t in worker.turns), 1),
        ratio_to_best_torch=round(statistics.median(ratios), 3) if ratios else None,
        extra=extra,
    )


def available_mib() -> float:
    """Memory that is free for new processes; infinite where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("MemAvailable")), float("inf"))
