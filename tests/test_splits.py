"""Parts are disjoint, cover, keep cold things out of training, and (by time) never look ahead."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from metarec_jax.core import MetarecError
from metarec_jax.data.interactions import Interactions, Vocabulary
from metarec_jax.data.io.published import read_partition
from metarec_jax.data.splits import SCENARIOS, Split, split
from metarec_jax.data.synthetic import checkerboard, synthetic


def interactions(num_users: int, num_items: int, density: float, seed: int, moments: int = 200) -> Interactions:
    """Random pairs; the rating of a row is its number, so that a row can be recognised. Times repeat."""
    rng = np.random.default_rng(seed)
    user, item = np.nonzero(rng.random((num_users, num_items)) < density)
    arrival = rng.integers(0, moments, num_users)
    return Interactions(
        user=(user + 1).astype(np.int32),
        item=(item + 1).astype(np.int32),
        rating=np.arange(len(user), dtype=np.float32),
        timestamp=arrival[user] + rng.integers(0, moments // 10, len(user)),
        users=Vocabulary(np.arange(num_users)),
        items=Vocabulary(np.arange(num_items)),
    )


def parts(s: Split) -> dict[tuple[str, str], Interactions]:
    out = {("train", ""): s.train}
    out |= {("validation", name): rows for name, rows in s.validation.items()}
    return out | {("test", name): rows for name, rows in s.test.items()}


def users(data: Interactions) -> set[int]:
    return set(data.user.tolist())


def items(data: Interactions) -> set[int]:
    return set(data.item.tolist())


cases = st.fixed_dictionaries(
    {
        "num_users": st.integers(10, 40),
        "num_items": st.integers(10, 40),
        "density": st.floats(0.2, 0.9),
        "seed": st.integers(0, 10**6),
    }
)
shares = st.sampled_from([(0.1, 0.1), (0.25, 0.2), (0.2, 0.0), (0.4, 0.3)])
chosen = st.sets(st.sampled_from(SCENARIOS), min_size=1)


def attempt(data: Interactions, scenarios: set[str], by: str, share: tuple[float, float], seed: int) -> Split:
    try:
        parts = split(data, sorted(scenarios), by=by, test=share[0], validation=share[1], seed=seed)
    except MetarecError as error:
        assume("too few to test" not in str(error))
        raise
    assume(not parts.notes)  # no scenario that cannot be validated
    return parts


@settings(max_examples=60, deadline=None)
@given(cases, chosen, st.sampled_from(["random", "time"]), shares)
def test_parts_are_disjoint_cover_and_keep_cold_out(case, scenarios, by, share):
    data = interactions(**case)
    s = attempt(data, scenarios, by, share, case["seed"])
    rows = np.concatenate([part.rating for part in parts(s).values()])
    assert len(np.unique(rows)) == len(rows)
    assert len(rows) + sum(s.dropped.values()) == len(data)
    assert set(s.test) == scenarios
    assert set(s.validation) == (scenarios if share[1] else set())
    of_user_cold = {"both_cold"} if {"user_cold", "both_cold"} <= scenarios else set()
    assert set(s.history) == ({"warm", "item_cold"} & scenarios) | of_user_cold
    for (_, name), part in parts(s).items():
        if name == "warm":
            assert users(part) <= users(s.train)
            assert items(part) <= items(s.train)
        if name == "user_cold":
            assert not users(part) & users(s.train)
            assert items(part) <= items(s.train)
        if name == "item_cold":
            assert users(part) <= users(s.train)
            assert not items(part) & items(s.train)
        if name == "both_cold":
            assert not users(part) & users(s.train)
            assert not items(part) & items(s.train)
    for name in {"warm", "item_cold"} & scenarios:
        assert np.array_equal(s.history[name].rating, s.train.rating)
    if of_user_cold:  # what the users of both_cold rated of training items, in validation and test
        held_out = [part for (_, name), part in parts(s).items() if name == "user_cold"]
        known = np.sort(np.concatenate([part.rating for part in held_out]))
        assert np.array_equal(np.sort(s.history["both_cold"].rating), known)


@settings(max_examples=30, deadline=None)
@given(cases, chosen, st.sampled_from(["random", "time"]))
def test_validation_users_and_items_are_apart_from_test_ones(case, scenarios, by):
    s = attempt(interactions(**case), scenarios, by, (0.25, 0.2), 0)
    cold = lambda which, names: [which[n] for n in names if n in which]  # noqa: E731
    for side, names in ((users, ("user_cold", "both_cold")), (items, ("item_cold", "both_cold"))):
        for chooses in cold(s.validation, names):
            for tests in cold(s.test, names):
                assert not side(chooses) & side(tests)


@settings(max_examples=60, deadline=None)
@given(cases, chosen, shares)
def test_nothing_looks_ahead_in_time(case, scenarios, share):
    s = attempt(interactions(**case), scenarios, "time", share, 0)
    for name in {"warm", "user_cold", "both_cold"} & scenarios:
        assert s.train.timestamp.max() < s.test[name].timestamp.min()
        if s.validation:
            assert s.train.timestamp.max() < s.validation[name].timestamp.min()
            assert s.validation[name].timestamp.max() < s.test[name].timestamp.min()


@settings(max_examples=30, deadline=None)
@given(cases)
def test_cold_items_by_time_are_the_last_to_appear(case):
    data = interactions(**case)
    s = attempt(data, {"item_cold"}, "time", (0.25, 0.2), 0)
    first = np.full(data.items.num_rows, 10**9)
    np.minimum.at(first, data.item, data.timestamp)
    assert first[s.train.item].max() < first[s.validation["item_cold"].item].min()
    assert first[s.validation["item_cold"].item].max() < first[s.test["item_cold"].item].min()


def test_shares_of_users_items_and_warm_rows():
    data = synthetic(100, 50, ratings_per_user=(20, 20)).data
    s = split(data, ("user_cold",), test=0.2, validation=0.1)
    assert (len(users(s.train)), len(users(s.validation["user_cold"])), len(users(s.test["user_cold"]))) == (70, 10, 20)
    s = split(data, ("item_cold",), test=0.2, validation=0.1)
    assert (len(items(s.train)), len(items(s.validation["item_cold"])), len(items(s.test["item_cold"]))) == (35, 5, 10)
    s = split(data, ("warm",), test=0.2, validation=0.1)
    # each of 20 rows is placed at (k + 1/2) / 20: 14 below 0.7, 2 below 0.8, 4 above
    assert set(np.bincount(s.test["warm"].user)[1:]) == {4}
    assert set(np.bincount(s.validation["warm"].user)[1:]) == {2}


def test_a_warm_item_is_never_wholly_held_out():
    data = interactions(40, 40, 0.2, 3)
    s = split(data, ("warm",), test=0.4, validation=0.4)
    assert items(s.train) == items(data)


def test_the_seed_decides_and_time_needs_none():
    data = synthetic(60, 40, ratings_per_user=(10, 20)).data
    a, b, c = (split(data, ("user_cold",), seed=seed) for seed in (1, 1, 2))
    assert users(a.test["user_cold"]) == users(b.test["user_cold"]) != users(c.test["user_cold"])
    d, e = (split(data, ("user_cold", "item_cold"), by="time", seed=seed) for seed in (1, 2))
    assert all(np.array_equal(x.user, y.user) for x, y in zip(parts(d).values(), parts(e).values(), strict=True))


def test_what_is_dropped_is_noted():
    s = split(synthetic(60, 40, ratings_per_user=(20, 20)).data, ("user_cold", "item_cold"))
    assert s.dropped
    assert [f"split: {n} rows dropped: {why}" for why, n in s.dropped.items()] == list(s.train.notes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scenarios": ("cold",)}, "choose from warm, user_cold"),
        ({"scenarios": ()}, "expected at least one scenario"),
        ({"by": "date"}, "by must be 'random' or 'time'"),
        ({"test": 0.0}, "test must be above 0"),
        ({"test": 0.6, "validation": 0.4}, "their sum below 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(MetarecError, match=message):
        split(interactions(20, 20, 0.5, 0), **arguments)


def test_no_timestamps_and_too_little_data():
    with pytest.raises(MetarecError, match="use --by random"):
        split(replace(interactions(20, 20, 0.5, 0), timestamp=None), by="time")
    with pytest.raises(MetarecError, match=r"to test both_cold \(.*\); use --scenarios user_cold .*--test, now 0.1"):
        split(interactions(10, 10, 0.9, 0), ("user_cold", "both_cold"), test=0.1, validation=0)


def full(num_users: int, num_items: int) -> Interactions:
    """Every user has every item."""
    ids = np.arange(num_users * num_items)
    user, item = ids // num_items + 1, ids % num_items + 1
    return Interactions(user, item, None, None, Vocabulary(np.arange(num_users)), Vocabulary(np.arange(num_items)))


def test_scenarios_that_the_data_is_too_small_for_are_left_out_and_noted():
    """Of ten items one is held out for test: nobody has a support and a query of it. All else is tested."""
    s = split(full(60, 10))
    assert list(s.test) == list(s.validation) == ["warm", "user_cold"]
    assert len(s.train) == 48 * 8  # no item is held out for a scenario that is not tested
    assert [note.split(":")[0] for note in s.notes] == ["item_cold is not tested", "both_cold is not tested"]
    assert not split(full(60, 40)).notes


@pytest.mark.parametrize(
    ("num_users", "num_items", "tested"), [(3, 2, ["user_cold"]), (2, 9, ["warm"]), (4, 2, ["user_cold"])]
)
def test_tiny_data_is_tested_wherever_it_can_be(num_users, num_items, tested):
    assert list(split(full(num_users, num_items)).test) == tested


def test_a_scenario_that_cannot_be_validated_is_tested_and_noted():
    data = full(60, 10)  # test items: 2, so a support and a query; one validation item
    s = split(data, ("item_cold",), test=0.2, validation=0.1)
    assert set(s.test) == {"item_cold"}
    assert s.validation == {}
    assert s.notes == ("item_cold is tested but not validated: no user has 2 of the 60 rows of its validation part",)


def test_data_too_small_for_anything_gets_one_message_with_all_options():
    with pytest.raises(MetarecError, match=r"3 users with 1 items.*--test, now 0.1, --validation, now 0.1") as refused:
        split(full(3, 1))
    assert all(name in str(refused.value) for name in SCENARIOS)


def partition(tmp_path: Path, name: str, **columns) -> Path:
    users, items = np.meshgrid(np.arange(20), np.arange(100, 130), indexing="ij")
    users, items = users.ravel(), items.ravel()
    cold_user, cold_item = users >= 15, items >= 120
    names = np.array([["warm_state", "item_cold_state"], ["user_cold_state", "user_and_item_cold_state"]])
    states = names[cold_user.astype(int), cold_item.astype(int)]
    frame = pd.DataFrame({"user_id": users, "movie_id": items, "rating": 1 + users % 5, "melu_state": states} | columns)
    if name.endswith(".csv"):
        frame.to_csv(tmp_path / name, index=False)
    else:
        frame.to_parquet(tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("name", ["p.csv", "p.parquet"])
def test_a_partition_without_validation_is_as_published(tmp_path, name):
    s = read_partition(partition(tmp_path, name), validation=0)
    assert len(s.train) == 15 * 20
    assert not s.validation
    assert not s.dropped
    assert not s.history
    assert {k: len(v) for k, v in s.test.items()} == {"user_cold": 5 * 20, "item_cold": 15 * 10, "both_cold": 5 * 10}
    assert s.train.items.decode(s.train.item).max() == 119
    assert s.train.rating.tolist() == (1 + s.train.users.decode(s.train.user) % 5).tolist()


def test_a_partition_with_validation_cuts_it_out_of_warm(tmp_path):
    s = read_partition(partition(tmp_path, "p.csv"), validation=0.2)
    # 3 of 15 users and 4 of 20 items: 12 * 16 train, 3 * 16, 12 * 4, 3 * 4; the test parts do not change
    assert len(s.train) == 12 * 16
    assert not s.dropped
    assert {k: len(v) for k, v in s.validation.items()} == {"user_cold": 48, "item_cold": 48, "both_cold": 12}
    assert len(s.test["user_cold"]) == 100


def test_a_partition_takes_vocabularies_and_features_from_data(tmp_path):
    base = synthetic(30, 125, ratings_per_user=(5, 5)).data  # ids 1..30 and 1..125: no user 0, no items 126..129
    s = read_partition(partition(tmp_path, "p.csv"), base, validation=0)
    assert s.train.user_features is base.user_features
    assert s.train.items is base.items
    assert s.dropped == {"rows with ids that the data lacks": 20 * 30 - 19 * 26}


@pytest.mark.parametrize(
    ("columns", "arguments", "message"),
    [
        ({"melu_state": "lukewarm"}, {}, "has lukewarm; known states"),
        ({"melu_state": "warm"}, {}, "expected warm rows and test scenarios"),
        ({"rating": "good"}, {}, "'good' is not a number"),
        ({"melu_state": None}, {}, r"line 2 of .*column 'melu_state', has no value"),
        ({"user_id": None}, {}, r"column 'user_id', has no value"),
        ({}, {"state_col": "nope"}, "no column for state"),
        ({}, {"validation": 1.0}, "below 1"),
    ],
)
def test_bad_partitions(tmp_path, columns, arguments, message):
    with pytest.raises(MetarecError, match=message):
        read_partition(partition(tmp_path, "p.csv", **columns), **arguments)


def test_a_partition_of_other_ids_or_no_file(tmp_path):
    with pytest.raises(MetarecError, match="no item of p"):
        read_partition(partition(tmp_path, "p.csv"), checkerboard(20, 20))
    with pytest.raises(MetarecError, match="there is no file"):
        read_partition(tmp_path / "none.csv")
    (tmp_path / "bad.parquet").write_bytes(b"rubbish")
    with pytest.raises(MetarecError, match=r"bad\.parquet"):
        read_partition(tmp_path / "bad.parquet")


@pytest.mark.data
def test_the_melu_partition():
    root = os.environ.get("METAREC_TEST_DATA")
    if not root:
        pytest.skip("METAREC_TEST_DATA is not set: a folder with ml-1m/melu_split.parquet")
    s = read_partition(Path(root) / "ml-1m" / "melu_split.parquet", validation=0)
    assert len(s.train) == 640_448
    assert {k: len(v) for k, v in s.test.items()} == {"user_cold": 163_702, "item_cold": 157_456, "both_cold": 38_603}
    assert not users(s.train) & (users(s.test["user_cold"]) | users(s.test["both_cold"]))
    assert not items(s.train) & (items(s.test["item_cold"]) | items(s.test["both_cold"]))
    chosen = read_partition(Path(root) / "ml-1m" / "melu_split.parquet")
    assert all(len(chosen.test[k]) == len(s.test[k]) for k in s.test)
    assert len(chosen.validation) == 3
