"""A store opened: what it gives back, who is held out, and every way in which its files may lie."""

from __future__ import annotations

import gc
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from metarec_jax.core import Column, MetarecError
from metarec_jax.data.store.held_out import hold_out, split_of
from metarec_jax.data.store.opened import File, Store, ids, is_store, lengths, load, open_store, read_events
from metarec_jax.data.store.prepare import prepare


def frame_of(users: int = 200, items: int = 30, seed: int = 0) -> pd.DataFrame:
    """User k has 1 + k % 12 ratings of items of their own, at times that grow."""
    rng = np.random.default_rng(seed)
    counts = 1 + np.arange(users) % 12
    user = np.repeat(np.arange(users), counts)
    item = np.concatenate([rng.choice(items, count, replace=False) for count in counts])
    rating = rng.integers(1, 6, len(user)).astype(float)
    names = "i" + pd.Series(item).astype(str)
    return pd.DataFrame({"user": user + 1000, "item": names, "rating": rating, "time": np.arange(len(user))})


def stored(folder: Path, frame: pd.DataFrame) -> Store:
    frame.to_parquet(folder / "data.parquet", index=False)
    return prepare([folder / "data.parquet"], folder / "store", say=lambda line: None)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return stored(tmp_path_factory.mktemp("store"), frame_of())


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Store:
    return stored(tmp_path_factory.mktemp("small"), frame_of(users=20))


@pytest.fixture
def own(small, tmp_path) -> Store:
    """One of 20 users that a test may damage."""
    shutil.copytree(small.path, tmp_path / "store")
    return open_store(tmp_path / "store")


def test_counts(store):
    """200 users with 1..12 ratings in turn: 16 rounds of 78 and 8 more users with 1..8, 36: 1284."""
    assert (store.users, store.items, store.interactions, store.longest) == (200, 30, 16 * 78 + 36, 12)
    assert (store.ratings, store.timestamps, store.implicit) == ((1.0, 5.0), True, False)
    assert lengths(store)[:13].tolist() == [*range(1, 13), 1]
    assert store.columns == {"user_id": Column("id", 1), "item_id": Column("id", 31)}
    assert is_store(store.path)
    assert not is_store(store.path.parent)


def test_ids_in_order(store):
    assert ids(store, "user").tolist() == list(range(1000, 1200))
    assert ids(store, "item").tolist() == sorted(f"i{k}" for k in range(30))
    assert ids(store, "user", np.array([1, 7, 200])).tolist() == [1000, 1006, 1199]


def test_histories_of_some_users(store):
    """In any order and repeated; the ratings are the floats behind the second number."""
    frame = frame_of()
    starts, events = read_events(store, np.array([12, 3, 12]))
    assert starts.tolist() == [0, 12, 15, 27]
    names = ids(store, "item")
    for k, user in enumerate((1011, 1002, 1011)):
        mine = frame[frame["user"] == user]
        part = events[starts[k] : starts[k + 1]]
        assert names[part[:, 0] - 1].tolist() == mine["item"].tolist()
        assert part[:, 1].view(np.float32).tolist() == mine["rating"].tolist()


@pytest.mark.parametrize("whole", [False, True])
def test_some_users_in_memory(store, whole):
    """Users 5 and 9 (rows) are rows 1 and 2 of a vocabulary of two, or keep their rows in the whole one."""
    data = load(store, np.array([5, 9]), whole=whole)
    everything = load(store)
    mine = everything.take(np.isin(everything.user, [5, 9]))
    assert np.unique(data.user).tolist() == ([5, 9] if whole else [1, 2])
    assert data.users.decode(data.user).tolist() == mine.users.decode(mine.user).tolist()
    assert data.users.num_rows == (201 if whole else 3)
    for name in ("item", "rating", "timestamp"):
        np.testing.assert_array_equal(getattr(data, name), getattr(mine, name))


