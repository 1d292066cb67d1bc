"""Nobody comes in: what is loaded runs no code, leaves no folder, stays within bounds; what belongs to others is noticed."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tables import refused, rows_of, write

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.hostile import lay, mutate, stored  # noqa: E402
from metarec_jax.commands.recommend import _click, _tell_unknown  # noqa: E402
from metarec_jax.core import MetarecError  # noqa: E402
from metarec_jax.data.interactions import Interactions, Vocabulary  # noqa: E402
from metarec_jax.data.io import bounds, datasets  # noqa: E402
from metarec_jax.data.io.histories import read_histories  # noqa: E402
from metarec_jax.data.io.readers import read  # noqa: E402
from metarec_jax.experiment import directory as directories  # noqa: E402
from metarec_jax.experiment.run import open_run  # noqa: E402
from metarec_jax.serving.history import Names, Unknown, parse_history, parse_table, rated  # noqa: E402


@pytest.fixture(autouse=True)
def no_code_ran(tmp_path, monkeypatch):
    """A payload that is unpickled makes a folder in the working directory."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / mutate.MARK).exists()


@pytest.fixture
def run(tmp_path):
    """The directory of a finished run."""
    lay(tmp_path / "run", stored.run_files())
    return tmp_path / "run"


def open_refused(folder: Path) -> str:
    with pytest.raises(MetarecError) as caught:
        directories.read(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# No code


def test_the_payload_does_run_where_it_is_let_in(tmp_path):
    """Or the tests beside this one would prove nothing."""
    pickle.loads(pickle.dumps(mutate.Payload()))
    assert (tmp_path / mutate.MARK).is_dir()
    (tmp_path / mutate.MARK).rmdir()


def test_a_pickle_in_a_catalogue_is_not_loaded(run):
    size = stored.world().users.num_rows
    for held in (np.array([mutate.Payload()] * size, object), np.array([mutate.Payload()] * 10_000, object)):
        np.savez(run / "catalogue.npz", user_row=held, item_row=np.arange(size, dtype=np.int32))
        assert "is damaged (user_row" in open_refused(run)


def test_a_pickled_type_in_a_parquet_file_is_not_loaded(tmp_path):
    """As Arrow kept Python's types before version 15."""
    field = pa.field("user", pa.string()).with_metadata(
        {
            b"ARROW:extension:name": b"arrow.py_extension_type",
            b"ARROW:extension:metadata": pickle.dumps(mutate.Payload()),
        }
    )
    schema = pa.schema([field, pa.field("item", pa.int64())])
    pq.write_table(
        pa.Table.from_arrays([pa.array(["a", "b"]), pa.array([1, 2])], schema=schema), tmp_path / "a.parquet"
    )
    assert rows_of(read(tmp_path / "a.parquet")) == [("a", 1), ("b", 2)]


def test_no_module_can_load_a_pickle_or_evaluate_text():
    """Nor be told to: the words that do it do not stand in the package."""
    words = ("eval(", "exec(", "allow_pickle=True", "np.load(", "read_pickle", "yaml.load", "marshal", "shelve")
    for path in (ROOT / "metarec_jax").rglob("*.py"):
        source = path.read_text().replace("jax.eval", "").replace("_eval(", "")
        for word in words[:2]:
            assert f" {word}" not in source, f"{path.name}: {word}"
        for word in words[2:]:
            if word == "np.load(":
                assert all("allow_pickle=False" in line for line in source.splitlines() if word in line), path.name
            else:
                assert word not in source, f"{path.name}: {word}"


# No path outside


def test_a_name_stays_a_name(tmp_path):
    for name in ("../../x", "/etc/passwd", "..", ".", "", "a/../../b", "a\0b", "x\n"):
        data = Interactions(*tables_of(), name=name)
        folder = directories.name_of(data)
        assert Path(folder).name == folder
        assert folder not in ("", ".", "..")
        assert folder.isprintable()


def tables_of() -> tuple:
    data = stored.world()
    return data.user, data.item, data.rating, data.timestamp, data.users, data.items


@pytest.mark.slow
def test_archives_that_lie(tmp_path, monkeypatch):
    """Links, members outside, a declared size of nothing, a zip inside the deflate bound: read in memory, by name, by sum."""
    tiny = stored.TINY
    monkeypatch.setattr(datasets, "_licences_printed", {"tiny"})
    layout = stored.tiny().original

    def packed(change) -> io.BytesIO:
        sink = io.BytesIO()
        with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as z:
            for name, content in tiny.items():
                change(z, f"tiny/{name}", content)
        return sink

    def link(z, name, content):
        info = zipfile.ZipInfo(name)
        info.external_attr = 0o120777 << 16
        z.writestr(info, "/etc/passwd")

    def outside(z, name, content):
        z.writestr(name, content)
        z.writestr(f"../{name}", content)
        z.writestr(f"{tmp_path}/out", content)

    def swollen(z, name, content):
        z.writestr(name, content + bytes(200_000_000))

    assert len(datasets._from_zip(packed(outside), layout, "tiny")) == 8
    assert [p.name for p in tmp_path.iterdir()] == []
    for change in (link, swollen):
        with pytest.raises(datasets._Unavailable, match="expected sha256"):
            datasets._from_zip(packed(change), layout, "tiny")


# Bounds

BOMBS = """
import gc, resource, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from metarec_jax.core import MetarecError
from metarec_jax.data.io import histories, readers
import pyarrow as pa
pa.set_cpu_count(1), pa.set_io_thread_count(1)
readers.read("good.csv"), histories.read_histories("good.csv")
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 512 * 2**20,) * 2)
for path in sorted(Path(".").glob("bomb*")):
    for enter in (readers.read, histories.read_histories, lambda p: readers.read("good.csv", item_features=p)):
        try:
            enter(path)
            print(path, "read")
        except MetarecError as error:
            print(path, "memory" if isinstance(error.__cause__, MemoryError) else "refused", str(error)[:200])
        gc.collect()
"""


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs a bound on a process's memory")
def test_what_swells_is_refused_in_half_a_gigabyte(tmp_path):
    """Files of at most 2 MB that unpack to 500 MB and more, or 20 rows of 100 MB: every door refuses, in 512 MiB."""
    block = b"u1,i1,3\n" * 125_000  # 1 MB
    (tmp_path / "good.csv").write_text("user,item,rating\n" + "".join(f"{k},{k % 7},{k % 5}\n" for k in range(50)))
    start = b"user,item,rating\nu1,i1,3\nu2,i1,4\n"
    (tmp_path / "bomb1.csv.gz").write_bytes(gzip.compress(start) + gzip.compress(block) * 500)
    (tmp_path / "bomb2.csv.bz2").write_bytes(bz2.compress(start) + bz2.compress(block) * 500)
    (tmp_path / "bomb3.csv.gz").write_bytes(gzip.compress(start) + gzip.compress(bytes(97 for _ in range(10**6))) * 500)
    (tmp_path / "bomb4.dat.gz").write_bytes(gzip.compress(b"1::2::3\n" * 125_000) * 500)
    zeros = pa.array(np.zeros(5_000_000, np.int64))
    with pq.ParquetWriter(
        tmp_path / "bomb5.parquet", pa.schema([("user", pa.int64()), ("item", pa.int64())])
    ) as writer:
        for _ in range(20):
            writer.write_table(pa.table({"user": zeros, "item": zeros}))
    long = pa.DictionaryArray.from_arrays(pa.array([0, 1] * 200_000, pa.int32()), pa.array(["x" * 10**6, "y" * 10**6]))
    users = pa.array(np.arange(400_000) % 1000)
    pq.write_table(
        pa.table({"user": users, "item": long}), tmp_path / "bomb6.parquet", compression="zstd", store_schema=False
    )
    assert max(p.stat().st_size for p in tmp_path.glob("bomb*")) < 2_000_000
    done = subprocess.run(
        [sys.executable, "-c", BOMBS.format(root=str(ROOT))],
        cwd=tmp_path,
        env=os.environ | {"MALLOC_ARENA_MAX": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(lines) == 18
    assert all("refused" in line for line in lines if "bomb6" not in line), done.stdout
    # One long text on many rows is held once, so it is no bomb; as a table of items it names none of them.
    assert [line.split()[1] for line in lines if "bomb6" in line] == ["read", "read", "refused"]


def test_a_line_without_end(tmp_path):
    row = "u1,i1,3\n"
    long = write(
        tmp_path / "a.csv", "user,item,rating\n" + row * 40_000 + "u2," + "x" * (2 * bounds.LINE + 10) + ",1\n"
    )
    assert f"line 40002 of {long} is longer than {bounds.LINE} characters" in refused(long)
    assert "expected fields separated by a comma" in refused(write(tmp_path / "b.csv", "a" * 20_000_000))
    open_quote = write(tmp_path / "c.csv", "user,item,rating\n" + row * 40_000 + 'u2,"' + "x,1\n" * 5_000_000)
    assert f"line 40002 of {open_quote} cannot be split into fields" in refused(open_quote)


def test_columns_without_end(tmp_path):
    """262,144 fields took a minute when each name was looked for among all before it."""
    for name, body in (("a.csv", "user,item" + "," * 250_000 + "\n1,2\n"), ("b.dat", "::" * 200_000)):
        assert f"expected at most {bounds.COLUMNS} fields" in refused(write(tmp_path / name, body))
    many = pa.table({f"c{k}": [1] for k in range(bounds.COLUMNS + 1)})
    pq.write_table(many, tmp_path / "c.parquet")
    assert f"expected at most {bounds.COLUMNS} columns" in refused(tmp_path / "c.parquet")
    head = ",".join(f"c{k}" for k in range(5000))
    message = refused(write(tmp_path / "d.csv", head + "\n" + ",".join("1" * 5000) + "\n"))
    assert len(message) < 500  # the first twelve names, and how many more
    assert "and 4988 more" in message


def test_one_long_id_costs_its_own_length_only():
    """10,000 ids, one of 10^6 characters: an array of fixed width would take 4 * 10^10 bytes."""
    ids = [f"i{k}" for k in range(10_000)] + ["x" * 10**6]
    known = Vocabulary(np.array(ids, object))
    assert known.encode(ids).tolist() == list(range(1, 10_002))
    world = stored.world()
    data = Interactions(world.user, world.item, world.rating, None, world.users, known)
    names = Names(data)
    assert names.rows(ids)[-1] == 10_001
    users, parsed, _, _ = parse_table((ids, ids, None), clicks(data), Names(clicks(data)))
    assert len(users) == len(parsed) == 10_001
    assert names.suggest("y" * 10**6) == ()


def clicks(data: Interactions) -> Interactions:
    return Interactions(data.user, data.item, None, None, data.users, data.items)


def test_a_header_that_claims_a_trillion_rows(run):
    """Nothing is allocated on its word: the length is the caller's."""
    head = "{'descr': '<i4', 'fortran_order': False, 'shape': (1000000000000,)}".ljust(117) + "\n"
    member = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode()
    with zipfile.ZipFile(run / "catalogue.npz", "w") as z:
        z.writestr("user_row.npy", member)
        z.writestr("item_row.npy", member)
    assert "user_row: expected int32[5], got int32[1000000000000]" in open_refused(run)
    with zipfile.ZipFile(run / "catalogue.npz", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("user_row.npy", bytes(50_000_000))
    assert "user_row in catalogue.npz: expected 20 bytes and a header, got 50000000 bytes" in open_refused(run)


@pytest.mark.parametrize(
    "spoilt", ["[" * 100_000, "{" * 3, '{"a":' * 50_000, "7" * 5000, "[1]", "3", '"x"', "null", ""]
)
def test_json_that_no_reader_should_follow(run, spoilt):
    for name in ("config.json", "identity.json"):
        kept = (run / name).read_bytes()
        (run / name).write_text(spoilt)
        assert "is damaged" in open_refused(run)
        (run / name).write_bytes(kept)
    (run / "result.json").write_text(spoilt)
    assert directories.result(run) is None
    assert "has not been trained to its end" in open_refused(run)
    huge = run / "huge.json"
    huge.write_bytes(b" " * 101)
    with pytest.raises(ValueError, match="larger than 100 bytes"):
        bounds.read_json(huge, most=100)


def test_what_is_no_plain_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        assert "is not a regular file" in refused(path)
    assert "zero byte" in refused(Path("a\0b"))
    assert "is a folder" in history_refused(tmp_path)
    for name, message in (
        ("~nobody-here/x", "is neither a data set nor an existing file"),
        ("x" * 5000, "is neither a data set"),
        (f"synthetic:{10**20}x5", "is too large to generate"),
    ):
        with pytest.raises(MetarecError, match=message):
            datasets.load(name)


def history_refused(path: Path) -> str:
    with pytest.raises(MetarecError) as caught:
        read_histories(path)
    return str(caught.value)


# What belongs to others


def test_a_run_as_it_was_left_is_opened(run):
    opened = directories.read(run)
    assert directories.fingerprint(opened.data) == directories.fingerprint(stored.world())
    assert opened.catalogue.item_row.tolist() == [0, 1, 2, 3, 4]


def test_the_data_of_another_run_is_noticed(run):
    """Of the same sizes; and the same rows with other titles, which no sum of the rows would tell."""
    data = stored.world()
    others = replace(data, rating=data.rating[::-1].copy())
    renamed = replace(data, titles=data.titles[::-1].copy())
    moved = replace(data, items=Vocabulary(data.items.ids + 1))
    for other in (others, renamed, moved):
        directories.write_cache(other, run / "data.parquet")
        assert "data.parquet is not the data that" in open_refused(run)


def test_the_catalogue_of_another_run_is_noticed(run):
    """Same shapes, another item left out: only a sum tells; rows of others are told without one, too."""
    held = {"user_row": np.zeros(5, np.int32), "item_row": np.arange(5, dtype=np.int32)}
    np.savez_compressed(run / "catalogue.npz", **held | {"item_row": np.array([0, 1, 0, 3, 4], np.int32)})
    assert "catalogue.npz is not the catalogue that" in open_refused(run)
    told = json.loads((run / "config.json").read_text())
    del told["files"]  # as older runs were written
    (run / "config.json").write_text(json.dumps(told))
    assert directories.read(run).catalogue.item_row.tolist() == [0, 1, 0, 3, 4]
    np.savez_compressed(run / "catalogue.npz", **held | {"item_row": np.array([0, 2, 1, 3, 4], np.int32)})
    assert "catalogue.npz is not the catalogue that" in open_refused(run)


def test_the_configuration_of_another_run_is_noticed(run):
    kept = (run / "config.json").read_text()
    for old, new, said in (
        ('"size": 2', '"size": 3', "they differ in 'model'"),
        ('"seed": 0', '"seed": 1', "they differ in"),
    ):
        (run / "config.json").write_text(kept.replace(old, new, 1))
        assert said in open_refused(run)
    (run / "config.json").write_text(kept.replace('"name": "world.csv"', '"name": "moved.csv"'))
    assert directories.read(run).config.data.name == "moved.csv"  # data may lie elsewhere


def test_the_checkpoint_of_other_shapes_is_noticed(run, tmp_path):
    """A checkpoint of tables of 5 x 2 in a run of 5 x 3."""
    for name in ("config.json", "identity.json"):
        (run / name).write_text((run / name).read_text().replace('"size": 2', '"size": 3', 1))
    with pytest.raises(MetarecError, match="does not match this program"):
        open_run(run)


def test_a_history_of_another_catalogue_is_noticed(capsys):
    data = stored.world()
    every = [Unknown(name, ()) for name in ("B001", "B002", "B003")]
    with pytest.raises(
        MetarecError, match=r"none of the 3 items \('B001', ...\) is known to runs/x; its items are such as"
    ):
        _tell_unknown(every, ["B001", "B002", "B003"], Path("runs/x"), data)
    _tell_unknown(every, ["B001", "B002", "B003", "10"], Path("runs/x"), data)
    assert "note: 3 of 4 items are not known to runs/x; are they of the data it learned from" in capsys.readouterr().err
    _tell_unknown(every[:1], ["B001", "10"], Path("runs/x"), data)
    assert "note:" not in capsys.readouterr().err  # one of two may be a slip


# Histories


def test_histories_of_any_value():
    data = stored.world()
    names = Names(data)
    for rating in (10**400, "1e999", float("inf"), None, [5], "five", 5.001, 1e300):
        assert rated(rating, 1.0, 5.0) is None
        with pytest.raises(MetarecError, match="expected a number from 1 to 5"):
            parse_history({10: rating}, data, names)
    for history in ([["Heat 10"]], [{"a": 1}], {"item_id": [[10], [11]], "rating": [5, 4]}):
        with pytest.raises(MetarecError, match="use one value per entry"):
            parse_history(history, data, names)
    found = parse_history({"item_id": ["Heat 10", np.int64(11), 12.0, "nan"], "rating": [5, 4, 3, 2]}, data, names)
    assert found.item.tolist() == [1, 2, 3]
    assert [u.name for u in found.unknown] == ["nan"]
    assert _click("x=²") == ("x=²", 1.0)  # a digit to isdigit, no number to float
