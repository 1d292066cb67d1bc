"""Ids from any source: exact, one id for one spelling, and refused where they were rounded before they came here."""

from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
from tables import refused, rows_of, write

from metarec_jax.core import MetarecError
from metarec_jax.data.interactions import Vocabulary
from metarec_jax.data.io.histories import read_histories
from metarec_jax.data.io.ids import code_ids
from metarec_jax.data.io.readers import from_pandas, read
from metarec_jax.data.store.opened import load
from metarec_jax.data.store.prepare import prepare
from metarec_jax.messages import shown
from metarec_jax.serving.history import Names, parse_table

FIRST = 1234567890123456768
"""Neighbours of it are one float64: 0 to 127 more all round to it."""


def ratings(path, spelled=str):
    lines = [f"{spelled(FIRST + 1000 + k % 4)},{spelled(FIRST + k)},{1 + k % 5},{k}\n" for k in range(12)]
    return write(path, "user_id,item_id,rating,timestamp\n" + "".join(lines))


def test_neighbouring_long_ids_keep_their_own_features(tmp_path):
    """Twelve items of 19 digits, each with its own title and genre (k % 3)."""
    items = write(
        tmp_path / "items.csv",
        "item_id,title,genre\n" + "".join(f"{FIRST + k},Film {k},{'abc'[k % 3]}\n" for k in range(12)),
    )
    data = read(ratings(tmp_path / "a.csv"), item_features=items)
    assert data.titles.tolist() == [f"Film {k}" for k in range(12)]
    assert data.item_features["item_genre"].values.tolist() == [0, *([1, 2, 3] * 4)]
    frame = pd.read_csv(items)
    frame.to_parquet(tmp_path / "items.parquet")
    assert read(tmp_path / "a.csv", item_features=tmp_path / "items.parquet").titles.tolist() == data.titles.tolist()


def test_long_ids_of_new_users_stay_apart(tmp_path):
    """Three users whose ids are one float64, and a row without an item, which would make pandas use floats."""
    users = [FIRST + 1, FIRST + 2, FIRST + 3]
    lines = "".join(f"{u},{FIRST + 10 * k},{k + 1}\n" for k, u in enumerate(users))
    found = read_histories(write(tmp_path / "new.csv", "user_id,item_id,rating\n" + lines + f"{users[0]},,4\n"))
    assert [str(u) for u in found.user_id] == [str(u) for u in users]
    assert [str(i) for i in found.item_id] == [str(FIRST + 10 * k) for k in range(3)]
    frame = pd.DataFrame({"user_id": users, "item_id": users, "rating": [1, 2, 3]})
    frame.to_parquet(tmp_path / "new.parquet")
    assert read_histories(tmp_path / "new.parquet").user_id == users


def test_a_feature_of_long_numbers_keeps_its_values_apart(tmp_path):
    """A director is a 19-digit number; the two of them are one float64."""
    body = "item_id,director_id\n" + "".join(f"{k},{FIRST + k % 2}\n" for k in range(30))
    path = write(tmp_path / "a.csv", "user,item,rating\n" + "".join(f"{k % 3},{k},{k % 5}\n" for k in range(30)))
    feature = read(path, item_features=write(tmp_path / "items.csv", body)).item_features["item_director_id"]
    assert feature.values.tolist() == [0, *([1, 2] * 15)]


def test_whole_numbers_with_a_point_are_integers_in_every_file(tmp_path):
    """What pandas writes of integers where one is missing."""
    body = "user_id,item_id,rating\n1.0,26.0,3\n2.0,,4\n2.0,7,5\n2.0,26.0,1\n"
    path = write(tmp_path / "a.csv", body)
    data = read(path)
    assert rows_of(data) == [(1, 26, 3.0), (2, 7, 5.0), (2, 26, 1.0)]
    assert "column 'item_id': whole numbers with a decimal point, such as '26.0', are read as integers" in data.notes
    for k, (one, two) in enumerate([("7", "26"), ("7.0", "26.0"), ("7", "26.0")]):
        items = write(tmp_path / f"items{k}.csv", f"item_id,title\n{one},Seven\n{two},Heat\n")
        assert read(path, item_features=items).titles.tolist() == ["Seven", "Heat"]
    store = load(prepare([path], tmp_path / "store", say=lambda _: None))
    assert (store.users.ids.tolist(), store.items.ids.tolist()) == ([1, 2], [7, 26])
    history = write(tmp_path / "new.csv", "user_id,item_id,rating\n5.0,26.0,3\n6.0,7,3\n")
    assert read_histories(history)[:2] == ([5, 6], [26, 7])
    assert data.items.encode(["26.0", 26.0, "26", " 26 "]).tolist() == [2, 2, 2, 2]
    versions = read(write(tmp_path / "v.csv", "user,item,rating\n1,1.0,3\n2,1.5,2\n"))
    assert versions.items.ids.tolist() == ["1.0", "1.5"]


