"""Output of a training run: a bar or plain lines, a JSONL file, TensorBoard."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from metarec_jax import files

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Shows and records a run; `update` is called once per chunk. A context manager.

    Args:
      steps: number of steps of the whole run, for the bar and the time left.
      tasks: tasks per step, for tasks/s.
      path: path of the JSONL file, one object per line; None records nothing.
      tensorboard: folder of the event files; used where tensorboardX is installed.
      stream: stream of the bar or the lines; stderr by default.
      bar: whether to draw a bar; by default where ``stream`` is a terminal. Otherwise a plain line is printed every ten
        seconds, and at each validation.
      quiet: record, and show nothing.
      clock: monotonic seconds.

    >>> with Progress(100, tasks=8, stream=sys.stdout, bar=False) as progress:
    ...     progress.update(50, {"loss": 0.5, "validation_mae": 0.72})
    step 50/100  loss 0.5  validation mae 0.72  ...
    """

    def __init__(
        self,
        steps: int,
        *,
        tasks: int = 1,
        path: str | os.PathLike[str] | None = None,
        tensorboard: str | os.PathLike[str] | None = None,
        stream: TextIO | None = None,
        bar: bool | None = None,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._steps, self._tasks, self._clock = steps, tasks, clock
        self._path = None if path is None else Path(path)
        self._stream = stream = None if quiet else stream or sys.stderr
        self._history: list[dict[str, Any]] = []
        self._file: TextIO | None = None
        self._events = None if tensorboard is None else _event_writer(tensorboard)
        self._last = (0, clock())  # step and time of the last update
        self._printed = clock()
        self._rate = math.nan  # steps a second, smoothed
        self._chunks = 0
        terminal = stream is not None and stream.isatty()
        self._bar = _Bar(steps, stream) if stream is not None and (terminal if bar is None else bar) else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def history(self) -> list[dict[str, Any]]:
        """All recorded lines, those from before a resume included."""
        return self._history

    def resume(self, step: int) -> None:
        """Continue after ``step``: lines of later steps in the file, and an incomplete line, are dropped.

        Without this call the first `update` starts a new file.
        """
        if self._file is not None:
            self._file.close()
        self._history = []
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._history = [line for line in read_history(self._path) if line["step"] <= step]
            files.write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in self._history))
            self._file = self._path.open("a")
        if step:
            self._last = (step, self._clock())
            self._rate, self._chunks = math.nan, 0

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record the metrics of a step, and show them if it is time, or if there is a ``validation...`` among them.

        Args:
          step: number of the step.
          metrics: ``loss`` and ``validation...`` are shown; all are recorded, with tasks per second.
        """
        if self._path is not None and self._file is None:
            self.resume(0)
        now = self._clock()
        done, seconds = step - self._last[0], now - self._last[1]
        if done > 0 and seconds > 0:
            rate = done / seconds
            # The first chunk may contain more than steps; its rate counts only until there is another.
            self._rate = rate if self._chunks < 2 else 0.7 * self._rate + 0.3 * rate
            self._last, self._chunks = (step, now), self._chunks + 1
        numbers = {name: float(value) for name, value in metrics.items() if name not in ("step", "tasks_per_s")}
        speed = {} if math.isnan(self._rate) else {"tasks_per_s": round(self._rate * self._tasks, 1)}
        line = {"step": int(step)} | {n: v if math.isfinite(v) else None for n, v in numbers.items()} | speed
        self._history.append(line)
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        if self._events is not None:
            for name, value in numbers.items():
                self._events.add_scalar(name, value, step)
        self._show(step, numbers, now)

    def start(self, text: str) -> None:
        """Print one line, and measure time from now on: compiling is over."""
        self._last = (self._last[0], self._clock())
        self.note(text)

    def note(self, text: str) -> None:
        """Print one line above the bar."""
        if self._bar is not None:
            self._bar.print(text)
        elif self._stream is not None:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Close the file and remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._events is not None:
            self._events.close()
            self._events = None

    def _show(self, step: int, numbers: Mapping[str, float], now: float) -> None:
        shown = {n: v for n, v in numbers.items() if n == "loss" or n.startswith("validation")}
        text = "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in shown.items())
        if not math.isnan(self._rate):
            left = max(self._steps - step, 0) / self._rate
            text += f"  {_short(self._rate * self._tasks)} tasks/s  {_duration(left)} left"
        if self._bar is not None:
            self._bar.update(step, text)
        elif self._stream is not None:
            validated = any(name.startswith("validation") for name in numbers)
            if validated or step >= self._steps or now - self._printed >= _SECONDS_BETWEEN_LINES:
                self._printed = now
                print(f"step {step}/{self._steps}  {text}", file=self._stream, flush=True)


def read_history(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a JSONL metrics file, except those that are not JSON (incomplete by a kill). [] without a file."""
    lines = []
    try:
        text = Path(path).read_text(errors="replace")
    except FileNotFoundError:
        return []
    for line in text.splitlines():
        try:
            metrics = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(metrics, dict) and isinstance(metrics.get("step"), int):
            lines.append(metrics)
    return lines


class _Bar:
    """A rich progress bar, followed by a line of numbers."""

    def __init__(self, steps: int, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(24),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            console=Console(file=stream),
        )
        self._task = self._progress.add_task("training", total=steps, numbers="compiling")
        self._progress.start()

    def update(self, step: int, text: str) -> None:
        self._progress.update(self._task, completed=step, numbers=text)

    def print(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def stop(self) -> None:
        self._progress.stop()


def _event_writer(folder: str | os.PathLike[str]) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))


def _short(number: float) -> str:
    """
    >>> _short(246_100.0), _short(12.3)
    ('246k', '12')
    """
    return f"{number / 1000:.0f}k" if number >= 10_000 else f"{number:.0f}"


def _duration(seconds: float) -> str:
    """
    >>> _duration(7.4), _duration(125), _duration(7300)
    ('7s', '2m05s', '2h01m')
    """
    minutes, whole = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{whole:02}s" if minutes else f"{whole}s"
    return f"{minutes // 60}h{minutes % 60:02}m"
