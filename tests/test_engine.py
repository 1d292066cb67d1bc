"""fit(): the result is a function of its arguments; no interruption, chunk or checkpoint changes a bit of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from worlds import ids_alone, largest_difference

from metarec_jax import learners, models
from metarec_jax.core import Column, MetarecError
from metarec_jax.data.catalogue import catalogue
from metarec_jax.data.draw import TaskSource, task_source
from metarec_jax.data.synthetic import synthetic
from metarec_jax.data.tasks import make_tasks
from metarec_jax.training import loop
from metarec_jax.training.checkpoints.checkpoint import Checkpoints
from metarec_jax.training.loop import fit
from metarec_jax.training.validation import validator

DATA = ids_alone(synthetic(200, 100, ratings_per_user=(8, 20), seed=0).data)


def learner():
    return learners.ridge(models.content_model(DATA.columns, size=3))


def source(tasks: int = 8):
    return task_source(DATA, tasks=tasks, support=(2, 6), query=3)


def test_chunk_size_changes_nothing_and_the_seed_does():
    """Bit for bit: chunks of 7 steps against one of 20."""
    by_seven = fit(learner(), source(), steps=20, chunk=7, seed=1)
    at_once = fit(learner(), source(), steps=20, chunk=20, seed=1)
    assert largest_difference(by_seven.params, at_once.params) == 0.0
    assert [row["step"] for row in by_seven.history] == [7, 14, 20]
    of_another_seed = fit(learner(), source(), steps=20, chunk=20, seed=2)
    assert largest_difference(of_another_seed.params, at_once.params) > 1e-3


def test_the_loss_falls_below_the_prior(capsys):
    """100 steps on planted preferences: the query loss falls well below the variance that the start leaves."""
    result = fit(learner(), source(32), steps=100, lr=0.02, chunk=25)
    assert result.history[-1]["query_loss"] < 0.5 * result.history[0]["query_loss"]
    assert result.stopped == "finished"


def test_stop_and_resume_is_the_uninterrupted_run(tmp_path):
    """Stopped at steps 4 and 10 of 16 and resumed: parameters equal bit for bit, and so does the best by validation."""

    def validate(params):
        return {"loss": float(jnp.abs(params["tables"]["item_id"]).sum() % 1.0)}

    arguments = {"steps": 16, "chunk": 4, "validate": validate, "validate_every": 4, "save_every": 2, "patience": None}
    whole = fit(learner(), source(), **arguments)
    polls = iter([False, True, False, False, True])  # polled every 2 steps
    for attempt in ("interrupted", "interrupted", "finished"):
        with Checkpoints(tmp_path, identity={"test": 1}) as checkpoints:
            part = fit(learner(), source(), **arguments, checkpoints=checkpoints, stop=lambda: next(polls, False))
        assert part.stopped == attempt
    assert largest_difference(part.params, whole.params) == 0.0


KILLED = """
    import sys, time
    sys.path.insert(0, {tests!r})
    import conftest, test_engine
    from metarec_jax.training.checkpoints.checkpoint import Checkpoints
    from metarec_jax.training.loop import fit
    def progress(step, row):
        print(step, flush=True)
    with Checkpoints({folder!r}, identity={{"test": 1}}) as checkpoints:
        fit(test_engine.learner(), test_engine.source(), steps=400, chunk=10, checkpoints=checkpoints, save_every=20,
            progress=progress)
