"""Files as spreadsheets, logs and other programs write them: decimal commas, `sep=`, JSON, odd scales, other names."""

import gzip
import json

import numpy as np
import pandas as pd
import pytest
from tables import refused, rows_of, write

from metarec_jax.core import MetarecError
from metarec_jax.data.interactions import NO_TIME
from metarec_jax.data.io.datasets import load as load_data
from metarec_jax.data.io.histories import read_histories
from metarec_jax.data.io.readers import from_pandas, read
from metarec_jax.data.store.opened import load
from metarec_jax.data.store.prepare import prepare
from metarec_jax.data.store.stream import stream_source


def test_decimal_commas_are_read_and_said(tmp_path):
    body = "\ufeffuserId;movieId;rating\n1;26;2,5\n1;7;3\n2;7;4,0\n"
    path = write(tmp_path / "a.csv", body)
    data = read(path)
    assert data.rating.tolist() == [2.5, 3.0, 4.0]
    assert "column 'rating': decimal commas, such as '2,5', are read as decimal points" in data.notes
    assert load(prepare([path], tmp_path / "store", say=lambda _: None)).rating.tolist() == [3.0, 2.5, 4.0]
    assert read_histories(path).rating == [2.5, 3.0, 4.0]
    quoted = write(tmp_path / "b.csv", 'user,item,rating\n1,26,"2,5"\n2,7,"4,0"\n')
    assert read(quoted).rating.tolist() == [2.5, 4.0]
    items = write(tmp_path / "items.csv", "item;price\n26;0,99\n7;10,5\n")
    assert read(path, item_features=items).item_features["item_price"].values.tolist() == [[0], [1], [-1]]


@pytest.mark.parametrize("values", [("2,5", "3.5"), ("1,000", "2,500"), ("2,5", "x"), ("1,2,3", "2")])
def test_commas_that_may_mean_thousands_or_nothing_are_refused(tmp_path, values):
    path = write(tmp_path / "a.csv", f"user;item;rating\n1;1;{values[0]}\n2;1;{values[1]}\n")
    assert "is not a number" in refused(path)
    with pytest.raises(MetarecError, match="are not 32-bit numbers"):
        prepare([path], tmp_path / "store", say=lambda _: None)


@pytest.mark.parametrize("delimiter", [";", ",", "\t", "|", "^"])
def test_the_line_that_names_the_separator_is_skipped(tmp_path, delimiter):
    lines = ["user_id,item_id,rating", "1,26,3", "2,7,5"]
    body = "\r\n".join([f"sep={delimiter}", *(line.replace(",", delimiter) for line in lines), ""])
    for k, start in enumerate(["", "\ufeff"]):
        path = write(tmp_path / f"{k}.csv", start + body)
        assert rows_of(read(path)) == [(1, 26, 3.0), (2, 7, 5.0)]
    assert "line 5 of" in refused(write(tmp_path / "bad.csv", body + delimiter.join("3x")))
    if delimiter == ";":
        stored = load(prepare([path], tmp_path / "store", say=lambda _: None))
        assert rows_of(stored) == [(1, 26, 3.0), (2, 7, 5.0)]


CLICKS = [{"user": "u1", "item": "i2"}, {"user": "u2", "item": "i1"}, {"item": "i1", "user": "u1", "at": 3}]


@pytest.mark.parametrize("form", ["lines", "array", "pretty", "gz", "bom"])
def test_json_is_read_in_lines_or_as_an_array(tmp_path, form):
    text = "".join(json.dumps(row) + "\n" for row in CLICKS) + "\n"
    if form in ("array", "pretty"):
        text = json.dumps(CLICKS, indent=2 if form == "pretty" else None)
    path = write(tmp_path / "clicks.json", ("\ufeff" if form == "bom" else "") + text)
    if form == "gz":
        path = tmp_path / "clicks.jsonl.gz"
        path.write_bytes(gzip.compress(text.encode()))
    data = read(path)
    assert rows_of(data) == [("u1", "i2"), ("u2", "i1"), ("u1", "i1")]
    assert data.name == "clicks"
    assert "columns not used: at" in data.notes
    assert read_histories(path)[:2] == (["u1", "u2", "u1"], ["i2", "i1", "i1"])


