"""Generated inputs: each is read, and what was read holds together, or is refused with one readable message.

`benchmarks.hostile` spoils good files of every kind and checks what comes of them; here a few hundred, in the long run
(``python -m benchmarks.fuzz``) ten thousand of each kind. tests/corpus keeps inputs that once failed.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.hostile import FAMILIES, Files, entered, lay, spoilt, stored  # noqa: E402
from benchmarks.hostile.checks import check_message, taken  # noqa: E402
from metarec_jax.core import MetarecError  # noqa: E402
from metarec_jax.data.interactions import Vocabulary  # noqa: E402
from metarec_jax.data.io.cache import write_cache  # noqa: E402
from metarec_jax.serving.history import Names, parse_history  # noqa: E402

FUZZED = ("text", "parquet", "folder", "features", "histories", "partition", "cache", "datasets", "config")
"""Families that this file fuzzes."""
CORPUS = sorted(p for p in (ROOT / "tests" / "corpus").iterdir() if p.is_dir())
QUIET = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Where a payload that runs would leave its mark."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", FUZZED)
def test_what_is_good_is_read(tmp_path, name):
    for files in FAMILIES[name].good():
        lay(tmp_path / "good", files)
        assert entered(FAMILIES[name], tmp_path / "good") == "read"


@pytest.mark.slow
@pytest.mark.parametrize("name", FUZZED)
@settings(QUIET, max_examples=60)
@given(index=st.integers(0, 10**9))
def test_what_is_spoilt_is_read_or_refused(tmp_path, name, index):
    lay(tmp_path / "spoilt", spoilt(name, 0, index))
    assert entered(FAMILIES[name], tmp_path / "spoilt") in ("read", "refused")


@pytest.mark.parametrize("family", CORPUS, ids=lambda p: p.name)
def test_what_once_failed(tmp_path, family):
    under: Files = stored.run_files() if family.name == "run" else {}
    for entry in sorted(family.iterdir()):
        lay(tmp_path / entry.name, under | taken(entry))
        assert entered(FAMILIES[family.name], tmp_path / entry.name) in ("read", "refused"), entry.name


@pytest.mark.slow
@settings(QUIET, max_examples=150)
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_a_table_or_refused(tmp_path, content):
    for name in ("text", "histories"):
        lay(tmp_path / "any", {"ratings.csv": content})
        assert entered(FAMILIES[name], tmp_path / "any") in ("read", "refused")


@settings(QUIET, max_examples=60)
@given(cells=st.lists(st.lists(st.text(max_size=6), min_size=2, max_size=4), min_size=2, max_size=6))
def test_any_cells_are_a_table_or_refused(tmp_path, cells):
    rows = [["user", "item", "rating", "timestamp"][: len(cells[0])], *cells]
    body = "\n".join(",".join(row) for row in rows)
    lay(tmp_path / "any", {"ratings.csv": body.encode("utf-8", "surrogatepass")})
    assert entered(FAMILIES["text"], tmp_path / "any") in ("read", "refused")


@settings(QUIET, max_examples=60)
@given(rest=JSON, name=st.sampled_from(["format", "lengths", "features", "notes", "name"]))
def test_any_metadata_is_a_data_set_or_damaged(tmp_path, rest, name):
    """Whatever stands in the JSON of a cached data set, with its right sum: the caller knows ValueError alone."""
    path = tmp_path / "data.parquet"
    write_cache(stored.world(), path)
    table = pq.read_table(path)
    held = json.loads(table.schema.metadata[b"metarec_jax"]) | {name: rest}
    pq.write_table(table.replace_schema_metadata({b"metarec_jax": json.dumps(held).encode()}), path)
    (tmp_path / "data.parquet.sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest())
    lay(tmp_path / "cache", {p.name: p.read_bytes() for p in tmp_path.glob("data*")})
    assert entered(FAMILIES["cache"], tmp_path / "cache") in ("read", "refused")


@settings(QUIET, max_examples=100)
@given(ids=st.lists(st.text(max_size=5), unique=True) | st.lists(st.integers(-(2**63), 2**63 - 1), unique=True))
def test_every_id_finds_its_row(ids):
    """Row k + 1 is that of ids[k], for lists of them, one of them, and what is not among them finds row 0."""
    known = Vocabulary(np.array(ids, dtype=object if ids and isinstance(ids[0], str) else np.int64))
    assert known.encode(ids).tolist() == list(range(1, len(ids) + 1))
    assert known.decode(known.encode(ids)).tolist() == ids
    assert known.encode([None, float("nan"), "\0no such id"]).tolist() == [0, 0, 0]


@settings(QUIET, max_examples=100)
@given(history=st.dictionaries(st.integers(8, 15) | st.text(max_size=5), JSON, max_size=4))
def test_any_history_is_understood_or_refused(history):
    data = stored.world()
    try:
        found = parse_history(history, data, Names(data))
    except MetarecError as error:
        check_message(str(error))
        return
    assert ((found.rating >= 1) & (found.rating <= 5)).all()  # the scale of the data
    assert len(found.item) + len(found.unknown) <= len(history)
