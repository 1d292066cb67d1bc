"""Files from the field, where ``METAREC_TEST_CASES`` names a folder of them: each is read whole, or refused with a way out."""

import os
from pathlib import Path

import pytest

from metarec_jax.core import MetarecError
from metarec_jax.data.io.histories import read_histories
from metarec_jax.data.io.readers import read

CASES = Path(os.environ.get("METAREC_TEST_CASES", "no/such/folder"))
pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(not CASES.is_dir(), reason="METAREC_TEST_CASES names no folder of cases"),
]


@pytest.mark.parametrize(
    ("table", "items", "rows", "ids"),
    [
        ("01_comma_decimal/ratings_small.csv", None, 1606, {"26"}),
        ("02_excel_sep_line/r.csv", None, 1606, {"26"}),
        ("05_bookcrossing/BX-Book-Ratings.csv", "05_bookcrossing/BX-Books-utf8.csv", 1606, {"084064930X"}),
        ("06_float_ids/r.csv", "06_float_ids/items_float.csv", 1605, {"26"}),
        ("06_float_ids/r.csv", "06_float_ids/items_int.csv", 1605, {"26"}),
        ("08_snowflake/r.csv", "08_snowflake/items.csv", 1606, {"1234567890123456026"}),
        ("08_snowflake/r53.csv", "08_snowflake/items53.csv", 1606, {"9007199254740993"}),
        ("08_snowflake2/ratings.csv", "08_snowflake2/items.csv", 1606, {"1234567890123456793"}),
        ("09_jsonl/clicks.jsonl", None, 1606, {"i26"}),
        ("20_parquet/binary_id.parquet", None, 1606, {"it26"}),
        ("26_scale/million.csv", None, 1606, {"26"}),
        ("29_genres/ratings.csv", "29_genres/items.csv", 1606, {"26"}),
        ("31_year/ratings.csv", "31_year/movies.csv", 1606, {"26"}),
        ("32_titles/ratings.csv", "32_titles/films.csv", 1606, {"26"}),
    ],
)
def test_a_table_is_read_whole(table, items, rows, ids):
    """All rows, all 50 items by the ids of the file, and a feature or title of each that its table names."""
    data = read(CASES / table, item_features=None if items is None else CASES / items)
    assert len(data) == rows
    assert len(data.items.ids) == 50
    assert ids <= set(map(str, data.items.ids))
    if items is not None and "bookcrossing" not in table:
        assert not any("have no row in the item table" in note for note in data.notes)


def test_lists_and_dates_of_a_table_of_items():
    data = read(CASES / "29_genres/ratings.csv", item_features=CASES / "29_genres/items.csv")
    want = data.item_features["item_pipe"]
    for name in ("comma", "pylist", "json", "slash", "semi"):
        feature = data.item_features[f"item_{name}"]
        assert feature.vocabulary.ids.tolist() == want.vocabulary.ids.tolist()
        assert feature.values.tolist() == want.values.tolist()
    assert data.item_features["item_released"].kind == "numeric"
    assert "NA" in data.item_features["item_country"].vocabulary.ids


def test_histories():
    found = read_histories(CASES / "08_snowflake2/new_users.csv")
    assert list(dict.fromkeys(found.user_id)) == [f"17345678901234560{k:02}" for k in (1, 2, 3)]
    assert read_histories(CASES / "33_dup_hist/hist.csv").rating == [1, 5]
    columns = {"user_col": "who", "item_col": "thing", "rating_col": "mark", "timestamp_col": "when"}
    assert set(read_histories(CASES / "27_cols/new.csv", trained_with=columns).user_id) == {"n1", "n2"}


def test_what_cannot_be_read_is_refused_with_a_way_out():
    with pytest.raises(MetarecError, match="iconv -f latin1 -t utf-8"):
        read(CASES / "05_bookcrossing/BX-Book-Ratings.csv", item_features=CASES / "05_bookcrossing/BX-Books.csv")
