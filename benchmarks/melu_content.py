"""Content of the MeLU release of ML-1M, as features: what P1 lets every method see."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd

from metarec_jax.core import MetarecError
from metarec_jax.data.interactions import Interactions
from metarec_jax.data.io.features import side_features

FIELDS = ("id", "title", "year", "rate", "date", "genre", "director", "writer", "actor", "plot", "poster")


def items(folder: Path) -> pd.DataFrame:
    """One row a movie: rate, half-decade, and lists of genres, directors, writers and actors that at least two movies have."""
    path = folder / "movies_extrainfos.dat"
    if not path.is_file():
        raise MetarecError(f"no movies_extrainfos.dat in {folder}; --content wants the folder of MeLU's ml-1m files")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = [dict(zip(FIELDS, line.split("::"), strict=False)) for line in lines if line.count("::") >= 8]
    table = pd.DataFrame({"item_id": [int(row["id"]) for row in rows], "rate": [row["rate"] for row in rows]})
    table["half_decade"] = [str(int(row["year"]) // 5 * 5) if row["year"].isdigit() else None for row in rows]
    for name in ("genre", "director", "writer", "actor"):
        lists = [names(row[name]) for row in rows]
        seen = Counter(value for values in lists for value in values)
        table[name] = pd.Series([[v for v in values if seen[v] > 1] for values in lists], dtype=object)
    return table


def names(text: str) -> list[str]:
    """Distinct names of a comma-separated list, without the roles in brackets.

    >>> names("Joel Cohen (screenplay by), Alec Sokolow (screenplay by)")
    ['Alec Sokolow', 'Joel Cohen']
    """
    parts = {re.sub(r"\(.*?\)", "", part).strip() for part in text.split(", ")}
    return sorted(parts - {"", "nan", "N/A"})


def users(folder: Path) -> pd.DataFrame | None:
    """Gender, age band and occupation, from users.dat in the folder or beside it."""
    path = next((p for p in (folder / "users.dat", folder.parent / "users.dat") if p.is_file()), None)
    if path is None:
        return None
    rows = [line.split("::") for line in path.read_text(encoding="latin-1").splitlines()]
    columns = {"user_id": [int(r[0]) for r in rows]} | {
        n: [r[k] for r in rows] for k, n in ((1, "gender"), (2, "age"), (3, "occupation"))
    }
    return pd.DataFrame(columns)


def with_content(data: Interactions, folder: Path) -> Interactions:
    """The same interactions with user and item features of the MeLU release."""
    item_side = side_features(items(folder), data.items, side="item").features
    table = users(folder)
    user_side = {} if table is None else side_features(table, data.users, side="user").features
    return replace(data, item_features=item_side, user_features=user_side)
