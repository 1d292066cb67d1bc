"""Tables that a person brings: interactions, users and items, histories of new users, a published partition."""

from __future__ import annotations

import gzip
import io
import json
import re
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.hostile import mutate
from benchmarks.hostile.checks import Family, Files, check_interactions, check_message, hold
from metarec_jax.core import MetarecError
from metarec_jax.data.interactions import Interactions
from metarec_jax.data.io import columns, formats, histories, published, readers
from metarec_jax.serving.history import Names, parse_table

# Delimited text


def lines(delimiter: str, header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> bytes:
    return "".join(delimiter.join(map(str, row)) + "\n" for row in ([header] if header else []) + rows).encode()


ROWS: list[tuple[Any, ...]] = [
    *((1, 10, 5, 978300760), (1, 11, 3, 978302109), (2, 10, 4, 978301968), (2, 12, 1, 978300275)),
    *((3, 11, 2, 978824291), (3, 10, 4.5, 978302268), (4, 13, 3, 978302039), (4, 12, 5, 978300719)),
]
NAMED = [(f"u{u}", f"Heat {i} (199{i % 10})", r, t) for u, i, r, t in ROWS]
HEADER = ("user_id", "item_id", "rating", "timestamp")
OPTIONS: tuple[dict[str, Any], ...] = (
    *({},) * 16,
    *({"implicit": True}, {"duplicates": "mean"}, {"duplicates": "first"}, {"duplicates": "error"}),
    *({"user_col": "1", "item_col": "2"}, {"timestamp_col": ""}, {"rating_col": "rating", "title_col": "title"}),
    *({"title_col": "item_id"}, {"item_col": "user_id"}, {"rating_col": "item_id"}, {"unrated_items": True}),
)


def _good_text() -> list[Files]:
    dated = [(f"u{u}", i, r, f"2024-01-{i:02}T00:00:{u:02}") for u, i, r, _ in ROWS]
    titled = [(u, i, r, f'"Heat, part {i}"') for u, i, r, _ in ROWS]
    bodies = [
        lines(",", HEADER, ROWS),
        lines("\t", (), ROWS),
        lines("::", (), ROWS),
        lines(";", ("uid", "isbn", "stars"), [row[:3] for row in NAMED]),
        lines("|", ("user", "item", "score", "date"), dated),
        lines(",", ("user", "item", "rating", "title"), titled),
        lines("\t", ("user_id:token", "item_id:token", "rating:float", "timestamp:float"), NAMED),
        lines(",", ("user", "item"), [row[:2] for row in NAMED]),
    ]
    return [{f"ratings.{k}.csv{end}": body} for k, body in enumerate(bodies) for end in ("", ".gz", ".bz2")]


def _spoil_text(rng: Random, good: Files) -> Files:
    """One of the text files, or two."""
    out = dict(good)
    for name in rng.sample(sorted(good), min(len(good), rng.choice((1, 1, 2)))):
        how = rng.random()
        body = mutate.raw(rng, good[name]) if how < 0.2 else mutate.text(rng, good[name])
        out[name] = rng.randbytes(rng.choice((0, 1, 10, 1000))) if how > 0.99 else body
    out = {name: mutate.packed(rng, name, content) for name, content in out.items()}
    return out | {"options.json": json.dumps(rng.choice(OPTIONS)).encode()}


def _options(folder: Path) -> dict[str, Any]:
    file = folder / "options.json"
    return json.loads(file.read_text()) if file.exists() else {}


def _only(folder: Path) -> Path:
    return next(p for p in sorted(folder.iterdir()) if p.name.startswith("ratings"))


def _enter_text(folder: Path) -> None:
    path, options = _only(folder), _options(folder)
    data = readers.read(path, **options)
    check_interactions(data)
    _check_against_lines(path, options, data)


def _check_against_lines(path: Path, options: dict[str, Any], data: Interactions) -> None:
    """The rows, beside those that Python's own csv module finds in the file."""
    dialect = formats.sniff(path, asked=tuple(c for n, c in options.items() if n.endswith("_col") and c))
    asked = {n: options.get(f"{n}_col") for n in ("user", "item", "rating", "timestamp", "title")}
    if not dialect.header:
        asked = {n: dialect.names[int(c) - 1] if c and c.isdecimal() else c for n, c in asked.items()}
    roles = columns.find_roles(dialect.names, *asked.values(), options.get("implicit", False), "")
    user, item = dialect.names.index(roles.user), dialect.names.index(roles.item)
    rows = [row for _, row in formats.lines(path, dialect)]
    pairs = [(row[user].strip(), row[item].strip()) for row in rows]
    found = list(zip(map(str, data.users.decode(data.user)), map(str, data.items.decode(data.item)), strict=True))
    said = [re.match(r"(\d+) (?:rows with missing values|repeated rows)", note) for note in data.notes]
    gone = sum(int(m[1]) for m in said if m)
    hold(len(found) + gone == len(rows), f"{len(found)} rows and {gone} dropped of {len(rows)}")
    hold(set(found) <= set(pairs), "a user and item that are not in the file")
    if not gone:
        hold(found == pairs, "rows in another order")
        if roles.rating is not None and data.rating is not None:
            k = dialect.names.index(roles.rating)
            wanted = np.array([float(row[k]) for row in rows]).astype(np.float32)
            hold(np.allclose(data.rating, wanted, rtol=1e-6), "other ratings")


# Parquet


def _parquet(frame: pd.DataFrame) -> bytes:
    sink = io.BytesIO()
    frame.to_parquet(sink)
    return sink.getvalue()


def _good_parquet() -> list[Files]:
    frame = pd.DataFrame(ROWS, columns=list(HEADER))
    named = pd.DataFrame(NAMED, columns=list(HEADER)).assign(title=[f"T{k}" for k in range(len(NAMED))])
    return [{"ratings.parquet": _parquet(f)} for f in (frame, named, named.astype({"item_id": "category"}))]


def _spoil_parquet(rng: Random, good: Files) -> Files:
    out = {name: mutate.table(rng, content) for name, content in good.items()}
    return out | {"options.json": json.dumps(rng.choice(OPTIONS)).encode()}


def _enter_file(folder: Path) -> None:
    check_interactions(readers.read(_only(folder), **_options(folder)))


# Folders


def _good_folders() -> list[Files]:
    flags = ["0"] * 19
    movie_lines = [(i, f"Heat {i} (199{i % 10})", "Action|War" if i % 2 else "Drama") for i in range(10, 14)]
    flagged = [(i, f"Heat {i} (199{i % 10})", "x", "", "y", *flags[:i], "1", *flags[i + 1 :]) for i in range(10, 14)]
    people = [(u, "FM"[u % 2], 18 * u, u, f"0{u}") for u in range(1, 5)]
    older = [(u, 18 * u, "FM"[u % 2], f"job {u % 2}", f"0{u}") for u in range(1, 5)]
    vector = [(f"Heat {i} (199{i % 10})", f"t{i % 2} t{i}", f"0.5 {i}") for i in range(10, 14)]
    typed = ("item_id:token", "class:token_seq", "vector:float_seq")
    return [
        {
            "ratings.dat": lines("::", (), ROWS),
            "movies.dat": lines("::", (), movie_lines),
            "users.dat": lines("::", (), people),
        },
        {"u.data": lines("\t", (), ROWS), "u.item": lines("|", (), flagged), "u.user": lines("|", (), older)},
        {
            "ratings.csv": lines(",", ("userId", "movieId", "rating", "timestamp"), ROWS),
            "movies.csv": lines(",", ("movieId", "title", "genres"), movie_lines),
        },
        {
            "a.inter": lines("\t", ("user_id:token", "item_id:token", "rating:float", "timestamp:float"), NAMED),
            "a.item": lines("\t", typed, vector),
            "a.user": lines("\t", ("user_id:token", "age:float"), [(f"u{u}", 18 * u) for u in range(1, 5)]),
        },
    ]


def _spoil_folder(rng: Random, good: Files) -> Files:
    out = _spoil_text(rng, good)
    if rng.random() < 0.05:
        del out[rng.choice(sorted(good))]
    if rng.random() < 0.05:
        name = rng.choice(sorted(good))
        out[f"{name}.gz"] = gzip.compress(out.pop(name, b""))
    return out


def _enter_folder(folder: Path) -> None:
    check_interactions(readers.read(folder, **_options(folder)))


# Tables of users and items


def _good_features() -> list[Files]:
    ratings = lines(",", HEADER, ROWS)
    frame = pd.DataFrame(
        {
            "item_id": range(10, 14),
            "title": [f"T{k}" for k in range(4)],
            "tags": [["a"], ["a", "b"], [], ["c"]],
            "vector": [[0.5, 1.0], [2.5, 1.0], [0.0, 1.5], [1.0, 1.0]],
            "price": [1.5, 2.5, 1e9, None],
            "day": pd.to_datetime(["2020-01-01", "2021-01-01", None, "2022-02-02"]),
            "brand": ["x", "y", "x", None],
        }
    )
    rows = [tuple(row) for row in frame[["item_id", "title", "price", "brand"]].itertuples(index=False)]
    text = lines(",", ("item_id", "name", "price", "brand"), rows)
    return [
        {"ratings.csv": ratings, "items.parquet": _parquet(frame)},
        {"ratings.csv": ratings, "items.csv": text},
        {
            "ratings.csv": ratings,
            "items.tsv": lines("\t", ("item_id:token", "v:float_seq"), [(i, "1 2") for i in range(10, 14)]),
        },
        {
            "ratings.csv": ratings,
            "users.csv": lines(",", ("id", "age", "zip"), [(u, u / 2, f"0{u}") for u in range(1, 5)]),
        },
    ]


def _spoil_features(rng: Random, good: Files) -> Files:
    name = next(n for n in good if not n.startswith("ratings"))
    body = mutate.table(rng, good[name]) if name.endswith(".parquet") else mutate.text(rng, good[name])
    return {**good, name: body, "options.json": json.dumps(rng.choice(OPTIONS)).encode()}


def _enter_features(folder: Path) -> None:
    about = {f"{p.stem.removesuffix('s')}_features": p for p in folder.iterdir() if p.stem in ("items", "users")}
    check_interactions(readers.read(_only(folder), **about, **_options(folder)))


# Histories of new users


def _good_histories() -> list[Files]:
    table = [("ann", 10, 5), ("ann", 11, 2), ("bob", 12, 1), ("bob", 99, 4)]
    titled = [("ann", "Heat 10", 5), ("bob", "heat 11", 2), ("bob", "Heta 12", 3)]
    frame = pd.DataFrame(table, columns=["user_id", "item_id", "rating"])
    return [
        {"ratings.csv": lines(",", ("user_id", "item_id", "rating"), table)},
        {"ratings.csv": lines("\t", ("user", "title", "rating"), titled)},
        {"ratings.csv": lines(",", (), table)},
        {"ratings.csv": lines(";", ("title", "stars"), [row[1:] for row in titled])},
        {"ratings.parquet": _parquet(frame)},
    ]


def _spoil_histories(rng: Random, good: Files) -> Files:
    return {n: mutate.table(rng, b) if n.endswith("t") else mutate.text(rng, b) for n, b in good.items()}


@cache
def world() -> Interactions:
    """What the run of these tests was trained on: four users, four items with titles, one feature."""
    frame = pd.DataFrame(ROWS, columns=list(HEADER))
    items = pd.DataFrame(
        {"item_id": range(10, 14), "title": [f"Heat {i}" for i in range(10, 14)], "kind": list("abab")}
    )
    users = pd.DataFrame({"user_id": range(1, 5), "age": [1.5, 2.5, 3.5, 0.5], "job": list("xyxy")})
    return readers.from_pandas(frame, item_features=items, user_features=users, name="world")


def _enter_histories(folder: Path) -> None:
    table = histories.read_histories(_only(folder))
    for note in table.notes:
        check_message(note)
    data, known = world(), Names(world())
    given = {"user_id": table.user_id, "item_id": table.item_id}
    given |= {} if table.rating is None else {"rating": table.rating}
    ids, parsed, unknown, notes = parse_table(given, data, known)
    hold(len(ids) == len(parsed) == len(set(ids)), "a user twice")
    for one in parsed:
        hold(one.item.dtype == np.int32 and one.rating.dtype == np.float32, "types of a history")
        hold(len(one.item) == len(one.rating) == len(set(one.item.tolist())), "an item twice")
        hold(bool(((one.item >= 1) & (one.item < data.items.num_rows)).all()), "rows outside the vocabulary")
        hold(bool(((one.rating >= 1) & (one.rating <= 5)).all()), "a rating outside the scale")
    hold(sum(len(p.unknown) for p in parsed) >= len(unknown), "unknown items lost")
    for note in notes:
        check_message(note)


# A published partition


def _good_partitions() -> list[Files]:
    states = ["warm", "warm", "user_cold", "user_cold", "item_cold", "warm_state", "user_and_item_cold", "warm"]
    rows = [(*row, state) for row, state in zip(ROWS, states, strict=True)]
    rows += [(1, 12, 3, 5, "warm"), (3, 12, 2, 6, "item_cold"), (3, 13, 1, 7, "item_cold"), (4, 10, 1, 8, "both_cold")]
    names = ("user_id", "item_id", "rating", "timestamp", "state")
    return [
        {"part.csv": lines(",", names, rows)},
        {"part.tsv": lines("\t", names, rows)},
        {"part.parquet": _parquet(pd.DataFrame(rows, columns=list(names)))},
    ]


def _spoil_partitions(rng: Random, good: Files) -> Files:
    return {n: mutate.table(rng, b) if n.endswith("t") else mutate.text(rng, b) for n, b in good.items()}


def _enter_partitions(folder: Path) -> None:
    path = next(folder.glob("part.*"))
    refused: Exception | None = None
    for data in (None, world()):
        try:
            parts = published.read_partition(path, data, validation=0.0)
        except MetarecError as error:
            refused = error
            continue
        for part in (parts.train, *parts.test.values()):
            check_interactions(part, several=False)
    if refused is not None:
        raise refused


FAMILIES: dict[str, Family] = {
    "text": Family("delimited text: readers.read", _good_text, _spoil_text, _enter_text),
    "parquet": Family("Parquet: readers.read", _good_parquet, _spoil_parquet, _enter_file),
    "folder": Family("MovieLens and RecBole folders: readers.read", _good_folders, _spoil_folder, _enter_folder),
    "features": Family("tables of users and items: readers.read", _good_features, _spoil_features, _enter_features),
    "histories": Family("tables of new users: read_histories", _good_histories, _spoil_histories, _enter_histories),
    "partition": Family(
        "a published partition: read_partition", _good_partitions, _spoil_partitions, _enter_partitions
    ),
}
