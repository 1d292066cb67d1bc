"""A run resumes from what it saved, bit for bit, and never from what was damaged."""

import contextlib
import errno
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metarec_jax.core import MetarecError
from metarec_jax.training.checkpoints import folders, quiet
from metarec_jax.training.checkpoints.checkpoint import Checkpoints, load_params, saved_metrics
from metarec_jax.training.checkpoints.lock import different

IDENTITY = {"config": {"lr": 0.1, "steps": 10}, "data": "abc"}


def state(step: int) -> dict:
    """A state with every kind of leaf that training has; each leaf depends on ``step``."""
    table = jax.random.normal(jax.random.key(step), (7, 3))
    params = {"tables": {"item_id": table}, "net": [jnp.float32(step), jnp.ones(2)]}
    return {
        "params": params,
        "moments": optax.adam(0.1).init(params),
        "slots": jnp.arange(5, dtype=jnp.int32) + step,
        "flags": jnp.array([True, False]),
        "key": jax.random.key(step),
        "keys": jax.random.split(jax.random.key(step, impl="rbg"), 2),
        "half": jnp.array([1.5], jnp.bfloat16),
        "empty": jnp.zeros((0, 4)),
        "best": float("inf") if step == 0 else 0.1 * step,
        "bad": step,
        "host": np.array([step], np.int64),
    }


def equal(a, b) -> bool:
    """Same tree, same types, same bits."""
    same = jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if hasattr(x, "dtype") and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            same &= x.dtype == y.dtype
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        same &= type(x) is type(y) and np.asarray(x).tobytes() == np.asarray(y).tobytes()
    return same


@pytest.fixture
def run(tmp_path):
    """A run directory with checkpoints of steps 1, 2 and 3; 2 is the best."""
    with Checkpoints(tmp_path, identity=IDENTITY) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state(step), metrics={"loss": step / 10}, best=step == 2)
    return tmp_path


def kept(run, kind):
    return sorted(int(p.name) for p in (run / "checkpoints" / kind).iterdir())


def test_metadata_that_is_no_metadata_is_passed_over(run):
    """With its mark made again, as if it had been written so: the metrics are those of the step before; loading refuses."""
    latest = run / "checkpoints" / "latest" / "3"
    (latest / "_CHECKPOINT_METADATA").write_text('{"custom_metadata": {"metrics": [], "leaves": [3]}}')
    folders.mark(latest)
    found = saved_metrics(run, which="latest")
    assert found is not None
    assert found[0] == 2
    with (
        Checkpoints(run, identity=IDENTITY) as checkpoints,
        pytest.raises(MetarecError, match="was not written by this library"),
    ):
        checkpoints.restore(state(0))


def test_every_kind_of_leaf_comes_back_with_the_same_bits(run):
    with Checkpoints(run, identity=IDENTITY) as checkpoints:
        step, restored = checkpoints.restore(state(0))
    assert step == 3
    assert equal(restored, state(3))


def test_restores_from_shapes_alone(run):
    like = {**jax.eval_shape(lambda: {k: v for k, v in state(0).items() if k not in ("best", "bad", "host")})}
    like |= {"best": 0.0, "bad": 0, "host": np.zeros(1, np.int64)}
    with Checkpoints(run, identity=IDENTITY) as checkpoints:
        assert equal(checkpoints.restore(like)[1], state(3))


def test_keeps_the_last_two_and_the_best(run):
    assert kept(run, "latest") == [2, 3]
    assert kept(run, "best") == [2]
    assert saved_metrics(run) == (2, {"loss": 0.2})
    assert saved_metrics(run, which="latest") == (3, {"loss": 0.3})


def test_nothing_to_restore_in_a_new_directory(tmp_path):
    with Checkpoints(tmp_path / "new", identity=IDENTITY) as checkpoints:
        assert checkpoints.restore(state(0)) is None


def test_the_copy_is_made_before_save_returns(tmp_path):
    bump = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    live = {"params": jnp.zeros(200_000)}
    with Checkpoints(tmp_path, identity={}) as checkpoints:
        for step in range(4):
            checkpoints.save(step, live)
            live = bump(live)
        assert checkpoints.restore({"params": jnp.zeros(200_000)})[1]["params"].tolist() == [3.0] * 200_000


