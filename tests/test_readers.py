"""From files and tables to interactions: every layout and every way to name and write a column."""

import gzip
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tables import ROWS, refused, rows_of, text, write

from metarec_jax.data.io.readers import from_pandas, read


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|", "::"])
@pytest.mark.parametrize("header", [None, ("userId", "movieId", "rating", "timestamp")])
def test_delimited_text(tmp_path, delimiter, header):
    path = write(tmp_path / "some.txt", text(delimiter, header))
    data = read(path)
    assert rows_of(data) == ROWS
    assert data.users.ids.tolist() == ["u1", "u2"]
    assert data.items.ids.tolist() == [7, 10]
    assert data.name == "some"
    assert data.user.dtype == data.item.dtype == np.int32
    assert (data.rating.dtype, data.timestamp.dtype) == (np.float32, np.int64)
    assert data.rating.flags.writeable
    packed = tmp_path / "some.txt.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert rows_of(read(packed)) == ROWS


def test_spellings_of_one_table_agree(tmp_path):
    plain = text(",")
    for name, content in {
        "windows.csv": plain.replace("\n", "\r\n"),
        "bom.csv": "\ufeff" + plain,
        "blanks.csv": "\n" + plain.replace(",", ", ") + "\n\n",
        "quotes.csv": plain.replace("u1", '"u1"').replace("rating", '"rating"'),
        "no_newline.csv": plain.rstrip("\n"),
    }.items():
        assert rows_of(read(write(tmp_path / name, content))) == ROWS, name


def test_quoted_fields_hold_delimiters_and_line_breaks(tmp_path):
    body = 'user,item,rating,review\nu1,"Heat, part 2",5,"two\nlines"\nu2,"say ""x""",2,\n'
    data = read(write(tmp_path / "a.csv", body))
    assert rows_of(data) == [("u1", "Heat, part 2", 5.0), ("u2", 'say "x"', 2.0)]
    assert data.notes[0] == "columns not used: review"


def test_parquet(tmp_path):
    frame = pd.DataFrame(ROWS, columns=["user", "item", "stars", "ts"]).astype({"stars": "float32"})
    frame["extra"] = 0
    frame.to_parquet(tmp_path / "a.parquet")
    data = read(tmp_path / "a.parquet")
    assert rows_of(data) == ROWS
    assert data.notes[0] == "columns not used: extra"
    assert rows_of(read(tmp_path)) == ROWS


def test_parquet_with_missing_integers_keeps_them_exact(tmp_path):
    frame = pd.DataFrame({"user": pd.array([2**60 + 1, None, 5], "Int64"), "item": [1, 2, 3]})
    frame.to_parquet(tmp_path / "a.parquet")
    data = read(tmp_path / "a.parquet")
    assert rows_of(data) == [(2**60 + 1, 1), (5, 3)]
    assert f"1 without user; the first is row 2 of {tmp_path / 'a.parquet'}" in data.notes[1]