"""


@pytest.mark.slow
def test_sigkill_in_the_middle_of_training(tmp_path):
    """Killed without warning after step 100 or so; the next fit resumes and ends where the uninterrupted run ends."""
    program = textwrap.dedent(KILLED).format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    for line in child.stdout:
        if int(line) >= 100:
            os.kill(child.pid, signal.SIGKILL)
            break
    assert child.wait() == -signal.SIGKILL
    resumed_at = []
    with Checkpoints(tmp_path, identity={"test": 1}) as checkpoints:
        rest = fit(
            learner(),
            source(),
            steps=400,
            chunk=50,
            checkpoints=checkpoints,
            progress=lambda s, _: resumed_at.append(s),
        )
    assert 0 < resumed_at[0] - 50 < 400, "it must have resumed in the middle"
    whole = fit(learner(), source(), steps=400, chunk=50)
    assert largest_difference(rest.params, whole.params) == 0.0


def test_early_stopping_returns_the_best(tmp_path):
    """Validation 3, 1, 2, 2, ...: the parameters of the second validation (step 4) come back, after patience 2 at step 8."""
    values = iter([3.0, 1.0, 2.0, 2.0, 0.0])
    seen = []

    def validate(params):
        seen.append(jax.tree.map(jnp.copy, params))
        return {"loss": next(values)}

    result = fit(learner(), source(), steps=100, chunk=2, validate=validate, validate_every=2, patience=2)
    assert (result.step, result.stopped) == (8, "early stop")
    assert largest_difference(result.params, seen[1]) == 0.0


@pytest.mark.parametrize("stops_at", [4, pytest.param(None, marks=pytest.mark.slow)])
def test_a_constant_validation_is_better_once(tmp_path, stops_at):
    """0.1 is no float32: of a validation that never changes the first is the best, after a resume too.

    Saved are the best, the step of the interruption and the step of the early stop, and no other of the validations.
    """
    saved, polls = [], iter(range(2, 100, 2))
    arguments = {"steps": 100, "chunk": 2, "validate": lambda _: {"loss": 0.1}, "validate_every": 2, "patience": 3}
    for _ in range(1 if stops_at is None else 2):
        with Checkpoints(tmp_path, identity={}) as checkpoints:
            save = checkpoints.save
            checkpoints.save = lambda step, *a, save=save, **k: saved.append((step, k["best"])) or save(step, *a, **k)
            result = fit(
                learner(), source(), **arguments, checkpoints=checkpoints, stop=lambda: next(polls) == stops_at
            )
    assert (result.step, result.stopped) == (8, "early stop")
    assert saved == [(2, True), *([] if stops_at is None else [(stops_at, False)]), (8, False)]


def test_a_loss_that_is_not_finite_stops_with_the_step_named():
    diverging = learners.maml(models.content_model(DATA.columns, size=3), inner_lr=1e4, inner_steps=5, only=None)
    with pytest.raises(
        MetarecError,
        match=r"the loss of step \d+ is (nan|inf), first in task \d+ of its batch; no checkpoint was saved yet; lower the",
    ):
        fit(diverging, source(), steps=20)


def test_the_caller_keeps_its_parameters():
    """The engine donates its own buffers, never the caller's."""
    params = jax.jit(learner().init)(jax.random.key(0))
    fit(learner(), source(), steps=2, params=params)
    assert np.isfinite(float(params["tables"]["item_id"].sum()))


def test_one_program_for_chunks_of_every_length():
    """20 steps in chunks of 4, paused every 5: lengths 4 and 1; one compiled program."""
    ridge, traces = learner(), []
    counted = ridge._replace(loss=lambda p, t, k: traces.append(t.query.mask.shape) or ridge.loss(p, t, k))
    result = fit(
        counted, source(), steps=20, chunk=4, validate=lambda p: {"loss": 0.0}, validate_every=5, patience=None
    )
    assert set(np.diff([0.0, *(row["step"] for row in result.history)])) == {1.0, 4.0}
    assert traces == [(3,)]
    assert result.compile_seconds > 0


def test_validation_compiles_once():
    """Three validations of tasks of one width: one program."""
    data = DATA.take(DATA.user <= 40)
    ridge = learner()
    traces = []
    counted = ridge._replace(adapt=lambda p, s, k: traces.append(s.mask.shape) or ridge.adapt(p, s, k))
    validate = validator(
        counted, {"user_cold": make_tasks(data, query=3, support=(1, 6))}, catalogue(data), rating_range=(1.0, 5.0)
    )
    params = jax.jit(ridge.init)(jax.random.key(0))
    values = [validate(params)["error"] for _ in range(3)]
    assert values[0] == values[1] == values[2]
    assert len(traces) == 1


def test_a_model_of_other_data_is_refused_before_the_first_step():
    """The items of DATA are rows up to 100; a table of 51 rows would serve row 50 for half of them."""
    columns = {**DATA.columns, "item_id": Column("id", 51)}
    ridge = learners.ridge(models.content_model(columns, size=3))
    with pytest.raises(MetarecError, match=r"table 'item_id' has rows 0\.\.50, and the training data has the id 100"):
        fit(ridge, DATA, steps=1)


@pytest.mark.slow
def test_debug_names_the_step_that_drew_a_wrong_id():
    """A source of one's own: from step 3 of 6 on, item id 101 in a table of rows 0..100."""
    inner = source()

    def draw(data, key):
        task = inner.draw(data[0], key)
        wrong = jnp.any(jax.random.key_data(key) == data[1])
        ids = jnp.where(wrong, 101, task.query.inputs["item_id"])
        return task._replace(query=task.query._replace(inputs={**task.query.inputs, "item_id": ids}))

    seed_key = jax.random.split(jax.random.key(0))[1]
    third = jax.random.key_data(jax.random.split(jax.random.fold_in(seed_key, 3))[0])
    odd = TaskSource((inner.data, third), draw, inner.tasks)
    with pytest.raises(MetarecError, match=r"table 'item_id' has rows 0\.\.100, and step 3 has the id 101"):
        fit(learner(), odd, steps=6, debug=True)
    fine = fit(learner(), inner, steps=3, debug=True)
    assert largest_difference(fine.params, fit(learner(), inner, steps=3).params) == 0.0
    assert not any("id/" in name for name in fine.history[0])