def damage(run, kind, step):
    """Flip one bit in the largest data file of a step."""
    files = (run / "checkpoints" / kind / str(step) / "state").rglob("d/*")
    file = max(files, key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_flipped_bit_falls_back_to_the_step_before_with_one_line(run, capfd):
    damage(run, "latest", 3)
    said = []
    with Checkpoints(run, identity=IDENTITY, say=said.append) as checkpoints:
        step, restored = checkpoints.restore(state(0))
        assert step == 2
        assert equal(restored, state(2))
        assert kept(run, "latest") == [2]  # the damaged one is gone: training writes step 3 again
        checkpoints.save(3, state(3), wait=True)
    assert len(said) == 1
    assert "step 3" in said[0]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("victim", ["sha256.json", "_CHECKPOINT_METADATA", "state/_METADATA", "state/manifest.ocdbt"])
def test_a_torn_step_is_passed_over(run, victim):
    (run / "checkpoints" / "latest" / "3" / victim).unlink()
    with Checkpoints(run, identity=IDENTITY, say=lambda _: None) as checkpoints:
        assert checkpoints.restore(state(0))[0] == 2


def test_all_damaged_is_a_start_from_nothing(run):
    damage(run, "latest", 2)
    damage(run, "latest", 3)
    damage(run, "best", 2)
    said = []
    with Checkpoints(run, identity=IDENTITY, say=said.append) as checkpoints:
        assert checkpoints.restore(state(0)) is None
    assert len(said) == 3


def test_a_sound_best_is_taken_where_every_latest_is_damaged(run):
    """The best is a whole state: the run goes on from it, and it is still there afterwards."""
    damage(run, "latest", 2)
    damage(run, "latest", 3)
    said = []
    with Checkpoints(run, identity=IDENTITY, say=said.append) as checkpoints:
        step, restored = checkpoints.restore(state(0))
        assert step == 2
        assert equal(restored, state(2))
        assert (kept(run, "latest"), kept(run, "best")) == ([2], [2])
        assert equal(checkpoints.restore(state(0), which="best")[1], state(2))
    assert "skipped the damaged checkpoint of step 3" in said[0]
    assert "the best one, of step 2; it is taken" in said[2]


def test_a_sound_best_that_is_newer_than_the_sound_latest_is_taken(run):
    with Checkpoints(run, identity=IDENTITY) as checkpoints:
        checkpoints.save(4, state(4), best=True)
    damage(run, "latest", 4)
    with Checkpoints(run, identity=IDENTITY, say=lambda _: None) as checkpoints:
        step, restored = checkpoints.restore(state(0))
        assert step == 4
        assert equal(restored, state(4))
        checkpoints.save(5, state(5), wait=True)
    assert kept(run, "best") == [2, 4]


def test_what_this_machine_cannot_read_is_neither_damaged_nor_deleted(run, monkeypatch):
    def exhausted(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch, Checkpoints(run, identity=IDENTITY) as checkpoints:
        patch.setattr(folders, "_sums", exhausted)
        with pytest.raises(
            MetarecError, match=r"cannot be read and is not changed: .*Too many open files; make it readable"
        ):
            checkpoints.restore(state(0))
    assert (kept(run, "latest"), kept(run, "best")) == ([2, 3], [2])


def test_saving_a_step_again_keeps_one(run):
    with Checkpoints(run, identity=IDENTITY) as checkpoints:
        checkpoints.save(3, state(3), best=True)
        checkpoints.save(3, state(30), wait=True)
        assert equal(checkpoints.restore(state(0))[1], state(30))


def test_another_identity_is_refused_by_name(run):
    other = {"config": {"lr": 0.2, "steps": 10}, "data": "abc"}
    with pytest.raises(MetarecError, match=r"config\.lr was 0\.1, now 0\.2"):
        Checkpoints(run, identity=other)
    with Checkpoints(run, identity=other, fresh=True) as checkpoints:
        assert checkpoints.restore(state(0)) is None
    Checkpoints(run, identity=IDENTITY).close()  # nothing was saved under the other one


def test_differences_are_named():
    old, new = {"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}, "d": 4}
    assert different(old, new) == ["b.c was 2, now 3", "d was 'absent', now 4"]
    assert different({"partition": "a" * 64}, {"partition": "b" * 64}) == [
        "partition has changed (sha256 aaaaaaaa... then, bbbbbbbb... now)"
    ]


def test_a_directory_in_use_is_refused(run):
    with Checkpoints(run, identity=IDENTITY), pytest.raises(MetarecError, match=f"in use.*{os.getpid()}"):
        Checkpoints(run, identity=IDENTITY)
    Checkpoints(run, identity=IDENTITY).close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": jnp.zeros(6, jnp.int32)}, r"\['slots'\] is int32\[5\] in the checkpoint and int32\[6\] here"),
        ({"slots": jnp.zeros(5)}, r"float32\[5\] here"),
        ({"new": jnp.zeros(1)}, r"\['new'\] is absent in the checkpoint"),
        ({"key": jax.random.key(0, impl="rbg")}, r"key<fry>"),
    ],
)
def test_a_state_of_another_form_is_refused_by_name(run, change, message):
    with Checkpoints(run, identity=IDENTITY) as checkpoints, pytest.raises(MetarecError, match=message):
        checkpoints.restore(state(0) | change)


def test_params_alone_for_serving(run):
    params = load_params(run, like=jax.eval_shape(lambda: state(0)["params"]))
    assert equal(params, state(2)["params"])
    assert equal(load_params(run, which="latest", like=state(0)["params"]), state(3)["params"])
    nested = load_params(run)
    assert nested["tables"]["item_id"].shape == (7, 3)
    assert nested["net"]["0"] == 2.0


def test_params_keep_the_precision_they_were_saved_with(run):
    """An application that serves may compute in float64 (JAX_ENABLE_X64): what is read is what was trained."""
    trained = load_params(run, like=jax.eval_shape(lambda: state(0)["params"]))
    with jax.enable_x64(True):
        like = jax.eval_shape(lambda: {"tables": {"item_id": jnp.zeros((7, 3))}, "net": [jnp.float64(0), jnp.ones(2)]})
        assert like["tables"]["item_id"].dtype == jnp.float64
        assert equal(load_params(run, like=like), trained)


def test_params_of_float64_are_not_cut_to_float32(tmp_path):
    with jax.enable_x64(True), Checkpoints(tmp_path, identity={}) as checkpoints:
        checkpoints.save(1, {"params": jnp.full(3, 0.1)})
    with pytest.raises(
        MetarecError, match=r"float64\[3\] in the checkpoint and float32\[3\] here \(.*JAX_ENABLE_X64=1"
    ):
        load_params(tmp_path, like=jnp.zeros(3))
    with jax.enable_x64(True):
        assert load_params(tmp_path, like=jnp.zeros(3)).tolist() == [0.1] * 3


def test_a_training_that_changes_its_precision_is_refused_by_the_setting(run):
    with (
        Checkpoints(run, identity=IDENTITY) as checkpoints,
        jax.enable_x64(True),
        pytest.raises(MetarecError, match=r"float32.* in the checkpoint and float64.* here \(JAX_ENABLE_X64 is on"),
    ):
        checkpoints.restore(state(0))


def test_params_are_found_wherever_the_state_has_them(tmp_path):
    class Outer(NamedTuple):
        train: dict
        best: float

    params = {"net": jnp.ones(2)}
    with Checkpoints(tmp_path, identity={}) as checkpoints:
        checkpoints.save(1, Outer({"params": params, "moments": optax.adam(0.1).init({"params": params})}, 0.0))
    assert equal(load_params(tmp_path), params)


def test_params_of_a_damaged_best_and_of_an_empty_run(run, tmp_path):
    damage(run, "best", 2)
    said = []
    with pytest.raises(MetarecError, match=r"all checkpoints in .* are damaged"):
        load_params(run, say=said.append)
    assert len(said) == 1
    with pytest.raises(MetarecError, match="no checkpoint"):
        load_params(tmp_path / "nowhere")


def test_a_failed_background_write_is_told_at_the_next_call(tmp_path):
    with Checkpoints(tmp_path, identity={}) as checkpoints:
        (tmp_path / "checkpoints").write_text("not a folder")
        checkpoints.save(1, {"params": jnp.ones(1)})
        with pytest.raises(MetarecError, match="could not write the checkpoint of step 1"):
            checkpoints.wait()


@pytest.mark.parametrize("fails", [False, True])
def test_a_save_leaves_the_logging_and_the_hooks_of_the_process_alone(tmp_path, monkeypatch, fails):
    import absl.logging

    def mine(_):
        pass

    verbosity, level = absl.logging.get_verbosity(), logging.getLogger("orbax").level
    monkeypatch.setattr(quiet, "_LATE", 0.0)
    monkeypatch.setattr(sys, "unraisablehook", mine)
    filters = list(logging.getLogger("absl").filters)
    absl.logging.set_verbosity(absl.logging.INFO)
    try:
        with Checkpoints(tmp_path, identity={}) as checkpoints:
            if fails:
                (tmp_path / "checkpoints").write_text("not a folder")
            with pytest.raises(MetarecError) if fails else contextlib.nullcontext():
                checkpoints.save(1, {"params": jnp.ones(1)}, wait=True)
            if not fails:
                checkpoints.restore({"params": jnp.zeros(1)})
        for thread in threading.enumerate():
            if thread.name == "quiet":
                thread.join()
        assert absl.logging.get_verbosity() == absl.logging.INFO
        assert sys.unraisablehook is mine
        assert (logging.getLogger("absl").filters, logging.getLogger("orbax").level) == (filters, level)
    finally:
        absl.logging.set_verbosity(verbosity)


def test_a_sharded_state_goes_back_to_its_shards(tmp_path):
    """On one device the sharding has one device; the layout is kept whatever the number."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    placed = jax.device_put(jnp.arange(8.0), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    with Checkpoints(tmp_path, identity={}) as checkpoints:
        checkpoints.save(1, {"params": placed}, wait=True)
        restored = checkpoints.restore({"params": placed})[1]["params"]
    assert restored.tolist() == list(range(8))
    assert restored.sharding.device_set == placed.sharding.device_set


@pytest.mark.slow
def test_killed_in_the_middle_of_saving(tmp_path):
    """Whatever moment SIGKILL strikes, the newest step found is whole: its leaf is filled with its own number."""
    program = textwrap.dedent(
        f"""
        import jax.numpy as jnp
        from metarec_jax.training.checkpoints.checkpoint import Checkpoints
        with Checkpoints({str(tmp_path)!r}, identity={{}}) as checkpoints:
            found = checkpoints.restore({{"params": jnp.zeros(30_000)}})
            first = 0 if found is None else found[0]
            print("from", first, set(found[1]["params"].tolist()) if found else None, flush=True)
            for step in range(first + 1, first + 100_000):
                checkpoints.save(step, {{"params": jnp.full(30_000, float(step))}}, best=step % 3 == 0)
                print(step, flush=True)
        """
    )
    last = 0
    for saves in (3, 6):
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as child:
            _, first, values = child.stdout.readline().split(maxsplit=2)
            assert int(first) >= last - 2
            assert values.strip() == ("None" if first == "0" else f"{{{float(first)}}}")
            for _ in range(saves):
                last = int(child.stdout.readline())
            child.send_signal(signal.SIGKILL)
        assert child.returncode == -signal.SIGKILL
    with Checkpoints(tmp_path, identity={}) as checkpoints:
        step, restored = checkpoints.restore({"params": jnp.zeros(30_000)})
    assert step >= last - 2
    assert set(restored["params"].tolist()) == {float(step)}


def test_nothing_is_pickled(run):
    json.loads((run / "identity.json").read_text())
    assert not [p for p in run.rglob("*") if p.suffix in (".pkl", ".pickle")]
