"""Whatever befalls a run directory, the newest step that is whole is used, one line says why, and nothing torn is loaded."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from test_checkpoint import IDENTITY, equal, kept, state

from metarec_jax.core import MetarecError
from metarec_jax.training.checkpoints import arrays, folders
from metarec_jax.training.checkpoints import lock as run_directory
from metarec_jax.training.checkpoints.checkpoint import Checkpoints, load_params


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Steps 2 and 3 of the latest; 2 is the best."""
    run = tmp_path_factory.mktemp("whole")
    with Checkpoints(run, identity=IDENTITY) as checkpoints:
        for step in (2, 3):
            checkpoints.save(step, state(step), best=step == 2)
    return run


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A copy of its own."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def files(run: Path, step: int) -> list[str]:
    folder = run / "checkpoints" / "latest" / str(step)
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def flip(path: Path) -> None:
    """One bit, in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def restored(run: Path) -> tuple[int | None, list[str]]:
    """The step that is used, its bits compared with what was saved, and what was said."""
    said: list[str] = []
    with Checkpoints(run, identity=IDENTITY, say=said.append) as checkpoints:
        found = checkpoints.restore(state(0))
    assert found is None or equal(found[1], state(found[0]))
    return (None if found is None else found[0]), said


@pytest.mark.parametrize("harm", [flip, halve, empty, Path.unlink], ids=["flip", "halve", "empty", "unlink"])
def test_a_fault_in_any_file_of_a_step_is_found_and_the_step_before_is_used(whole, tmp_path, harm):
    """Twelve files or so, one after the other; a file that is empty anyway can only go missing."""
    names = [n for n in files(whole, 3) if harm is Path.unlink or (whole / "checkpoints/latest/3" / n).stat().st_size]
    assert len(names) >= 8
    for k, name in enumerate(names):
        run = Path(shutil.copytree(whole, tmp_path / str(k)))
        harm(run / "checkpoints" / "latest" / "3" / name)
        step, said = restored(run)
        assert step == 2, name
        assert len(said) == 1, said
        assert "skipped the damaged checkpoint of step 3" in said[0]
        assert name in said[0] or name == folders.MARK
        assert "\n" not in said[0]
        assert kept(run, "latest") == [2]


def test_a_fault_is_found_by_what_serves_too(run):
    """The parameters of the best; the latest is not taken in its place, since it is another state."""
    flip(max((run / "checkpoints" / "best" / "2" / "state").rglob("d/*"), key=lambda p: p.stat().st_size))
    said: list[str] = []
    with pytest.raises(MetarecError, match=r"all checkpoints in .* are damaged"):
        load_params(run, say=said.append)
    assert len(said) == 1
    assert equal(load_params(run, which="latest", like=state(0)["params"]), state(3)["params"])


def test_a_step_that_is_deleted_by_half_is_none(whole, tmp_path, monkeypatch):
    """The deletion stops before its first, second, ... file: before it the step is whole, from then on it is not."""
    left = []
    for stop in range(4):
        run = Path(shutil.copytree(whole, tmp_path / str(stop)))
        count = iter(range(100))
        with monkeypatch.context() as patch:
            for name in ("unlink", "rmdir"):
                patch.setattr(os, name, killed_at(stop, count, getattr(os, name)))
            with pytest.raises(KeyboardInterrupt):
                folders.delete(run / "checkpoints" / "latest" / "3")
        step, said = restored(run)
        left.append((step, len(said)))
    assert left == [(3, 0), (2, 1), (2, 1), (2, 1)]


def killed_at(stop: int, count, function):
    def call(*arguments, **options):
        if next(count) == stop:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    return call


@pytest.mark.parametrize(
    ("function", "when", "step", "lines"),
    [
        ("mark", "before", 2, 2),  # Orbax is done, the digests are not: 4 and 3 are skipped
        ("mark", "after", 4, 1),  # the best is there, the latest not: it is taken, and reported
        ("copy", "before", 4, 1),
        ("copy", "after", 4, 0),
        ("prune", "before", 4, 0),
        ("prune", "after", 4, 0),
    ],
)
def test_a_save_that_is_cut_between_its_parts(run, monkeypatch, function, when, step, lines):
    """Step 4, the best, is saved over 2 and 3; 3 is damaged, so that 2 must still be there."""
    real = getattr(folders, function)

    def cut(*arguments):
        if when == "after":
            real(*arguments)
        raise KeyboardInterrupt

    flip(run / "checkpoints" / "latest" / "3" / "_CHECKPOINT_METADATA")
    monkeypatch.setattr(folders, function, cut)
    checkpoints = Checkpoints(run, identity=IDENTITY)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(4, state(4), best=True, wait=True)
    checkpoints.close()
    monkeypatch.undo()
    found, said = restored(run)
    assert found == step
    assert len(said) == lines
    with Checkpoints(run, identity=IDENTITY, say=said.append) as checkpoints:
        checkpoints.save(4, state(4), best=True, wait=True)
        assert checkpoints.restore(state(0))[0] == 4
        assert equal(checkpoints.restore(state(0), which="best")[1], state(4))
    names = {p.name for kind in ("latest", "best") for p in (run / "checkpoints" / kind).iterdir()}
    assert names <= {"2", "3", "4"}


def test_a_disk_that_fills_while_the_digests_are_written(run, monkeypatch):
    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folders, "mark", full)
    checkpoints = Checkpoints(run, identity=IDENTITY)
    checkpoints.save(4, state(4))
    with pytest.raises(MetarecError, match=r"step 4 .*No space left on device; the checkpoint of step 3 is good"):
        checkpoints.wait()
    checkpoints.close()
    monkeypatch.undo()
    assert restored(run)[0] == 3


def test_a_whole_step_that_cannot_be_read_is_no_reason_to_delete_it(run, monkeypatch):
    """A machine without the memory to load step 3 must not go back to step 2, which would delete 3."""

    def no_memory(*_):
        raise MemoryError("out of memory")

    with monkeypatch.context() as patch, Checkpoints(run, identity=IDENTITY) as checkpoints:
        patch.setattr(arrays, "read", no_memory)
        with pytest.raises(MetarecError, match=r"step 3 in .* is whole, but cannot be read: out of memory"):
            checkpoints.restore(state(0))
    assert restored(run) == (3, [])


MAIN = """
    import sys
    from metarec_jax.cli import main
    sys.exit(main(sys.argv[1:]))
