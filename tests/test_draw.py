"""The device draw: every number uniform, every part of a task independent of the others, from one call for randomness."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from math import perm

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from metarec_jax.data import draw
from metarec_jax.data.interactions import Interactions, Vocabulary

KEYS = 40_000
TOO_UNLIKELY = 1e-4


@pytest.fixture(scope="module")
def keys() -> jax.Array:
    return jax.random.split(jax.random.key(1), KEYS)


def evenly(cells, number: int) -> float:
    """p-value of the chi-square test that ``cells`` (ints below ``number``) are uniform."""
    return stats.chisquare(np.bincount(np.asarray(cells).ravel(), minlength=number)).pvalue


def clicks(user, item, users: int, items: int) -> Interactions:
    ids = Vocabulary(np.arange(users)), Vocabulary(np.arange(items))
    return Interactions(np.asarray(user), np.asarray(item), None, None, *ids)


MOST = 2000


@jax.jit
def permutation(n, seed):
    """Images of ``0..MOST-1``; the first n are the permutation. One program for all n."""
    return draw.permuted(jnp.arange(MOST), n, jax.random.key(seed))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, MOST), st.integers(0, 10**6))
def test_permuted_is_a_permutation(n, seed):
    x = np.asarray(permutation(n, seed))
    assert np.sort(x[:n]).tolist() == list(range(n))
    assert x.min() >= 0
    assert x.max() < n


@pytest.mark.parametrize("n", [2**30 + 7, 2**31 - 1])
def test_permuted_of_the_longest_history(n):
    """At the largest int32: images in range, distinct, and spread as uniform ones are (16 cells, p > 1e-4)."""
    x = np.unique(np.linspace(0, n - 1, 5000).astype(np.int32))
    images = np.asarray(jax.jit(draw.permuted)(x, jnp.int32(n), jax.random.key(5)))
    assert images.min() >= 0
    assert images.max() < n
    assert len(np.unique(images)) == len(x)
    assert evenly(images.astype(np.int64) * 16 // n, 16) > TOO_UNLIKELY


@pytest.mark.parametrize("n", [5, 13, 200])
def test_permuted_pairs_are_uniform(n, keys):
    """Images of (0, 1) over 40,000 keys: chi-square of the pairs (folded to at most 25 cells) passes at p > 1e-4."""
    pairs = np.asarray(jax.jit(jax.vmap(lambda k: draw.permuted(jnp.arange(2), jnp.int32(n), k)))(keys))
    cells = np.minimum(pairs * 5 // n, 4)
    counts = np.bincount(cells[:, 0] * 5 + cells[:, 1], minlength=25)
    size = np.bincount(np.minimum(np.arange(n) * 5 // n, 4), minlength=5)
    both = np.outer(size, size) - np.diag(size)
    expected = both.ravel() / (n * (n - 1)) * len(keys)
    keep = expected > 0
    assert counts[~keep].sum() == 0
    assert stats.chisquare(counts[keep], expected[keep]).pvalue > TOO_UNLIKELY


@pytest.mark.parametrize(("n", "points"), [(2, 2), (3, 3), (4, 4), (5, 5), (7, 3), (12, 3)])
def test_permuted_small_permutations_are_uniform(n, points, keys):
    """Every one of the n! / (n - points)! images of (0, 1, ..) comes as often as the others: 24 at n = 4, 120 at n = 5."""
    images = np.asarray(jax.jit(jax.vmap(lambda k: draw.permuted(jnp.arange(points), jnp.int32(n), k)))(keys))
    names = {image: cell for cell, image in enumerate(permutations(range(n), points))}
    cells = [names[tuple(image)] for image in images.tolist()]
    assert evenly(cells, perm(n, points)) > TOO_UNLIKELY


@pytest.mark.parametrize("apart", [8, 55, 144])
def test_permuted_distances_are_uniform(apart, keys):
    """Of 200 points, 0 and one ``apart``: their distance afterwards is 1..199 (mod 200), each as often as another.

    A bit for swapping that changes slowly with the position would keep them together; these are the distances at which
    multiplication by the golden ratio, or an exclusive or, would do so.
    """
    x = jnp.array([0, apart])
    images = np.asarray(jax.jit(jax.vmap(lambda k: draw.permuted(x, jnp.int32(200), k)))(keys))
    assert evenly((images[:, 1] - images[:, 0]) % 200 - 1, 199) > TOO_UNLIKELY


def test_permuted_tasks_of_a_batch_are_independent(keys):
    """Two permutations of 5 in one batch, tasks 0 and 1: the 25 pairs of images of 0 are alike."""

    def both(key):
        return draw._permuted(jnp.zeros((2, 1), jnp.int32), jnp.full(2, 5), jax.random.bits(key, (2,)))[:, 0]

    images = np.asarray(jax.jit(jax.vmap(both))(keys))
    assert evenly(images[:, 0] * 5 + images[:, 1], 25) > TOO_UNLIKELY


def test_words_are_random_in_every_bit():
    """2^16 words of consecutive counters, for keys that differ in one bit.

    Each of the 32 bits is 1 as often as not, each pair of neighbouring words has equal bits as often as not, and so have
    the words of two keys: all |z| < 5.5 (160 tests: the chance that one fails by accident is 6e-6).
    """
    count = 2**16
    streams = [jnp.array(s, jnp.uint32) for s in ((0, 0), (1, 0), (0, 1))]
    words = [np.asarray(draw.random_words(s, (count,))) for s in streams]
    assert all(len(np.unique(w)) > 0.999 * count for w in words)  # as many as of random ones: 2^16 (1 - 2^-17)
    samples = [*words, words[0] ^ np.roll(words[0], 1), words[0] ^ words[1], words[0] ^ words[2]]
    for sample in samples:
        ones = (sample[:, None] >> np.arange(32, dtype=np.uint32) & 1).sum(0)
        assert np.abs((ones - count / 2) / np.sqrt(count / 4)).max() < 5.5


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**31 - 1))
def test_below_is_the_exact_product(word, n):
    assert int(_below(np.uint32(word), np.int32(n))) == word * n >> 32


_below = jax.jit(draw._below)


def test_chances_at_the_ends():
    words = jnp.array([0, 255, 2**31, 2**32 - 1], jnp.uint32)
    assert draw.happens(words, 0.0).tolist() == [False] * 4
    assert draw.happens(words, 1.0).tolist() == [True] * 4
    assert draw.happens(words, 0.5).tolist() == [True, True, False, False]


def one_user_of_five() -> Interactions:
    return clicks(np.ones(5, int), np.arange(1, 6), 1, 5)


PLAIN = {"item_drop": 0.0, "cold_tasks": 0.0, "negatives": 0}


def items_of(source, count: int, part: str = "query") -> np.ndarray:
    """Item ids ``[count, tasks, slots]`` of many draws."""
    draws = jax.jit(jax.vmap(lambda k: getattr(source.draw(source.data, k), part).inputs["item_id"]))
    return np.asarray(draws(jax.random.split(jax.random.key(2), count)))


def test_tasks_of_a_batch_are_independent():
    """One user of 5 items, two tasks of one query item: 25 pairs over 20,000 draws, all alike."""
    source = draw.task_source(one_user_of_five(), tasks=2, support=(1, 1), query=1, **PLAIN)
    first, second = items_of(source, 20_000)[:, :, 0].T
    assert evenly((first - 1) * 5 + second - 1, 25) > TOO_UNLIKELY


def test_the_parts_of_a_task_are_independent():
    """User (2), query event (4), support size (1 or 2), cold or not, user unknown or not: 64 combinations, all alike."""
    event = np.arange(8)
    data = replace(clicks(event // 4 + 1, event + 1, 2, 8), rating=event.astype(np.float32))
    source = draw.task_source(
        data, tasks=32_000, support=(1, 2), query=1, user_rows="own", user_drop=0.5, item_drop=0.0, cold_tasks=0.5
    )
    support, query = jax.device_get(jax.jit(source.draw)(source.data, jax.random.key(3)))
    size = support.mask.sum(1).astype(int) - 1
    cold, stranger = query.inputs["item_id"][:, 0] == 0, query.inputs["user_id"][:, 0] == 0
    cell = ((query.target[:, 0].astype(int) * 2 + size) * 2 + cold) * 2 + stranger
    assert evenly(cell, 64) > TOO_UNLIKELY


def test_the_moment_is_uniform_in_time_order():
    """A user of 6 events, 2 support and 1 query: the query is event 3, 4, 5 or 6, each in a quarter of the tasks."""
    data = Interactions(
        np.ones(6, int), np.arange(1, 7), None, np.arange(6), Vocabulary(np.arange(1)), Vocabulary(np.arange(6))
    )
    source = draw.task_source(data, tasks=8000, support=(2, 2), query=1, order="time", **PLAIN)
    task = jax.jit(source.draw)(source.data, jax.random.key(0))
    last = np.asarray(task.query.inputs["item_id"])[:, 0]
    assert (np.asarray(task.support.inputs["item_id"]) == last[:, None] + [-2, -1]).all()
    assert evenly(last - 3, 4) > TOO_UNLIKELY


def test_ids_are_dropped_at_the_rates_asked_for():
    """cold_tasks 0.25: all items of a quarter of the tasks; item_drop 0.1 of the others; user_drop 0.4, independent.

    Of 8,000 tasks with 3 items each: P(no item at all) = 0.25 + 0.75 * 0.1^3 = 0.25075, P(all three) = 0.75 * 0.9^3 =
    0.54675; the user is gone in 0.4 of each kind. Bounds: 5 standard errors.
    """
    source = draw.task_source(
        one_user_of_five(),
        tasks=8000,
        support=(2, 2),
        query=1,
        user_rows="own",
        user_drop=0.4,
        item_drop=0.1,
        cold_tasks=0.25,
        negatives=0,
    )
    task = jax.jit(source.draw)(source.data, jax.random.key(4))
    there = np.concatenate([np.asarray(part.inputs["item_id"]) > 0 for part in task], axis=1)
    no_user = np.asarray(task.query.inputs["user_id"])[:, 0] == 0
    assert (task.support.inputs["user_id"] == task.query.inputs["user_id"]).all()
    for got, chance, of in (
        (~there.any(1), 0.25075, 8000),
        (there.all(1), 0.54675, 8000),
        (no_user, 0.4, 8000),
        (no_user[~there.any(1)], 0.4, 2000),
    ):
        assert abs(got.mean() - chance) < 5 * np.sqrt(chance * (1 - chance) / of)


@pytest.mark.parametrize(("item_drop", "cold", "left"), [(0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)])
def test_ids_at_the_ends_of_the_rates(item_drop, cold, left):
    source = draw.task_source(
        one_user_of_five(), tasks=50, support=(2, 2), query=1, item_drop=item_drop, cold_tasks=cold, negatives=0
    )
    assert (items_of(source, 2) > 0).mean() == left


_draw_negatives = jax.jit(draw.draw_negatives, static_argnums=3)


def test_negatives_are_uniform_over_what_a_user_never_had():
    """User 1 had items 2, 4 (twice) and 7 of 1..7 (5 is of nobody): 1, 3, 6 come alike; user 2 had every one: none is free."""
    user = np.array([1, 1, 1, 1, 2, 2, 2, 2, 2, 2])
    item = np.array([4, 2, 7, 4, 1, 2, 3, 4, 6, 7])
    source = draw.task_source(clicks(user, item, 2, 7), support=(1, 1), negatives=2)
    users = source.data.users
    assert users[:, 2].tolist() == [4, 6]
    assert users[:, 3].tolist() == [3, 6]
    drawn, free = _draw_negatives(source.data, users[:, 1], users[:, 3], 6000, jax.random.key(0))
    counts = np.bincount(np.asarray(drawn[0]), minlength=8)
    assert np.flatnonzero(counts).tolist() == [1, 3, 6]
    assert stats.chisquare(counts[[1, 3, 6]]).pvalue > TOO_UNLIKELY
    assert free.tolist() == [[1.0], [0.0]]
    task = jax.jit(source.draw)(source.data, jax.random.key(1))
    real = np.asarray(task.query.mask).sum(1)
    assert set(real) == {9.0, 5.0}  # of user 1: min(10, 4 - 1) = 3 query and 2 negatives each; of user 2: 5, and none


def test_negatives_against_the_set_of_free_items():
    """Histories of 2 to 20 events, with repeats, over 14 items, of one who had all, and one who had all but one."""
    rng = np.random.default_rng(0)
    had = [rng.integers(1, rng.integers(2, 16), rng.integers(2, 21)).tolist() for _ in range(60)]
    had += [list(range(1, 15)), list(range(14, 1, -1))]
    user = np.repeat(np.arange(1, 63), [len(h) for h in had])
    source = draw.task_source(clicks(user, np.concatenate(had), 62, 14), support=(1, 1), negatives=1)
    table = source.data.users
    drawn, free = _draw_negatives(source.data, table[:, 1], table[:, 3], 400, jax.random.key(0))
    pool = set(np.concatenate(had).tolist())
    lefts = [pool - set(own) for own in had]
    assert {len(left) for left in lefts} >= {0, 1, 5}
    for items, some, left in zip(np.asarray(drawn), np.asarray(free), lefts, strict=True):
        assert some.tolist() == [float(bool(left))]
        assert not left or set(items.tolist()) == left


def test_the_draw_is_a_function_of_the_key():
    source = draw.task_source(one_user_of_five(), tasks=30, support=(1, 3), query=1, negatives=0)
    once, again, other = (jax.jit(source.draw)(source.data, jax.random.key(k)) for k in (0, 0, 1))
    same = jax.tree.map(lambda a, b: bool((a == b).all()), once, again)
    assert all(jax.tree.leaves(same))
    assert not (once.support.inputs["item_id"] == other.support.inputs["item_id"]).all()


def test_one_call_for_randomness_a_batch():
    """JAX's generator is asked once, for 7 purposes of two words, however many tasks there are."""
    source = draw.task_source(one_user_of_five(), tasks=500, support=(1, 3), query=1, user_drop=0.1, negatives=2)
    program = str(jax.make_jaxpr(source.draw)(source.data, jax.random.key(0)))
    assert program.count("random_bits[") == 1
    assert "random_split" not in program
    assert "random_bits[bit_width=32 shape=(7, 2)]" in program
