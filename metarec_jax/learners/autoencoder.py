"""Item autoencoder: a user is a code read from the rated items, and two heads score the whole catalogue: what the user
will rate, and what the user will like. For lists.

Source: Liang et al., "Variational Autoencoders for Collaborative Filtering", 2018 (the denoising autoencoder with a
multinomial likelihood); the random part of a history that it reads in training is here the support of a task.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax.core import Array, Column, Examples, Inputs, Learner, MetarecError, Params, Task
from metarec_jax.data.draw import happens, random_words
from metarec_jax.data.interactions import Interactions
from metarec_jax.data.liked import relevant_from
from metarec_jax.options import POSITIVE, Bounds, bounded

DENSE_LIMIT = 20_000
"""Largest number of item rows that every step scores in full."""
_VALUES = 256
"""Largest number of values of an item feature that is read."""


@bounded
def autoencoder(
    columns: Mapping[str, Column],
    *,
    size: Annotated[int, Bounds(1)] = 128,
    rated_weight: Annotated[float, Bounds(0.0)] = 0.5,
    dropout: Annotated[float, Bounds(0.0, 0.9)] = 0.2,
    hide: Annotated[float, Bounds(0.0, 0.9)] = 0.05,
    dense_limit: Annotated[int, POSITIVE] = DENSE_LIMIT,
) -> Learner:
    """Meta-train a code of the support, and item vectors that it scores. For lists: scores are not ratings.

    ``z = tanh(c + sum_{i in support} (a_i + t_i b_i) / sqrt(1 + n))``, with ``t`` the rating less the mean, in standard
    deviations; the log-odds that item j is liked are ``p_j + <v_j, z>``, and those that it is rated ``q_j + <w_j, z>``.
    ``v_j``, ``p_j``, ``w_j`` and ``q_j`` are the sum of the item's own row and of its content (categorical features of
    up to 256 values, and numeric ones); an item unknown to training has its content alone.

    The loss is the mean negative log-likelihood of the query's liked items under the softmax over all items that are
    not in the support, plus ``rated_weight`` times that of all its items. In training, the examples of a
    task are divided into support and query at random, so that codes of short and long supports are learned.

    Args:
      columns: columns of the data (`Interactions.columns`).
      size: length of the code.
      rated_weight: weight of the head of what will be rated.
      dropout: share of the code that training hides.
      hide: share of the items that a task scores by their content alone, as if they were new.
      dense_limit: largest number of item rows; each step scores all of them.

    Returns:
      A learner without tables, whose ``adapted`` is ``{"code": [size]}``; `autoencoder_start` gives it the content of
      the items, their popularity, and the rating from which an item is liked.

    Raises:
      MetarecError: more item rows than ``dense_limit``.
    """
    rows = columns["item_id"].size
    if rows > dense_limit:
        raise MetarecError(
            f"autoencoder scores all items in each step; there are {rows} item rows, and dense_limit is {dense_limit}; "
            "raise dense_limit, or use item_map or ridge"
        )
    features = content_columns(columns)
    width = sum(features.values())

    def init(key: Array) -> Params:
        inward, outward = jax.random.split(key)
        net = {
            "inward": 0.02 * jax.random.normal(inward, (rows, 2 * size)),
            "shift": jnp.zeros(size),
            "own": 0.02 * jax.random.normal(outward, (rows, 2 * size)).at[0].set(0.0),
            "own_bias": jnp.zeros((rows, 2)),
            "content": jnp.zeros((width, 2 * size)),
            "content_bias": jnp.zeros((width, 2)),
            "bias": jnp.zeros(2),
        }
        fixed = {
            "content": jnp.zeros((rows, width)),
            "mean": jnp.zeros(()),
            "deviation": jnp.ones(()),
            "liked_from": jnp.ones(()),
            "rated_from": jnp.zeros(()),
        }
        return {"tables": {}, "net": net, "fixed": fixed}

    def encode(params: Params, support: Examples) -> Array:
        net, fixed = params["net"], params["fixed"]
        weight = jnp.where((support.mask > 0) & (support.target >= fixed["rated_from"]), support.mask, 0.0)
        value = jnp.where(weight > 0, (support.target - fixed["mean"]) / fixed["deviation"], 0.0)
        read = net["inward"][support.inputs["item_id"]]
        total = weight @ read[:, :size] + (weight * value) @ read[:, size:]
        return jnp.tanh(net["shift"] + total / jnp.sqrt(1.0 + weight.sum()))

    def adapt(params: Params, support: Examples, key: Array) -> dict[str, Array]:
        return {"code": encode(params, support)}

    def predict(params: Params, adapted: dict[str, Array], inputs: Inputs) -> Array:
        net, items = params["net"], inputs["item_id"]
        content = as_content(inputs, features)
        known = (items > 0).astype(content.dtype)
        vectors = net["own"][items, :size] + content @ net["content"][:, :size]
        bias = known * net["own_bias"][items, 0] + content @ net["content_bias"][:, 0] + net["bias"][0]
        return vectors @ adapted["code"] + bias

    def meta_loss(params: Params, task: Task, key: Array) -> tuple[Array, dict[str, Array]]:
        net, fixed = params["net"], params["fixed"]
        for_share, for_split, for_code, for_items = jax.random.split(key, 4)
        stream = jax.random.bits(for_items, (2,), jnp.uint32)
        every = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), _items(task.support), _items(task.query))
        real = jnp.where(every.target >= fixed["rated_from"], every.mask, 0.0)
        share = jax.random.uniform(for_share, minval=0.3, maxval=0.95)
        shown = jax.random.bernoulli(for_split, share, real.shape)
        code = encode(params, every._replace(mask=jnp.where(shown, real, 0.0)))
        code = jnp.where(jax.random.bernoulli(for_code, 1 - dropout, code.shape), code / (1 - dropout), 0.0)
        ids = every.inputs["item_id"]
        hidden = jnp.zeros(rows, bool).at[jnp.where(shown & (real > 0), ids, 0)].set(True).at[0].set(True)
        asked = jnp.where(shown | hidden[ids], 0.0, real)  # an item may occur twice
        known = (~happens(random_words(stream, (rows,)), hide)).astype(code.dtype)
        liked = jnp.where(every.target >= fixed["liked_from"], asked, 0.0)
        total, metrics = jnp.zeros(()), dict[str, Array]()
        for head, (name, wanted, weight) in enumerate((("liked", liked, 1.0), ("rated", asked, rated_weight))):
            part = slice(head * size, (head + 1) * size)
            own = net["own"][:, part] @ code + net["own_bias"][:, head]
            content = fixed["content"] @ (net["content"][:, part] @ code + net["content_bias"][:, head])
            scores = jnp.where(hidden, -jnp.inf, known * own + content + net["bias"][head])
            log_share = scores[ids] - jax.nn.logsumexp(scores)
            value = -jnp.where(wanted > 0, wanted * log_share, 0.0).sum() / jnp.maximum(wanted.sum(), 1.0)
            total, metrics = total + weight * value, {**metrics, name: value}
        return total, {"query_loss": metrics["liked"]}

    return Learner(init, adapt, predict, meta_loss, {})


@jax.jit
def autoencoder_scores(params: Params, adapted: dict[str, Array]) -> Array:
    """What ``predict`` gives for all known items and a batch of users, ``[B, rows]``."""
    net, size = params["net"], adapted["code"].shape[1]
    vectors = net["own"][:, :size] + params["fixed"]["content"] @ net["content"][:, :size]
    bias = net["own_bias"][:, 0] + params["fixed"]["content"] @ net["content_bias"][:, 0] + net["bias"][0]
    return adapted["code"] @ vectors.T + bias[None]


def _items(examples: Examples) -> Examples:
    return examples._replace(inputs={"item_id": examples.inputs["item_id"]})


def autoencoder_start(params: Params, train: Interactions, *, liked_from: float | None = None, seed: int = 0) -> Params:
    """Parameters of an `autoencoder` with the data's content, popularity and scale; ``seed`` is not used.

    Args:
      liked_from: rating from which an item counts as liked (`data.liked.relevant_from`).

    Raises:
      MetarecError: data with other items or features than those of the learner.
    """
    net, fixed = params["net"], params["fixed"]
    rows = train.items.num_rows
    features = content_columns(train.columns)
    columns = {name: jnp.asarray(train.item_features[name].values) for name in features}
    content = np.array(as_content({"item_id": jnp.arange(rows), **columns}, features))
    if (rows, content.shape[1]) != fixed["content"].shape:
        raise MetarecError(
            "autoencoder_start got data with other items or features than those of the learner; build the learner from "
            "the columns of this data"
        )
    threshold = relevant_from(train, liked_from)
    rating = np.ones(len(train), np.float32) if train.rating is None else train.rating
    counts = [np.bincount(train.item[chosen], minlength=rows) for chosen in (rating >= threshold, rating == rating)]
    seen = counts[1] > 0
    content[~seen] = 0.0
    log = np.log1p(np.stack(counts, 1))
    middle = log[seen].mean(0)
    own = np.where(seen[:, None], log - middle, 0.0)
    changed = {"own_bias": jnp.asarray(own, jnp.float32), "bias": jnp.asarray(middle, jnp.float32)}
    scale = {
        "content": jnp.asarray(content, jnp.float32),
        "mean": jnp.float32(rating.mean(dtype=np.float64)),
        "deviation": jnp.float32(rating.std(dtype=np.float64) or 1.0),
        "liked_from": jnp.float32(threshold),
        "rated_from": jnp.float32(0.5 if train.rating is None else -np.inf),
    }
    return {**params, "net": {**net, **changed}, "fixed": {**fixed, **scale}}


def content_columns(columns: Mapping[str, Column]) -> dict[str, int]:
    """The item features that are read, each with its number of inputs."""
    item = {name: c for name, c in columns.items() if name.startswith("item_") and name != "item_id"}
    return {name: c.size for name, c in item.items() if c.kind == "numeric" or c.size <= _VALUES}


def as_content(inputs: Inputs, features: Mapping[str, int]) -> Array:
    """The features of items as numbers, ``[n, sum of features]``: shares of each value, or the numbers themselves."""
    count = inputs["item_id"].shape[0]
    parts: list[Any] = [jnp.zeros((count, 0))]
    for name, size in features.items():
        values = inputs[name]
        if jnp.issubdtype(values.dtype, jnp.floating):
            parts.append(values)
            continue
        values = values.reshape(count, -1)
        real = (values > 0).astype(jnp.float32)
        share = real / jnp.maximum(real.sum(1, keepdims=True), 1.0)
        parts.append(jnp.zeros((count, size)).at[jnp.arange(count)[:, None], values].add(share))
    return jnp.concatenate(parts, axis=1)
