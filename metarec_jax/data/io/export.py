"""Results as files: CSV, JSON, JSON lines or Parquet, chosen by the suffix."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from metarec_jax.core import MetarecError
from metarec_jax.messages import one_line

SUFFIXES = (".csv", ".json", ".jsonl", ".parquet")


def check_suffix(path: Path) -> None:
    """Refuse a file whose suffix is not one of `SUFFIXES`.

    Raises:
      MetarecError: the suffix is another one.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise MetarecError(f"cannot write {path}: its name must end in one of {', '.join(SUFFIXES)}; rename it")


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write these columns of the rows, in the format of the suffix; CSV rounds numbers to six digits.

    Raises:
      MetarecError: the suffix is not one of `SUFFIXES`, or the path cannot be written.
    """
    check_suffix(path)
    rows = [{name: _printable(row[name]) for name in columns} for row in rows]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".parquet":
            pq.write_table(pa.table({name: [row[name] for row in rows] for name in columns}), path)
            return
        with path.open("w", newline="", encoding="utf-8") as file:
            if path.suffix.lower() == ".csv":
                writer = csv.DictWriter(file, list(columns))
                writer.writeheader()
                writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
            elif path.suffix.lower() == ".json":
                json.dump(rows, file, ensure_ascii=False, indent=1)
            else:
                file.writelines(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise MetarecError(f"cannot write {path} ({one_line(error)}); choose another path") from error


def _printable(value: Any) -> Any:
    """The value; in text, lone surrogates, which UTF-8 cannot encode, are escaped."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
