"""The numbers that select, with their arithmetic."""

import jax.numpy as jnp
import numpy as np
import pytest

from metarec_jax.core import Learner, MetarecError
from metarec_jax.data.catalogue import catalogue
from metarec_jax.data.interactions import Interactions, Vocabulary
from metarec_jax.data.tasks import TaskSet
from metarec_jax.training.validation import validator


def by_score():
    """A learner that does not learn: the score of an item is its number in ``params``."""
    return Learner(
        init=lambda key: jnp.zeros(5),
        adapt=lambda params, support, key: (),
        predict=lambda params, adapted, inputs: params[inputs["item_id"]],
        loss=lambda params, task, key: (jnp.zeros(()), {}),
        tables={},
    )


@pytest.fixture
def known():
    """Two users who rated four items."""
    user, item = np.array([1, 1, 2, 2], np.int32), np.array([1, 2, 3, 4], np.int32)
    users, items = Vocabulary(np.array(["a", "b"])), Vocabulary(np.array(["w", "x", "y", "z"]))
    return catalogue(Interactions(user, item, np.array([1, 2, 3, 5], np.float32), None, users, items))


def tasks(*queries):
    """One task for each query: ``[(item, target), ...]``, padded to two; one support example."""
    n = len(queries)
    padded = np.array([[*q, *[(0, 0)] * (2 - len(q))] for q in queries], np.float32)
    mask = np.array([[1.0] * len(q) + [0.0] * (2 - len(q)) for q in queries], np.float32)
    support = np.ones((n, 1), np.int32), np.ones((n, 1), np.float32), np.ones((n, 1), np.float32)
    return TaskSet(np.ones(n, np.int32), *support, padded[..., 0].astype(np.int32), padded[..., 1], mask)


def test_mae_is_clipped_and_a_mean_over_tasks_then_scenarios(known):
    scores = jnp.array([0.0, 2.0, 9.0, 3.0, 4.0])  # of items 0..4; 9 is clipped to 5
    held = {"warm": tasks([(1, 1), (2, 5)], [(3, 5)]), "user_cold": tasks([(4, 1)])}
    found = validator(by_score(), held, known, rating_range=(1.0, 5.0))(scores)
    # warm: task 1 (|2-1| + |5-5|) / 2 = 0.5, task 2 |3-5| = 2; mean 1.25. user_cold: |4-1| = 3. error (1.25 + 3) / 2.
    assert found == {"error": 2.125, "mae_warm": 1.25, "mae_user_cold": 3.0}


def test_misranked_is_the_share_of_pairs_and_a_tie_counts_half(known):
    held = {"warm": tasks([(2, 1)])}
    judge = validator(by_score(), held, known, rating_range=None, others=50)
    assert judge(jnp.array([0.0, 1, 9, 1, 1]))["misranked_warm"] < 0.5  # only the item itself ties
    assert judge(jnp.array([0.0, 9, 1, 9, 9]))["misranked_warm"] > 0.5
    assert judge(jnp.zeros(5)) == {"error": 0.5, "misranked_warm": 0.5}


def test_no_task_is_refused(known):
    with pytest.raises(MetarecError, match="no validation task"):
        validator(by_score(), {}, known, rating_range=None)
