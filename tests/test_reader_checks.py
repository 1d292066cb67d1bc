"""Every way in which a table can be wrong: handled as documented, or refused by row and column."""

import gzip
import os

import numpy as np
import pandas as pd
import pytest
from tables import ROWS, refused, rows_of, text, write

from metarec_jax.core import MetarecError
from metarec_jax.data.interactions import NO_TIME
from metarec_jax.data.io.readers import from_pandas, read


def test_duplicates():
    frame = pd.DataFrame(
        {"user": [1, 1, 2, 1], "item": [5, 5, 5, 6], "rating": [1.0, 4.0, 2.0, 3.0], "timestamp": [90, 20, 30, 40]}
    )
    assert rows_of(from_pandas(frame)) == [
        (1, 5, 1.0, 90),
        (2, 5, 2.0, 30),
        (1, 6, 3.0, 40),
    ]  # last in time, not in order
    assert rows_of(from_pandas(frame, duplicates="first"))[0] == (1, 5, 4.0, 20)
    assert sorted(rows_of(from_pandas(frame, duplicates="mean")))[0] == (1, 5, 2.5, 90)  # (1 + 4) / 2
    assert "1 repeated rows of a user and item dropped (the last is kept)" in from_pandas(frame).notes
    untimed = frame.drop(columns="timestamp")
    assert rows_of(from_pandas(untimed))[0] == (1, 5, 4.0)
    assert rows_of(from_pandas(untimed, duplicates="first"))[0] == (1, 5, 1.0)
    with pytest.raises(MetarecError, match=r"user 1 and item 5 occur on frame.iloc\[0\] and on frame.iloc\[1\]"):
        from_pandas(frame, duplicates="error")
    with pytest.raises(MetarecError, match="must be 'last', 'first', 'mean' or 'error'"):
        from_pandas(frame, duplicates="both")  # type: ignore[arg-type]


def test_missing_values_are_dropped_and_counted(tmp_path):
    body = "user,item,rating,timestamp\nu1,1,5,10\n,1,5,10\nu2,NA,4,10\nu2,2,,10\nu3,3,3,\nu4,1,2,10\n"
    data = read(write(tmp_path / "a.csv", body))
    assert rows_of(data) == [("u1", 1, 5.0, 10), ("u3", 3, 3.0, NO_TIME), ("u4", 1, 2.0, 10)]
    assert (data.users.ids.tolist(), data.items.ids.tolist()) == (["u1", "u3", "u4"], [1, 3])  # no id without a row
    assert data.notes[0] == (
        "3 rows with missing values dropped (1 without user, 1 without item, 1 without rating; "
        f"the first is line 3 of {tmp_path / 'a.csv'})"
    )
    frame = pd.DataFrame({"user": ["a", None, "b"], "item": [1, 2, np.nan], "rating": [1, 2, 3]})
    with pytest.raises(MetarecError, match="one user"):
        from_pandas(frame)
    empty = read(write(tmp_path / "b.csv", "user,item,rating,timestamp\n1,1,5,\n2,1,4,\n"))
    assert empty.timestamp is None
    assert "column 'timestamp' is empty: read without timestamps" in empty.notes


@pytest.mark.parametrize("value", ["abc", "3,5,5", "inf", "-inf", "1e39"])
def test_a_rating_that_is_no_number_is_refused_by_line(tmp_path, value):
    body = "user;item;rating\n\n1;1;5\n2;1;" + value + "\n"
    message = refused(write(tmp_path / "a.csv", body))
    assert message.startswith(f"line 4 of {tmp_path / 'a.csv'}, column 'rating': ")
    assert ("not a number" if value in ("abc", "3,5,5") else "expected a finite number") in message


