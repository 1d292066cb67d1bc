"""Layouts of folders: the file of interactions, and the tables of users and items beside it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from metarec_jax.core import MetarecError
from metarec_jax.data.io import bounds, formats, json_rows, parquet
from metarec_jax.data.io.columns import plain
from metarec_jax.data.io.features import id_column
from metarec_jax.data.io.movielens import GENRES_100K
from metarec_jax.messages import listed, shown

Format = Literal["csv", "parquet", "json", "recbole", "movielens"]

_MOVIELENS_100K = re.compile(r"u\.data|u[1-5ab]\.(base|test)")
_SIDE_NAMES = {
    "users.dat": ("user_id", "gender", "age", "occupation", "zip_code"),
    "movies.dat": ("item_id", "title", "genres"),
    "u.user": ("user_id", "age", "gender", "occupation", "zip_code"),
    "u.item": ("item_id", "title", "release_date", "video_date", "url", *GENRES_100K),
}
"""MovieLens files of users and items, which have no header."""


def find(folder: Path) -> Path:
    """The file of interactions in a folder: that of a known layout, or the only table.

    Raises:
      MetarecError: there is no table, or there are several.
    """
    try:
        files = sorted(p for p in folder.iterdir() if p.is_file())
    except OSError as error:
        raise MetarecError(f"cannot read the folder {folder} ({error.strerror}). Change its permissions") from error
    layouts = (
        [p for p in files if p.name.endswith((".inter", ".inter.gz"))],
        [
            p
            for n in ("ratings.dat", "u.data", "ratings.csv", "ratings.parquet")
            for p in files
            if p.name in (n, f"{n}.gz")
        ],
        [p for p in files if re.search(r"\.(csv|tsv|parquet|jsonl|ndjson)(\.gz|\.bz2)?$", p.name)],
        [p for p in files if re.search(r"\.json(\.gz|\.bz2)?$", p.name)],
    )
    for k, tables in enumerate(layouts):
        if len(tables) == 1 or (tables and k == 1):
            return tables[0]
        if tables:
            raise MetarecError(f"the folder {folder} has several tables: {listed(p.name for p in tables)}. Name one")
    raise MetarecError(
        f"the folder {folder} has no table of interactions (NAME.inter, ratings.dat, u.data, ratings.csv, one CSV, "
        f"Parquet or JSON file); it has: {listed(p.name for p in files) or 'no files'}. Name a file"
    )


def layout(path: Path) -> Format:
    """The format of a file of interactions, by its content and, for MovieLens, by its name."""
    if formats.kind(path) == "parquet":
        return "parquet"
    if json_rows.is_json(path):
        return "json"
    dialect_types = formats.sniff(path).types
    if any(dialect_types):
        return "recbole"
    base = path.name.removesuffix(".gz")
    named = base == "ratings.dat" or _MOVIELENS_100K.fullmatch(base)
    return "movielens" if named or (base == "ratings.csv" and beside(path, "movielens")[1] is not None) else "csv"


def beside(path: Path, form: Format) -> tuple[Path | None, Path | None]:
    """The files of users and of items that a layout keeps beside its interactions; None if absent."""
    base = path.name.removesuffix(".gz")
    if form == "recbole":
        pair = (f"{base.removesuffix('.inter')}.user", f"{base.removesuffix('.inter')}.item")
    elif form == "movielens":
        pair = {"ratings.dat": ("users.dat", "movies.dat"), "ratings.csv": ("", "movies.csv")}.get(
            base, ("u.user", "u.item")
        )
    else:
        return None, None
    there = [[p for p in (path.parent / name, path.parent / f"{name}.gz") if name and p.is_file()] for name in pair]
    return (there[0][0] if there[0] else None), (there[1][0] if there[1] else None)


def side_frame(path: str | Path | None, side: str, id_col: str | None = None) -> pd.DataFrame | None:
    """A table of users or items; MovieLens files get column names, lists of genres, and the year of the title.

    Args:
      side, id_col: as in `metarec_jax.data.io.features.side_features`; the ids of a text file are read as text.
    """
    if path is None:
        return None
    path = bounds.local(path)
    if formats.kind(path) == "parquet":
        return parquet.read(path)
    if json_rows.is_json(path):
        return json_rows.read(path)
    base = path.name.removesuffix(".gz")
    names = _SIDE_NAMES.get(base)
    dialect = formats.sniff(path, names, latin=names is not None)
    if names is None and not dialect.header:
        raise MetarecError(f"{path} has no header, so its columns have no names. Add one as its first line")
    frame = formats.read_text(path, dialect, (id_column(dialect.names, side, id_col),))
    if base == "u.item":
        if odd := next((g for g in GENRES_100K if not pd.api.types.is_numeric_dtype(frame[g].dtype)), None):
            raise MetarecError(
                f"{path}, genre {odd}: expected 0 or 1, got {shown(frame[odd].iloc[0])}. Download it again"
            )
        flags = frame[list(GENRES_100K)].to_numpy(dtype=np.float64, na_value=0) > 0
        genres = [[g for g, on in zip(GENRES_100K, row, strict=True) if on and g != "unknown"] for row in flags]
        frame = frame[["item_id", "title"]].assign(genres=pd.Series(genres, dtype=object))
    title = next((c for c in frame.columns if plain(c) == "title"), None)
    if title is not None and base in ("movies.dat", "u.item", "movies.csv"):
        year = frame[title].astype("string").str.extract(r"\(([0-9]{4})\)\s*$")[0]
        if year.notna().any() and not any(plain(c) == "year" for c in frame.columns):
            frame = frame.assign(year=year.astype("Float64"))
    return frame
