"""What a run takes and what there is: by the compiler and by Linux's files; refused before it runs, never falsely."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from worlds import ids_alone, largest_difference

from metarec_jax import learners, models
from metarec_jax.core import MetarecError
from metarec_jax.data.draw import task_source
from metarec_jax.data.synthetic import synthetic
from metarec_jax.training.devices import budget as memory
from metarec_jax.training.loop import fit

DATA = ids_alone(synthetic(60, 40, ratings_per_user=(8, 12), seed=0).data)
GIB = 2**30


def learner():
    return learners.ridge(models.content_model(DATA.columns, size=3))


def machine(folder, *, available, swap=0):
    """A folder like /proc, of a process in the control group a/b. Sizes in GiB."""
    (folder / "self").mkdir(parents=True)
    (folder / "meminfo").write_text(
        f"MemTotal: 1 kB\nMemAvailable: {available * 2**20} kB\nSwapFree: {swap * 2**20} kB\n"
    )
    (folder / "self" / "cgroup").write_text("0::/a/b\n")
    return folder


def group(folder, *, limit, used, inactive):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\n")


def test_what_is_free_is_the_least_of_machine_and_control_groups(tmp_path):
    """16 available and 1 of swap: 17. A group with a limit of 8 and 5 used, of which 2 are cached files: 8 - 5 + 2 + 1 = 6.
    The limit of its parent, 4 - 3 + 0 + 1 = 2, holds too; "max" is none."""
    proc = machine(tmp_path / "proc", available=16, swap=1)
    assert memory.host_free(proc, tmp_path / "none") == 17 * GIB
    group(tmp_path / "cgroup" / "a" / "b", limit=8 * GIB, used=5 * GIB, inactive=2 * GIB)
    group(tmp_path / "cgroup", limit="max", used=9 * GIB, inactive=0)
    assert memory.host_free(proc, tmp_path / "cgroup") == 6 * GIB
    group(tmp_path / "cgroup" / "a", limit=4 * GIB, used=3 * GIB, inactive=0)
    assert memory.host_free(proc, tmp_path / "cgroup") == 2 * GIB


def test_control_groups_of_the_first_version(tmp_path):
    """3 - 2 + 1 = 2 GiB in the folder of the memory controller."""
    proc = machine(tmp_path / "proc", available=16)
    (proc / "self" / "cgroup").write_text("5:cpu:/x\n4:memory:/x\n")
    folder = tmp_path / "cgroup" / "memory" / "x"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(str(3 * GIB))
    (folder / "memory.usage_in_bytes").write_text(str(2 * GIB))
    (folder / "memory.stat").write_text(f"total_inactive_file {GIB}\n")
    assert memory.host_free(proc, tmp_path / "cgroup") == 2 * GIB


def test_what_is_unknown_refuses_nothing(tmp_path):
    assert memory.host_free(tmp_path / "nothing", tmp_path) is None

    class Card:
        platform = "gpu"
        stats = None

        def memory_stats(self):
            return self.stats

    card = Card()
    assert memory.free(card) is None
    card.stats = {"bytes_in_use": 3}
    assert memory.free(card) is None
    card.stats = {"bytes_limit": 10, "bytes_in_use": 3}
    assert memory.free(card) == 7


def test_the_compiler_knows_arguments_and_temporaries():
    """x [256, 256] float32 is 256 KiB, and so are sin(x @ x), held whole before it is multiplied again, and the result."""
    x = jnp.ones((256, 256))
    found = memory.estimate(jax.jit(lambda x: jnp.sin(x @ x) @ x).lower(x).compile())
    assert found.arguments == 256 * 1024
    assert 2 * 256 * 1024 <= found.working <= 4 * 256 * 1024


def test_a_donated_argument_is_not_counted_twice():
    """The output lies in the argument's buffer: nothing is made beside it but what a loop keeps of its own."""
    add = lambda x: x + 1.0  # noqa: E731
    x = jnp.ones((256, 256))
    fresh, donated = (memory.estimate(jax.jit(add, donate_argnums=d).lower(x).compile()) for d in ((), (0,)))
    assert fresh.working - donated.working == 256 * 1024


def test_tables_that_do_not_fit_are_refused_before_they_are_made(monkeypatch):
    """10^9 rows of 4 float32 and two moments each: 48 GB, of which 1 GiB is there; init is only asked for its shapes."""
    big = learner()
    shapes = []

    def init(key):
        shapes.append(type(key))
        params = big.init(key)
        return {**params, "tables": {**params["tables"], "item_id": jnp.zeros((10**9, 4))}}

    monkeypatch.setattr(memory, "free", lambda device: GIB)
    with pytest.raises(
        MetarecError, match=r"the parameters \(14.9 GiB\) and their optimisers' state would take.*1.0 GiB are"
    ):
        fit(big._replace(init=init), task_source(DATA, tasks=4, support=(2, 6), query=3), steps=1)
    assert len(shapes) == 1


def test_a_batch_that_does_not_fit_is_refused_before_it_runs(monkeypatch):
    """512 tasks in what the parameters alone take and 100 KiB: the outer step needs more, and says what to do."""
    source = task_source(DATA, tasks=512, support=(2, 6), query=3)
    monkeypatch.setattr(memory, "free", lambda device: 100 * 1024)
    seen = []
    with pytest.raises(
        MetarecError, match=r"the outer step, in addition to .* would take another .* draw fewer tasks per step"
    ):
        fit(learner(), source, steps=2, progress=lambda step, row: seen.append(step))
    assert not seen


def test_fit_says_what_it_takes(monkeypatch):
    monkeypatch.setattr(memory, "free", lambda device: None)
    lines = []
    found = fit(learner(), task_source(DATA, tasks=4, support=(2, 6), query=3), steps=2, say=lines.append)
    assert len(lines) == 1
    assert lines[0].startswith(f"compiled in {found.compile_seconds:.1f} s; a step takes ")
    assert "free" not in lines[0]


def test_an_optimiser_may_keep_the_parameters_themselves():
    """Its state holds the very arrays that the step donates, and a buffer cannot be donated twice: it gets its own."""
    anchored = optax.GradientTransformation(lambda p: p, lambda g, anchor, p: (optax.tree.scale(-0.1, g), anchor))
    params = jax.jit(learner().init)(jax.random.key(0))
    before = jax.tree.map(np.array, params)
    source = task_source(DATA, tasks=4, support=(2, 6), query=3)
    found = fit(learner(), source, steps=3, chunk=2, params=params, optimizer=anchored)
    assert largest_difference(before, params) == 0.0
    assert largest_difference(before, found.params) > 0.0