def test_json_of_reviews_keeps_numbers_and_missing_values(tmp_path):
    big = 1234567890123456769
    rows = [
        {"reviewerID": big, "asin": "A", "overall": 3.0, "unixReviewTime": 100, "text": "a\nb, c"},
        {"reviewerID": big + 1, "asin": "B", "overall": 4, "unixReviewTime": 200},
        {"reviewerID": big + 2, "asin": None, "overall": 4, "unixReviewTime": 200},
    ]
    path = write(tmp_path / "reviews.json", "\n".join(map(json.dumps, rows)))
    data = read(path)
    assert rows_of(data) == [(big, "A", 3.0, 100), (big + 1, "B", 4.0, 200)]
    assert f"the first is line 3 of {path}" in data.notes[-2]
    items = [{"asin": "A", "title": "Heat", "tags": ["x", "y"], "more": {"a": 1}}, {"asin": "B", "tags": ["y"]}]
    data = read(path, item_features=write(tmp_path / "items.json", json.dumps(items)))
    assert data.titles.tolist() == ["Heat", "B"]
    assert data.item_features["item_tags"].vocabulary.ids.tolist() == ["x", "y"]
    assert list(data.item_features) == ["item_tags"]
    assert "item column 'more' holds objects: not a feature" in data.notes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            '{"user": {"id": 1}, "item": 2}\n{"user": 3, "item": 2}\n',
            "line 1 of .*'user': expected one value per row, got an object or a list",
        ),
        (
            '{"user": 1, "item": 2}\n{"user": 3, "item": [2]}\n',
            "line 2 of .*'item': expected one value per row, got an object or a list",
        ),
        ('{"user": 1, "item": 2}\n{"user": 3, "item"\n', "line 2 of .* is not JSON"),
        ('{"user": 1, "item": 2}\n[3, 4]\n', "line 2 of .* is not a JSON object"),
        ('[{"user": 1, "item": 2}, 7]', "entry 2 of .* is not a JSON object"),
        ('[{"user": 1, "item": 2}', "is not JSON"),
        ('{\n "data": [{"user": 1, "item": 2}]\n}\n', "one JSON object per line, or an array of objects"),
        ('{"thing": 1, "item": 2}\n', "no user column by a usual name; its columns are: thing, item"),
        ("[]", "has no rows"),
    ],
)
def test_json_that_is_no_table_is_refused(tmp_path, text, said):
    message = refused(write(tmp_path / "a.json", text))
    assert pd.Series([message]).str.contains(said).all(), message


def test_prepare_refuses_json_with_a_way_out(tmp_path):
    path = write(tmp_path / "clicks.jsonl", "".join(json.dumps(row) + "\n" for row in CLICKS))
    with pytest.raises(
        MetarecError, match=r"expected CSV or Parquet, got JSON.*COPY \(FROM '.*clicks.jsonl'\) TO '.*clicks.parquet'"
    ):
        prepare([path], tmp_path / "store", say=lambda _: None)


def test_a_rating_that_stands_for_none_is_noted():
    """Book-Crossing: 6 of 10 ratings are 0, the others 6 to 10."""
    rating = [0] * 6 + [6, 8, 10, 7]
    frame = pd.DataFrame({"user": range(10), "item": range(10), "rating": rating})
    said = "60% of the ratings are 0, far from the others (mean 7.75)"
    assert any(note.startswith(said) for note in from_pandas(frame).notes)
    jester = frame.assign(rating=[99] * 4 + [-9, -3, 4, 9, 1, 2])
    assert any(note.startswith("40% of the ratings are 99, far") for note in from_pandas(jester).notes)
    anime = frame.assign(rating=[-1] * 2 + [1, 2, 3, 4, 5, 6, 7, 8])
    assert any(note.startswith("20% of the ratings are -1, far") for note in from_pandas(anime).notes)
    for usual in (
        [1, 1, 1, 2, 3, 4, 5, 5, 5, 5],
        [0, 1] * 5,
        [0, 1, 2, 3, 4, 5, 5, 5, 4, 4],
        [0, 0, 1, 1, 2, 2, 3, 4, 5, 2],
    ):
        assert not any("far from" in note for note in from_pandas(frame.assign(rating=usual)).notes), usual


def test_prepare_notes_a_rating_that_stands_for_none(tmp_path):
    body = "".join(f"{k},{k},{r}\n" for k, r in enumerate([0] * 6 + [6, 8, 10, 7]))
    store = prepare([write(tmp_path / "a.csv", "user,item,rating\n" + body)], tmp_path / "store", say=lambda _: None)
    assert any(note.startswith("60% of the ratings are 0, far from the others (mean 7.75)") for note in store.notes)


def test_a_folder_that_holds_one_json_file(tmp_path):
    write(tmp_path / "clicks.json", json.dumps(CLICKS))
    assert len(read(tmp_path)) == 3


