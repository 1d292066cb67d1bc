"""Side features: which columns are features, of which kind, in which rows."""

import numpy as np
import pandas as pd
import pytest

from metarec_jax.core import MetarecError
from metarec_jax.data.cache import read_cache, write_cache
from metarec_jax.data.interactions import Interactions
from metarec_jax.data.readers import from_pandas
from metarec_jax.online.history import feature_columns


def items(**columns) -> Interactions:
    n = len(next(iter(columns.values())))
    frame = pd.DataFrame({"user": np.arange(n) % 2, "item": np.arange(n), "rating": np.arange(n) % 5})
    return from_pandas(frame, item_features=pd.DataFrame({"item": np.arange(n), **columns}))


def test_kinds_of_features():
    n = 60
    many = np.arange(n) * 3
    data = items(
        few=np.arange(n) % 4,
        many=many,
        real=np.linspace(0, 1, n),
        color=["red", "blue"] * (n // 2),
        flag=[True, False] * (n // 2),
        tags=[["b", "a"], ["a"]] * (n // 2),
        bars=["x|y", "y"] * (n // 2),
        item_kind=pd.Categorical(list("ab") * (n // 2)),
        when=pd.date_range("2020-01-01", periods=n),
        text=[f"review {k}" for k in range(n)],
        zip_code=np.arange(n) + 10_000,
        constant=[1] * n,
        title=[f"T{k}" for k in range(n)],
    )
    kinds = {name: f.kind for name, f in data.item_features.items()}
    assert kinds == {
        **{f"item_{name}": "categorical" for name in ("few", "color", "flag", "kind")},
        **{f"item_{name}": "numeric" for name in ("many", "real", "when")},
        **{f"item_{name}": "multi" for name in ("tags", "bars")},
    }
    scaled = (many - many.mean()) / many.std()
    np.testing.assert_allclose(data.item_features["item_many"].values[1:, 0], scaled, rtol=1e-6)
    assert data.item_features["item_many"].values[0, 0] == 0
    assert data.item_features["item_color"].vocabulary.ids.tolist() == ["blue", "red"]
    assert data.item_features["item_tags"].values[:3].tolist() == [[0, 0], [2, 1], [1, 0]]
    assert data.titles[7] == "T7"
    for name in ("text", "zip_code"):
        assert f"item column {name!r} differs on most rows, like a label: no feature" in data.notes
    assert "item column 'constant' is the same everywhere: no feature" in data.notes


def test_missing_features_are_the_unknown_value():
    data = items(real=[1.5, np.nan, 2.5, 3.5], color=["a", None, "", "b"], tags=[["x"], None, [], ["y", "x"]])
    real = data.item_features["item_real"].values[:, 0]
    np.testing.assert_allclose(real, [0, -np.sqrt(1.5), 0, 0, np.sqrt(1.5)], rtol=1e-6)  # mean 2.5, std sqrt(2/3)
    assert data.item_features["item_color"].values.tolist() == [0, 1, 0, 0, 2]
    assert data.item_features["item_tags"].values.tolist() == [[0, 0], [1, 0], [0, 0], [0, 0], [2, 1]]


def test_long_lists_are_cut_and_that_is_said():
    data = items(tags=[[str(k) for k in range(40)], ["1"], ["2"]])
    assert data.item_features["item_tags"].values.shape == (4, 32)
    assert "item column 'tags' has up to 40 values a row: the first 32 are kept (1 rows cut)" in data.notes


def test_feature_rows_are_matched_by_id():
    frame = pd.DataFrame({"user": ["1", "2", "3"], "item": [1, 2, 3], "rating": [1, 2, 3]})
    about = pd.DataFrame({"user": [2, 9, 1, 2], "job": ["cook", "none", "pilot", "clerk"]})
    data = from_pandas(frame, user_features=about)
    job = data.user_features["user_job"]
    assert job.vocabulary.ids.tolist() == ["clerk", "pilot"]
    assert job.values.tolist() == [0, 2, 1, 0]
    assert "1 users of the user table have no interaction: left out" in data.notes
    assert "1 repeated user ids in the user table: the last row counts" in data.notes
    assert "1 users have no row in the user table: their features are unknown" in data.notes
    with pytest.raises(MetarecError, match="no id in column 'user' of the user table is among"):
        from_pandas(frame, user_features=about.assign(user=77))
    with pytest.raises(MetarecError, match="no column of user ids; its columns are: job"):
        from_pandas(frame, user_features=about[["job"]])


def test_the_order_of_rows_changes_no_vocabulary():
    frame = pd.DataFrame({"user": [3, 1, 2], "item": ["c", "a", "b"], "rating": [1, 2, 3]})
    about = pd.DataFrame({"item": ["c", "a", "b"], "kind": ["z", "y", "y"]})
    one, two = (from_pandas(f, item_features=a) for f, a in ((frame, about), (frame[::-1], about[::-1])))
    assert one.users.ids.tolist() == two.users.ids.tolist() == [1, 2, 3]
    assert one.items.ids.tolist() == two.items.ids.tolist() == ["a", "b", "c"]
    assert one.item_features["item_kind"].values.tolist() == two.item_features["item_kind"].values.tolist()


def test_numbers_of_a_new_user_are_standardised_as_those_read(tmp_path):
    """Also from a cache, as a run has it: what a known user's row says, a new user of the same age gets."""
    ages = np.linspace(20.5, 70.0, 60)
    frame = pd.DataFrame({"user": np.arange(60), "item": np.arange(60) % 7, "rating": np.arange(60) % 5})
    data = from_pandas(frame, user_features=pd.DataFrame({"user": np.arange(60), "age": ages}))
    write_cache(data, tmp_path / "data.parquet")
    read = read_cache(tmp_path / "data.parquet")
    row = int(data.users.encode([17])[0])
    for one in (data, read):
        columns, _ = feature_columns({"age": float(ages[17])}, one)
        np.testing.assert_allclose(columns["user_age"][0], data.user_features["user_age"].values[row], rtol=1e-6)
