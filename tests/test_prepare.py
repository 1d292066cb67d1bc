"""Any table becomes the same store: against the reader that holds all in memory, and by arithmetic shown here."""

from __future__ import annotations

import bz2
import fcntl
import gzip
import json
import os
import shutil
import signal
import threading
from collections import namedtuple
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from metarec_jax import cli
from metarec_jax.core import MetarecError
from metarec_jax.data.io.readers import read
from metarec_jax.data.store import partition
from metarec_jax.data.store import prepare as preparing
from metarec_jax.data.store.opened import Store, ids, load, open_store
from metarec_jax.data.store.prepare import prepare

COLUMNS = ["user_id", "item_id", "rating", "timestamp"]


def table(users: int = 40, items: int = 25, rows: int = 600, seed: int = 0) -> pd.DataFrame:
    """Ratings with repeated pairs; no two rows of a user have one time, so that readers have no choice."""
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "user_id": rng.integers(100, 100 + users, rows) * 7,
            "item_id": rng.integers(0, items, rows) - 3,
            "rating": rng.integers(1, 11, rows) / 2,
            "timestamp": 1_600_000_000 + rng.permutation(rows),
        }
    )


def made(tmp_path: Path, *paths: object, name: str = "store", **options) -> Store:
    return prepare([str(p) for p in paths], tmp_path / name, say=lambda line: None, **options)


def refused(tmp_path: Path, *paths: object, **options) -> str:
    with pytest.raises(MetarecError) as caught:
        made(tmp_path, *paths, **options)
    assert not (tmp_path / "store").exists()
    assert not (tmp_path / "store.part").exists()
    return str(caught.value)


def written(frame: pd.DataFrame, path: Path) -> Path:
    if path.suffix == ".parquet":
        frame.to_parquet(path, index=False)
    else:
        frame.to_csv(path, index=False)
    return path


