"""``metarec recommend``: what a trained run says to users it has never seen."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from metarec_jax import config as configs
from metarec_jax import runs
from metarec_jax.commands.compiled import compile_cache
from metarec_jax.core import MetarecError
from metarec_jax.data.columns import listed, one_line, printable, shown
from metarec_jax.data.histories import read_histories
from metarec_jax.data.interactions import Interactions
from metarec_jax.online.history import Unknown, rated, spoken
from metarec_jax.online.recommend import Recommendations, Recommender

_TOLD_UNKNOWN = 5
_SHOWN_USERS = 3


def recommend(
    directory: Path,
    *,
    rate: Sequence[str],
    history: Path | None,
    top: int,
    out: Path | None,
    why: bool,
    as_json: bool,
) -> int:
    """Adapt on the given feedback, print the list (or write it), and say why."""
    if rate and history is not None:
        raise MetarecError("--rate and --history are both given; a table and a single user are two commands")
    compile_cache()
    run = runs.open_run(directory)
    given = parse_rates(rate, run.data)
    negatives = configs.negatives(run.config.tasks, run.data)
    serve = Recommender(runs.method(run), run.data, run.known, negatives=negatives)
    extra: dict[str, Any] = {}
    if history is None:
        found = serve.recommend(given, top, explain=3 if why else 0)
        _tell_unknown(found.unknown, given["item_id"], directory, run.data)
        _tell(found.notes)
        rows = found.rows()
        extra = {"unknown": [u.name for u in found.unknown], "notes": list(found.notes)}
        if out is None:
            if not rate:
                print("no feedback was given: this is the list for a user of whom nothing is known")
            _show(found)
    else:
        table = read_histories(history)
        _tell(table.notes)
        columns = {"user_id": table.user_id, "item_id": table.item_id}
        if table.rating is not None:
            columns["rating"] = table.rating
        elif run.data.rating is not None:
            raise MetarecError(
                f"{history} has no rating column by a usual name, and {directory} learned from ratings; name it rating"
            )
        many = serve.recommend_many(columns, top, explain=3 if why else 0)
        _tell_unknown(many.unknown, table.item_id, directory, run.data)
        _tell(many.notes)
        rows = many.rows()
        extra = {"unknown": [u.name for u in many.unknown], "notes": [*table.notes, *many.notes]}
        if out is None:
            for user in list(many)[:_SHOWN_USERS]:
                print(f"{printable(str(user))}:")
                _show(many[user])
            if len(many) > _SHOWN_USERS:
                print(f"and {len(many) - _SHOWN_USERS} users more; --out FILE.csv writes all")
    if out is not None:
        _write(out, rows)
        users = len({row.get("user_id") for row in rows})
        print(f"{len(rows)} recommendations for {users} user{'s' if users != 1 else ''} in {out}")
    if as_json:
        print(json.dumps({"recommendations": rows, **extra}))
    return 0


def parse_rates(rate: Sequence[str], data: Interactions) -> dict[str, list[Any]]:
    """Columns ``item_id`` and ``rating`` of arguments such as ``Heat (1995)=2``; for clicks ``Heat (1995)`` will do.

    Raises:
      MetarecError: no rating, one that is no number, or one outside the scale.
    """
    found: dict[str, list[Any]] = {"item_id": [], "rating": []}
    if data.rating is None:
        for text in rate:
            item, click = _click(text)
            found["item_id"].append(item)
            found["rating"].append(click)
        return found
    low, high = float(data.rating.min()), float(data.rating.max())
    for text in rate:
        item, equals, rating = text.rpartition("=")
        if not equals or not item.strip():
            what = "no item" if equals else "no rating" if text.strip() else "neither item nor rating"
            item = "ITEM" if equals or not text.strip() else text.strip()
            raise MetarecError(f'--rate {shown(text)} gives {what}; write --rate "{listed([item])}={spoken(high)}"')
        value = rated(rating, low, high)
        if value is None:
            raise MetarecError(
                f"--rate {shown(text)}: {shown(rating)} is no rating from {spoken(low)} to {spoken(high)}; "
                f'write --rate "{listed([item])}={spoken(high)}"'
            )
        found["item_id"].append(item.strip())
        found["rating"].append(value)
    return found


def _click(text: str) -> tuple[str, float]:
    """
    >>> _click("Heat (1995)=4"), _click("Heat (1995)"), _click("E=mc2")
    (('Heat (1995)', 4.0), ('Heat (1995)', 1.0), ('E=mc2', 1.0))
    """
    item, _, rating = text.rpartition("=")
    if item and rating.strip().replace(".", "", 1).isdecimal():
        return item, float(rating)
    return text, 1.0


def _tell_unknown(unknown: Sequence[Unknown], names: Collection[Any], directory: Path, data: Interactions) -> None:
    """Say which names were skipped.

    Raises:
      MetarecError: not one of them is an item of the data.
    """
    if not unknown:
        return
    given = len(set(map(str, names)))
    labels = data.items.ids if data.titles is None else data.titles
    if len(unknown) >= given:
        like = unknown[0].suggestions
        hint = f"perhaps you meant {_either(like)}" if like else f"its items are such as {shown(str(labels[0]))}"
        first = shown(unknown[0].name)
        if given == 1:
            raise MetarecError(f"{first} is no item that {directory} knows; {hint}")
        raise MetarecError(f"none of the {given} items ({first}, ...) is known to {directory}; {hint}")
    for item in unknown[:_TOLD_UNKNOWN]:
        close = f"; perhaps you meant {_either(item.suggestions)}" if item.suggestions else ""
        print(f"skipped: no item is called {shown(item.name)}{close}", file=sys.stderr)
    if len(unknown) > _TOLD_UNKNOWN:
        print(f"skipped: {len(unknown) - _TOLD_UNKNOWN} items more that are not known", file=sys.stderr)
    if 2 * len(unknown) > given:
        print(
            f"note: {len(unknown)} of {given} items are not known to {directory}; are they of the data it learned "
            f"from, whose items are such as {shown(str(labels[0]))}?",
            file=sys.stderr,
        )


def _either(names: Sequence[str]) -> str:
    return " or ".join(shown(name, 200) for name in names)


def _tell(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"note: {printable(note)}", file=sys.stderr)


def _show(found: Recommendations) -> None:
    for rank, item in enumerate(found, 1):
        print(f"{rank:>4}  {item.score:6.3f}  {printable(str(item.title or item.item_id))}")
        if item.because:
            reasons = ", ".join(
                f"{i.title or i.item_id}{'' if i.rating is None else f'={i.rating:g}'} ({i.contribution:+.3f})"
                for i in item.because
            )
            print(f"{'':>14}because of {printable(reasons)}")


def _write(out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else ["rank", "item_id", "title", "score", "because"])
            writer.writeheader()
            writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise MetarecError(f"{out} cannot be written ({one_line(error)}); give --out a path that can") from error
