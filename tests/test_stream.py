"""Tasks streamed from a store: whose they are, when they come, resumed anywhere, and uniform where they are random."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pandas as pd
import pytest
from scipy import stats
from worlds import largest_difference

from metarec_jax import learners, models
from metarec_jax.core import Column, MetarecError
from metarec_jax.data.draw import task_source
from metarec_jax.data.store import stream
from metarec_jax.data.store.held_out import hold_out
from metarec_jax.data.store.opened import Store, load, open_store
from metarec_jax.data.store.prepare import prepare
from metarec_jax.data.store.stream import stream_source
from metarec_jax.experiment.build import build_stream
from metarec_jax.experiment.config import Config, LearnerConfig, TaskConfig
from metarec_jax.training.checkpoints.checkpoint import Checkpoints
from metarec_jax.training.loop import fit

USERS, ITEMS = 30, 50
TOO_UNLIKELY = 1e-4


def frame_of() -> pd.DataFrame:
    """User k has 3 + k ratings, from 1 to 5, at times that grow; user and item are told by the rating's time."""
    rng = np.random.default_rng(0)
    counts = 3 + np.arange(USERS)
    item = np.concatenate([rng.choice(ITEMS, count, replace=False) for count in counts])
    user = np.repeat(np.arange(USERS), counts)
    return pd.DataFrame(
        {"user": user, "item": item, "rating": rng.integers(1, 6, len(user)), "time": np.arange(len(user))}
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    folder = tmp_path_factory.mktemp("stream")
    frame_of().to_csv(folder / "data.csv", index=False)
    return prepare([folder / "data.csv"], folder / "store", say=lambda line: None)


@pytest.fixture(scope="module")
def clicks(tmp_path_factory) -> Store:
    folder = tmp_path_factory.mktemp("clicks")
    frame_of().drop(columns=["rating", "time"]).to_csv(folder / "data.csv", index=False)
    return prepare([folder / "data.csv"], folder / "store", say=lambda line: None)


def batches(store: Store, count: int, step: int = 0, **options) -> list[dict]:
    return list(itertools.islice(stream_source(store, **options).stream(step), count))


def test_every_epoch_visits_each_user_once(store):
    """30 users in batches of 4: the first 15 batches are two epochs, each all users, in two orders."""
    user = np.concatenate([b["user"] for b in batches(store, 15, tasks=4, support=(2, 8))])
    first, second = user[:30], user[30:]
    assert sorted(first) == sorted(second) == list(range(1, 31))
    assert first.tolist() != second.tolist()
    assert first.tolist() != list(range(1, 31))


def test_batches_larger_than_an_epoch(store):
    """100 tasks of 30 users: everyone comes 3 times and ten of them 4 times."""
    (only,) = batches(store, 1, tasks=100, support=(2, 8))
    assert sorted(np.bincount(only["user"])[1:]) == [3] * 20 + [4] * 10


def test_users_too_short_or_held_out_do_not_come(store):
    """With 5 support examples at the least, users need 6: rows 4 to 30, of which only the even ones are asked for."""
    even = np.arange(2, 31, 2, dtype=np.int32)
    user = np.concatenate([b["user"] for b in batches(store, 13, users=even, tasks=2, support=(5, 8))])
    assert sorted(user[:14]) == list(range(4, 31, 2))
    with pytest.raises(MetarecError, match="no user has 41 interactions"):
        stream_source(store, support=(40, 50))
    with pytest.raises(MetarecError, match="users must be rows 1 to 30 of the store, got 0 to 31"):
        stream_source(store, np.array([0, 31]))


@pytest.mark.parametrize("order", ["random", "time"])
def test_tasks_are_the_users_own(store, order):
    """Support and query are distinct events of the user, with their ratings; q = min(4, n - 2), s in 2..min(8, n - q)."""
    data = load(store)
    sizes_seen = set()
    for batch in batches(store, 60, tasks=8, support=(2, 8), query=4, order=order):
        for user, (s, q), events in zip(batch["user"], batch["sizes"], batch["events"], strict=True):
            mine = data.take(data.user == user)
            n = len(mine)
            assert q == min(4, n - 2)
            assert 2 <= s <= min(8, n - q)
            used = np.concatenate([events[:q], events[4 : 4 + s]])
            place = np.array([mine.item.tolist().index(item) for item in used[:, 0]])
            assert len(set(place)) == q + s
            np.testing.assert_array_equal(used[:, 1].view(np.float32), mine.rating[place])
            if order == "time":  # a stretch of the history: the support, then the query
                assert [*place[q:], *place[:q]] == list(range(place[q], place[q] + s + q))
            sizes_seen.add(s)
    assert sizes_seen == set(range(2, 9))


@pytest.mark.parametrize("options", [{}, {"negatives": 2}, {"order": "time"}, {"tasks": 7, "ahead": 1, "threads": 1}])
def test_a_stream_goes_on_bit_for_bit_from_any_step(store, options):
    """Batch k of a stream that began at 0 is the first of one that begins at k, also in another process's place."""
    options = {"tasks": 4} | options
    whole = batches(store, 40, **options)
    for step in (1, 7, 38):
        (found,) = batches(store, 1, step, **(options | {"ahead": 3, "threads": 4}))
        assert found.keys() == whole[step].keys()
        for name, values in found.items():
            np.testing.assert_array_equal(values, whole[step][name])
            assert values.dtype == whole[0][name].dtype
    (other,) = batches(store, 1, seed=1, **options)
    assert any((other[name] != whole[0][name]).any() for name in other)


def learner(store: Store):
    return learners.ridge(models.content_model(store.columns, size=3))


def test_a_resumed_run_ends_as_one_that_was_not_stopped(store, tmp_path):
    """Stopped after 9 of 20 steps, then resumed: every parameter is the same to the last bit."""
    source = stream_source(store, tasks=4, support=(2, 8), query=4)
    whole = fit(learner(store), source, steps=20, chunk=3)
    stops = iter([False, False, True])
    for _ in range(2):
        with Checkpoints(tmp_path, identity={}) as checkpoints:
            part = fit(
                learner(store), source, steps=20, chunk=3, checkpoints=checkpoints, stop=lambda: next(stops, False)
            )
    assert part.step == 20
    assert part.history[0]["step"] > 9
    assert largest_difference(part.params, whole.params) == 0.0


def test_training_from_a_store_learns(store):
    """The mean loss of the last 50 steps is well below that of the first 5."""
    found = fit(learner(store), stream_source(store, tasks=16, support=(2, 8), query=4), steps=300, chunk=5, lr=0.03)
    losses = [row["loss"] for row in found.history]
    assert np.mean(losses[-10:]) < 0.8 * losses[0]


@pytest.mark.parametrize("negatives", [0, 2])
def test_tasks_have_the_form_of_those_from_memory(store, negatives):
    """Same tree, shapes and types as `task_source` gives, whose data has the whole table of users."""
    options = {"tasks": 4, "support": (2, 8), "query": 4, "negatives": negatives}
    source, memory = stream_source(store, **options), task_source(load(store), **options)
    key = jax.random.key(0)
    task = jax.eval_shape(source.draw, (source.data, next(source.stream(0))), key)
    assert task == jax.eval_shape(memory.draw, memory.data, key)


def drawn(store: Store, steps: int = 1, **options):
    source = stream_source(store, **options)
    draw = jax.jit(source.draw)
    return [
        (batch, draw((source.data, batch), jax.random.key(k)))
        for k, batch in enumerate(itertools.islice(source.stream(0), steps))
    ]


def test_masks_and_targets(store):
    """Of s support and q query examples the first are real; items are shown where nothing hides them, 0 elsewhere."""
    options = {"tasks": 30, "support": (2, 8), "query": 4, "item_drop": 0.0, "cold_tasks": 0.0}
    ((batch, task),) = drawn(store, **options)
    for part, size, first, last in ((task.query, 1, 0, 4), (task.support, 0, 4, 12)):
        real = np.arange(last - first)[None] < batch["sizes"][:, size : size + 1]
        events = batch["events"][:, first:last]
        np.testing.assert_array_equal(part.mask, real.astype(np.float32))
        np.testing.assert_array_equal(part.inputs["item_id"], np.where(real, events[..., 0], 0))
        np.testing.assert_array_equal(part.target, np.where(real, events[..., 1].view(np.float32), 0))
        assert (np.asarray(part.inputs["user_id"]) == 0).all()


def test_own_user_rows(store):
    ((batch, task),) = drawn(store, tasks=30, user_rows="own")
    np.testing.assert_array_equal(task.support.inputs["user_id"][:, 0], batch["user"])
    ((_, task),) = drawn(store, tasks=30, user_rows="own", user_drop=1.0)
    assert not np.asarray(task.support.inputs["user_id"]).any()


def test_clicks_have_targets_of_one_and_negatives_of_zero(clicks):
    options = {"tasks": 30, "support": (2, 8), "query": 4, "negatives": 2, "item_drop": 0.0, "cold_tasks": 0.0}
    ((batch, task),) = drawn(clicks, **options)
    assert batch["events"].shape == (30, 12, 1)
    target, mask = np.asarray(task.query.target), np.asarray(task.query.mask)
    np.testing.assert_array_equal(target[:, :4], mask[:, :4])
    assert not target[:, 4:].any()
    np.testing.assert_array_equal(mask[:, 4:], np.repeat(mask[:, :4], 2, axis=1))
    shown = np.asarray(task.query.inputs["item_id"])[:, 4:]
    np.testing.assert_array_equal(shown, np.where(mask[:, 4:] > 0, batch["negatives"][:, :8], 0))


def test_ids_are_hidden_as_often_as_asked(store):
    """A fifth of the items (and of the tasks whole): of 60 batches of 30 tasks, within 5 standard errors."""
    options = {"tasks": 30, "support": (8, 8), "query": 4, "users": np.arange(10, 31)}
    n = 60 * 30
    for drop, cold in ((0.2, 0.0), (0.0, 0.2)):
        shown = np.concatenate(
            [
                np.asarray(t.support.inputs["item_id"]) > 0
                for _, t in drawn(store, 60, item_drop=drop, cold_tasks=cold, **options)
            ]
        )
        count = shown.size if drop else n
        assert abs(shown.mean() - 0.8) < 5 * np.sqrt(0.2 * 0.8 / count)
        assert ((shown.all(1) | ~shown.any(1)).all()) == bool(cold)


def test_negatives_are_what_the_user_never_had_each_alike(store):
    """20,000 negatives of one user with 12 of 50 items, from a pool of the 40 first: none was had, all others alike."""
    data, pool = load(store), np.arange(1, 41)
    mine = data.item[data.user == 10]
    free = np.setdiff1d(pool, mine)
    found = batches(store, 250, users=np.array([10]), items=pool, tasks=1, support=(2, 6), query=4, negatives=8)
    drawn_items = np.concatenate([b["negatives"].ravel() for b in found])
    assert set(drawn_items) == set(free)
    counts = np.bincount(drawn_items)[free]
    assert stats.chisquare(counts).pvalue > TOO_UNLIKELY


def test_a_user_who_had_all_items_has_no_negatives(store):
    """From a pool of the user's own items there is nothing to draw: 0, which the mask leaves out."""
    data = load(store)
    own = np.unique(data.item[data.user == 5])
    options = {"items": own, "tasks": 2, "support": (2, 4), "query": 3, "negatives": 3, "users": np.array([5])}
    ((batch, task),) = drawn(store, **options)
    assert not batch["negatives"].any()
    assert not np.asarray(task.query.mask)[:, 3:].any()


def test_never_had_is_the_rank_of_the_free_items(store):
    """Against a plain loop: word r over the free items of each user, in order."""
    rng = np.random.default_rng(1)
    histories = [rng.choice(30, n, replace=True) + 1 for n in (1, 5, 40, 12)]
    starts = np.append(0, np.cumsum([len(h) for h in histories]))
    pool = np.sort(rng.choice(30, 20, replace=False) + 1)
    words = rng.integers(0, 2**32, (4, 25), dtype=np.uint32)
    place = np.array([np.searchsorted(pool, item) if item in pool else -1 for item in np.concatenate(histories)])
    found = stream._never_had(starts, place, pool, words)
    for k, history in enumerate(histories):
        free = np.setdiff1d(pool, history)
        wanted = [free[int(w) * len(free) >> 32] if len(free) else 0 for w in words[k]]
        assert found[k].tolist() == wanted


@pytest.mark.parametrize("n", [1, 2, 5, 13, 200])
def test_places_are_a_permutation(n):
    """Every row of 300 is a permutation of 0..n-1; beyond n, something below n."""
    x = np.broadcast_to(np.arange(n + 3), (300, n + 3))
    found = stream._permuted(x, np.full((300, 1), n), np.random.default_rng(n))
    assert (np.sort(found[:, :n], axis=1) == np.arange(n)).all()
    assert found.min() >= 0
    assert found.max() < n


@pytest.mark.parametrize("n", [5, 13])
def test_pairs_of_places_are_uniform(n):
    """Images of (0, 1) for 40,000 rows: all n (n - 1) pairs alike."""
    x = np.broadcast_to(np.arange(2), (40_000, 2))
    found = stream._permuted(x, np.full((40_000, 1), n), np.random.default_rng(0))
    counts = np.bincount(found[:, 0] * n + found[:, 1], minlength=n * n).reshape(n, n)
    assert not np.diag(counts).any()
    assert stats.chisquare(counts[~np.eye(n, dtype=bool)]).pvalue > TOO_UNLIKELY


def test_places_are_those_of_the_device_draw():
    """The same formula as `draw._permuted`, from the same pivots, factors and terms."""
    from metarec_jax.data import draw

    words = np.asarray(draw.random_words(jax.random.bits(jax.random.key(0), (2,), "uint32"), (3, 12, 5)))
    n, x = np.array([4, 9, 30, 1000, 2**31 - 1]), np.tile(np.arange(4), (5, 1))

    class Fixed:
        class bit_generator:
            random_raw = staticmethod(lambda count: words.ravel().view(np.uint64))

    ours = stream._permuted(x, n[:, None], Fixed)
    theirs = jax.jit(draw._permuted)(
        jax.numpy.asarray(x, "int32"), jax.numpy.asarray(n, "int32"), jax.random.bits(jax.random.key(0), (2,), "uint32")
    )
    np.testing.assert_array_equal(ours, theirs)


def test_features_go_with_their_rows(store, tmp_path):
    """The kind of item k is k % 3, the age of user k is k % 4: read back from the columns of a task."""
    frames = {"item": pd.DataFrame({"item": range(ITEMS), "kind": [f"k{k % 3}" for k in range(ITEMS)]})}
    frames["user"] = pd.DataFrame({"user": range(USERS), "age": np.arange(USERS) % 4})
    paths = {side: tmp_path / f"{side}.csv" for side in frames}
    for side, frame in frames.items():
        frame.to_csv(paths[side], index=False)
    rich = open_store(store.path, item_features=paths["item"], user_features=paths["user"])
    assert rich.columns["user_age"] == Column("categorical", 5)
    ((batch, task),) = drawn(rich, tasks=30, support=(2, 8), query=4, item_drop=1.0)
    real = np.asarray(task.support.mask) > 0
    kind = np.asarray(task.support.inputs["item_kind"])
    item = batch["events"][:, 4:, 0]
    items, users = load(store).items, load(store).users
    assert (kind[real] == items.decode(item[real]) % 3 + 1).all()
    assert (kind[~real] == 0).all()
    assert (np.asarray(task.support.inputs["user_age"])[:, 0] == users.decode(batch["user"]) % 4 + 1).all()
    assert not np.asarray(task.support.inputs["item_id"]).any()


def test_a_damaged_store_stops_the_run_with_its_place(store, tmp_path):
    """The error of a reading thread reaches `fit` as it was raised."""
    import shutil

    shutil.copytree(store.path, tmp_path / "store")
    events = np.fromfile(tmp_path / "store" / "events.bin", "<i4").reshape(-1, 2)
    events[3 + 4 + 5, 0] = 99
    events.tofile(tmp_path / "store" / "events.bin")
    bad = open_store(tmp_path / "store")
    with pytest.raises(MetarecError, match="interaction 0 of user row 4 has item row 99"):
        fit(learner(bad), stream_source(bad, tasks=4, support=(2, 8)), steps=20)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tasks": 0}, "tasks must be 1"),
        ({"support": (5, 3)}, "support must be"),
        ({"item_drop": 1.5}, "item_drop is a probability, from 0 to 1, got 1.5"),
        ({"cold_tasks": float("nan")}, "cold_tasks is a probability, from 0 to 1, got nan"),
        ({"order": "file"}, "order='file'"),
        ({"user_rows": "mine"}, "user_rows 'mine'"),
        ({"seed": -1}, "seed must be from 0 to"),
        ({"negatives": -1}, "negatives must be 0"),
    ],
)
def test_bad_options_are_refused(store, options, said):
    with pytest.raises(MetarecError, match=said):
        stream_source(store, **options)


def test_order_by_time_wants_times(clicks):
    with pytest.raises(MetarecError, match="requires timestamps, which the store lacks"):
        stream_source(clicks, order="time")


@pytest.mark.parametrize(
    ("learner", "user_rows", "message"),
    [
        ("dropout_net", "prior", "learns from rows of the users, .* give --user-rows own"),
        ("gaussian_process", "own", "counts all ratings in memory, .* take --learner ridge"),
    ],
)
def test_learners_that_read_what_is_not_in_memory_are_refused(store, learner, user_rows, message):
    given = Config(learner=LearnerConfig(learner), tasks=TaskConfig(user_rows=user_rows, support=(2, 4)))
    with pytest.raises(MetarecError, match=message):
        build_stream(given, store, hold_out(store, user_rows=user_rows))


def test_a_dropped_row_is_trained_from_a_stream_of_users_with_rows(store):
    given = Config(learner=LearnerConfig("dropout_net"), tasks=TaskConfig(user_rows="own", support=(2, 4), tasks=4))
    source = build_stream(given, store, hold_out(store, user_rows="own"))
    task = jax.jit(source.draw)((source.data, next(source.stream(0))), jax.random.key(0))
    assert np.all(np.asarray(task.query.inputs["user_id"]) > 0)