def rows(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def same(store: Store, path: Path, **options) -> None:
    """The store holds what `read` finds, sorted by user, time and item row; ids of the same type and order."""
    a, b = load(store), read(path, **options)
    assert a.users.ids.tolist() == b.users.ids.tolist()
    assert a.items.ids.tolist() == b.items.ids.tolist()
    time = np.zeros(len(b)) if b.timestamp is None else b.timestamp
    by = np.lexsort((b.item, time, b.user))
    for name in ("user", "item", "rating", "timestamp"):
        theirs = getattr(b, name)
        if theirs is None:
            assert getattr(a, name) is None
        else:
            np.testing.assert_array_equal(getattr(a, name), theirs[by])
            assert getattr(a, name).dtype == theirs.dtype


def text_ids(frame: pd.DataFrame) -> pd.DataFrame:
    """Ids that are text, in an order that is not that of numbers: "u9" after "u10", and beyond ASCII."""
    users = "u" + frame["user_id"].astype(str)
    return frame.assign(
        user_id=users, item_id=np.where(frame["item_id"] % 2, "\u00e9", "Z") + frame["item_id"].astype(str)
    )


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
@pytest.mark.parametrize("kind", ["integers", "text", "without times", "clicks", "gaps"])
def test_a_store_is_what_the_reader_finds(tmp_path, kind, suffix):
    frame = table()
    if kind == "text":
        frame = text_ids(frame)
    if kind in ("without times", "clicks"):  # then which of a pair comes last is for the reader to say: none repeats
        frame = frame.drop_duplicates(["user_id", "item_id"]).drop(columns=["timestamp"])
    if kind == "clicks":
        frame = frame.drop(columns=["rating"])
    if kind == "gaps":
        frame.loc[::7, "rating"] = np.nan
        frame = frame.astype({"user_id": "Int64", "timestamp": "Int64"})
        frame.loc[::11, "user_id"] = pd.NA
        frame.loc[::13, "timestamp"] = pd.NA
        timeless = frame["timestamp"].isna()  # none of them repeats: see above
        frame = frame[
            ~(timeless & frame[timeless].duplicated(["user_id", "item_id"]).reindex(frame.index, fill_value=False))
        ]
    path = written(frame, tmp_path / f"data.{suffix}")
    same(made(tmp_path, path), path)


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|", "::"])
@pytest.mark.parametrize("packed", ["", ".gz", ".bz2"])
def test_text_of_every_layout(tmp_path, delimiter, packed):
    frame = table(rows=200)
    text = frame.to_csv(index=False).replace(",", delimiter).encode()
    path = tmp_path / f"data.csv{packed}"
    path.write_bytes({"": lambda b: b, ".gz": gzip.compress, ".bz2": bz2.compress}[packed](text))
    same(made(tmp_path, path), path)


def test_text_is_read_in_blocks(tmp_path, monkeypatch):
    """Blocks of 4096 bytes, so that the delimiter of two bytes, and quoted line ends, lie across their borders."""
    monkeypatch.setattr("metarec_jax.data.store.ingest._BLOCK", 4096)
    frame = table(rows=2000)
    path = tmp_path / "ratings.dat"
    path.write_text(frame.to_csv(index=False, header=False).replace(",", "::"))
    same(made(tmp_path, path), path)
    quoted = frame.assign(item_id="a\nb, " + frame["item_id"].astype(str))
    path = written(quoted, tmp_path / "quoted.csv")
    same(made(tmp_path, path, name="other"), path)


def test_columns_by_name_and_position(tmp_path):
    frame = table().rename(columns=dict(zip(COLUMNS, "wxyz", strict=True)))
    path = written(frame, tmp_path / "data.csv")
    names = {"user_col": "w", "item_col": "x", "rating_col": "y", "timestamp_col": "z"}
    same(made(tmp_path, path, **names), path, **names)
    bare = tmp_path / "bare.csv"
    frame.to_csv(bare, index=False, header=False)
    swapped = {"user_col": "2", "item_col": "1"}
    same(made(tmp_path, bare, name="swapped", **swapped), bare, **swapped)
    implicit = made(tmp_path, path, name="clicks", implicit=True, **names)
    assert implicit.implicit
    same(implicit, path, implicit=True, **names)


@pytest.mark.parametrize(("divisor", "unit"), [(1000, "milli"), (10**6, "micro"), (10**9, "nano")])
@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_times_in_other_units(tmp_path, divisor, unit, suffix):
    """1,600,000,000,500 milliseconds are 1,600,000,000 seconds; before 1970, -1 of any unit is second -1."""
    frame = table()
    frame["timestamp"] = frame["timestamp"] * divisor + divisor // 2
    frame.loc[0, "timestamp"] = -1
    path = written(frame, tmp_path / f"data.{suffix}")
    store = made(tmp_path, path)
    same(store, path)
    assert load(store).timestamp.min() == -1
    assert any(f"{unit}seconds" in note for note in store.notes)


@pytest.mark.parametrize("zone", ["", "Z", "+02:00"])
@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_dates_become_seconds(tmp_path, zone, suffix):
    frame = table()
    dates = pd.to_datetime(frame["timestamp"], unit="s")
    if suffix == "csv":
        frame["timestamp"] = dates.dt.strftime("%Y-%m-%dT%H:%M:%S") + zone
    else:
        frame["timestamp"] = dates.dt.tz_localize("Europe/Berlin") if zone else dates
    path = written(frame, tmp_path / f"data.{suffix}")
    same(made(tmp_path, path), path)


def test_nothing_but_the_rows_decides(tmp_path):
    """One table in one file, in five shuffled ones, in a folder, in 3 files of histories: the same digest, 5 times."""
    frame = table()
    whole = written(frame, tmp_path / "data.parquet")
    shuffled = frame.sample(frac=1, random_state=1)
    parts = tmp_path / "parts"
    parts.mkdir()
    for k, part in enumerate(np.array_split(np.arange(len(frame)), 5)):
        written(shuffled.iloc[part], parts / f"part-{k}.parquet")
    (parts / "_SUCCESS").write_text("")
    pieces = sorted(parts.glob("*.parquet"))
    stores = [
        made(tmp_path, whole, name="a"),
        made(tmp_path, *pieces, name="b"),
        made(tmp_path, parts, name="c"),
        made(tmp_path, parts / "part-*.parquet", name="d"),
        made(tmp_path, whole, name="e", partitions=3, memory="300MB"),
    ]
    assert len({store.digest for store in stores}) == 1
    assert len(list((stores[4].path / "histories").iterdir())) >= 2
    other = made(tmp_path, written(frame.assign(rating=frame["rating"] + 0.5), tmp_path / "other.parquet"), name="f")
    assert other.digest != stores[0].digest


def test_what_is_loaded_makes_the_same_store(tmp_path):
    """Store -> Interactions -> table -> store: the same digest."""
    store = made(tmp_path, written(text_ids(table()), tmp_path / "data.csv"))
    data = load(store)
    columns = [data.users.decode(data.user), data.items.decode(data.item), data.rating, data.timestamp]
    again = written(pd.DataFrame(dict(zip(COLUMNS, columns, strict=True))), tmp_path / "again.parquet")
    assert made(tmp_path, again, name="again").digest == store.digest


def test_of_a_repeated_pair_the_last_is_kept(tmp_path):
    """User 1, item 5: times 10, 30, 20 -> the 2.0 at 30. User 2, item 5: both at 10 -> the higher rating. Two rows go."""
    path = rows(
        tmp_path / "data.csv",
        "user,item,rating,time",
        "1,5,1,10",
        "1,5,2,30",
        "1,5,3,20",
        "2,5,4,10",
        "2,5,5,10",
        "2,6,1,9",
    )
    store = made(tmp_path, path)
    data = load(store)
    assert data.rating.tolist() == [2.0, 1.0, 5.0]
    assert data.timestamp.tolist() == [30, 9, 10]
    assert any(note.startswith("3 repeated rows") and "last" in note for note in store.notes)


def test_without_times_the_highest_of_a_pair_is_kept(tmp_path):
    path = rows(tmp_path / "data.csv", "user,item,rating", "1,5,4", "1,5,2", "2,6,1")
    assert load(made(tmp_path, path)).rating.tolist() == [4.0, 1.0]


def test_users_longer_than_what_is_read_at_once(tmp_path, monkeypatch):
    """Batches of 7 rows: users end inside, at the border and many batches later, and the store is the same."""
    frame = pd.concat([table(users=5, items=90, rows=300), table(users=60, rows=100, seed=1)])
    path = written(frame.drop_duplicates(["user_id", "timestamp"]), tmp_path / "data.parquet")
    whole = made(tmp_path, path, name="a")
    for size in (1, 7, 64):
        monkeypatch.setattr(partition, "_ROWS", size)
        assert made(tmp_path, path, name=f"b{size}", partitions=4).digest == whole.digest


def test_rows_without_a_value_are_dropped_and_counted(tmp_path):
    """7 rows: one lacks its user, one its item, one its rating ("NA"), one has an infinite one; 3 are left."""
    path = rows(
        tmp_path / "data.csv", "user,item,rating", "1,5,4", "2,5,3", "3,6,2", ",5,1", "4, ,1", "5,5,NA", "6,5,inf"
    )
    store = made(tmp_path, path)
    assert (store.interactions, store.users, store.items) == (3, 3, 2)
    dropped = [note for note in store.notes if note.startswith("rows dropped")]
    assert sorted(note.split(": ")[1] for note in dropped) == [
        "1 without a item",
        "1 without a rating",
        "1 without a rating that is finite",
        "1 without a user",
    ]


def test_items_of_dropped_rows_are_no_items(tmp_path):
    path = rows(tmp_path / "data.csv", "user,item,rating", "1,5,4", "2,6,3", "3,7,")
    assert ids(made(tmp_path, path), "item").tolist() == [5, 6]


def test_notes_say_what_was_assumed(tmp_path):
    path = rows(tmp_path / "data.csv", "user,item,rating,comment", "1,5,4,x", "u2,6,3,y", "u2,5,1,z")
    notes = " / ".join(made(tmp_path, path).notes)
    assert "columns not used: comment" in notes
    assert "'user' mixes numbers (on 1 rows) and text" in notes
    assert "1 of 2 users have a single interaction" in notes


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["user,item,rating", "1,5,4", "2,6,five", "3,6,1"], "'rating': 1 values are not 32-bit numbers.*'five'"),
        (["user,item,rating", "1,5,4", "1,6,3"], "all rows belong to one user"),
        (["user,item,rating", "1,5,4", "2,6,4"], "all ratings are 4.0.*--implicit"),
        (["user,item,rating", "1,5", "2,6,4"], "line 2 of .*data.csv: expected 3 fields"),
        (
            ["user,item,time", "1,5,2020-01-01", "2,6,soon", "2,6,2020-01-02"],
            "'time': 1 values such as 'soon' are not ISO",
        ),
        (["user,item,time", "1,5,12", "2,6,soon", "2,6,13"], "'soon' are not numbers of seconds"),
        (["user,thing,rating", "1,5,4", "2,6,3"], "no item column by a usual name"),
        (["user,item,rating"], "has a header .* and no rows"),
        (["user,item,rating", "1,,4", "2,,3"], "no row has a value in every required column"),
    ],
)
def test_bad_tables_are_refused(tmp_path, lines, said):
    message = refused(tmp_path, rows(tmp_path / "data.csv", *lines))
    assert pd.Series([message]).str.contains(said).all(), message