def test_a_bad_rating_in_a_table_is_refused_by_row():
    frame = pd.DataFrame({"user": [1, 2], "item": [1, 2], "rating": ["5", "five"]})
    with pytest.raises(MetarecError, match=r"frame.iloc\[1\], column 'rating': 'five' is not a number"):
        from_pandas(frame)
    with pytest.raises(MetarecError, match=r"frame.iloc\[0\], column 'rating': expected a finite number, got inf"):
        from_pandas(frame.assign(rating=[np.inf, 1.0]))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b"user_id,item_id,rating\n", "has a header (user_id, item_id, rating) and no rows"),
        (b"user,item,rating\n1,2,3\n1,2\n2,2,1\n", "line 3 of {path}: expected 3 fields (user, item, rating), got 2"),
        (b"user,item,rating\n1,2,3\n2,2,1\n1,", "line 4 of {path}: expected 3 fields (user, item, rating), got 2"),
        (b"user,item,rating\n1,2,3,4\n2,2,3,4\n", "line 2 of {path}: expected 3 fields (user, item, rating), got 4"),
        (b"user,item,rating\n1,2,3\n1,3,2\n", "all rows belong to one user (1)"),
        (b"user,item,rating\n1,2,1\n2,3,1\n", "all ratings are 1"),
        (b"user,item,rating\n,2,1\n2,,1\n", "every row of {path} lacks a value"),
        (b"user,item,rating\n1,2,3\n2,caf\xe9,4\n", "line 3 of {path} is not UTF-8 text (byte 0xe9)"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)), "got binary data"),
        (b"PK\x03\x04rest", "zip archive"),
        (b"just some words\nand more of them\n", "expected fields separated by a comma"),
        (b"\x1f\x8b\x08\x00rub", "truncated"),
        (
            gzip.compress(b"")[:10] + b"\xff" * 400,  # a block type that there is not
            "cannot be read",
        ),
        (b"PAR1rubbish", "damaged or truncated"),
    ],
)
def test_files_that_are_refused(tmp_path, content, said):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    message = refused(path)
    assert said.format(path=path) in message
    assert "\n" not in message


def test_a_byte_that_is_not_utf8_beyond_the_sample_is_refused_by_line(tmp_path):
    path = tmp_path / "a.csv"
    body = b"user,item,rating\n" + b"1,some_longer_name,3\n" * 20_000
    path.write_bytes(body + b"2,caf\xe9,4\n")
    assert f"line 20002 of {path} is not UTF-8 text" in refused(path)


def test_cut_files_are_refused(tmp_path):
    whole = gzip.compress(np.random.default_rng(0).permutation(50_000).astype(str).tobytes() + text(",").encode())
    (tmp_path / "a.csv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MetarecError):
        read(tmp_path / "a.csv.gz")
    rows = "".join(f"{k},{k * 7919 % 10007},{k % 5}\n" for k in range(100_000))
    packed = gzip.compress(("user,item,rating\n" + rows).encode())
    (tmp_path / "b.csv.gz").write_bytes(packed[: len(packed) // 2])
    assert "truncated. Download it again" in refused(tmp_path / "b.csv.gz")
    pd.DataFrame(ROWS, columns=["user", "item", "rating", "time"]).to_parquet(tmp_path / "c.parquet")
    (tmp_path / "c.parquet").write_bytes((tmp_path / "c.parquet").read_bytes()[:200])
    assert "damaged or truncated" in refused(tmp_path / "c.parquet")


def test_whatever_a_damaged_file_holds_the_reader_gives_data_or_one_message(tmp_path):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(ROWS, columns=["user", "item", "rating", "timestamp"])
    frame.to_parquet(tmp_path / "a.parquet")
    plain = text(",").encode()
    for k, good in enumerate([plain, gzip.compress(plain), (tmp_path / "a.parquet").read_bytes(), text("::").encode()]):
        for damage in range(60):
            bad = bytearray(good)
            for at in rng.integers(0, len(bad), 1 + damage % 5):
                bad[at] = rng.choice([0, 10, 34, 44, 45, 57, 101, 195, 255])
            path = tmp_path / f"{k}_{damage}"
            path.write_bytes(bad)
            try:
                data = read(path)
            except MetarecError:
                continue
            assert data.user.min() >= 1
            assert data.user.max() <= len(data.users.ids)


def test_paths_that_are_refused(tmp_path):
    assert "there is no file" in refused(tmp_path / "none.csv")
    path = write(tmp_path / "a.csv", text(","))
    assert "there is no file" in refused(path, item_features=tmp_path / "none.csv")
    if os.geteuid():
        path.chmod(0)
        assert "no permission to read" in refused(path)


def test_ratings_all_equal_are_read_when_said_to_be_implicit(tmp_path):
    path = write(tmp_path / "a.csv", "user,item,rating\n1,2,1\n2,3,1\n")
    assert "--implicit (implicit=True in Python)" in refused(path)
    assert read(path, implicit=True).implicit


def test_users_with_a_single_interaction_are_kept_and_counted():
    data = from_pandas(pd.DataFrame({"user": [1, 1, 2], "item": [1, 2, 3], "rating": [1, 2, 3]}))
    assert len(data) == 3
    assert any(note.startswith("1 of 2 users have a single interaction") for note in data.notes)


def test_the_table_given_is_left_as_it_was():
    frame = pd.DataFrame({"user": [1, 2], "item": [1, 2], "rating": np.array([1, 2], np.float32), "t": ["a", "b"]})
    before = frame.copy()
    data = from_pandas(frame, title_col="t")
    data.rating[:] = 0
    pd.testing.assert_frame_equal(frame, before)
    assert data.titles.tolist() == ["a", "b"]
