"""`Interactions` cached as one Parquet file with its sha256 beside it, which detects corruption.

Interactions, ids, titles and features are columns of different lengths; shorter ones are padded with nulls. The
lengths, names, kinds of features and notes are JSON in the file's metadata. In the first format everything except the
interactions was in that JSON, which exceeded Parquet's limit of 100 MB at about a million titled items; such files are
still read.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from metarec_jax import files
from metarec_jax.core import MetarecError
from metarec_jax.data.interactions import Feature, Interactions, Vocabulary
from metarec_jax.data.io import bounds, parquet
from metarec_jax.messages import one_line, printable

_METADATA = b"metarec_jax"
_COLUMNS = ("user", "item", "rating", "timestamp")
_GROUP = 1 << 20
"""Rows that are written at once, and so the most nulls in memory for a column that has ended."""


def write_cache(data: Interactions, path: Path) -> None:
    """Write ``path`` and then ``path.sha256``, each atomically, so that a reader never sees a partial file.

    Raises:
      OSError: the folder cannot be written.
    """
    columns = {name: pa.array(values) for name in _COLUMNS if (values := getattr(data, name)) is not None}
    columns |= {"users": _strings(data.users.ids), "items": _strings(data.items.ids)}
    if data.titles is not None:
        columns["titles"] = _strings(data.titles)
    features: dict[str, dict[str, Any]] = {}
    for side in ("user", "item"):
        features[side] = {}
        for k, (name, feature) in enumerate(getattr(data, f"{side}_features").items()):
            features[side][name] = {"kind": feature.kind, "units": feature.units}
            columns[f"{side}_feature_{k}"] = _vectors(feature.values)
            if feature.vocabulary is not None:
                columns[f"{side}_feature_{k}_ids"] = _strings(feature.vocabulary.ids)
    rest = {
        "format": 2,
        "name": data.name,
        "notes": data.notes,
        "lengths": {name: len(values) for name, values in columns.items()},
        "features": features,
    }
    schema = pa.schema([(name, values.type) for name, values in columns.items()], {_METADATA: json.dumps(rest)})
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        for first in range(0, max(map(len, columns.values())), _GROUP):
            parts = [values[first : first + _GROUP] for values in columns.values()]
            count = max(map(len, parts))
            padded = [pa.chunked_array([part, pa.nulls(count - len(part), part.type)]) for part in parts]
            writer.write_table(pa.table(padded, schema=schema))
    raw = sink.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(path, raw)
    files.write_atomically(_checksum(path), files.sha256(raw))


def _strings(values: np.ndarray) -> pa.Array:
    """Integers or text as an Arrow array; text with lone surrogates, which is not valid UTF-8, as bytes."""
    if values.dtype.kind != "O":
        return pa.array(values)
    try:
        return pa.array(values, pa.large_string())
    except UnicodeEncodeError:
        return pa.array([text.encode("utf-8", "surrogatepass") for text in values.tolist()], pa.large_binary())


def _vectors(values: np.ndarray) -> pa.Array:
    """The values of a feature as an Arrow array, with lists if a row has several values."""
    if values.ndim == 1:
        return pa.array(values)
    rows, width = values.shape
    return pa.LargeListArray.from_arrays(np.arange(rows + 1, dtype=np.int64) * width, values.reshape(-1))


def read_cache(path: Path) -> Interactions:
    """Read the data set that `write_cache` wrote.

    Raises:
      OSError: a file is absent or cannot be read.
      ValueError: the checksum does not match, or the file is not a cached data set.
    """
    raw = path.read_bytes()
    if files.sha256(raw) != _checksum(path).read_text(errors="replace").strip():
        raise ValueError("its sha256 differs from the one recorded when it was written")
    try:
        return _parsed(raw, path)
    except (*_ERRORS, pa.ArrowException, MemoryError) as error:
        raise ValueError(f"it is not a cached data set: {one_line(error)}") from error


_ERRORS = (MetarecError, OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, NotImplementedError)


def _parsed(raw: bytes, path: Path) -> Interactions:
    with pq.ParquetFile(pa.BufferReader(raw), thrift_string_size_limit=max(len(raw), bounds.ROOM)) as file:
        schema = file.schema_arrow
    rest = bounds.parse_json(schema.metadata[_METADATA])
    if "format" not in rest:
        return _of_first_format(raw, path, rest)
    if rest["format"] != 2:
        raise ValueError(f"it has format {rest['format']!r}; this version of metarec_jax reads formats 1 and 2")
    if not all(isinstance(text, str) for text in [rest["name"], *rest["notes"]]):
        raise ValueError("its name or notes are not text")
    table = parquet.counted(pa.BufferReader(raw), path, len(raw))
    lengths = rest["lengths"]
    if sorted(lengths) != sorted(table.column_names):
        raise ValueError("its columns differ from those in its metadata")

    def column(name: str) -> Any:
        if name not in lengths:
            return None
        if type(lengths[name]) is not int or not 0 <= lengths[name] <= len(table):
            raise ValueError(f"{name}: expected a length of at most {len(table)}, got {lengths[name]!r}")
        return _array(table[name].slice(0, lengths[name]), name)

    def features(side: str) -> dict[str, Feature]:
        return {
            name: Feature(
                about["kind"],
                column(f"{side}_feature_{k}"),
                _vocabulary(column(f"{side}_feature_{k}_ids")),
                _units(about["units"]),
            )
            for k, (name, about) in enumerate(rest["features"][side].items())
        }

    titles = column("titles")
    if titles is not None and titles.dtype != object:
        raise ValueError("its titles are not text")
    return Interactions(
        **{name: column(name) for name in _COLUMNS},
        users=Vocabulary(column("users")),
        items=Vocabulary(column("items")),
        user_features=features("user"),
        item_features=features("item"),
        titles=titles,
        notes=tuple(map(printable, rest["notes"])),
        name=rest["name"],
    )


def _array(values: pa.ChunkedArray, name: str) -> np.ndarray:
    """A column as numbers or text (objects); ``[rows, length]`` if its rows are lists of one length."""
    kind = values.type
    if values.null_count:
        raise ValueError(f"its column {name} has {values.null_count} missing values")
    if pa.types.is_large_list(kind):
        widths = pc.unique(pc.list_value_length(values)).to_pylist()
        if len(widths) > 1:
            raise ValueError(f"its column {name} has lists of different lengths")
        inner = _array(pc.list_flatten(values), name)
        return inner.reshape(len(values), widths[0] if widths else 0)
    if pa.types.is_large_binary(kind):
        return _objects(text.decode("utf-8", "surrogatepass") for text in values.to_pylist())
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"its column {name} is {kind}")
    return values.to_numpy()


def _objects(texts: Iterator[str]) -> np.ndarray:
    return np.array([*texts, None], object)[:-1]  # the None keeps the dtype object: fixed-width text would waste memory


def _units(pairs: Any) -> tuple[tuple[float, float], ...]:
    return tuple((float(middle), float(spread)) for middle, spread in pairs)


def _vocabulary(ids: np.ndarray | None) -> Vocabulary | None:
    return None if ids is None else Vocabulary(ids)


def _of_first_format(raw: bytes, path: Path, rest: Mapping[str, Any]) -> Interactions:
    """Data of versions up to 0.1.0: everything except the interactions is in the JSON of the metadata."""
    table = parquet.counted(pa.BufferReader(raw), path, len(raw), footer=max(len(raw), bounds.ROOM))

    def ids(values: list[Any]) -> Vocabulary:
        whole = all(type(value) is int for value in values)  # not bool, nor 1.5, which an array of integers would cut
        return Vocabulary(np.array(values, dtype=np.int64 if whole else object))

    def feature(f: Mapping[str, Any]) -> Feature:
        vocabulary = None if f["vocabulary"] is None else ids(f["vocabulary"])
        return Feature(f["kind"], np.array(f["values"]), vocabulary)

    titles = rest["titles"]
    if not all(isinstance(text, str) for text in [rest["name"], *rest["notes"], *(titles or ())]):
        raise ValueError("its name, notes or titles are not text")
    rows: dict[str, Any] = dict.fromkeys(_COLUMNS)
    rows |= {name: _array(table[name], name) for name in _COLUMNS if name in table.column_names}
    return Interactions(
        **rows,
        users=ids(rest["users"]),
        items=ids(rest["items"]),
        user_features={name: feature(f) for name, f in rest["user_features"].items()},
        item_features={name: feature(f) for name, f in rest["item_features"].items()},
        titles=None if titles is None else np.array(titles, dtype=object),
        notes=tuple(map(printable, rest["notes"])),
        name=rest["name"],
    )


def _checksum(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")