def test_parameters_of_another_learner_are_refused():
    other = learners.ridge(models.content_model(DATA.columns, size=4)).init(jax.random.key(0))
    with pytest.raises(
        MetarecError, match=r"'net/.*' of shape|'ridge/log_precision' of shape \[5\], and the learner expects \[4\]"
    ):
        fit(learner(), DATA, steps=1, params=other)
    plain = jax.jit(models.content_model(DATA.columns, size=3).init)(jax.random.key(0))
    with pytest.raises(MetarecError, match=r"params lack 'ridge/log_precision'; start from learner\.init"):
        fit(learner(), DATA, steps=1, params=plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 0}, "chunk must be 1 or more, got 0"),
        ({"validate_every": 0}, "validate_every must be 1 or more, got 0"),
        ({"train": [1, 2]}, "fit\\(\\) expected .* got list"),
        ({"validate": lambda p: {"mae": 1.0}}, "did not return 'loss'.* set monitor= to one of mae"),
        (
            {"learner": learners.ridge(models.content_model(dict(DATA.columns, item_x=Column("numeric", 2))))},
            "lack columns of the model: item_x;",
        ),
    ],
)
def test_fit_says_what_is_wrong(options, message):
    arguments = {"learner": learner(), "train": source(), "steps": 1, **options}
    with pytest.raises(MetarecError, match=message):
        fit(arguments.pop("learner"), arguments.pop("train"), **arguments)


def test_clicks_get_negatives_by_default():
    """Without ratings every event is a 1: without negatives the constant 1 would be a perfect fit, and nothing learned."""
    clicks = replace(DATA, rating=None)
    drawn = loop._source(learner(), clicks)
    target = jax.jit(drawn.draw)(drawn.data, jax.random.key(0)).query.target
    assert 0.1 < float(target.mean()) < 0.3


@pytest.mark.parametrize(
    ("names", "best"), [(("error",), 1), (("loss",), 2), (("loss", "error"), 1)], ids=lambda given: str(given)
)
def test_the_validators_error_selects_by_default(names, best):
    """What `validator` returns needs no ``monitor``; a function that returns a loss alone is selected by that."""
    rows, seen = iter([{"loss": 3, "error": 3}, {"loss": 2, "error": 1}, {"loss": 1, "error": 2}]), []

    def validate(params):
        seen.append(jax.tree.map(jnp.copy, params))
        row = next(rows)
        return {name: row[name] for name in names}

    found = fit(learner(), source(), steps=3, validate=validate, validate_every=1)
    assert largest_difference(found.params, seen[best]) == 0.0


@pytest.mark.slow
def test_a_gaussian_process_is_trained_on_users_it_knows_to_have_counted():
    """`fit` on interactions draws tasks as the learner requires: of users with rows of their own, not of new ones."""
    process = learners.gaussian_process(DATA.columns)
    start = learners.gaussian_process_start(process.init(jax.random.key(0)), DATA)
    own, prior = (task_source(DATA, user_rows=rows) for rows in ("own", "prior"))
    losses = [fit(process, data, steps=1, params=start).history[0]["loss"] for data in (DATA, own, prior)]
    assert losses[0] == losses[1] > losses[2] + 0.01


@pytest.mark.slow
def test_resuming_without_a_best_checkpoint_returns_living_parameters(tmp_path):
    """The best checkpoint is gone and nothing later is better: the parameters resumed from come back, not freed buffers."""

    class Kept:
        state = None

        def save(self, step, state, **_):
            self.state = (step, jax.tree.map(jnp.copy, state))

        def restore(self, like, *, which="latest"):
            if self.state is None or which == "best":
                return None
            return self.state[0], jax.tree.map(jnp.copy, self.state[1])

    kept, values = Kept(), iter([1.0, 2.0, 3.0, 4.0])
    arguments = {"validate": lambda p: {"loss": next(values)}, "validate_every": 2, "checkpoints": kept}
    fit(learner(), source(), steps=2, **arguments)
    resumed = fit(learner(), source(), steps=4, **arguments)
    assert np.isfinite(np.asarray(resumed.params["tables"]["item_id"])).all()
