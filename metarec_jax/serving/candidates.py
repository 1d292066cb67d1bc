"""Which items may be recommended: given ones, by feature, by number of ratings; applied before the best are chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from metarec_jax.core import MetarecError
from metarec_jax.data.interactions import Feature, Interactions
from metarec_jax.messages import listed, shown
from metarec_jax.serving.history import Names


def candidates(
    data: Interactions,
    *,
    only: Sequence[Any] | None = None,
    exclude: Sequence[Any] | None = None,
    where: Mapping[str, Sequence[Any]] | None = None,
    min_ratings: int = 0,
) -> np.ndarray:
    """Which items pass every filter, bool ``[data.items.num_rows]``, for `Recommender.recommend`; row 0 never does.

    Args:
      only: ids or titles of the items that may be recommended; None: all.
      exclude: ids or titles of items that may not.
      where: by item feature, the values of which an item must have one: ``{"genre": ["Comedy", "Drama"]}``. A number of
        a numeric feature, in the units of the data, must be equal.
      min_ratings: smallest number of interactions in the data.

    Raises:
      MetarecError: an item, a feature or a value that the data does not have, or no item that passes.

    >>> from metarec_jax.data.interactions import Vocabulary
    >>> ids = Vocabulary(np.arange(2)), Vocabulary(np.array(["a", "b", "c"]))
    >>> data = Interactions(np.array([1, 2, 1]), np.array([1, 1, 2]), None, None, *ids)
    >>> candidates(data, exclude=["b"]).tolist(), candidates(data, min_ratings=2).tolist()
    ([False, True, False, True], [False, True, False, False])
    """
    names = Names(data)
    allowed = np.ones(data.items.num_rows, bool)
    for option, items, value in (("only", only, True), ("exclude", exclude, False)):
        if items is None:
            continue
        rows = names.rows(list(items))
        if missing := [name for name, row in zip(items, rows, strict=True) if row == 0]:
            close = names.suggest(missing[0])
            hint = f"perhaps you meant {shown(close[0])}" if close else "give ids or titles of items of the data"
            raise MetarecError(f"{option}: no single item is called {listed(missing)}; {hint}")
        chosen = np.zeros(len(allowed), bool)
        chosen[rows] = True
        allowed &= chosen == value
    for name, values in (where or {}).items():
        allowed &= _with_value(data, name, values)
    if min_ratings > 0:
        allowed &= np.bincount(data.item, minlength=len(allowed)) >= min_ratings
    allowed[0] = False
    if not allowed.any():
        raise MetarecError("no item passes all filters; leave one of them out, or widen it")
    return allowed


def _with_value(data: Interactions, name: str, values: Sequence[Any]) -> np.ndarray:
    """The items with one of these values of a feature."""
    own = {label: key for key in data.item_features for label in (key, key.removeprefix("item_"))}
    if name not in own:
        known = ", ".join(key.removeprefix("item_") for key in data.item_features) or "none"
        raise MetarecError(f"where: the items have no feature {shown(name)}; their features are: {known}")
    feature: Feature = data.item_features[own[name]]
    if feature.vocabulary is None:
        if len(feature.units) != 1:
            raise MetarecError(f"where: {name} has no single value; filter by another feature")
        (middle, spread), numbers = feature.units[0], feature.values[:, 0]
        found = np.zeros(len(numbers), bool)
        for value in values:
            try:
                found |= np.isclose(numbers * spread + middle, float(value), rtol=1e-5, atol=1e-5 * abs(spread))
            except ValueError:
                raise MetarecError(f"where: {name} is a number, got {shown(value)}; give a number") from None
        return found
    codes = feature.vocabulary.encode(np.asarray(values))
    if (codes == 0).any():
        unknown = [value for value, code in zip(values, codes, strict=True) if code == 0]
        some = ", ".join(str(value) for value in feature.vocabulary.ids[:8].tolist())
        raise MetarecError(f"where: no item has {name}={unknown[0]}; its values are, among others: {some}")
    cells = feature.values.reshape(len(feature.values), -1)
    return np.asarray(np.isin(cells, codes).any(axis=1))