@pytest.mark.parametrize(
    "spelled",
    ["1.2345678901234568e+18", "1.23457E+18", "1.2345678901234568E18", "9007199254740994.0", "1234567890123456768.0"],
)
def test_ids_that_were_rounded_are_refused(tmp_path, spelled):
    """Pandas writes long ids of a float column so, and a spreadsheet as 1.23457E+18: which id it was, nobody can say."""
    path = write(tmp_path / "a.csv", f"user,item,rating\n1,{spelled},3\n2,5.0,4\n2,6.0,3\n")
    message = refused(path)
    assert f"column 'item': the id {spelled!r} was rounded" in message
    with pytest.raises(MetarecError, match="were rounded"):
        prepare([path], tmp_path / "store", say=lambda _: None)
    with pytest.raises(MetarecError, match="was rounded"):
        read_histories(path)
    good = write(tmp_path / "b.csv", "user,item,rating\n1,5,3\n2,6,4\n")
    assert "was rounded" in refused(good, item_features=write(tmp_path / "items.csv", f"item,g\n{spelled},a\n5.0,b\n"))


def test_ids_spelled_like_powers_among_other_text_are_text(tmp_path):
    data = read(write(tmp_path / "a.csv", "user,item,rating\n1,1e+05,3\n2,b7,4\n"))
    assert data.items.ids.tolist() == ["1e+05", "b7"]


@pytest.mark.parametrize(
    "ids",
    [
        np.array([FIRST, FIRST + 1, 5], np.float64),
        np.array([2**24 + 1, 1, 2], np.float32),
        pd.array([float(FIRST), 5.0, None], "Float64"),
        np.array([float(2**53), "x", 3], object),
    ],
)
def test_float_ids_beyond_what_a_float_counts_are_refused(tmp_path, ids):
    """2**53 and 2**53 + 1 are one float64; 2**24 and 2**24 + 1 one float32."""
    frame = pd.DataFrame({"user": [1, 2, 3], "item": ids, "rating": [1, 2, 3]})
    with pytest.raises(MetarecError, match=r"column 'item': the id .* was rounded.* int64"):
        from_pandas(frame)
    with pytest.raises(MetarecError, match="was rounded"):
        from_pandas(frame.assign(item=[1, 2, 3]), item_features=pd.DataFrame({"item": ids, "g": ["a", "b", "b"]}))
    if ids.dtype != object:
        frame.to_parquet(tmp_path / "a.parquet")
        assert "was rounded" in refused(tmp_path / "a.parquet")
        with pytest.raises(MetarecError, match="were rounded"):
            prepare([tmp_path / "a.parquet"], tmp_path / "store", say=lambda _: None)


def test_a_vocabulary_never_reads_an_id_through_a_float():
    """1234567890123456769.0 as text is exact; as a float it is rounded, and finds nothing."""
    ids = Vocabulary(np.array([FIRST, FIRST + 1]))
    assert ids.encode([f"{FIRST + 1}.0", str(FIRST)]).tolist() == [2, 1]
    assert ids.encode(np.array([float(FIRST)])).tolist() == [0]
    assert Vocabulary(np.array([str(FIRST)])).encode([float(FIRST)]).tolist() == [0]
    assert ids.encode([FIRST + 1, 5.0]).tolist() == ids.encode([FIRST + 1, None]).tolist() == [2, 0]
    assert Vocabulary(np.array([1000, 7])).encode(["1e3", "1_000", "7.", "+7"]).tolist() == [0, 0, 2, 2]


def test_users_of_a_table_of_histories_are_not_merged():
    """Two users of one float64; as floats they are refused, as integers they are two."""
    data = from_pandas(pd.DataFrame({"user": [1, 2], "item": [1, 2], "rating": [1, 2]}))
    users = [FIRST + 1, FIRST + 2]
    columns = {"user_id": users, "item_id": [1, 2], "rating": [1, 2]}
    assert parse_table(columns, data, Names(data))[0] == users
    with pytest.raises(MetarecError, match=r"column 'user_id': the id .* was rounded"):
        parse_table({**columns, "user_id": np.array(users, float)}, data, Names(data))


def test_bytes_and_decimals_as_ids():
    coded = code_ids(pd.Series([b"it7", b"it7", None, "caf\u00e9".encode()], dtype=object))
    assert coded.ids.tolist() == ["caf\u00e9", "it7"]
    assert code_ids(pd.Series([Decimal("7.00"), Decimal("8")], dtype=object)).ids.tolist() == [7, 8]
    with pytest.raises(MetarecError, match=r"column 'x': the id b'\\xff\\xfe' is not UTF-8 text"):
        code_ids(pd.Series([b"\xff\xfe", b"a"], dtype=object), name="x")


def test_messages_show_values_as_a_person_writes_them():
    assert shown(np.int64(1)) == "1"
    assert shown(np.float64(2.5)) == "2.5"
    assert shown(np.str_("a")) == "'a'"
