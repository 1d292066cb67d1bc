"""A state spread over devices and processes comes back bit for bit, on as many others; what one refuses, all refuse."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sharded_child as child
from test_checkpoint import damage, kept

from metarec_jax.core import MetarecError
from metarec_jax.training.checkpoints import folders
from metarec_jax.training.checkpoints import lock as run_directory
from metarec_jax.training.checkpoints.checkpoint import Checkpoints, load_params, saved_metrics

pytestmark = [pytest.mark.slow, pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")]
MESHES = [(1, 8), (8, 1), (2, 4), (1, 3), (1, 1)]


def open_run(run, **options):
    return Checkpoints(run, **{"identity": child.IDENTITY, **options})


def launch(count: int, *scenarios: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, child.__file__, str(count)]
    return [
        subprocess.Popen(
            [*command, str(k), str(port), *scenarios], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for k in range(count)
    ]


def said(count: int, *scenarios: str) -> list[dict[str, list[str]]]:
    """What each process printed, by scenario; all must reach the end."""
    found = []
    for process in launch(count, *scenarios):
        out, err = process.communicate(timeout=120)
        lines: dict[str, list[str]] = {}
        for line in out.splitlines():
            if line.endswith(":"):
                lines[line[:-1]] = []
            elif lines and not line.startswith("[Gloo]"):
                lines[list(lines)[-1]].append(line)
        assert list(lines) == [s.split("=")[0] for s in scenarios], err[-3000:]
        found.append(lines)
    return found


@pytest.fixture(scope="module")
def eight(tmp_path_factory) -> Path:
    """Steps 1 to 4 of one process with eight devices; 2 is the best."""
    run = tmp_path_factory.mktemp("eight")
    mesh = child.make_mesh(1, 8)
    state = child.device_state(1, mesh)
    with open_run(run) as checkpoints:
        for step in range(1, 5):
            checkpoints.save(step, state, metrics={"loss": step / 10}, best=step == 2)
            state = child.next_state(state)  # in the same buffers
    return run


@pytest.mark.parametrize("shape", MESHES)
def test_any_mesh_restores_what_another_saved(eight, shape):
    like = child.device_state(0, child.make_mesh(*shape))
    with open_run(eight) as checkpoints:
        step, restored = checkpoints.restore(like)
        assert step == 4
        child.check(restored, 4, like)
        child.check(checkpoints.restore(like, which="best")[1], 2, like)


def test_shapes_with_shardings_are_enough(eight):
    live = child.device_state(0, child.make_mesh(2, 2))
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x, live
    )
    with open_run(eight) as checkpoints:
        child.check(checkpoints.restore(like)[1], 4, live)
    params = load_params(eight, like=like["params"])
    assert params["table"].sharding.is_equivalent_to(live["params"]["table"].sharding, 2)
    assert np.asarray(params["table"]).tobytes() == child.host_state(2)["params"]["table"].tobytes()


def test_a_leaf_goes_back_to_the_one_device_it_was_on(tmp_path):
    there = jax.device_put(jnp.arange(3.0), jax.devices()[5])
    anywhere = jnp.arange(3.0)
    with open_run(tmp_path) as checkpoints:
        checkpoints.save(1, {"there": there, "anywhere": anywhere}, wait=True)
        restored = checkpoints.restore({"there": there, "anywhere": anywhere})[1]
    assert restored["there"].devices() == {jax.devices()[5]}
    assert (restored["there"].committed, restored["anywhere"].committed) == (True, False)


def test_a_restored_state_may_be_donated(eight):
    """Replicas that share the memory they were read into are each written on their own."""
    live = child.device_state(0, child.make_mesh(4, 2))
    with open_run(eight) as checkpoints:
        state = checkpoints.restore(live)[1]
        for step in (5, 6):
            state = child.next_state(state)
            child.check(state, step, live)
        child.check(checkpoints.restore(live)[1], 4, live)


class Together(NamedTuple):
    run: Path
    says: list[dict[str, list[str]]]


@pytest.fixture(scope="module")
def together(tmp_path_factory, eight) -> Together:
    """Two processes of two devices: they save, resume, are refused; resume a damaged run of this one; fill a disk."""
    folder = tmp_path_factory.mktemp("together")
    one = folder / "one"
    with open_run(one) as checkpoints:
        for step in (7, 8):
            checkpoints.save(step, child.device_state(step, child.make_mesh(1, 8)))
    damage(one, "latest", 8)
    with open_run(folder / "locked"):
        says = said(
            2,
            f"save={folder / 'two'}",
            f"resume={folder / 'two'}",
            f"refusals={folder / 'two'}",
            f"locked={folder / 'locked'}",
            f"resume_one={one}",
            f"full={folder / 'full'}",
        )
    return Together(folder, says)


@pytest.mark.slow
def test_two_processes_resume_what_they_saved(together):
    """`sharded_child.check` compares the bits of each shard in each process."""
    for lines in together.says:
        assert lines["save"] == []
        assert lines["resume"] == ["resumed at 4"]
    assert kept(together.run / "two", "latest") == [4, 5]
    assert kept(together.run / "two", "best") == [2, 5]
    assert saved_metrics(together.run / "two", which="latest") == (5, {})


def test_each_process_wrote_its_own_shards_and_replicas_once(together):
    """Half of the table's 96 * 4 * 4 bytes a process; a leaf on all devices is in the files of one."""
    state = together.run / "two" / "checkpoints" / "latest" / "5" / "state"
    assert {p.name for p in state.glob("ocdbt.process_*")} == {"ocdbt.process_0", "ocdbt.process_1"}
    described = json.loads((state.parent / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]["leaves"]
    assert [d["path"] for d in described if "sha256" in d] == ["['best']", "['step']"]
    assert [d["shape"] for d in described if d["path"] == "['params']['table']"] == [[96, 4]]


@pytest.mark.parametrize("shape", [(1, 8), (1, 1)])
def test_one_process_restores_what_two_saved(together, shape):
    like = child.device_state(0, child.make_mesh(*shape))
    with open_run(together.run / "two") as checkpoints:
        step, restored = checkpoints.restore(like)
        assert step == 5
        child.check(restored, 5, like)
    params = load_params(together.run / "two")
    assert np.asarray(params["table"]).tobytes() == child.host_state(5)["params"]["table"].tobytes()


def test_two_processes_resume_what_one_saved_and_pass_over_its_damaged_step(together):
    first, second = (lines["resume_one"] for lines in together.says)
    assert first[1:] == second == ["resumed at 7"]
    assert first[0].startswith("said: skipped the damaged checkpoint of step 8")
    assert kept(together.run / "one", "latest") == [7, 8]  # 8 is written again


def test_what_one_process_refuses_all_refuse_in_the_same_words(together):
    first, second = (lines["refusals"] for lines in together.says)
    assert first == second
    assert [words in line for words, line in zip(REFUSALS, first, strict=True)] == [True] * 3
    for lines in together.says:
        assert len(lines["locked"]) == 1
        assert f"is in use by another process (pid {os.getpid()})" in lines["locked"][0]


REFUSALS = (
    "holds another run: version was 1, now 2.",
    "['params']['table'] is float32[96, 4] in the checkpoint and float32[192, 4] here",
    "process 1 does not see in",
)


def test_a_full_disk_of_one_process_is_told_in_all_and_the_last_step_stays(together):
    first, second = (lines["full"] for lines in together.says)
    assert first == second
    assert "could not write the checkpoint of step 2" in first[0]
    assert "File too large" in first[0]
    assert "the checkpoint of step 1 is good" in first[0]
    run = together.run / "full"
    assert folders.numbered(run / "checkpoints" / "latest") == [1]
    with open_run(run) as checkpoints:
        assert kept(run, "latest") == [1]  # what the other was still writing while the first swept is gone by now
        assert checkpoints.restore(child.device_state(0, child.make_mesh(1, 4), 9600))[0] == 1


@pytest.mark.slow
def test_four_processes_resume_what_two_saved_and_one_resumes_from_them(together):
    run = together.run / "two"
    with open_run(run) as checkpoints:
        step = checkpoints.restore(child.device_state(0, child.make_mesh(1, 1)))[0]
    says = said(4, f"resume={run}", f"alone={run}")
    assert [lines["resume"] for lines in says] == [[f"resumed at {step}"]] * 4
    assert [lines["alone"] for lines in says] == [[f"alone: {step + 1}.0"], [], [], []]
    like = child.device_state(0, child.make_mesh(2, 4))
    with open_run(run) as checkpoints:
        child.check(checkpoints.restore(like)[1], step + 1, like)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_sigkill_of_one_of_two_processes_in_the_middle_of_saving(tmp_path, victim):
    """Whatever moment it strikes, the step found is whole, and at most two behind the last that was asked for."""
    run, last, draw = tmp_path / "run", 0, random.Random(victim)
    for _ in range(2):
        both = launch(2, f"forever={run}")
        while not (line := both[victim].stdout.readline()).startswith("from"):
            assert line
        assert int(line.split()[1]) >= last - 2
        for _ in range(draw.randint(2, 6)):
            last = int(next(line for line in both[victim].stdout if line.strip().isdigit()))
        both[victim].send_signal(signal.SIGKILL)
        both[1 - victim].kill()  # as a launcher does
        for process in both:
            process.communicate()
    like = child.device_state(0, child.make_mesh(1, 4))
    with open_run(run, say=lambda _: None) as checkpoints:
        step, restored = checkpoints.restore(like)
    assert step >= last - 2
    child.check(restored, step, like)


@pytest.mark.slow
def test_a_directory_in_which_a_process_of_the_run_before_still_lives_is_refused(tmp_path, monkeypatch):
    """The first is killed and the second, stopped here, could still write: into the save of whoever resumes."""
    monkeypatch.setattr(run_directory, "PATIENCE", 0.0)
    run = tmp_path / "run"
    first, second = launch(2, f"forever={run}")
    assert any(line.startswith("from") for line in second.stdout)
    second.send_signal(signal.SIGSTOP)
    first.kill()
    first.communicate()
    with pytest.raises(MetarecError, match="in use by another process"):
        open_run(run)
    second.kill()
    second.communicate()
    open_run(run).close()


def test_a_mesh_of_another_run_is_no_reason_to_refuse_its_shapes_are(eight):
    like = child.device_state(0, child.make_mesh(1, 8), child.ROWS * 2)
    with (
        open_run(eight) as checkpoints,
        pytest.raises(MetarecError, match=r"float32\[96, 4\] in the checkpoint and float32\[192"),
    ):
        checkpoints.restore(like)
