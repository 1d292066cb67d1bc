"""Mixture: several fitted methods as one, which rates by one weighted mean of their predictions and ranks by another.

The weights are learned on held-out tasks (`experiment.mixing`), none is negative, and they depend on what a task shows:
on the length of its support, and on whether the item is known. A method that a table has no use for has weight 0.

Source: Wolpert, "Stacked generalization", 1992; Breiman, "Stacked Regressions", 1996 (weights that are not negative).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax.core import Array, Examples, Inputs, MetarecError, Method, Params

FEW = 10.0
"""Support examples at which the weights of short and of long supports count the same."""


class Weights(NamedTuple):
    """Weights of the members of one mean, ``{name: [2, 2]}``: by unknown (0) or known (1) item, short or long support.

    ``scale``: what the scores of each member are divided by.
    """

    weight: Mapping[str, np.ndarray]
    scale: Mapping[str, float]


def mixture(
    methods: Mapping[str, Method],
    ratings: Weights | None,
    lists: Weights,
    *,
    rating_range: tuple[float, float] | None = None,
    new_items: float = 0.0,
    members: tuple[str, ...] = (),
) -> Method:
    """``rating(x) = sum_m w_m(x) bounded(m(x))`` and ``rank(x) = sum_m v_m(x) m(x) / s_m`` of fitted methods m.

    ``w_m`` is linear between the weights of a short and of a long support: ``10 / (10 + n)`` of the first.

    Args:
      methods: the members by name.
      ratings: weights of the members that predict ratings; None for clicks, where ``predict`` ranks.
      lists: weights of the members that rank.
      rating_range: lowest and highest rating. Predictions of members are bounded by it and half of its span beyond, so
        that none runs away and the order of predictions near the ends is kept.
      new_items: what is added to the rank of an unknown item, whose weights are on a scale of their own.
      members: learners to train, joined by +, such as ridge+autoencoder; plain methods are members too. By default
        chosen by the kind and the size of the data.

    Returns:
      A method whose ``adapted`` holds that of each member.

    Raises:
      MetarecError: a weight for a method that is not there.

    >>> level = lambda r: Method(jnp.float32(r), lambda p, s, k: (), lambda p, a, x: p * jnp.ones(len(x["item_id"])))
    >>> some, one = np.array([[0.0, 0.0], [0.5, 0.5]]), np.array([[1.0, 1.0], [0.5, 0.5]])
    >>> weights = Weights({"low": some, "high": one}, {"low": 1.0, "high": 1.0})
    >>> both = mixture({"low": level(1.0), "high": level(4.0)}, weights, weights)
    >>> empty = Examples({"item_id": jnp.zeros(1, int)}, jnp.zeros(1), jnp.zeros(1))
    >>> adapted = both.adapt(both.params, empty, jax.random.key(0))
    >>> both.predict(both.params, adapted, {"item_id": jnp.array([7, 0])}).tolist()
    [2.5, 4.0]
    """
    for weights in (dict.fromkeys(members, 0), *(w.weight for w in (ratings, lists) if w is not None)):
        if absent := set(weights) - set(methods):
            raise MetarecError(
                f"the mixture has weights for {', '.join(sorted(absent))}, and its methods are {', '.join(methods)}; "
                "use the same names in both"
            )
    params = {
        "methods": {name: method.params for name, method in methods.items()},
        "ratings": _arrays(ratings),
        "lists": _arrays(lists),
        "new_items": jnp.float32(new_items),
        "range": jnp.asarray((-np.inf, np.inf) if rating_range is None else bounds(rating_range), jnp.float32),
    }
    return rebuilt(methods, params)


def bounds(rating_range: tuple[float, float]) -> tuple[float, float]:
    """The lowest and the highest prediction of a member.

    >>> bounds((1.0, 5.0))
    (-1.0, 7.0)
    """
    low, high = rating_range
    return low - (high - low) / 2, high + (high - low) / 2


def rebuilt(methods: Mapping[str, Method], params: Params) -> Method:
    """The `mixture` of these parameters; of ``methods`` only the functions are used."""
    parts = {name: method._replace(params=params["methods"][name]) for name, method in methods.items()}
    rates = bool(params["ratings"])

    def adapt(params: Params, support: Examples, key: Array) -> Any:
        few = FEW / (FEW + jnp.where(support.mask > 0, support.mask, 0.0).sum())
        adapted: dict[str, Any] = {}
        for (name, m), k in zip(parts.items(), jax.random.split(key, len(parts)), strict=True):
            adapted[name] = m.adapt(params["methods"][name], support, k)
            support = _after(adapted[name], support)
        return {"methods": adapted, "few": few}

    def total(params: Params, adapted: Any, inputs: Inputs, of: str, by_rank: bool) -> Array:
        known = inputs["item_id"] > 0
        mean = jnp.zeros(known.shape)
        for name, of_member in params[of].items():
            m, weight, scale = parts[name], of_member["weight"], of_member["scale"]
            score = (m.orders if by_rank else m.predict)(params["methods"][name], adapted["methods"][name], inputs)
            score = score if by_rank else jnp.clip(score, params["range"][0], params["range"][1])
            by_length = adapted["few"] * weight[:, 0] + (1 - adapted["few"]) * weight[:, 1]
            mean += jnp.where(known, by_length[1], by_length[0]) * score / scale
        return mean + jnp.where(known, 0.0, params["new_items"]) if by_rank else mean

    def predict(params: Params, adapted: Any, inputs: Inputs) -> Array:
        return total(params, adapted, inputs, "ratings" if rates else "lists", by_rank=not rates)

    def rank(params: Params, adapted: Any, inputs: Inputs) -> Array:
        return total(params, adapted, inputs, "lists", by_rank=True)

    def scores(params: Params, adapted: Any) -> Array:
        few = np.asarray(adapted["few"])[:, None]
        sums: Any = 0.0
        for name, of_member in params["lists"].items():
            product, weight = parts[name].scores, np.asarray(of_member["weight"])
            assert product is not None, "asked only where each member has one"
            known = few * weight[1, 0] + (1 - few) * weight[1, 1]
            sums = sums + known / np.asarray(of_member["scale"]) * product(
                params["methods"][name], adapted["methods"][name]
            )
        return sums

    quick = all(parts[name].scores is not None for name in params["lists"])
    return Method(params, adapt, predict, scores=scores if quick else None, rank=rank)


def explained(params: Params) -> tuple[str, ...]:
    """What a mixture rates and ranks by, in words: a line for ratings and lists of known and of new items.

    >>> bias, als = np.array([[1.0, 0.0]] * 2), np.array([[0.0, 1.0]] * 2)
    >>> weights = Weights({"bias": bias, "als": als}, {"bias": 1.0, "als": 1.0})
    >>> explained({"ratings": _arrays(weights), "lists": {}})[0]
    'ratings of known items: als 100% (short histories: 0%), bias 0% (short histories: 100%)'
    """
    lines = []
    for of in ("ratings", "lists"):
        for group, what in ((1, "known"), (0, "new")):
            weights = {name: np.asarray(member["weight"])[group] for name, member in params[of].items()}
            if weights:
                lines.append(f"{of} of {what} items: {_shares(weights)}")
    return tuple(lines)


def _shares(weights: Mapping[str, np.ndarray]) -> str:
    """The members with a weight ``[2]``, by their share for long supports; that for short ones where it differs."""
    total = np.maximum(sum(weights.values()), 1e-12)
    shares = {name: weight / total for name, weight in weights.items() if weight.any()}
    parts = []
    for name, (short, long) in sorted(shares.items(), key=lambda one: -one[1][1]):
        differs = f" (short histories: {short:.0%})" if abs(short - long) > 0.1 else ""
        parts.append(f"{name} {long:.0%}{differs}")
    return ", ".join(parts)


def _after(adapted: Any, support: Examples) -> Examples:
    """The support, unchanged, but not before ``adapted`` is computed: members adapt one after the other.

    Two batched linear solves at once may wait for each other for ever on a CPU with few threads (`cpu.THREADS_ENOUGH`).
    """
    leaves = [leaf for leaf in jax.tree.leaves(adapted) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    nothing = sum((jnp.minimum(jnp.abs(leaf), 0.0).sum() for leaf in leaves), jnp.zeros(()))
    return support._replace(mask=support.mask + nothing)


def _arrays(weights: Weights | None) -> dict[str, dict[str, Array]]:
    if weights is None:
        return {}
    return {
        name: {"weight": jnp.asarray(weight, jnp.float32), "scale": jnp.float32(weights.scale[name])}
        for name, weight in weights.weight.items()
    }