def test_bad_columns_of_parquet_are_refused(tmp_path):
    frame = table()
    halves = written(frame.assign(user_id=frame["user_id"] + 0.5), tmp_path / "halves.parquet")
    assert "got 600 fractions" in refused(tmp_path, halves)
    lists = written(frame.assign(item_id=[[1]] * len(frame)), tmp_path / "lists.parquet")
    assert "values of type LIST cannot be ids" in refused(tmp_path, lists)
    whole = written(frame.astype({"user_id": float, "item_id": float}), tmp_path / "whole.parquet")
    same(made(tmp_path, whole, name="whole"), whole)


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    frame = table()
    a, b = written(frame, tmp_path / "a.parquet"), written(frame, tmp_path / "b.csv")
    assert "partly Parquet, partly text" in refused(tmp_path, a, b)
    c = written(frame.rename(columns={"rating": "liked"}), tmp_path / "c.parquet")
    assert "has no column 'rating'" in refused(tmp_path, a, c)
    d = written(frame[COLUMNS[::-1]], tmp_path / "d.csv")
    assert "has another layout" in refused(tmp_path, b, d)
    assert "there is no file" in refused(tmp_path, tmp_path / "none*.csv")


def test_limits_are_stated(tmp_path, monkeypatch):
    path = written(table(), tmp_path / "data.parquet")
    for memory in ("2 bananas", "1KB", "-2GB", "nan"):
        assert "such as 2GB" in refused(tmp_path, path, memory=memory)
    usage = namedtuple("usage", "free")(10_000)  # 600 rows at 40 bytes are 24,000
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert "GB of disk, and" in refused(tmp_path, path)