def test_recbole_atomic_files(tmp_path):
    write(tmp_path / "ml.inter", "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + text("\t", None))
    write(tmp_path / "ml.user", "user_id:token\tage:float\tjob:token\nu1\t20\tcook\nu2\t30\tpilot\n")
    header = "item_id:token\tmovie_title:token\tclass:token_seq\tvector:float_seq\n"
    write(tmp_path / "ml.item", header + '7\t"Heat" 2\tAction War\t0.5 1\n10\tAlien\tWar\t0.25 3\n')
    for path in (tmp_path, tmp_path / "ml.inter"):
        data = read(path)
        assert (rows_of(data), data.name) == (ROWS, "ml")
        assert data.titles.tolist() == ['"Heat" 2', "Alien"]
        assert data.user_features["user_age"].vocabulary.ids.tolist() == [20, 30]
        assert data.user_features["user_job"].values.tolist() == [0, 1, 2]
        genre = data.item_features["item_class"]
        assert (genre.kind, genre.vocabulary.ids.tolist()) == ("multi", ["Action", "War"])
        assert genre.values.tolist() == [[0, 0], [1, 2], [2, 0]]
        vector = data.item_features["item_vector"]
        assert vector.kind == "numeric"
        assert vector.values.tolist() == [[0, 0], [1, -1], [-1, 1]]  # two values, standardised


def test_movielens_1m_layout(tmp_path):
    write(tmp_path / "ratings.dat", "1::2::5::978300760\n2::2::3::978300761\n2::9::4::978300762\n")
    write(tmp_path / "users.dat", "1::F::1::10::48067\n2::M::56::16::70072\n")
    movies = "2::Père: Fils (1995)::Drama|War\n9::Heat (1995)::Action\n11::Unrated (2000)::War\n"
    write(tmp_path / "movies.dat", movies, "latin-1")
    data = read(tmp_path)
    assert rows_of(data) == [(1, 2, 5.0, 978300760), (2, 2, 3.0, 978300761), (2, 9, 4.0, 978300762)]
    assert data.titles.tolist() == ["Père: Fils (1995)", "Heat (1995)"]
    assert sorted(data.user_features) == ["user_age", "user_gender", "user_occupation", "user_zip_code"]
    assert data.item_features["item_genres"].vocabulary.ids.tolist() == ["Action", "Drama", "War"]
    assert "1 items of the item table have no interaction: dropped" in data.notes
    assert data.name == tmp_path.name
    more = read(tmp_path, unrated_items=True)
    assert more.items.ids.tolist() == [2, 9, 11]
    assert rows_of(more) == rows_of(data)
    assert "1 items without an interaction are added from the item table" in more.notes


def test_movielens_100k_layout(tmp_path):
    write(tmp_path / "u.data", "1\t2\t5\t881250949\n2\t2\t3\t881250950\n2\t1\t3\t881250951\n")
    write(tmp_path / "u.user", "1|24|M|technician|85711\n2|53|F|other|94043\n")
    flags = ["0"] * 19
    drama, war = flags.copy(), flags.copy()
    drama[8], war[17], war[8] = "1", "1", "1"
    lines = [["1", "Kolya (1996)", "x", "", "y", *drama], ["2", "Légende (1997)", "x", "", "y", *war]]
    write(tmp_path / "u.item", "".join("|".join(line) + "\n" for line in lines), "latin-1")
    data = read(tmp_path)
    assert data.titles.tolist() == ["Kolya (1996)", "Légende (1997)"]
    assert data.item_features["item_genres"].values.tolist() == [[0, 0], [1, 0], [1, 2]]
    assert data.item_features["item_year"].vocabulary.ids.tolist() == [1996, 1997]


def test_movielens_csv_layout(tmp_path):
    write(tmp_path / "ratings.csv", "userId,movieId,rating,timestamp\n1,2,5.0,100\n2,3,0.5,101\n")
    movies = 'movieId,title,genres\n2,"American President, The (1995)",Comedy|Drama\n3,X (1999),(no genres listed)\n'
    write(tmp_path / "movies.csv", movies)
    data = read(tmp_path)
    assert data.titles.tolist() == ["American President, The (1995)", "X (1999)"]
    assert data.item_features["item_genres"].values.tolist() == [[0, 0], [1, 2], [0, 0]]


def test_side_files_by_name(tmp_path):
    path = write(tmp_path / "a.csv", text(","))
    users = write(tmp_path / "people.csv", "userId,age\nu1,1.5\nu2,2.5\n")
    items = write(tmp_path / "things.tsv", "id\tname\tbrand\n10\tTen\tb\n7\tSeven\ta\n")
    data = read(path, user_features=users, item_features=items)
    assert data.user_features["user_age"].values.tolist() == [[0], [-1], [1]]
    assert data.titles.tolist() == ["Seven", "Ten"]
    assert data.item_features["item_brand"].values.tolist() == [0, 1, 2]


def test_a_folder_must_hold_one_table(tmp_path):
    assert "has no table of interactions" in refused(tmp_path)
    write(tmp_path / "a.csv", text(","))
    write(tmp_path / "b.csv", text(","))
    assert "several tables: a.csv, b.csv" in refused(tmp_path)


def test_format_is_checked(tmp_path):
    path = write(tmp_path / "a.csv", text(","))
    assert rows_of(read(path, format="csv")) == ROWS
    assert "expected format 'parquet', got 'csv'" in refused(path, format="parquet")


@pytest.mark.parametrize(
    ("user", "item", "rating", "timestamp"),
    [
        ("user_id", "item_id", "rating", "timestamp"),
        ("reviewerID", "asin", "overall", "unixReviewTime"),
        ("customer_id", "product_id", "stars", "date"),
        ("User-ID", "ISBN", "Book-Rating", "time"),
        ("uid", "business_id", "score", "ts"),
    ],
)
def test_names_that_people_use(tmp_path, user, item, rating, timestamp):
    assert rows_of(read(write(tmp_path / "a.csv", text(",", (user, item, rating, timestamp))))) == ROWS


def test_names_asked_for(tmp_path):
    path = write(tmp_path / "a.csv", text(",", ("kunde", "artikel", "note", "wann")))
    asked = {"user_col": "kunde", "item_col": "artikel", "rating_col": "note", "timestamp_col": "wann"}
    assert rows_of(read(path, **asked)) == ROWS
    message = refused(path)
    assert "no user column" in message
    assert "kunde, artikel, note, wann" in message
    assert "--user-col (user_col= in Python)" in message
    assert "Did you mean 'artikel'?" in refused(path, **{**asked, "item_col": "Artikle"})


def test_columns_without_a_header_go_by_position(tmp_path):
    path = write(tmp_path / "a.csv", "10,u1,5\n10,u2,3\n")
    assert rows_of(read(path, user_col="2", item_col="1")) == [("u1", 10, 5.0), ("u2", 10, 3.0)]
    timed = read(write(tmp_path / "b.csv", "u1,10,978300760\nu2,7,978300761\n"))
    assert timed.rating is None
    assert timed.notes[0] == "no header: the columns are read as user_id, item_id, timestamp"


def test_implicit_feedback(tmp_path):
    path = write(tmp_path / "a.csv", "user,item\nu1,7\nu2,8\n")
    data = read(path)
    assert data.implicit
    assert "no rating column: implicit feedback" in data.notes
    rated = read(write(tmp_path / "b.csv", text(",")), implicit=True, timestamp_col="")
    assert rated.rating is None
    assert rated.timestamp is None
    assert "ratings are ignored (implicit)" in rated.notes


def test_ids_come_back_as_they_were_given(tmp_path):
    path = write(tmp_path / "a.csv", "user,item,rating\n007,10,1\n12,9,2\n")
    data = read(path)
    assert data.users.ids.tolist() == ["007", "12"]
    assert data.items.ids.tolist() == [9, 10]
    path = write(tmp_path / "b.csv", "user,item,rating\n7,10,1\nx,9,2\n")
    mixed = read(path)
    assert mixed.users.ids.tolist() == ["7", "x"]
    assert "column 'user' mixes numbers (1 ids) and text: all ids are kept as text" in mixed.notes
    huge = read(write(tmp_path / "c.csv", f"user,item,rating\n{10**30},10,1\n{2**60 + 1},9,2\n"))
    assert huge.users.ids.tolist() == [str(10**30), str(2**60 + 1)]
    frame = pd.DataFrame({"user": ["7", "8"], "item": [-5, 2**40], "rating": [1, 2]})
    assert rows_of(from_pandas(frame)) == [("7", -5, 1.0), ("8", 2**40, 2.0)]


def test_ids_of_every_dtype_of_pandas():
    values = {"a": ["x", "y", "x"], "b": [3.0, 1.0, 3.0], "c": [3, 1, 3]}
    want = {"a": ["x", "y"], "b": [1, 3], "c": [1, 3]}
    for key, dtypes in {"a": [object, "string", "category"], "b": [float], "c": ["Int64", "uint8", "category"]}.items():
        for dtype in dtypes:
            frame = pd.DataFrame({"user": pd.Series(values[key], dtype=dtype), "item": [1, 2, 3], "rating": [1, 2, 3]})
            data = from_pandas(frame)
            assert data.users.ids.tolist() == want[key]
            assert data.users.decode(data.user).tolist() == values[key]
    mixed = from_pandas(pd.DataFrame({"user": [1, "1", "b"], "item": [1, 2, 3], "rating": [1, 2, 3]}))
    assert mixed.users.ids.tolist() == ["1", "b"]
    assert mixed.user.tolist() == [1, 1, 2]


@pytest.mark.parametrize("scale", [1, 1_000, 10**6, 10**9])
def test_times_in_any_unit_become_seconds(scale):
    frame = pd.DataFrame({"user": [1, 2], "item": [1, 2], "timestamp": np.array([978300760, 978300761]) * scale})
    data = from_pandas(frame)
    assert data.timestamp.tolist() == [978300760, 978300761]
    assert any("divided by" in note for note in data.notes) == (scale > 1)


def test_dates_become_seconds(tmp_path):
    day = 86_400  # 1970-01-02 is one day after the start, and 01:00+01:00 is midnight in UTC
    body = "user,item,date\n1,1,1970-01-02\n2,1,1970-01-02T00:00:01\n3,1,1970-01-02T01:00:00+01:00\n"
    assert read(write(tmp_path / "a.csv", body)).timestamp.tolist() == [day, day + 1, day]
    when = pd.to_datetime(["1970-01-02", "1970-01-03"])
    for values in (when, when.tz_localize("UTC"), when.astype("datetime64[s]"), when.date):
        data = from_pandas(pd.DataFrame({"user": [1, 2], "item": [1, 2], "date": values}))
        assert data.timestamp.tolist() == [day, 2 * day]
    floats = read(write(tmp_path / "b.csv", "user,item,ts\n1,1,978300760.5\n2,1,978300761.0\n"))
    assert floats.timestamp.tolist() == [978300760, 978300761]
    message = refused(write(tmp_path / "c.csv", "user,item,date\n1,1,1970-01-02\n2,1,yesterday\n"))
    assert message.startswith(f"line 3 of {tmp_path / 'c.csv'}, column 'date': 'yesterday' is neither")
    message = refused(write(tmp_path / "d.csv", "user,item,ts\n1,1,100\n2,1,soon\n3,1,200\n"))
    assert message.startswith(f"line 3 of {tmp_path / 'd.csv'}, column 'ts': 'soon' is neither")


DATA = os.environ.get("METAREC_TEST_DATA")


@pytest.mark.data
@pytest.mark.skipif(not DATA, reason="METAREC_TEST_DATA names no folder of real data")
@pytest.mark.parametrize(
    ("name", "rows", "users", "items"), [("ml-1m", 1_000_209, 6_040, 3_706), ("ml-100k", 100_000, 943, 1_682)]
)
def test_real_movielens(name, rows, users, items):
    data = read(Path(str(DATA)) / name)
    assert (len(data), len(data.users.ids), len(data.items.ids)) == (rows, users, items)
    assert data.titles[0] == "Toy Story (1995)"
    assert data.rating.sum(dtype=np.float64) == {"ml-1m": 3_582_313, "ml-100k": 352_986}[name]
    assert {"item_genres", "item_year", "user_age", "user_gender", "user_occupation"} <= {
        *data.item_features,
        *data.user_features,
    }