"""
FULL = """
    import resource, sys
    from metarec_jax.training.checkpoints.checkpoint import Checkpoints
    save = Checkpoints.save

    def save_on_a_full_disk(self, step, *arguments, **options):
        if step >= 40:  # no file may grow beyond a kilobyte from here on
            self.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        save(self, step, *arguments, **options)

    Checkpoints.save = save_on_a_full_disk
"""
SMALL = [
    "fit",
    "synthetic",
    "--learner",
    "ridge",
    "--steps",
    "60",
    "--save-every",
    "10",
    "--validate-every",
    "1000",
    "--tasks",
    "8",
]


def metarec(*arguments: str, before: str = "") -> subprocess.Popen[str]:
    """``metarec`` on one device, in a process of its own, after some lines of Python."""
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
    command = [sys.executable, "-c", textwrap.dedent(before) + textwrap.dedent(MAIN), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | {"XLA_FLAGS": flags}, **pipes)


@pytest.mark.slow
def test_a_disk_that_fills_under_metarec_fit(tmp_path):
    """Exit 2, one line, the last good step named and there; with room again the run goes on from it."""
    run = tmp_path / "run"
    arguments = [*SMALL, "--no-evaluate", "--out", str(run)]
    child = metarec(*arguments, before=FULL)
    err = child.communicate(timeout=120)[1]
    assert child.returncode == 2, err
    assert "Traceback" not in err
    [line] = [line for line in err.splitlines() if line.startswith("error:")]
    assert "could not write the checkpoint of step 40" in line
    assert "File too large" in line
    assert "the checkpoint of step 30 is good" in line
    assert kept(run, "latest") == [20, 30]
    child = metarec(*arguments)
    err = child.communicate(timeout=120)[1]
    assert child.returncode == 0, err
    assert "resuming at step 30" in err


@pytest.mark.slow
def test_sigterm_saves_at_the_step(tmp_path):
    """Between two saves: the step that it stops at is none that is saved anyway."""
    run = tmp_path / "run"
    command = [*SMALL, "--steps", "100000", "--save-every", "99999", "--no-evaluate", "--out", str(run)]
    child = metarec(*command)
    assert any("compiled in" in line for line in child.stderr)  # reads up to that line
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 143, err[-2000:]
    [line] = [line for line in out.splitlines() if line.startswith("SIGTERM: saved at step ")]
    assert kept(run, "latest") == [int(line.split()[4])]


def test_a_killed_holder_lets_go_of_the_directory(tmp_path):
    program = f"""
        from metarec_jax.training.checkpoints.checkpoint import Checkpoints
        checkpoints = Checkpoints({str(tmp_path)!r}, identity={{}})
        print("held", flush=True)
        input()
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "held\n"
    with pytest.raises(MetarecError, match=f"is in use by another process \\(pid {child.pid}\\)"):
        Checkpoints(tmp_path, identity={})
    child.kill()
    child.communicate()
    Checkpoints(tmp_path, identity={}).close()


def test_a_file_system_without_locks_is_refused_by_that_name(tmp_path, monkeypatch):
    def no_locks(handle, shared):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_directory, "_flock", no_locks)
    with pytest.raises(MetarecError, match=r"cannot be locked \(No locks available\)"):
        Checkpoints(tmp_path, identity={})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": "other"}, "data was 'abc', now 'other'"),
        ({"config": {"lr": 0.1, "steps": 10, "model": "mlp"}}, "config.model was 'absent', now 'mlp'"),
        ({"version": "9.9"}, "version was 'absent', now '9.9'"),
    ],
)
def test_a_run_of_other_data_model_or_version_is_refused_with_the_difference_named(run, change, words):
    before = (run / "identity.json").read_bytes()
    with pytest.raises(MetarecError, match=words):
        Checkpoints(run, identity=IDENTITY | change)
    assert (run / "identity.json").read_bytes() == before
    assert restored(run)[0] == 3


def test_a_state_that_was_saved_on_devices_that_are_not_there(tmp_path):
    """Nothing of where the arrays lay is asked for: a host array comes back from the record of a mesh, or without."""
    value = np.arange(6.0, dtype=np.float32)
    with Checkpoints(tmp_path, identity={}) as checkpoints:
        checkpoints.save(1, {"params": jnp.asarray(value)})
    folder = tmp_path / "checkpoints" / "latest" / "1"
    (folder / "state" / "_sharding").unlink(missing_ok=True)
    (folder / folders.MARK).unlink()
    folders.mark(folder)
    assert load_params(tmp_path, which="latest").tolist() == value.tolist()