def test_a_year_column_wins_over_the_year_in_titles(tmp_path):
    """A file called movies.csv has the years of titles added, unless it brings a year."""
    path = write(tmp_path / "ratings.csv", "user,item,rating\n" + "".join(f"{k % 2},{k},{k % 5}\n" for k in range(4)))
    rows = "".join(f"{k},Film {k} (200{k}),{1950 + 7 * k}\n" for k in range(4))
    for name in ("movies.csv", "films.csv"):
        items = write(tmp_path / name, "item_id,title,year\n" + rows)
        years = read(path, item_features=items).item_features["item_year"].vocabulary.ids.tolist()
        assert years == [1950, 1957, 1964, 1971]
    write(tmp_path / "movies.csv", "item_id,title,g\n" + "".join(f"{k},Film {k},{'ab'[k % 2]}\n" for k in range(4)))
    plain = read(path, item_features=tmp_path / "movies.csv")
    assert list(plain.item_features) == ["item_g"]
    assert not any("year" in note for note in plain.notes)


def test_a_title_of_two_items_is_noted():
    frame = pd.DataFrame({"user": [1, 2, 1], "item": [3, 4, 5], "rating": [1, 2, 3]})
    films = pd.DataFrame({"item": [3, 4, 5], "title": ["Hamlet", "Hamlet", "Heat"]})
    notes = from_pandas(frame, item_features=films).notes
    assert "1 title belongs to several items (such as 'Hamlet', ids 3 and 4): refer to these by their ids" in notes


def test_of_a_repeated_item_the_last_in_time_stands_last(tmp_path):
    path = write(tmp_path / "a.csv", "user_id,item_id,rating,timestamp\nB,7,4,9\nA,7,5,2\nA,8,3,\nA,7,1,1\n")
    found = read_histories(path)
    assert found.user_id == ["B", "A", "A", "A"]
    assert list(zip(found.item_id, found.rating, strict=True)) == [(7, 4), (8, 3), (7, 1), (7, 5)]
    dated = write(tmp_path / "b.csv", "user_id,item_id,rating,date\nA,7,5,2020-01-02\nA,7,1,2020-01-01\n")
    assert read_histories(dated).rating == [1, 5]
    unread = read_histories(write(tmp_path / "c.csv", "user_id,item_id,rating,date\nA,7,5,2/1/20\nA,7,1,1/1/20\n"))
    assert unread.rating == [5, 1]
    assert "order of the file, since their times cannot be read: line 2 of" in unread.notes[0]


def test_histories_have_the_columns_asked_for(tmp_path):
    path = write(tmp_path / "new.csv", "who,thing,mark,when\nn1,26,3,5\nn1,26,4,4\n")
    columns = {"user_col": "who", "item_col": "thing", "rating_col": "mark", "timestamp_col": "when"}
    assert read_histories(path, **columns)[:3] == (["n1", "n1"], [26, 26], [4, 3])
    assert read_histories(path, trained_with=columns)[:3] == (["n1", "n1"], [26, 26], [4, 3])
    usual = write(tmp_path / "b.csv", "user,item,stars\nn1,26,3\n")
    assert read_histories(usual, trained_with=columns)[:3] == (["n1"], [26], [3])
    with pytest.raises(MetarecError, match="has no column 'who'"):
        read_histories(usual, **columns)
    headless = write(tmp_path / "c.csv", "26,n1,3\n7,n2,4\n")
    assert read_histories(headless, user_col="2", item_col="1")[:2] == (["n1", "n2"], [26, 7])


def test_a_path_below_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.csv", "user,item,rating\n1,26,3\n2,7,4\n")
    write(tmp_path / "items.csv", "item,title\n26,Heat\n7,Seven\n")
    assert read("~/a.csv", item_features="~/items.csv").titles.tolist() == ["Seven", "Heat"]
    assert read_histories("~/a.csv").item_id == [26, 7]


@pytest.mark.parametrize("url", ["https://example.org/a.csv", "s3://bucket/a.parquet", "file:///a.csv"])
def test_a_url_is_refused_as_such(tmp_path, url):
    said = f"{url} is a URL, expected a local file. Download it"
    assert refused(url).startswith(said)
    for opens in (load_data, read_histories, lambda u: prepare([u], tmp_path / "s", say=lambda _: None)):
        with pytest.raises(MetarecError) as caught:
            opens(url)
        assert str(caught.value).startswith(said)


def test_rows_without_a_time_are_kept():
    """Three of six lack a time; only what needs the order in time refuses them."""
    from metarec_jax.data.describe import describe
    from metarec_jax.data.splits import split

    frame = pd.DataFrame(
        {
            "user": [1, 1, 1, 2, 2, 2],
            "item": [1, 2, 1, 1, 2, 3],
            "rating": [1, 2, 3, 4, 5, 1],
            "time": [5, 6, None, None, 7, None],
        }
    )
    data = from_pandas(frame)
    assert "3 rows have no time: kept, but --by time and --order time require a time in every row" in data.notes
    assert len(data) == 5  # user 1 rates item 1 twice: at time 5, and at none, which is the earlier
    assert rows_of(data)[0][:3] == (1, 1, 1.0)
    assert not data.timed
    assert describe(data)["time"]["days"] == 2 / 86400
    with pytest.raises(MetarecError, match="2 of 5 interactions have no time"):
        split(data, ["user_cold"], by="time")


