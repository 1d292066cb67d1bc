"""MovieLens files, in GroupLens' original form or RecBole's atomic form, as one canonical `Interactions`.

Canonical means: the same users, items, rows, row order and features from either form. Users keep their integer ids; an
item's id is its title with the year, "Toy Story (1995)"; only rated items are kept; rows are sorted by user, time and
title. The zip code of a user is omitted.
"""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
import pandas as pd

from metarec_jax.data.interactions import Feature, Interactions, Vocabulary

AGES = {0: "under 18", 18: "18-24", 25: "25-34", 35: "35-44", 45: "45-49", 50: "50-55", 56: "56+"}
"""ML-1M's seven age bands by their lower bound; ML-100K's ages in years are mapped to the same bands."""

OCCUPATIONS = (
    "other",
    "academic/educator",
    "artist",
    "clerical/admin",
    "college/grad student",
    "customer service",
    "doctor/health care",
    "executive/managerial",
    "farmer",
    "homemaker",
    "K-12 student",
    "lawyer",
    "programmer",
    "retired",
    "sales/marketing",
    "scientist",
    "self-employed",
    "technician/engineer",
    "tradesman/craftsman",
    "unemployed",
    "writer",
)
"""ML-1M's occupations by code, as its README names them."""

GENRES_100K = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"),
    *("Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
"""The order of the genre flags in ML-100K's ``u.item``."""

_TITLES = {"unkonwn (unkonwn)": "unknown", "Associate, The (L'Associe (1982)": "Associate, The (L'Associe)(1982)"}
"""Titles that RecBole's copy spells differently from the original."""


def ml_1m(files: Mapping[str, bytes], name: str) -> Interactions:
    """From ``ratings.dat``, ``users.dat``, ``movies.dat`` (fields separated by ``::``, Latin-1)."""
    columns = {0: "user", 2: "item", 4: "rating", 6: "timestamp"}
    ratings = pd.read_csv(io.BytesIO(files["ratings.dat"]), sep=":", header=None, usecols=list(columns), dtype=np.int64)
    ratings = ratings.rename(columns=columns)
    movies = [line.split("::") for line in files["movies.dat"].decode("latin-1").splitlines()]
    items = pd.DataFrame({"item": [m[1] for m in movies], "genres": [m[2].split("|") for m in movies]})
    titles = {int(m[0]): m[1] for m in movies}
    people = [line.split("::") for line in files["users.dat"].decode("latin-1").splitlines()]
    users = pd.DataFrame(
        {
            "user": [int(p[0]) for p in people],
            "gender": [p[1] for p in people],
            "age": [int(p[2]) for p in people],
            "occupation": [OCCUPATIONS[int(p[3])] for p in people],
        }
    )
    return canonical(ratings.assign(item=ratings["item"].map(titles)), users, items, name)


def ml_100k(files: Mapping[str, bytes], name: str) -> Interactions:
    """From ``u.data`` (tabs), ``u.user`` and ``u.item`` (bars, Latin-1)."""
    columns = ["user", "item", "rating", "timestamp"]
    ratings = pd.read_csv(io.BytesIO(files["u.data"]), sep="\t", header=None, names=columns, dtype=np.int64)
    movies = [line.split("|") for line in files["u.item"].decode("latin-1").splitlines()]
    genres = [[g for g, flag in zip(GENRES_100K, m[5:], strict=True) if flag == "1"] for m in movies]
    items = pd.DataFrame({"item": [m[1] for m in movies], "genres": genres})
    titles = {int(m[0]): m[1] for m in movies}
    people = [line.split("|") for line in files["u.user"].decode("latin-1").splitlines()]
    users = pd.DataFrame(
        {
            "user": [int(p[0]) for p in people],
            "age": [int(p[1]) for p in people],
            "gender": [p[2] for p in people],
            "occupation": [p[3] for p in people],
        }
    )
    return canonical(ratings.assign(item=ratings["item"].map(titles)), users, items, name)


def atomic(files: Mapping[str, bytes], name: str) -> Interactions:
    """From RecBole's ``NAME.inter``, ``NAME.user``, ``NAME.item``: user ids have a prefix, and item ids are titles."""

    def table(suffix: str) -> pd.DataFrame:
        raw = io.BytesIO(files[f"{name}.{suffix}"])
        frame = pd.read_csv(raw, sep="\t", quoting=3, encoding="utf-8", na_filter=False)
        return frame.rename(columns=lambda column: column.split(":")[0])

    def number(users: pd.Series) -> np.ndarray:
        return users.str.split("_").str[1].astype(np.int64).to_numpy()

    ratings, items, users = table("inter"), table("item"), table("user")
    coded = pd.api.types.is_integer_dtype(users["occupation"])
    return canonical(
        pd.DataFrame(
            {
                "user": number(ratings["user_id"]),
                "item": ratings["item_id"],
                "rating": ratings["rating"],
                "timestamp": ratings["timestamp"],
            }
        ),
        pd.DataFrame(
            {
                "user": number(users["user_id"]),
                "age": users["age"],
                "gender": users["gender"],
                "occupation": [OCCUPATIONS[code] for code in users["occupation"]] if coded else users["occupation"],
            }
        ),
        pd.DataFrame({"item": items["item_id"], "genres": items["genre" if "genre" in items else "class"].str.split()}),
        name,
    )


def canonical(ratings: pd.DataFrame, users: pd.DataFrame, items: pd.DataFrame, name: str) -> Interactions:
    """One form for every source.

    Args:
      ratings: user (integer), item (title), rating, timestamp.
      users: user, age (years or band), gender, occupation.
      items: item (title), genres (lists of names). Items with the same title are merged, and the latest of a user's
        ratings is kept (of equal times, the highest).
    """
    item_titles = items["item"].map(_title)
    row_title, distinct = pd.factorize(ratings["item"])
    spelled = pd.Series(distinct).map(_title)
    user_ids = np.sort(ratings["user"].unique())
    item_ids = np.unique(spelled.to_numpy(str))
    item = (pd.Index(item_ids).get_indexer(spelled) + 1).astype(np.int32)[row_title]
    user = (pd.Index(user_ids).get_indexer(ratings["user"]) + 1).astype(np.int32)
    rating, timestamp = ratings["rating"].to_numpy(np.float32), ratings["timestamp"].to_numpy(np.int64)

    order = np.lexsort((rating, timestamp, item, user))
    last = np.append((np.diff(user[order]) != 0) | (np.diff(item[order]) != 0), True)
    order = order[last]
    order = order[np.lexsort((item[order], timestamp[order], user[order]))]

    frame = items.assign(item=item_titles).drop_duplicates("item").set_index("item")
    unrated = len(frame) - len(item_ids)
    people = users.set_index("user").loc[user_ids]
    bounds = np.array(list(AGES))
    bands = np.array(list(AGES.values()))[np.searchsorted(bounds, people["age"].to_numpy(), side="right") - 1]
    year = pd.Series(item_ids).str.extract(r"\((\d{4})\)(?: \(V\))?$")[0].astype(float).to_numpy()
    notes = []
    if merged := len(item_titles) - item_titles.nunique():
        notes.append(f"{merged} titles with two ids each are merged into one item each")
    if repeats := len(ratings) - len(order):
        notes.append(f"{repeats} ratings of an item that the user rated again later are dropped")
    if unrated:
        notes.append(f"{unrated} items without a rating are dropped")
    return Interactions(
        user=user[order],
        item=item[order],
        rating=rating[order],
        timestamp=timestamp[order],
        users=Vocabulary(user_ids),
        items=Vocabulary(item_ids),
        user_features={
            "user_age": _categorical(bands),
            "user_gender": _categorical(people["gender"].to_numpy(str)),
            "user_occupation": _categorical(people["occupation"].to_numpy(str)),
        },
        item_features={
            "item_genre": _multi(frame["genres"].loc[item_ids].tolist()),
            "item_half_decade": _categorical(np.array([_half_decade(float(y)) for y in year])),
            "item_year": _numeric(year),
        },
        notes=tuple(notes),
        name=name,
    )


def _title(title: str) -> str:
    title = title.strip()
    return _TITLES.get(title, title)


def _half_decade(year: float) -> str:
    """
    >>> _half_decade(1997.0), _half_decade(float("nan"))
    ('1995-1999', '')
    """
    return "" if np.isnan(year) else f"{int(year) // 5 * 5}-{int(year) // 5 * 5 + 4}"


def _categorical(values: np.ndarray) -> Feature:
    vocabulary = Vocabulary(np.array(sorted(set(values.tolist()) - {""})))
    return Feature("categorical", np.concatenate([np.zeros(1, np.int32), vocabulary.encode(values)]), vocabulary)


def _multi(values: list[list[str]]) -> Feature:
    vocabulary = Vocabulary(np.array(sorted({v for row in values for v in row} - {"unknown"})))
    rows = [np.sort(codes[codes > 0]) for codes in (vocabulary.encode(np.array(row, str)) for row in values)]
    out = np.zeros((len(rows) + 1, max(len(codes) for codes in rows)), np.int32)
    for k, codes in enumerate(rows):
        out[k + 1, : len(codes)] = codes
    return Feature("multi", out, vocabulary)


def _numeric(values: np.ndarray) -> Feature:
    middle, spread = (float(np.nan_to_num(moment(values))) for moment in (np.nanmean, np.nanstd))
    spread = spread or 1.0
    scaled = np.nan_to_num((values - middle) / spread)
    out = np.concatenate([[0.0], scaled]).astype(np.float32)[:, None]
    return Feature("numeric", out, units=((middle, spread),))
