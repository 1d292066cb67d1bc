"""Hostile values: ids, types, shapes and text that no table should have, and settings that no run should have."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tables import ROWS, refused, rows_of, text, write

from metarec_jax import options
from metarec_jax.core import MetarecError
from metarec_jax.data.describe import describe
from metarec_jax.data.interactions import Feature, Interactions, Vocabulary
from metarec_jax.data.io.columns import find_roles, numbers
from metarec_jax.data.io.histories import read_histories
from metarec_jax.data.io.ids import code_ids
from metarec_jax.data.io.readers import from_pandas, read
from metarec_jax.experiment import config
from metarec_jax.messages import listed, shown

# Ids, shapes, types


def test_ids_of_few_bits_do_not_meet():
    """-128..100 in int8: 100 - (-128) = 228 wraps to -28, which stood for 201 - 128 = 73 and met it."""
    ids = np.array([-128, 73, 100, 0], np.int8)
    coded = code_ids(pd.Series(ids))
    assert coded.ids[coded.codes].tolist() == ids.tolist()
    assert coded.ids.tolist() == [-128, 0, 73, 100]


def test_only_what_a_row_has_is_an_id():
    column = pd.Series(pd.Categorical(["a", "b"], categories=["a", "b", "never"]))
    assert code_ids(column).ids.tolist() == ["a", "b"]


def test_numbers_are_those_of_everyone():
    for spelled in ("1_000", "0x10", "½"):
        with pytest.raises(MetarecError, match="is not a number"):
            numbers(pd.Series([spelled, "2"]), "rating", lambda row: f"row {row}")
    times = pd.DataFrame({"user": [1, 2], "item": [1, 2], "ts": np.array([2**63 + 5, 7], np.uint64)})
    with pytest.raises(MetarecError, match="is not a time"):
        from_pandas(times)


def test_ids_that_are_none():
    frame = pd.DataFrame({"user": [[1], [2]], "item": [1, 2]})
    with pytest.raises(MetarecError, match="column 'user': expected one value per row, got lists or tables"):
        from_pandas(frame)
    for ids in ([1.5, 2.5], [["a"], ["b"]], [None, "a"], [True, False], np.array([1, "a"], object), np.array([2**63])):
        with pytest.raises(MetarecError, match="as ids, got"):
            Vocabulary(np.array(ids))
    with pytest.raises(MetarecError, match="'a' occurs twice"):
        Vocabulary(np.array(["a", "b", "a"]))


def test_types_and_shapes_of_interactions():
    ids, n = Vocabulary(np.arange(3)), np.array([1, 2])
    kept = Interactions(n, n.astype(np.uint8), np.array([1, 2]), n.astype(np.int32), ids, ids)
    assert [a.dtype for a in (kept.user, kept.item, kept.rating, kept.timestamp)] == [
        "int32",
        "int32",
        "float32",
        "int64",
    ]
    for wrong in (
        {"user": n.reshape(1, 2), "item": n[:1]},
        {"rating": np.array(["1", "2"])},
        {"rating": np.array([1e300, 1])},  # beyond float32
        {"timestamp": np.array([1.5, 2])},
        {"user": n.astype(float)},
    ):
        given = {"user": n, "item": n, "rating": None, "timestamp": None} | wrong
        with pytest.raises(MetarecError):
            Interactions(**given, users=ids, items=ids)
    for kind, values, vocabulary in (
        ("categorical", np.zeros((3, 2), np.int32), ids),
        ("categorical", np.zeros(3), ids),
        ("categorical", np.zeros(3, np.int32), None),
        ("multi", np.zeros(3, np.int32), ids),
        ("multi", np.full((3, 1), 2**40), ids),
        ("numeric", np.full((3, 1), np.nan), None),
        ("numeric", np.zeros((3, 1)), ids),
        ("other", np.zeros((3, 1)), None),
    ):
        with pytest.raises(MetarecError):
            Feature(kind, values, vocabulary)


def test_unrated_items_of_another_kind_of_id():
    """Ratings by number, items by number and by text: those by text are no items, and the others are still found."""
    frame = pd.DataFrame({"user": [1, 2, 1], "item": [10, 20, 20], "rating": [1, 2, 3]})
    items = pd.DataFrame({"item": ["10", "20", "B00X"], "kind": ["a", "b", "a"]})
    data = from_pandas(frame, item_features=items, unrated_items=True)
    assert data.items.ids.tolist() == [10, 20]
    assert data.items.encode([20, "10", "B00X"]).tolist() == [2, 1, 0]


def test_features_without_measure():
    """1e308 and -1e308 are standardised to 1 and -1, though the square of neither is a number."""
    frame = pd.DataFrame({"user": [1, 2], "item": [1, 2], "rating": [1, 2]})
    items = pd.DataFrame(
        {"item": [1, 2], "price": [1e308, -1e308], "far": pd.to_datetime(["9999-01-01", "1600-01-01"])}
    )
    data = from_pandas(frame, item_features=items)
    assert data.item_features["item_price"].values.tolist() == [[0], [1], [-1]]
    assert data.item_features["item_far"].values.tolist() == [[0], [1], [-1]]
    wide = from_pandas(pd.DataFrame({"user": range(40), "item": range(40), "rating": np.linspace(-3.4e38, 3.4e38, 40)}))
    assert sum(describe(wide)["ratings"]["histogram"].values()) == 40


# Configuration


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (config.TrainConfig, {"lr": float("inf")}),
        (config.TrainConfig, {"lr": float("nan")}),
        (config.TrainConfig, {"lr": 10**400}),
        (config.TrainConfig, {"seed": 10**5000}),  # Python refuses to spell it
        (config.TrainConfig, {"seed": 2**31}),
        (config.TrainConfig, {"steps": [[]]}),
        (config.TrainConfig, {"steps": "9" * 10_000}),
        (config.ModelConfig, {"name": {}}),
        (config.ModelConfig, {"name": ["content"]}),
        (config.ModelConfig, {"hidden": (8, float("inf"))}),
        (config.DataConfig, {"name": "a\0b"}),
        (config.DataConfig, {"name": "x", "user_col": 10**5000}),
    ],
)
def test_settings_that_no_run_should_have(section, values):
    with pytest.raises(MetarecError) as caught:
        section(**values)
    assert 0 < len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


def test_entries_are_names_with_values():
    assert options.entries({"a": 1}, "here") == {"a": 1}
    with pytest.raises(MetarecError, match="the configuration expected names with values, got \\[1\\]"):
        options.entries([1], "the configuration")


# Text of every kind


def test_other_encodings(tmp_path):
    plain = text(",")
    (tmp_path / "a.csv").write_bytes(plain.encode("utf-16"))
    assert "is UTF-16 text. Convert it" in refused(tmp_path / "a.csv")
    bare = "\ufeff" + text(",", None)
    assert rows_of(read(write(tmp_path / "b.csv", bare))) == ROWS
    assert read_histories(write(tmp_path / "c.csv", bare)).user_id == ["u1", "u2", "u1"]  # the mark is no part of an id
    side = "item_id,name\n10,Alien\n7,He\x0bat\u2028 2\x85\n"  # none of these ends a line of a table
    items = write(tmp_path / "items.csv", side)
    assert read(write(tmp_path / "d.csv", plain), item_features=items).titles.tolist() == ["He\x0bat\u2028 2", "Alien"]
    rows = "".join(f"{k},name {k}\n" for k in range(40_000))
    (tmp_path / "late.csv").write_bytes(b"item_id,name\n" + rows.encode() + b"7,caf\xe9\n")
    assert "line 40002 of" in refused(tmp_path / "d.csv", item_features=tmp_path / "late.csv")


def test_the_control_character_that_parts_fields_within(tmp_path):
    assert "contains the control character '\\x1f'" in refused(write(tmp_path / "a.dat", "1::2::3\n2::2\x1f4\n"))


def test_headers_that_repeat(tmp_path):
    """Three columns called a, a_3 and a: the third becomes a_3, which there is, and so a_3_3."""
    path = write(tmp_path / "a.csv", "a_3,user,a,a,item\n1,u1,2,3,7\n1,u2,2,3,8\n")
    assert rows_of(read(path)) == [("u1", 7), ("u2", 8)]
    pq.write_table(pa.Table.from_arrays([pa.array([1, 2])] * 2, names=["user", "user"]), tmp_path / "b.parquet")
    assert "has two columns called 'user'" in refused(tmp_path / "b.parquet")


def test_one_column_in_two_roles():
    names = ["user", "item", "rating"]
    for asked in (("user", "user", None, None), (None, None, "item", None), (None, None, None, "user")):
        with pytest.raises(MetarecError, match="cannot be both"):
            find_roles(names, *asked, None, False, "a.csv")
    frame = pd.DataFrame({"user": ["a", "b"], "item": ["x", "y"], "rating": [1, 2]})
    assert from_pandas(frame, title_col="item").titles.tolist() == ["x", "y"]  # a title may be the id


def test_messages_are_for_a_terminal(tmp_path):
    """Neither colour nor length nor a line of its own comes in through a name."""
    message = refused(write(tmp_path / "a.csv", "\x1b[31mred,b\n1,2\n"), user_col="x")
    assert "\\x1b[31mred" in message
    assert message.isprintable()
    assert shown("a\nb\ud800") == "'a\\nb\\ud800'"
    assert len(shown("x" * 10**6)) < 80
    assert listed(str(k) for k in range(100)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 88 more"