def test_what_is_there_stays(tmp_path):
    """A store is replaced when told so; a folder of something else never; a failure leaves the old store."""
    path = written(table(), tmp_path / "data.parquet")
    other = written(table(seed=1), tmp_path / "other.parquet")
    old = made(tmp_path, path)
    with pytest.raises(MetarecError, match=r"is already a task store.*--fresh"):
        made(tmp_path, other)
    with pytest.raises(MetarecError, match="all rows belong to one user"):
        made(tmp_path, rows(tmp_path / "one.csv", "user,item", "1,2", "1,3"), fresh=True)
    assert open_store(tmp_path / "store").digest == old.digest
    assert made(tmp_path, other, fresh=True).digest != old.digest
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.parquet", "one.csv", "other.parquet", "store"]
    (tmp_path / "mine").mkdir()
    with pytest.raises(MetarecError, match="exists and is not a task store"):
        made(tmp_path, path, name="mine", fresh=True)


def test_a_killed_prepare_leaves_no_store_and_the_next_one_clears_up(tmp_path):
    """What a killed process leaves is a .part folder, unlocked; one that is locked belongs to a living process."""
    path = written(table(), tmp_path / "data.parquet")
    left = tmp_path / "store.part"
    (left / "scratch").mkdir(parents=True)
    (left / "scratch" / "sorted.parquet").write_bytes(b"half")
    with (left / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(MetarecError, match="another metarec prepare is writing"):
            made(tmp_path, path)
    assert made(tmp_path, path).interactions > 0
    assert not left.exists()


@pytest.mark.parametrize("phase", ["check", "items", "sort", "histories", "pack"])
def test_interrupted_in_any_phase_nothing_is_left(tmp_path, phase):
    path = written(table(), tmp_path / "data.parquet")

    def say(line: str) -> None:
        if line == f"{phase} ...":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([path], tmp_path / "store", say=say)
    assert [p.name for p in tmp_path.iterdir()] == ["data.parquet"]


def test_ctrl_c_ends_a_query(tmp_path):
    """One that would take hours, interrupted by a signal, as KeyboardInterrupt and not as an error of DuckDB's."""
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
    try:
        with preparing._database(tmp_path / "scratch", 10**9, None) as run:
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                run("SELECT sum(a.i * b.i) FROM range(10000000) a(i), range(10000000) b(i)")
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)


def test_the_command(tmp_path, capsys, monkeypatch):
    """Default place, JSON as the last line, and exit code 2 with one line for what is refused."""
    monkeypatch.chdir(tmp_path)
    written(table(), tmp_path / "log.parquet")
    assert cli.main(["prepare", "log.parquet", "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert (found["store"], found["users"]) == ("stores/log", 40)
    assert any(line.startswith("sort: 600 rows in ") for line in lines)
    assert "next: metarec fit stores/log" in lines
    assert cli.main(["prepare", "log.parquet"]) == 2
    assert capsys.readouterr().err.startswith("error: stores/log is already a task store")
    assert cli.main(["prepare"]) == 2


def test_phases_print_how_far_they_are(monkeypatch):
    """Every 15 s of a phase; here after every call: 50 of 100 rows, then the whole."""
    said: list[str] = []
    phase = preparing._Phases(said.append)
    monkeypatch.setattr(preparing._Phases, "EVERY", -1.0)
    with phase("pack", 100) as progress:
        progress(50)
    assert said[0] == "pack ..."
    assert said[1].startswith("  pack: 50 of 100 rows, ")
    assert said[2].startswith("pack: 100 rows in ")