def test_features_are_read_beside_it(store, tmp_path):
    """Of items and users, aligned with the rows; of some users only theirs."""
    pd.DataFrame(
        {"item": [f"i{k}" for k in range(30)], "kind": ["a", "b"] * 15, "title": [f"T{k}" for k in range(30)]}
    ).to_csv(tmp_path / "items.csv", index=False)
    pd.DataFrame({"user": range(1000, 1200), "age": np.arange(200) % 7}).to_csv(tmp_path / "users.csv", index=False)
    found = open_store(store.path, item_features=tmp_path / "items.csv", user_features=tmp_path / "users.csv")
    assert found.columns["item_kind"] == Column("categorical", 3)
    data = load(found, np.array([3, 10]))
    assert data.titles[0] == "T0"
    age = data.user_features["user_age"]
    assert age.vocabulary.decode(age.values[1:]).tolist() == [2, 9 % 7]
    assert data.columns["user_age"] == Column("categorical", 8)


def test_who_is_held_out(store):
    """183 of 200 users have two or more ratings (17 have one): 18 for the test, 18 for validation, 164 train."""
    held = hold_out(store, seed=3)
    assert (np.bincount(held.part[1:]) == [164, 18, 18]).all()
    test, validation, train = (part.users.decode(np.unique(part.user)) for part in (
        held.split.test["user_cold"], held.split.validation["user_cold"], held.split.train
    ))  # fmt: skip
    assert not set(test) & set(validation)
    assert set(train) == set(ids(store, "user")[held.users - 1])
    assert not set(train) & (set(test) | set(validation))
    assert len(held.data) == store.interactions
    again = hold_out(store, seed=3)
    assert again.users.tolist() == held.users.tolist()
    assert hold_out(store, seed=4).users.tolist() != held.users.tolist()
    parts = split_of(held.data, held.part)
    assert len(parts.test["user_cold"]) == len(held.split.test["user_cold"])


def test_held_out_users_stay_where_data_grows(store, tmp_path):
    """Those of the lowest hashes: with 20 users more, most of the 18 are the same, whatever their rows are."""
    frame = frame_of(users=200)
    more = pd.concat([frame, frame_of(users=20).assign(user=lambda f: f["user"] - 500)])
    grown = stored(tmp_path, more)
    of = [h.split.test["user_cold"] for h in (hold_out(store), hold_out(grown))]
    before, after = (set(part.users.decode(np.unique(part.user))) for part in of)
    assert len(before & after) >= 14


def test_limits_of_what_is_held_out_and_sampled(store):
    """At most 5 users a part; the sample stops before 50 interactions."""
    held = hold_out(store, most=5, sample=50)
    assert np.bincount(held.part[1:])[1:].tolist() == [5, 5]
    assert 50 - 12 < len(held.split.train) <= 50
    assert len(held.users) == 190
    assert (hold_out(store, validation=0.0).split.validation, hold_out(store, test=0.0).split.test) == ({}, {})
    for shares in ({"test": 0.6, "validation": 0.5}, {"test": -0.1}, {"test": 0.999, "validation": 0.0005}):
        with pytest.raises(MetarecError, match="--validation"):
            hold_out(store, **shares)


def test_items_that_only_held_out_users_had_are_unknown(store):
    """Counted from the whole store, not from the sample."""
    held = hold_out(store, test=0.5, validation=0.4, sample=1)
    everything = load(store)
    trained = np.unique(everything.item[np.isin(everything.user, held.users)])
    assert held.items.tolist() == trained.tolist()
    rows = np.asarray(held.known.item_row)
    assert np.flatnonzero(rows).tolist() == trained.tolist()
    assert not np.asarray(held.known.user_row).any()
    own = hold_out(store, test=0.5, validation=0.4, sample=1, user_rows="own")
    assert np.flatnonzero(np.asarray(own.known.user_row)).tolist() == own.users.tolist()
    assert own.data.users.num_rows == store.users + 1


