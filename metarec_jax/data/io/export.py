"""Rows of a result as a file that other programs read: CSV, JSON, JSON lines or Parquet, by the name of the file."""

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
    """Refuse a name that tells of no format that is written.

    Raises:
      MetarecError: a suffix that is none of `SUFFIXES`.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise MetarecError(f"{path} cannot be written: its name must end in one of {', '.join(SUFFIXES)}; rename it")


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write rows with these columns, in the format that the suffix names; CSV rounds numbers to six digits.

    Raises:
      MetarecError: a suffix that is none of `SUFFIXES`, or a path that cannot be written.
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
        raise MetarecError(f"{path} cannot be written ({one_line(error)}); give another path") from error


def _printable(value: Any) -> Any:
    """Text without half characters, which UTF-8 has no bytes for."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
