"""The Parquet half of a store, as another engine writes it: finished in place, or refused."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_prepare import made, rows

from metarec_jax.core import MetarecError
from metarec_jax.data.store.opened import load
from metarec_jax.data.store.pack import pack
from metarec_jax.data.store.prepare import prepare


def half(folder: Path, histories: list[dict], users=("a", "b"), items=(5, 6, 7)) -> Path:
    """The Parquet half of a store, as another engine would write it: 64-bit rows, two files of histories."""
    for name, known in (("users", users), ("items", items)):
        (folder / name).mkdir(parents=True)
        vocabulary = {"row": pa.array(range(1, len(known) + 1), pa.int64()), "id": list(known)}
        pq.write_table(pa.table(vocabulary), folder / name / "part-0.parquet")
    (folder / "histories").mkdir()
    (folder / "histories" / "_SUCCESS").write_text("")
    for k, row in enumerate(histories):
        pq.write_table(pa.Table.from_pylist([row]), folder / "histories" / f"part-{k}.parquet")
    return folder


def history(user: int, items: list, ratings: list | None = None, times: list | None = None) -> dict:
    return {
        "user": user,
        "items": items,
        "ratings": [1.0 + k for k in range(len(items))] if ratings is None else ratings,
        "times": list(range(len(items))) if times is None else times,
    }


def test_a_parquet_half_is_finished_in_place(tmp_path):
    """Written by something else, with 64-bit lists: the same digest as the store of the same table."""
    path = rows(tmp_path / "data.csv", "user,item,rating,time", "a,5,1,0", "a,7,2,1", "b,6,1,0")
    whole = made(tmp_path, path)
    folder = half(tmp_path / "half", [history(1, [1, 3]), history(2, [2])])
    finished = prepare([folder], folder, say=lambda line: None)
    assert finished.digest == whole.digest
    assert load(finished).rating.tolist() == [1.0, 2.0, 1.0]
    with pytest.raises(MetarecError, match="is already a task store"):
        prepare([folder], folder)
    with pytest.raises(MetarecError, match="is completed in place"):
        prepare([folder], tmp_path / "elsewhere")


GOOD = history(2, [2])


@pytest.mark.parametrize(
    ("histories", "said"),
    [
        ([history(2, [1]), history(1, [2])], "rows are not consecutive"),
        ([history(1, [1])], "has 1 users, and the vocabulary has 2"),
        ([history(1, [1, 4]), GOOD], "user row 1 has item row 4; rows are 1 to 3"),
        ([history(1, [0]), GOOD], "user row 1 has item row 0"),
        ([history(1, [1, 2], ratings=[1.0, float("nan")]), GOOD], "user row 1 has rating nan"),
        ([history(1, [1, 2], times=[5, 4]), GOOD], "user row 1 has times that do not ascend"),
        ([history(1, [1, 2], times=[5]), GOOD], "user row 1 has 2 items and 1 times"),
        ([history(1, [1, None]), GOOD], "items has missing values"),
        ([history(1, ["x"]), GOOD], "items: expected rows of the vocabulary, got object"),
        ([{"user": 1, "items": 3}, {"user": 2, "items": 3}], "items: expected a list, got int64"),
    ],
)
def test_a_bad_parquet_half_is_refused(tmp_path, histories, said):
    folder = half(tmp_path / "half", histories)
    with pytest.raises(MetarecError, match=said):
        pack(folder, name="half")
    assert not (folder / "store.json").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"users": ("b", "a")}, "the ids do not ascend"),
        ({"users": ("a", "a")}, "the ids do not ascend"),
        ({"users": ("a", None)}, "the ids do not ascend"),
        ({"items": (0.5, 1.5, 2.5)}, "got double"),
    ],
)
def test_a_bad_vocabulary_is_refused(tmp_path, change, said):
    folder = half(tmp_path / "half", [history(1, [1]), GOOD], **change)
    with pytest.raises(MetarecError, match=said):
        pack(folder, name="half")
