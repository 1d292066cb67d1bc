"""Several processes of `metarec fit` on this machine: one run, one result, and no one waits for the dead."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from metarec_jax.core import MetarecError
from metarec_jax.cpu import cores
from metarec_jax.data.synthetic import synthetic
from metarec_jax.training.checkpoints.checkpoint import load_params
from metarec_jax.training.devices import launch, watch

COMMAND = [sys.executable, "-m", "metarec_jax.cli", "fit"]
SETTINGS = [
    "--learner",
    "ridge",
    "--tasks",
    "16",
    "--size",
    "4",
    "--save-every",
    "10",
    "--validate-every",
    "1000000",
    "--no-evaluate",
]


@pytest.fixture(scope="module")
def ratings(tmp_path_factory):
    """5,000 items, so that their table is cut over the processes."""
    data = synthetic(300, 5000, ratings_per_user=(8, 20), seed=0).data
    path = tmp_path_factory.mktemp("data") / "ratings.csv"
    rows = np.column_stack([data.users.decode(data.user), data.items.decode(data.item), data.rating.astype(str)])
    missing = np.setdiff1d(data.items.ids, rows[:, 1])
    filler = np.column_stack([rows[np.arange(len(missing)) % len(rows), 0], missing, np.full(len(missing), "3")])
    np.savetxt(path, np.concatenate([rows, filler]), "%s", ",", header="user_id,item_id,rating", comments="")
    return path


def start(ratings, out, count: int, steps: int, *more: str):
    """``count`` processes of one run; their stderr is kept in files beside ``out``."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    several = [
        ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(count), "--process-id", str(k)]
        if count > 1
        else []
        for k in range(count)
    ]
    return [
        subprocess.Popen(
            [*COMMAND, str(ratings), "--out", str(out), "--steps", str(steps), *SETTINGS, *more, *own],
            stdout=(out.parent / f"{out.name}.{k}.out").open("w"),
            stderr=(out.parent / f"{out.name}.{k}.err").open("w"),
            env=env,
        )
        for k, own in enumerate(several)
    ]


def said(out, k: int) -> str:
    return "".join((out.parent / f"{out.name}.{k}.{stream}").read_text() for stream in ("out", "err"))


def wait_until(condition, processes) -> None:
    """Return once ``condition()``; fail where a process ends before."""
    while not condition():
        assert all(process.poll() is None for process in processes), "a process has ended too early"
        try:
            processes[0].wait(0.05)
        except subprocess.TimeoutExpired:
            continue


def saved(out) -> int:
    """The newest step that is saved whole."""
    marked = (out / "checkpoints" / "latest").glob("*/sha256.json")
    return max((int(mark.parent.name) for mark in marked), default=0)