def test_rows_without_a_time_are_kept_in_a_store(tmp_path):
    """As by `read`: three rows, of which one has no time and stands first of its user's."""
    path = write(tmp_path / "a.csv", "user,item,rating,time\n1,5,3,7\n1,6,4,\n2,5,5,8\n")
    store = prepare([path], tmp_path / "store", say=lambda _: None)
    assert (store.interactions, store.untimed) == (3, 1)
    assert rows_of(load(store)) == [(1, 6, 4.0, NO_TIME), (1, 5, 3.0, 7), (2, 5, 5.0, 8)]
    assert "1 rows have no time: kept, but --order time requires a time in every row" in store.notes
    with pytest.raises(MetarecError, match=r"1 of the store .* have none"):
        stream_source(store, np.array([1, 2]), None, order="time")


def test_binary_ids_of_parquet(tmp_path):
    import uuid

    import pyarrow as pa
    import pyarrow.parquet as pq

    keys = [uuid.UUID(int=2**127 + 255 + k) for k in range(3)]
    columns = {"user": [1, 2, 2], "rating": [1, 2, 3]}
    path = tmp_path / "a.parquet"
    for kind, values, ids in [
        (pa.binary(), [b"it7", b"it8", "caf\u00e9".encode()], ["caf\u00e9", "it7", "it8"]),
        (pa.large_binary(), [b"it7", b"it8", b"it9"], ["it7", "it8", "it9"]),
        (pa.binary(3), [b"it7", b"it8", b"it9"], ["it7", "it8", "it9"]),
        (pa.binary(16), [k.bytes for k in keys], list(map(str, keys))),
        (pa.uuid(), [k.bytes for k in keys], list(map(str, keys))),
    ]:
        pq.write_table(pa.table({**columns, "item": pa.array(values, kind)}), path)
        data = read(path)
        assert data.items.ids.tolist() == ids, kind
        assert data.items.decode(data.item).tolist() == ([v.decode() for v in values] if len(values[0]) < 16 else ids)
        pq.write_table(pa.table({"item": pa.array(values, kind), "genre": ["a", "b", "b"]}), tmp_path / "items.parquet")
        assert (
            read(path, item_features=tmp_path / "items.parquet")
            .item_features["item_genre"]
            .values.min(initial=1, where=[False, True, True, True])
            == 1
        )
    pq.write_table(pa.table({**columns, "item": pa.array([b"it7", b"7", None], pa.binary())}), path)
    stored = load(prepare([path], tmp_path / "store", say=lambda _: None))
    assert stored.items.ids.tolist() == ["7", "it7"]
    pq.write_table(pa.table({**columns, "item": pa.array([b"\xff\xfe", b"a", b"b"], pa.binary())}), path)
    with pytest.raises(MetarecError, match="UTF8"):
        prepare([path], tmp_path / "store", fresh=True, say=lambda _: None)
    assert "is not UTF-8 text" in refused(path)


def test_a_data_set_is_shown_in_a_line():
    data = from_pandas(pd.DataFrame({"user": [1, 2], "item": [1, 2], "rating": [1, 2]}), name="mine")
    assert repr(data) == "<Interactions 'mine': 2 of 2 users with 2 items, ratings 1 to 2>"
    clicks = from_pandas(pd.DataFrame({"user": np.arange(2000), "item": 1, "time": 5}))
    assert repr(clicks) == "<Interactions 'interactions': 2,000 of 2,000 users with 1 items, clicks, times>"


def test_dropped_rows_are_a_warning_in_python(tmp_path, recwarn):
    from metarec_jax.core import MetarecWarning
    from metarec_jax.experiment.build import build_data
    from metarec_jax.experiment.config import DataConfig

    frame = pd.DataFrame({"user": [1, None, 2], "item": [1, 2, 3], "rating": [1, 2, 3]})
    with pytest.warns(MetarecWarning, match="1 rows with missing values dropped"):
        from_pandas(frame)
    again = pd.DataFrame({"user": [1, 1, 2], "item": [1, 1, 3], "rating": [1, 2, 3]})
    with pytest.warns(MetarecWarning, match="1 repeated rows"):
        from_pandas(again)
    again.to_csv(tmp_path / "a.csv")
    with pytest.warns(MetarecWarning, match="1 repeated rows"):
        read(tmp_path / "a.csv")
    recwarn.clear()
    build_data(DataConfig(str(tmp_path / "a.csv")))  # the command line prints the notes itself
    from_pandas(again.drop_duplicates("user"))
    assert not [w for w in recwarn if issubclass(w.category, MetarecWarning)]
