"""``metarec recommend``: what a trained run says to users it has never seen."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from metarec_jax import files
from metarec_jax.core import MetarecError
from metarec_jax.data.interactions import Interactions
from metarec_jax.data.io.export import check_suffix, write_rows
from metarec_jax.data.io.histories import Histories, read_features, read_histories
from metarec_jax.experiment.compiled import compile_cache
from metarec_jax.experiment.run import Run, open_run
from metarec_jax.messages import listed, printable, shown
from metarec_jax.serving.candidates import candidates
from metarec_jax.serving.history import Unknown, feature_name, format_rating, rated
from metarec_jax.serving.recommender import Influence, Recommendations, Recommender

_TOLD_UNKNOWN = 5
_SHOWN_USERS = 3
_SHOWN_IDS = 6


class Filters(NamedTuple):
    """What may be recommended: files of ids or titles, ``FEATURE=VALUE`` of the items, a least number of ratings."""

    only: Path | None = None
    exclude: Path | None = None
    where: Sequence[str] = ()
    min_ratings: int = 0

    def of(self, data: Interactions) -> np.ndarray | None:
        """The items that pass, bool ``[rows]``; None without a filter."""
        if self == Filters():
            return None
        if self.min_ratings < 0:
            raise MetarecError(f"--min-ratings must be 0 or more, got {self.min_ratings}; correct it")
        pairs = parse_features(self.where, "--where", "genre=Comedy")
        return candidates(
            data,
            only=None if self.only is None else _lines(self.only),
            exclude=None if self.exclude is None else _lines(self.exclude),
            where={name: [part.strip() for part in value.split("|")] for name, value in pairs.items()},
            min_ratings=self.min_ratings,
        )


def _lines(path: Path) -> list[str]:
    """The lines of a file of names, without empty ones."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        why = files.cause(error) if isinstance(error, OSError) else "it is not UTF-8 text"
        raise MetarecError(f"{path} cannot be read ({why}); give a text file with one id or title per line") from error
    if not (names := [line for line in lines if line]):
        raise MetarecError(f"{path} has no line; give a text file with one id or title per line")
    return names


def recommend(
    directory: Path,
    *,
    rate: Sequence[str],
    user: Sequence[str],
    history: Path | None,
    user_features: Path | None,
    columns: Mapping[str, str | None],
    top: int,
    by: Literal["list", "rating"],
    filters: Filters,
    out: Path | None,
    why: bool,
    as_json: bool,
) -> int:
    """Adapt on the given feedback, print the list (or write it), and say why.

    Args:
      columns: names of the columns of ``history`` by role; None where the run's own or usual names are to be found.
    """
    single, many = (rate or user), (history is not None or user_features is not None)
    if single and many:
        raise MetarecError(
            "--rate or --user is given beside --history or --user-features; one user and a table are two commands"
        )
    if out is not None:
        check_suffix(out)
    if history is None and (given := [role for role, name in columns.items() if name is not None and role != "user"]):
        raise MetarecError(f"--{given[0]}-col names a column of --history, which is not given; leave it out")
    compile_cache()
    run = open_run(directory)
    serve, allowed = run.recommender(by=by), filters.of(run.data)
    if many:
        rows, extra = _many(serve, run, history, user_features, columns, top, allowed, why, out is None)
    else:
        rates, features = parse_rates(rate, run.data), parse_features(user)
        rows, extra = _single(serve, run, rates, features, top, allowed, why, out is None)
    if out is not None:
        names = ["rank", "item_id", "title", *(["predicted"] if serve.predicts_ratings else []), "score", "because"]
        write_rows(out, rows, [*(["user_id"] if many else []), *names])
        users = len({row.get("user_id") for row in rows})
        print(f"{len(rows)} recommendations for {users} user{'s' if users != 1 else ''} in {out}")
    if as_json:
        print(json.dumps({"recommendations": rows, **extra}))
    return 0


_Rows = tuple[list[dict[str, Any]], dict[str, Any]]
"""Rows, and what was skipped and noted."""


def _single(
    serve: Recommender,
    run: Run,
    rates: dict[str, list[Any]],
    features: dict[str, str],
    top: int,
    allowed: np.ndarray | None,
    why: bool,
    show: bool,
) -> _Rows:
    """One user's list. A history that leaves nothing to recommend is refused."""
    found = serve.recommend(rates, top, user_features=features, explain=3 if why else 0, candidates=allowed)
    _tell_unknown(found.unknown, rates["item_id"], run.directory, run.data)
    if not found.items and found.notes:
        raise MetarecError(f"{found.notes[-1]}; leave some of them out")
    _tell(found.notes)
    if show:
        if not rates["item_id"]:
            known = "only features are known" if features else "nothing is known"
            print(f"no feedback was given: this is the list for a user of whom {known}")
        _show(found)
    return found.rows(), {"unknown": [u.name for u in found.unknown], "notes": list(found.notes)}


