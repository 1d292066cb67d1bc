"""`Interactions` as one Parquet file with its sha256 beside it: read back quickly, or found corrupt."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from metarec_jax.core import MetarecError
from metarec_jax.data import bounds, parquet
from metarec_jax.data.columns import one_line, printable
from metarec_jax.data.interactions import Feature, Interactions, Vocabulary

_METADATA = b"metarec_jax"
_COLUMNS = ("user", "item", "rating", "timestamp")


def write_cache(data: Interactions, path: Path) -> None:
    """Write ``path`` and then ``path.sha256``, each in one step, so that a reader never sees half a file.

    The rows are the columns of the file; vocabularies, features, titles and notes are JSON in its metadata.

    Raises:
      OSError: the folder cannot be written.
    """

    def feature(f: Feature) -> dict[str, Any]:
        ids = None if f.vocabulary is None else f.vocabulary.ids.tolist()
        return {"kind": f.kind, "values": f.values.tolist(), "vocabulary": ids}

    rest = {
        "name": data.name,
        "notes": data.notes,
        "users": data.users.ids.tolist(),
        "items": data.items.ids.tolist(),
        "titles": None if data.titles is None else data.titles.tolist(),
        "user_features": {name: feature(f) for name, f in data.user_features.items()},
        "item_features": {name: feature(f) for name, f in data.item_features.items()},
    }
    columns = {name: values for name in _COLUMNS if (values := getattr(data, name)) is not None}
    sink = io.BytesIO()
    pq.write_table(pa.table(columns).replace_schema_metadata({_METADATA: json.dumps(rest)}), sink, compression="zstd")
    raw = sink.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, raw)
    _replace(_checksum(path), hashlib.sha256(raw).hexdigest().encode())


def read_cache(path: Path) -> Interactions:
    """What `write_cache` wrote.

    Raises:
      OSError: a file is not there or cannot be read.
      ValueError: the bytes are not those whose checksum was noted, or hold something else.
    """
    raw = path.read_bytes()
    if hashlib.sha256(raw).hexdigest() != _checksum(path).read_text(errors="replace").strip():
        raise ValueError("its sha256 is not the one noted when it was written")
    try:
        return _parsed(raw, path)
    except (*_ERRORS, pa.ArrowException, MemoryError) as error:
        raise ValueError(f"it is no cached data set: {one_line(error)}") from error


_ERRORS = (MetarecError, OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, NotImplementedError)


def _parsed(raw: bytes, path: Path) -> Interactions:
    schema = pq.read_schema(pa.BufferReader(raw))
    rest = bounds.parse_json(schema.metadata[_METADATA])
    table = parquet.counted(pa.BufferReader(raw), path, len(raw), [name for name in _COLUMNS if name in schema.names])

    def ids(values: list[Any]) -> Vocabulary:
        whole = all(type(value) is int for value in values)  # not bool, nor 1.5, which an array of integers would cut
        return Vocabulary(np.array(values, dtype=np.int64 if whole else object))

    def feature(f: Mapping[str, Any]) -> Feature:
        vocabulary = None if f["vocabulary"] is None else ids(f["vocabulary"])
        return Feature(f["kind"], np.array(f["values"]), vocabulary)

    def column(name: str) -> Any:
        if name not in table.column_names:
            return None
        found = table[name]
        if found.null_count or not (pa.types.is_integer(found.type) or pa.types.is_floating(found.type)):
            raise ValueError(f"its column {name} is {found.type} with {found.null_count} missing values")
        return found.to_numpy()

    titles = rest["titles"]
    if not all(isinstance(text, str) for text in [rest["name"], *rest["notes"], *(titles or ())]):
        raise ValueError("its name, notes or titles are no text")
    return Interactions(
        user=column("user"),
        item=column("item"),
        rating=column("rating"),
        timestamp=column("timestamp"),
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


def _replace(path: Path, raw: bytes) -> None:
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(raw)
        os.replace(scratch, path)
    except OSError:
        os.unlink(scratch)
        raise