def change(store: Store, **changes) -> None:
    path = store.path / "store.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "other"}, "version 1, got"),
        ({"version": 2}, "version 1, got"),
        ({"users": -1}, "users must be .* got -1"),
        ({"users": 21}, "starts.bin: expected 176 bytes, got 168"),
        ({"users": 2**40}, "users must be"),
        ({"items": "many"}, "items must be .* got 'many'"),
        ({"interactions": True}, "interactions must be .* got True"),
        ({"interactions": 10**9}, "events.bin: expected"),
        ({"ratings": [1.0, float("inf")]}, "ratings: expected"),
        ({"ratings": None}, "events.bin: expected"),
        ({"ratings": "ab"}, "could not convert"),
        ({"longest": 3}, "starts.bin: a user has"),
        ({"notes": 5}, "store.json"),
    ],
)
def test_a_store_that_lies_about_itself_is_refused(own, changes, said):
    change(own, **changes)
    with pytest.raises(MetarecError, match=said) as caught:
        open_store(own.path)
    assert "Prepare it again" in str(caught.value)


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"[" * 100_000, b"null", b"\xff\xfe", b'{"format": 1}', b" " * 2**25]
)
def test_a_store_json_that_is_none_is_refused(own, raw):
    (own.path / "store.json").write_bytes(raw)
    with pytest.raises(MetarecError, match="is damaged"):
        open_store(own.path)


@pytest.mark.parametrize("name", ["starts", "events", "times", "counts", "hashes"])
def test_a_file_that_was_cut_or_lost_is_refused(own, name):
    path = own.path / f"{name}.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(MetarecError, match=f"{name}.bin: expected .* bytes"):
        open_store(own.path)
    path.unlink()
    with pytest.raises(MetarecError, match=f"{name}.bin: expected .* got 0"):
        open_store(own.path)


def test_no_store(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(MetarecError, match=r"is not a task store.*metarec prepare"):
            open_store(path)


def damage(store: Store, name: str, at: int, value: int, kind: str) -> None:
    raw = np.fromfile(store.path / f"{name}.bin", kind)
    raw[at] = value
    raw.tofile(store.path / f"{name}.bin")


@pytest.mark.parametrize(("at", "value"), [(0, 1), (5, 2**40), (3, -(2**60)), (-1, 7)])
def test_starts_that_do_not_ascend_are_refused(own, at, value):
    damage(own, "starts", at, value, "<i8")
    with pytest.raises(MetarecError, match=r"starts\.bin"):
        open_store(own.path)


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        (0, 0, "interaction 2 of user row 4 has item row 0 with rating"),
        (0, 31, "item row 31"),
        (0, -(2**31), "item row -2147483648"),
        (1, 0x7F800000, "with rating inf"),
        (1, 0x7FC00000, "with rating nan"),
    ],
)
def test_damaged_events_are_told_by_user_and_row(own, column, value, said):
    """User row 4 has interactions 6..9 (after 1 + 2 + 3): the third is number 8, its numbers are 16 and 17."""
    damage(own, "events", 2 * 8 + column, value, "<i4")
    own = open_store(own.path)
    read_events(own, np.array([1, 2, 3, 5]))
    for users in ([4], [7, 4, 1]):
        with pytest.raises(MetarecError, match=said):
            read_events(own, np.array(users))


def test_a_file_that_ends_while_it_is_read(own):
    with (own.path / "events.bin").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(MetarecError, match=r"events\.bin ends before its last interaction"):
        read_events(own, np.array([20]))


@pytest.mark.parametrize("side", ["user", "item"])
def test_a_damaged_vocabulary_is_refused(own, side):
    path = own.path / f"{side}s" / "part-00000.parquet"
    whole = pd.read_parquet(path)
    whole[::-1].to_parquet(path)
    with pytest.raises(MetarecError, match="rows are not 1, 2, 3"):
        ids(own, side)
    whole[:-1].to_parquet(path)
    with pytest.raises(MetarecError, match=f"{side}s has {len(whole) - 1} rows"):
        ids(own, side)
    path.write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(MetarecError, match="damaged or truncated"):
        ids(own, side)
    path.unlink()
    with pytest.raises(MetarecError, match="has no Parquet file"):
        ids(own, side)


def test_a_file_is_closed_when_it_is_forgotten(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(bytes(range(10)))
    file = File(path)
    assert file.read([(8, 2), (0, 3), (5, 0)]).tolist() == [8, 9, 0, 1, 2]
    descriptor = file._descriptor
    del file
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