def _many(
    serve: Recommender,
    run: Run,
    history: Path | None,
    user_features: Path | None,
    columns: Mapping[str, str | None],
    top: int,
    allowed: np.ndarray | None,
    why: bool,
    show: bool,
) -> _Rows:
    """The lists of the users of a table of histories, of a table of features, or of both."""
    given = run.config.data
    trained = {f"{role}_col": getattr(given, f"{role}_col") for role in ("user", "item", "rating", "timestamp")}
    table = Histories([], [], None)
    if history is not None:
        asked = {f"{role}_col": name for role, name in columns.items()}
        table = read_histories(history, **asked, trained_with=trained)
        if table.rating is None and run.data.rating is not None:
            raise MetarecError(
                f"{history} has no rating column by a usual name, and {run.directory} learned from ratings; name it "
                "with --rating-col"
            )
    _tell(table.notes)
    features = None
    if user_features is not None:
        features = read_features(user_features, columns.get("user") or given.user_col)
        features = _known_features(features, run.data, user_features)
        features = _same_ids(features, table.user_id)
    ratings = table.rating if table.rating is not None or run.data.rating is None else []
    feedback = (table.user_id, table.item_id, ratings)
    explain = 3 if why else 0
    many = serve.recommend_many(feedback, top, user_features=features, explain=explain, candidates=allowed)
    _tell_unknown(many.unknown, table.item_id, run.directory, run.data)
    _tell(many.notes)
    if show:
        for user in list(many)[:_SHOWN_USERS]:
            print(f"{printable(str(user))}:")
            _show(many[user])
        if len(many) > _SHOWN_USERS:
            print(f"and {len(many) - _SHOWN_USERS} users more; --out FILE.csv writes all")
    return many.rows(), {"unknown": [u.name for u in many.unknown], "notes": [*table.notes, *many.notes]}


def _known_features(features: dict[Any, dict[str, Any]], data: Interactions, path: Path) -> dict[Any, dict[str, Any]]:
    """The columns that the run learned from; others are noted.

    Raises:
      MetarecError: not one column is a feature of the run.
    """
    columns = dict.fromkeys(name for row in features.values() for name in row)
    known = [name for name in columns if feature_name(name, data) is not None]
    have = ", ".join(data.user_features) or "none"
    if columns and not known:
        raise MetarecError(
            f"{path}: none of its columns, {listed(columns)}, is a user feature of the run, which has: {have}"
        )
    if unknown := [name for name in columns if name not in known]:
        _tell([f"{path}: not used, since the run has only the user features {have}: {listed(unknown)}"])
    return {user: {name: row[name] for name in known if name in row} for user, row in features.items()}


def _same_ids(features: dict[Any, dict[str, Any]], users: Sequence[Any]) -> dict[Any, dict[str, Any]]:
    """Features under the users' ids as the histories have them: one file may hold numbers, and the other text."""
    by_text = {str(user): user for user in users}
    return {by_text.get(str(user), user): row for user, row in features.items()}


def parse_features(user: Sequence[str], flag: str = "--user", example: str = "age=25") -> dict[str, str]:
    """Values by feature of texts ``FEATURE=VALUE``.

    Raises:
      MetarecError: no name or no value, or one name twice.

    >>> parse_features(["age=25", "likes=War|Drama"])
    {'age': '25', 'likes': 'War|Drama'}
    """
    found: dict[str, str] = {}
    for text in user:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not (name and equals and value):
            raise MetarecError(f"{flag} {shown(text)}: expected FEATURE=VALUE, as in {flag} {example}")
        if name in found:
            raise MetarecError(f"{flag} {shown(name)} is given twice; several values of one feature are joined by '|'")
        found[name] = value
    return found


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
            example = f'--rate "{listed([item])}={format_rating(high)}"'
            raise MetarecError(f"--rate {shown(text)} gives {what}; write {example}")
        value = rated(rating, low, high)
        if value is None:
            raise MetarecError(
                f"--rate {shown(text)}: {shown(rating)} is not a rating from {format_rating(low)} to "
                f'{format_rating(high)}; write --rate "{listed([item])}={format_rating(high)}"'
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


def _tell_unknown(
    unknown: Sequence[Unknown], names: Collection[Any], directory: Path | None, data: Interactions
) -> None:
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
        if unknown[0].ids:
            raise MetarecError(_shared(unknown[0]))
        if given == 1:
            raise MetarecError(f"{first} is no item that {directory} knows; {hint}")
        raise MetarecError(f"none of the {given} items ({first}, ...) is known to {directory}; {hint}")
    for item in unknown[:_TOLD_UNKNOWN]:
        if item.ids:
            print(f"skipped: {_shared(item)}", file=sys.stderr)
            continue
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


def _shared(item: Unknown) -> str:
    *ids, last = (shown(name) if isinstance(name, str) else str(name) for name in item.ids[:_SHOWN_IDS])
    more = f" and {len(item.ids) - _SHOWN_IDS} more" if len(item.ids) > _SHOWN_IDS else ""
    named = f"{', '.join(ids)} and {last}" if not more else f"{', '.join([*ids, last])}{more}"
    return f"{len(item.ids)} items are called {listed([item.name])}, ids {named}: give the id"


def _either(names: Sequence[str]) -> str:
    return " or ".join(shown(name, 200) for name in names)


def _tell(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"note: {printable(note)}", file=sys.stderr)


def _show(found: Recommendations) -> None:
    for rank, item in enumerate(found, 1):
        shown_score = item.score if item.predicted is None else item.predicted
        print(f"{rank:>4}  {shown_score:6.3f}  {printable(str(item.title or item.item_id))}")
        raised = [i for i in item.because if i.contribution >= 0]
        lowered = [i for i in item.because if i.contribution < 0]
        reasons = [
            f"{word} {_named(some)}" for word, some in (("because of", raised), ("in spite of", lowered)) if some
        ]
        if reasons:
            print(f"{'':>14}{printable(', '.join(reasons))}")


def _named(influences: Sequence[Influence]) -> str:
    return ", ".join(
        f"{i.title or i.item_id}{'' if i.rating is None else f'={i.rating:g}'} ({i.contribution:+.3f})"
        for i in influences
    )
