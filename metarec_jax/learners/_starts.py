"""Start the tables of a dot-product content model from a quick matrix factorisation.

The factors of the items in training are regressed on their content; the content rows start from that regression, and an
item's own row from its residual, so that the model scores a known item as the factorisation does and an unrated item by
its content. Users start from their factors, and the rows of their features from 0.
"""

from __future__ import annotations

import itertools
from typing import Annotated

import jax.numpy as jnp
import numpy as np
from scipy import sparse

from metarec_jax.core import MetarecError, Params
from metarec_jax.data.interactions import Interactions
from metarec_jax.factorization import als_factors, implicit_als_factors
from metarec_jax.options import POSITIVE, bounded

_POPULARITY = 20.0
"""Number of ratings with which an item has half of the full weight in the regression on content."""


@bounded
def warm_start(
    params: Params,
    train: Interactions,
    *,
    reg: Annotated[float, POSITIVE] = 8.0,
    content_reg: Annotated[float, POSITIVE] = 3.0,
    iterations: int = 10,
    seed: int = 0,
) -> Params:
    """Parameters of a dot-product `content_model`, started from ALS on ``train``.

    Args:
      params: parameters from ``init``; the size of the factors is that of the item table.
      reg: ridge of the factorisation, in units of one rating.
      content_reg: ridge of the regression of factors on content, in units of one item with many ratings.
      iterations: number of sweeps of ALS.
      seed: seed of the factorisation.

    Raises:
      MetarecError: the parameters are not those of a dot-product `content_model`, or a ridge is not above 0.
    """
    tables = params["tables"]
    if "item_id" not in tables or "mean" not in params["net"].get("params", {}):
        raise MetarecError(
            "warm_start requires the parameters of content_model(head='dot'); train other models without warm start"
        )
    size = tables["item_id"].shape[1] - 1
    if train.rating is None:
        factors = implicit_als_factors(train, size=size, seed=seed, iterations=iterations)
    else:
        factors = als_factors(train, size=size, reg=reg, iterations=iterations, seed=seed)
    rows = np.column_stack([factors.item_bias, factors.item_factors]).astype(np.float64)
    count = np.bincount(train.item, minlength=train.items.num_rows).astype(np.float64)
    names, blocks = content_blocks(train)
    fit, base, content = regress(blocks, rows, count / (count + _POPULARITY), content_reg)
    own = np.where(count[:, None] > 0, rows - (fit - base), 0.0)  # the constant is in no content row
    own[0] = base  # an unknown item: what content does not say, on average
    new = {name: np.zeros(table.shape) for name, table in tables.items() if name.startswith("user_")}
    new |= {"item_id": own, **dict(zip(names, content, strict=True))}
    if "user_id" in tables:  # row 0 stays 0: the mean user, with whom the factorisation is centred
        new["user_id"] = np.column_stack([factors.user_bias, factors.user_factors])
    new = {name: np.pad(value, ((0, len(tables[name]) - len(value)), (0, 0))) for name, value in new.items()}
    mean = jnp.asarray(factors.mu, jnp.float32)
    net = {**params["net"], "params": {**params["net"]["params"], "mean": mean}}
    return {**params, "tables": {**tables, **{k: jnp.asarray(v, jnp.float32) for k, v in new.items()}}, "net": net}


def content_blocks(train: Interactions) -> tuple[list[str], list[sparse.csr_matrix]]:
    """For each categorical or multi-valued item feature, the matrix [items, values] of the model's averages."""
    names, blocks = [], []
    for name, feature in train.item_features.items():
        if feature.vocabulary is None:
            continue
        values = feature.values.reshape(len(feature.values), -1)
        item, slot = np.nonzero(values)
        weight = 1.0 / np.maximum((values > 0).sum(1), 1)[item]
        shape = (len(values), feature.vocabulary.num_rows)
        names.append(name)
        blocks.append(sparse.csr_matrix((weight, (item, values[item, slot])), shape=shape))
    return names, blocks


def regress(
    blocks: list[sparse.csr_matrix], target: np.ndarray, weight: np.ndarray, reg: float, sweeps: int = 60
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Weighted ridge of ``target [n, d]`` on content and a constant, by conjugate gradients on all columns at once.

    Returns the fit ``[n, d]``, the constant ``[d]``, and the coefficients of each block.
    """
    x = sparse.hstack([*blocks, sparse.csr_matrix(np.ones((len(target), 1)))]).tocsr()
    ridge = np.append(np.full(x.shape[1] - 1, reg), 1e-3 * reg)[:, None]
    weighted = sparse.diags(weight) @ x
    solution = np.zeros((x.shape[1], target.shape[1]))
    residual = direction = weighted.T @ target
    size = (residual**2).sum(0)
    for _ in range(sweeps):
        image = weighted.T @ (x @ direction) + ridge * direction
        step = size / np.maximum((direction * image).sum(0), 1e-30)
        solution = solution + step * direction
        residual = residual - step * image
        size, old = (residual**2).sum(0), size
        direction = residual + size / np.maximum(old, 1e-30) * direction
    ends = np.cumsum([0] + [b.shape[1] for b in blocks])
    parts = [solution[a:b] for a, b in itertools.pairwise(ends)]
    return np.asarray(x @ solution), solution[-1], parts
