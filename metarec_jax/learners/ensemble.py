"""Several methods as one: the weighted mean of their scores.

Source: Dietterich, "Ensemble Methods in Machine Learning", 2000.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from metarec_jax.core import Array, Examples, Inputs, MetarecError, Method, Params


def ensemble(
    methods: Mapping[str, Method],
    weights: Mapping[str, float] | None = None,
    unknown: Mapping[str, float] | None = None,
) -> Method:
    """``score(x) = sum_m w_m score_m(x)`` of methods with scores on the same scale, such as ratings.

    Args:
      methods: the methods by name; each adapts to the support by itself.
      weights: weights by the same names, scaled here to the sum 1; None for equal weights.
      unknown: weights for items unknown to training (id 0), which methods predict unequally well; None: ``weights``.

    On a CPU with few cores call `tune_cpu` first: closed forms that are solved at the same time need enough threads.

    Raises:
      MetarecError: there is no method, weights have other names, or weights do not sum to more than 0.

    >>> level = lambda r: Method(jnp.float32(r), lambda p, s, k: (), lambda p, a, x: p * jnp.ones(len(x["item_id"])))
    >>> both = ensemble({"low": level(1.0), "high": level(4.0)}, {"low": 2, "high": 1}, {"low": 0, "high": 1})
    >>> adapted = both.adapt(both.params, None, jax.random.key(0))
    >>> both.predict(both.params, adapted, {"item_id": jnp.array([7, 0])}).tolist()
    [2.0, 4.0]
    """
    if not methods:
        raise MetarecError("an ensemble requires a method, got none; give at least one, as {'name': Method(...)}")
    weights = dict.fromkeys(methods, 1.0) if weights is None else weights
    scaled = []
    for shares in (weights, weights if unknown is None else unknown):
        if set(shares) != set(methods) or not sum(shares.values()) > 0:
            raise MetarecError(
                f"ensemble expected a weight for each of {', '.join(methods)}, with a sum above 0, got {dict(shares)}; "
                "give one for each"
            )
        scaled.append({name: jnp.float32(shares[name] / sum(shares.values())) for name in methods})
    params = {"methods": {name: m.params for name, m in methods.items()}, "known": scaled[0], "unknown": scaled[1]}

    def adapt(params: Params, support: Examples, key: Array) -> Any:
        keys = jax.random.split(key, len(methods))
        return {n: m.adapt(params["methods"][n], support, k) for (n, m), k in zip(methods.items(), keys, strict=True)}

    def predict(params: Params, adapted: Any, inputs: Inputs) -> Array:
        known = inputs["item_id"] > 0
        total = jnp.zeros(known.shape)
        for name, m in methods.items():
            weight = jnp.where(known, params["known"][name], params["unknown"][name])
            total += weight * m.predict(params["methods"][name], adapted[name], inputs)
        return total

    return Method(params, adapt, predict)
