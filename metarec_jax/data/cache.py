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
      ValueError: the bytes are not those whose checksum was noted.
    """
    raw = path.read_bytes()
    if hashlib.sha256(raw).hexdigest() != _checksum(path).read_text(errors="replace").strip():
        raise ValueError("its sha256 is not the one noted when it was written")
    table = pq.read_table(pa.BufferReader(raw))
    rest = json.loads(table.schema.metadata[_METADATA])

    def feature(f: Mapping[str, Any]) -> Feature:
        values = np.array(f["values"], np.float32 if f["kind"] == "numeric" else np.int32)
        return Feature(f["kind"], values, None if f["vocabulary"] is None else Vocabulary(np.array(f["vocabulary"])))

    def column(name: str) -> Any:
        return table[name].to_numpy() if name in table.column_names else None

    return Interactions(
        user=column("user"),
        item=column("item"),
        rating=column("rating"),
        timestamp=column("timestamp"),
        users=Vocabulary(np.array(rest["users"])),
        items=Vocabulary(np.array(rest["items"])),
        user_features={name: feature(f) for name, f in rest["user_features"].items()},
        item_features={name: feature(f) for name, f in rest["item_features"].items()},
        titles=None if rest["titles"] is None else np.array(rest["titles"]),
        notes=tuple(rest["notes"]),
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