def params_of(out):
    return jax.tree.leaves(load_params(out, which="latest"))


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_are_one(ratings, tmp_path, count):
    """30 steps in 1 process and in several: the saved parameters agree to rounding; the first process alone speaks."""
    for out, n in ((tmp_path / "one", 1), (tmp_path / "many", count)):
        assert [p.wait(300) for p in start(ratings, out, n, 30)] == [0] * n, said(out, 0)
    for a, b in zip(params_of(tmp_path / "one"), params_of(tmp_path / "many"), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    assert f"rows of item_id partitioned over {count} devices" in said(tmp_path / "many", 0)
    assert "step" not in said(tmp_path / "many", 1)  # but for a line of Gloo's own


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
def test_the_others_end_when_one_dies_and_the_run_goes_on(ratings, tmp_path, victim):
    """SIGKILL for one of two: the other exits with 75 and one line. The same command again resumes from what was saved
    (to the same bits: benchmarks/chaos.py)."""
    out = tmp_path / "run"
    running = start(ratings, out, 2, 1_000_000)
    wait_until(lambda: saved(out) >= 20, running)
    running[victim].send_signal(signal.SIGKILL)
    assert running[1 - victim].wait(60) == 75, said(out, 1 - victim)
    running[victim].wait(60)
    last = [line for line in said(out, 1 - victim).splitlines() if line][-1]
    assert last == f"error: process {victim} of 2 has ended; start all of them again with the same command to resume"
    resumed = start(ratings, out, 2, 1_000_000)
    wait_until(lambda: "resuming at step" in said(out, 0), resumed)
    for process in resumed:
        process.kill()
        process.wait(60)


@pytest.mark.slow
def test_an_error_of_one_alone_ends_all(ratings, tmp_path):
    """The first cannot write its metrics: it says so and exits with 2, the other with 75 and one line."""
    out = tmp_path / "run"
    (out / "metrics.jsonl").mkdir(parents=True)
    assert [process.wait(120) for process in start(ratings, out, 2, 1_000_000)] == [2, 75], said(out, 0) + said(out, 1)
    assert "metrics.jsonl" in said(out, 0).splitlines()[-1]
    assert "error: process 0 of 2 has ended; start all of them again" in said(out, 1)


@pytest.mark.slow
def test_a_signal_to_one_stops_all_at_the_same_step(ratings, tmp_path):
    """SIGTERM reaches the second process alone: both save the same step and exit with 143."""
    out = tmp_path / "run"
    running = start(ratings, out, 2, 1_000_000)
    wait_until(lambda: saved(out) >= 10, running)
    running[1].send_signal(signal.SIGTERM)
    assert [process.wait(60) for process in running] == [143, 143], said(out, 0) + said(out, 1)
    assert f"saved at step {saved(out)} of 1000000" in said(out, 0)


def test_how_processes_are_named(monkeypatch):
    """Slurm's and Open MPI's variables are counted; half of the three flags is an error, and so is a wrong number."""
    assert launch.launched() == 1
    for name in ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert launch.launched() == 4
    with pytest.raises(MetarecError, match=r"give all three"):
        launch.join("127.0.0.1:1", None, 0)
    with pytest.raises(MetarecError, match=r"between 0 and 1, got 3"):
        launch.join("127.0.0.1:1", 2, 3)
    with pytest.raises(MetarecError, match=r"must be HOST:PORT, got .somewhere."):
        launch.join("somewhere", 2, 0)


def test_cpu_devices_have_threads_enough(monkeypatch):
    """4 devices: 10 threads or a thread a core; what is set stands only where it is more."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    monkeypatch.delenv("NPROC", raising=False)
    launch.cpu_devices(1)
    assert int(os.environ["NPROC"]) == max(cores(), 10)
    for given, wanted in (("3", "10"), ("40", "40")):
        monkeypatch.setenv("NPROC", given)
        launch.cpu_devices(1)
        assert os.environ["NPROC"] == wanted


@pytest.mark.parametrize(
    "error", [ValueError("Gloo AllGather failed"), MetarecError("could not write"), jax.errors.JaxRuntimeError("gone")]
)
def test_whatever_fails_first_the_one_that_has_gone_is_named(monkeypatch, error):
    """A collective fails as this or that, a save that others share in as its own error: the watch is waited for first."""
    monkeypatch.setattr(launch.processes, "count", lambda: 2)
    monkeypatch.setattr(launch.watch, "watched", lambda host, advice: contextlib.nullcontext())
    monkeypatch.setattr(launch.watch, "wait_for_news", lambda: launch.watch.end("process 1 of 2", ""))
    monkeypatch.setattr(launch.watch, "end", lambda who, advice: sys.exit(who))
    with pytest.raises(SystemExit, match=r"^process 1 of 2$"), launch.together("start again"):
        raise error


@pytest.mark.parametrize(
    ("error", "heard"), [(None, b"bye\n"), (MetarecError("all raise it"), b"bye\n"), (OSError("its own disk"), b"")]
)
def test_what_one_raises_alone_ends_the_others(monkeypatch, error, heard):
    """A line that closes without a word is a death to those who listen; who parts in order says so."""
    here, there = socket.socketpair()
    monkeypatch.setattr(watch.processes, "count", lambda: 2)
    monkeypatch.setattr(watch.processes, "is_first", lambda: False)
    monkeypatch.setattr(watch, "_line_to_first", lambda host: {here: 0})
    with contextlib.suppress(OSError, MetarecError), watch.watched("", ""):
        if error is not None:
            raise error
    assert there.recv(16) == heard


def test_the_watch_takes_only_those_who_know_the_token(monkeypatch):
    """It listens at the coordinator's address alone. A wrong token, a wrong number, rubbish and silence get nothing, and
    the two processes of the run come through all the same, one of them in two parts."""
    told = queue.Queue()
    monkeypatch.setattr(watch.processes, "count", lambda: 3)
    monkeypatch.setattr(watch.processes, "send", lambda name, word: told.put(word))
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as stack:
        lines = pool.submit(watch._lines_to_all, "127.0.0.1")
        port, token = told.get(timeout=60).split()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", int(port)), 60)

        def comes(*words: bytes) -> socket.socket:
            line = stack.enter_context(socket.create_connection(("127.0.0.1", int(port)), 60))
            for word in words:
                line.sendall(word)
            return line

        silent = comes()
        refused = [
            b"0" * 32 + b"00000001",
            token.encode() + b"00000003",
            token.encode() + b"0000000x",
            b"GET / HTTP/1.1" * 9,
        ]
        for words in refused:
            with contextlib.suppress(ConnectionResetError):
                assert comes(words).recv(16) == b""
        assert not lines.done()
        second = comes(watch._greeting(token, 2)[:7])
        comes(watch._greeting(token, 1))
        second.sendall(watch._greeting(token, 2)[7:])
        found = lines.result(60)
        assert sorted(found.values()) == [1, 2]
        with contextlib.suppress(ConnectionResetError):
            assert silent.recv(16) == b""
        for line in found:
            line.close()
