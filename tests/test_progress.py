"""The record of a run is continuous over a resume."""

import io
import json
import math
import threading

import pytest

from metarec_jax.experiment.phases import Phases
from metarec_jax.training.progress import Progress, read_history


def ticking(*times: float):
    """A clock that tells these times, and then the last one for ever."""
    left = list(times)
    return lambda: left.pop(0) if len(left) > 1 else left[0]


def steps(path):
    return [line["step"] for line in read_history(path)]


def test_records_one_object_a_line(tmp_path):
    path = tmp_path / "runs" / "metrics.jsonl"
    with Progress(20, tasks=4, path=path, quiet=True) as progress:
        progress.update(10, {"loss": 1.5})
        progress.update(20, {"loss": math.nan, "validation_mae": 0.5})
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first["step"] == 10
    assert first["loss"] == 1.5
    assert second["loss"] is None  # NaN is no JSON
    assert second["validation_mae"] == 0.5
    assert progress.history == [first, second]


def test_rate_is_tasks_over_time(tmp_path):
    clock = ticking(0.0)
    progress = Progress(100, tasks=8, quiet=True, clock=lambda: clock())
    clock = ticking(2.0)
    progress.update(10, {"loss": 1.0})  # 10 steps x 8 tasks / 2 s
    assert progress.history[-1]["tasks_per_s"] == 40.0
    clock = ticking(3.0)
    progress.update(20, {"loss": 1.0})  # 10 steps x 8 / 1 s: the first chunk, which compiles, is forgotten
    assert progress.history[-1]["tasks_per_s"] == 80.0
    clock = ticking(5.0)
    progress.update(30, {"loss": 1.0})  # 10 steps / 2 s, smoothed: 0.7 * 10 + 0.3 * 5 = 8.5 steps/s, x 8
    assert progress.history[-1]["tasks_per_s"] == 68.0


def test_compiling_is_not_in_the_rate():
    """Told at 7 s that all is compiled; 10 steps x 8 tasks in the 2 s after that."""
    clock, out = ticking(0.0), io.StringIO()
    progress = Progress(100, tasks=8, stream=out, clock=lambda: clock())
    clock = ticking(7.0)
    progress.start("compiled in 7.0 s")
    clock = ticking(9.0)
    progress.update(10, {"loss": 1.0})
    assert progress.history[-1]["tasks_per_s"] == 40.0
    assert out.getvalue().startswith("compiled in 7.0 s\n")


def test_resume_drops_what_came_after_the_step_and_a_cut_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with Progress(40, path=path, quiet=True) as progress:
        for step in (10, 20, 30):
            progress.update(step, {"loss": 1.0})
    with path.open("a") as file:
        file.write('{"step": 40, "lo')
    with Progress(40, path=path, quiet=True) as progress:
        progress.resume(20)
        progress.update(30, {"loss": 2.0})
        assert [line["step"] for line in progress.history] == [10, 20, 30]
    assert steps(path) == [10, 20, 30]
    assert read_history(path)[-1]["loss"] == 2.0


def test_a_new_run_starts_a_new_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):
        with Progress(10, path=path, quiet=True) as progress:
            progress.update(10, {"loss": 1.0})
    assert steps(path) == [10]


def test_plain_lines_come_every_ten_seconds_at_validation_and_at_the_end():
    times = iter([0.0, 0.0, 4.0, 11.0, 12.0, 13.0, 14.0])  # two on opening, one for each update
    out = io.StringIO()
    with Progress(5, tasks=1, stream=out, clock=lambda: next(times)) as progress:
        for step, extra in [(1, {}), (2, {}), (3, {"validation_mae": 0.7}), (4, {}), (5, {})]:
            progress.update(step, {"loss": 1.0} | extra)
        progress.note("saved")
    said = out.getvalue().splitlines()
    assert [line.split("  ")[0] for line in said] == ["step 2/5", "step 3/5", "step 5/5", "saved"]
    assert "validation mae 0.7" in said[1]
    assert "left" in said[0]


def test_a_bar_shows_the_numbers():
    out = io.StringIO()
    with Progress(10, tasks=1, stream=out, bar=True) as progress:
        progress.update(10, {"loss": 0.25})
        progress.note("a line [with brackets]")
    assert "10/10" in out.getvalue()
    assert "loss 0.25" in out.getvalue()
    assert "a line [with brackets]" in out.getvalue()


def test_tensorboard_where_installed(tmp_path):
    pytest.importorskip("tensorboardX")
    with Progress(10, quiet=True, tensorboard=tmp_path) as progress:
        progress.update(10, {"loss": 0.25})
    assert list(tmp_path.glob("events*"))


def test_a_long_part_of_a_command_reports_itself_until_it_ends():
    lines, first, counted = [], threading.Event(), threading.Event()

    def say(line):
        lines.append(line)
        first.set()
        if "256 of 1,200 tasks" in line:
            counted.set()

    phases, before = Phases(every=1e-3, say=say), threading.active_count()
    with phases("baselines"):
        assert first.wait(60)
    with phases("evaluate"):
        phases.progress(256, 1200)
        assert counted.wait(60)
    with phases("train", silent=True):
        assert threading.active_count() == before
    assert lines[0].startswith("baselines: ")
    assert lines[-1].startswith("evaluate: 256 of 1,200 tasks, ")
    assert list(phases.seconds) == ["baselines", "evaluate", "train"]
