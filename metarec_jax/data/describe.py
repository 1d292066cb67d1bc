"""Statistics of a data set that matter for cold start."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np

from metarec_jax.data.interactions import NO_TIME, Feature, Interactions

_QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def describe(data: Interactions) -> dict[str, Any]:
    """Counts, density, ratings, time span and cold-start statistics, as plain numbers for JSON.

    Returns:
      counts (users and items are those of the vocabularies), density = interactions / (users * items); per_user and
      per_item: quantiles of the number of interactions, over users and items with any; ratings: mean, sd and histogram
      (values, or ten equal bins for more than 20 values), or None if implicit; time: first, last, days, or None;
      concentration: the Gini coefficient of interactions over items, 0 if all are equal and near 1 if one has all, and
      the share of the top 1% and 10% of items; cold_start: the number of users and items with fewer interactions than
      a threshold; features: kind, cardinality, and coverage, the fraction of users or items with a value.

    >>> from metarec_jax.data.synthetic import checkerboard
    >>> facts = describe(checkerboard(6, 4, leave_out=False))
    >>> facts["counts"], facts["density"], facts["concentration"]["gini"]
    ({'users': 6, 'items': 4, 'interactions': 24}, 1.0, 0.0)
    """
    users, items = len(data.users.ids), len(data.items.ids)
    per_user = np.bincount(data.user, minlength=users + 1)[1:]
    per_item = np.bincount(data.item, minlength=items + 1)[1:]
    return {
        "name": data.name,
        "counts": {"users": users, "items": items, "interactions": len(data)},
        "density": len(data) / max(1, users * items),
        "per_user": _quantiles(per_user[per_user > 0]),
        "per_item": _quantiles(per_item[per_item > 0]),
        "ratings": None if data.rating is None else _ratings(data.rating),
        "time": None if data.timestamp is None else _time(data.timestamp),
        "concentration": {
            "gini": _gini(per_item),
            "top_1%_of_items": _top_share(per_item, 0.01),
            "top_10%_of_items": _top_share(per_item, 0.1),
        },
        "cold_start": {
            "users_with_fewer_than": {str(n): int((per_user < n).sum()) for n in (2, 5, 10, 20)},
            "items_with_fewer_than": {str(n): int((per_item < n).sum()) for n in (1, 5, 10, 20)},
        },
        "user_features": _features(data.user_features),
        "item_features": _features(data.item_features),
        "notes": [*data.notes, *remarks(data)],
    }


def remarks(data: Interactions) -> list[str]:
    """A note if the ratings look like counts or amounts, of which the few largest dominate every error.

    They do with a long tail: no negative value, more than 20 values, and a highest value above 10 times the median and
    3 times the 90% quantile.
    """
    if data.rating is None or not len(data) or data.rating.min() < 0:
        return []
    median, most, highest = (float(q) for q in np.quantile(data.rating, (0.5, 0.9, 1.0)))
    if highest <= 10 * median or highest <= 3 * most or len(np.unique(data.rating)) <= 20:
        return []
    kind = "counts" if (data.rating == np.floor(data.rating)).all() else "amounts"
    return [
        f"the ratings look like {kind}, not like ratings (median {median:g}, highest {highest:g}); try --implicit, "
        "which reads every row as a positive"
    ]


def _quantiles(counts: np.ndarray) -> dict[str, float]:
    if not len(counts):
        return {}
    named = {"0": "min", "0.5": "median", "1": "max"}
    out = {named.get(f"{q:g}", f"{q:.0%}"): float(np.quantile(counts, q)) for q in _QUANTILES}
    return out | {"mean": float(counts.mean())}


def _ratings(rating: np.ndarray) -> dict[str, Any]:
    if not len(rating):
        return {"mean": None, "sd": None, "histogram": {}}
    exact = rating.astype(np.float64)
    values, counts = np.unique(rating, return_counts=True)
    if len(values) <= 20:
        names = [f"{value:.0f}" if value == np.floor(value) and abs(value) < 1e15 else f"{value:g}" for value in values]
        names = names if len(set(names)) == len(names) else [str(value) for value in values]
        histogram = {name: int(count) for name, count in zip(names, counts, strict=True)}
    else:
        counts, edges = np.histogram(exact, bins=10)
        histogram = {f"{low:.3g} to {high:.3g}": int(n) for low, high, n in zip(edges, edges[1:], counts, strict=False)}
    return {"mean": float(exact.mean()), "sd": float(exact.std()), "histogram": histogram}


def _time(timestamp: np.ndarray) -> dict[str, Any]:
    timestamp = timestamp[timestamp != NO_TIME]
    if not len(timestamp):
        return {"first": None, "last": None, "days": None}
    first, last = int(timestamp.min()), int(timestamp.max())
    return {"first": _moment(first), "last": _moment(last), "days": (last - first) / 86_400}


def _moment(seconds: int) -> str:
    """The time in UTC; the number itself if it is beyond the calendar (timestamps may be positions)."""
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat()
    except (OverflowError, OSError, ValueError):
        return str(seconds)


def _gini(counts: np.ndarray) -> float:
    """sum_k (2 k - n - 1) x_k / (n sum_k x_k) over the counts x in ascending order, k = 1..n.

    >>> _gini(np.array([0, 0, 0, 8])), _gini(np.array([2, 2]))
    (0.75, 0.0)
    """
    n, total = len(counts), counts.sum()
    if total == 0:
        return 0.0
    return float(((2 * np.arange(1, n + 1) - n - 1) * np.sort(counts)).sum() / (n * total))


def _top_share(counts: np.ndarray, share: float) -> float:
    top = int(np.ceil(share * len(counts)))
    return float(np.sort(counts)[len(counts) - top :].sum() / max(1, counts.sum()))


def _features(features: Mapping[str, Feature]) -> dict[str, dict[str, Any]]:
    def facts(f: Feature) -> dict[str, Any]:
        values = f.values[1:].reshape(len(f.values) - 1, -1)
        cardinality = None if f.vocabulary is None else len(f.vocabulary.ids)
        covered = float((values != 0).any(1).mean()) if len(values) else 0.0
        return {"kind": f.kind, "cardinality": cardinality, "coverage": covered}

    return {name: facts(f) for name, f in features.items()}
