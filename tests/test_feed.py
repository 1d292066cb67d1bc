"""Tasks streamed from the host: the same run as tasks on the device, for any chunk, resumed anywhere."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest
from worlds import largest_difference

from metarec_jax import learners, models
from metarec_jax.core import MetarecError
from metarec_jax.data.draw import TaskSource, task_source
from metarec_jax.data.synthetic import synthetic
from metarec_jax.training.checkpoints.checkpoint import Checkpoints
from metarec_jax.training.loop import fit

pytestmark = pytest.mark.slow

DATA = synthetic(60, 40, ratings_per_user=(8, 20), seed=0).data
DRAWN = task_source(DATA, tasks=4, support=(2, 6), query=3)
_draw = jax.jit(DRAWN.draw)


def learner():
    return learners.ridge(models.content_model(DATA.columns, size=3))


def batch_of(step: int):
    """Four tasks that depend on the step alone, as host arrays."""
    return jax.tree.map(np.asarray, _draw(DRAWN.data, jax.random.key(step)))


def streamed(last: int | None = None) -> TaskSource:
    """The same tasks from the host: ``draw`` takes the batch as it comes."""
    steps = (lambda first: itertools.count(first)) if last is None else (lambda first: range(first, last))
    return TaskSource((), lambda data, key: data[1], 4, lambda first: map(batch_of, steps(first)))


def on_device() -> TaskSource:
    """All batches of 12 steps on the device, picked by the step that the key was folded with: the reference."""
    batches = jax.tree.map(lambda *leaves: np.stack(leaves), *(batch_of(k) for k in range(12)))
    keys = [jax.random.split(jax.random.fold_in(jax.random.split(jax.random.key(0))[1], k))[0] for k in range(12)]
    words = np.stack([jax.random.key_data(key) for key in keys])

    def draw(data, key):
        k = (data[1] == jax.random.key_data(key)[None]).all(1).argmax()
        return jax.tree.map(lambda a: a[k], data[0])

    return TaskSource((batches, words), draw, 4)


@pytest.mark.parametrize("chunk", [5, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 12))])
def test_a_stream_trains_as_the_same_tasks_on_the_device(chunk):
    """12 steps in chunks of 1, 5 (so 5 + 5 + 2, padded) and 12."""
    a = fit(learner(), streamed(), steps=12, chunk=chunk)
    b = fit(learner(), on_device(), steps=12, chunk=12)
    assert largest_difference(a.params, b.params) == 0.0


@pytest.mark.slow
def test_a_resumed_stream_goes_on_with_the_next_batch(tmp_path):
    """Stopped after 6 of 12 steps: the second run asks the stream for step 6, and ends bit for bit as one run does."""
    stops = iter([False, True])
    for _ in range(2):
        with Checkpoints(tmp_path, identity={}) as checkpoints:
            part = fit(
                learner(), streamed(), steps=12, chunk=3, checkpoints=checkpoints, stop=lambda: next(stops, False)
            )
    assert (part.step, part.history[0]["step"]) == (12, 9.0)
    assert largest_difference(part.params, fit(learner(), streamed(), steps=12).params) == 0.0


def test_a_stream_that_ends_too_early_is_an_error():
    with pytest.raises(MetarecError, match="ended before the last step"):
        fit(learner(), streamed(last=7), steps=12, chunk=5)


def test_a_stream_of_changing_shapes_is_an_error():
    source = streamed()._replace(stream=lambda first: ({"a": np.zeros(k)} for k in itertools.count(1)))
    with pytest.raises(MetarecError, match="must have one shape, got"):
        fit(learner(), source, steps=12, chunk=5)
