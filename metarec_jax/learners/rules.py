"""Inner rules: how a gradient of the support loss becomes a step.

SGD and any optax transformation; learned ones: Meta-SGD, rates by step and layer (LSLR), Meta-Curvature, an LSTM.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metarec_jax.core import Array, MetarecError
from metarec_jax.options import Bounds, bounded


class Rule(NamedTuple):
    """An inner update rule, possibly with parameters of its own that are meta-learned.

    Attributes:
      init: ``init(moving) -> params`` for the parameters that adapt (a dict of arrays); {} where nothing is learned.
      start: ``start(params, moving) -> state`` at the beginning of a task.
      update: ``update(params, grads, state, moving) -> (moving, state)``.
      lr: the rate where an update is exactly ``moving - lr * grads``, which lets `maml` keep changes of low rank.
      sees_loss: whether ``update`` takes a fifth argument, the support loss at the point of the gradient.
    """

    init: Callable[[dict[str, Array]], Any]
    start: Callable[[Any, dict[str, Array]], Any]
    update: Callable[..., tuple[dict[str, Array], Any]]
    lr: float | None = None
    sees_loss: bool = False


MakeRule = Callable[[float, int], Rule]
"""``make(lr, steps) -> Rule``: a rule with an initial rate, for a number of steps."""


def sgd(lr: float) -> Rule:
    """Gradient descent: ``moving <- moving - lr * gradient``.

    >>> rule = sgd(0.5)
    >>> float(rule.update({}, {"a": jnp.array(4.0)}, (), {"a": jnp.array(3.0)})[0]["a"])  # 3 - 0.5 * 4
    1.0
    """

    def update(params: Any, grads: Any, state: Any, moving: Any) -> tuple[Any, Any]:
        return jax.tree.map(lambda p, g: p - lr * g, moving, grads), state

    return Rule(lambda moving: {}, lambda params, moving: (), update, lr)


def from_optax(transformation: optax.GradientTransformation) -> Rule:
    """Any optax transformation as inner rule. Adam requires ``eps_root=1e-8``: else the second derivative is NaN.

    Where tables adapt, it must not change rows without a gradient (no weight decay): a task owns only the rows of its
    support, so rows of the query would be changed in meta-training, and not when the task is served.
    """

    def update(params: Any, grads: Any, state: Any, moving: Any) -> tuple[Any, Any]:
        updates, state = transformation.update(grads, state, moving)
        return optax.apply_updates(moving, updates), state

    return Rule(lambda moving: {}, lambda params, moving: transformation.init(moving), update)


def meta_sgd(lr: float) -> Rule:
    """A learned rate for every parameter, initially ``lr``: ``moving <- moving - rate * gradient``.

    The rate of a table is learned for each of its columns, not for each row: it must be valid for rows never seen.
    Source: Li et al., "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning", 2017.
    """

    def init(moving: dict[str, Array]) -> dict[str, Array]:
        shape = lambda name, a: (1, a.shape[1]) if name.startswith("tables/") else a.shape  # noqa: E731
        return {name: jnp.full(shape(name, a), lr, a.dtype) for name, a in moving.items()}

    def update(rates: Any, grads: Any, state: Any, moving: Any) -> tuple[Any, Any]:
        return {name: p - rates[name] * grads[name] for name, p in moving.items()}, state

    return Rule(init, lambda rates, moving: (), update)


@bounded
def lslr(lr: float, steps: Annotated[int, Bounds(1)]) -> Rule:
    """A learned rate for every layer at every step, initially ``lr``: ``moving <- moving - rate[step] * gradient``.

    A layer is one array of parameters. Steps beyond ``steps`` take the last rate.
    Source: Antoniou, Edwards and Storkey, "How to Train Your MAML", 2019 (LSLR).

    >>> rule = lslr(0.5, steps=2)
    >>> rates = rule.init({"a": jnp.array(3.0)})
    >>> moved, state = rule.update(rates, {"a": jnp.array(4.0)}, rule.start(rates, {}), {"a": jnp.array(3.0)})
    >>> float(moved["a"]), int(state), rates["a"].shape  # 3 - 0.5 * 4
    (1.0, 1, (2,))
    """

    def init(moving: dict[str, Array]) -> dict[str, Array]:
        return {name: jnp.full((steps,), lr, a.dtype) for name, a in moving.items()}

    def update(rates: Any, grads: Any, step: Array, moving: Any) -> tuple[Any, Any]:
        rate = lambda name: rates[name][jnp.minimum(step, rates[name].shape[0] - 1)]  # noqa: E731
        return {name: p - rate(name) * grads[name] for name, p in moving.items()}, step + 1

    return Rule(init, lambda rates, moving: jnp.zeros((), jnp.int32), update)


def meta_curvature(lr: float) -> Rule:
    """A learned matrix for every dimension of every parameter transforms its gradient; the identity at the start.

    ``moving <- moving - lr * G x_1 M_1 x_2 M_2 ...``, x_k the product along dimension k: ``M_1 G M_2'`` for a dense
    layer. A table has a matrix only for its columns: it must be valid for rows never seen. A dimension of n units takes
    n^2 parameters.

    Source: Park and Oliva, "Meta-Curvature", 2019.

    >>> rule = meta_curvature(0.5)
    >>> curvature = {"w": {"0": jnp.array([[2.0, 0.0], [0.0, 1.0]])}}
    >>> rule.update(curvature, {"w": jnp.array([1.0, 1.0])}, (), {"w": jnp.zeros(2)})[0]["w"].tolist()
    [-1.0, -0.5]
    """

    def axes(name: str, a: Array) -> list[int]:
        return [1] if name.startswith("tables/") else list(range(a.ndim))

    def init(moving: dict[str, Array]) -> dict[str, dict[str, Array]]:
        scalar = {"scale": jnp.ones(())}
        return {
            name: {str(k): jnp.eye(a.shape[k], dtype=a.dtype) for k in axes(name, a)} or scalar
            for name, a in moving.items()
        }

    def curved(name: str, matrices: dict[str, Array], g: Array) -> Array:
        for k in axes(name, g):
            g = jnp.moveaxis(jnp.tensordot(matrices[str(k)], g, (1, k)), 0, k)
        return g if g.ndim else matrices["scale"] * g

    def update(curvature: Any, grads: Any, state: Any, moving: Any) -> tuple[Any, Any]:
        return {name: p - lr * curved(name, curvature[name], grads[name]) for name, p in moving.items()}, state

    return Rule(init, lambda curvature, moving: (), update)


def lstm(lr: float, *, forget: float = 1e-4, hidden: int = 20, stop_inputs: bool = True, seed: int = 0) -> Rule:
    """An LSTM whose cell is the parameter: ``moving <- f * moving - i * gradient``, with learned gates f and i.

    For each coordinate, with weights shared by all of them: ``h = LSTM([gradient, loss])``, both on a logarithmic scale
    (`log_scaled`), ``i = sigmoid(w_i . [h, parameter, previous i] + b_i)``, and f likewise. Initially ``w = 0``, so
    ``i = lr`` and ``f = 1 - forget``: SGD, except for ``forget * |parameter|`` per step. A table row without gradient
    does not change: a task owns only the rows of its support.

    Args:
      lr: initial input gate, above 0 and below 1.
      forget: 1 minus the initial forget gate, above 0 and below 1; a gate of exactly 1 could not learn.
      hidden: units H of the first LSTM, for every coordinate that adapts; with 0 the gates read gradient and loss
        directly.
      stop_inputs: treat the inputs of the gates as constant, as the paper does: the logarithm of a small gradient has a
        very large derivative.
      seed: seed of the first LSTM's weights.

    Raises:
      MetarecError: ``lr`` or ``forget`` is not between 0 and 1.

    Source: Ravi and Larochelle, "Optimization as a Model for Few-Shot Learning", 2017.

    >>> rule = lstm(0.5, forget=1e-6)
    >>> learned, moving = rule.init({"a": jnp.ones(2)}), {"a": jnp.array([3.0, 0.0])}
    >>> moved, _ = rule.update(learned, {"a": jnp.array([4.0, 1.0])}, rule.start(learned, moving), moving, jnp.ones(()))
    >>> [round(x, 4) for x in moved["a"].tolist()]  # 3 - 0.5 * 4, 0 - 0.5 * 1
    [1.0, -0.5]
    """
    for name, value in (("lr", lr), ("forget", forget)):
        if not 0 < value < 1:
            raise MetarecError(
                f"lstm: {name} is the initial value of a gate and must be above 0 and below 1, got {value}; correct it"
            )
    reads = (hidden or 4) + 2

    def init(moving: dict[str, Array]) -> dict[str, Array]:
        gate = lambda open: jnp.zeros((reads + 1,)).at[-1].set(jnp.log(open) - jnp.log1p(-open))  # noqa: E731
        gates = {"input": gate(lr), "forget": gate(1 - forget)}
        if not hidden:
            return gates
        kernel = jax.random.normal(jax.random.key(seed), (4 + hidden, 4 * hidden)) / (4 + hidden) ** 0.5
        return gates | {"kernel": kernel, "bias": jnp.zeros((4 * hidden,))}

    def start(params: Any, moving: dict[str, Array]) -> dict[str, Array]:
        count, dtype = sum(a.size for a in moving.values()), jnp.result_type(*moving.values())
        gates = {name: jnp.zeros((count,), dtype) for name in ("input", "forget")}
        return gates | {name: jnp.zeros((count, hidden), dtype) for name in ("h", "cell") if hidden}

    def update(params: Any, grads: Any, state: Any, moving: Any, loss: Array) -> tuple[Any, Any]:
        flat = lambda parts: jnp.concatenate([parts[name].reshape(-1) for name in moving])  # noqa: E731
        p, g = flat(moving), flat(grads)
        seen_p, seen_g, seen_loss = jax.lax.stop_gradient((p, g, loss)) if stop_inputs else (p, g, loss)
        everywhere = jnp.broadcast_to(seen_loss, g.shape).astype(g.dtype)
        x = jnp.concatenate([log_scaled(seen_g), log_scaled(everywhere)], axis=1)
        new = {}
        if hidden:
            z = jnp.concatenate([x, state["h"]], axis=1) @ params["kernel"] + params["bias"][None]
            keep, write, candidate, out = jnp.split(z, 4, axis=1)
            new["cell"] = jax.nn.sigmoid(keep) * state["cell"] + jax.nn.sigmoid(write) * jnp.tanh(candidate)
            x = new["h"] = jax.nn.sigmoid(out) * jnp.tanh(new["cell"])
        for name in ("input", "forget"):
            read = jnp.concatenate([x, seen_p[:, None], state[name][:, None]], axis=1)
            new[name] = jax.nn.sigmoid(read @ params[name][:-1] + params[name][-1])
        touched = flat({name: _touched(name, grad) for name, grad in grads.items()})
        moved = jnp.where(touched, new["forget"] * p - new["input"] * g, p)
        parts = jnp.split(moved, list(itertools.accumulate(a.size for a in moving.values()))[:-1])
        return {name: part.reshape(a.shape) for (name, a), part in zip(moving.items(), parts, strict=True)}, new

    return Rule(init, start, update, sees_loss=True)


def log_scaled(x: Array, p: float = 10.0) -> Array:
    """Two numbers of moderate size for one of any size: ``(log|x| / p, sign x)`` where ``|x| >= e^-p``, else
    ``(-1, e^p x)``.

    Args:
      x: ``[n]``.

    Returns:
      ``[n, 2]``.

    Source: Andrychowicz et al., "Learning to learn by gradient descent by gradient descent", 2016.

    >>> log_scaled(jnp.array([1.0, -1.0, 0.0])).tolist()
    [[0.0, 1.0], [0.0, -1.0], [-1.0, 0.0]]
    """
    size = jnp.abs(x)
    large = size >= jnp.exp(-p)
    logarithm = jnp.log(jnp.where(large, size, 1.0)) / p
    small = jnp.where(large, 0.0, x) * jnp.exp(p)
    return jnp.stack([jnp.where(large, logarithm, -1.0), jnp.where(large, jnp.sign(x), small)], axis=1)


def _touched(name: str, grad: Array) -> Array:
    """Whether the row of each entry has a nonzero gradient; True everywhere outside of tables."""
    if not name.startswith("tables/"):
        return jnp.ones(grad.shape, bool)
    return jnp.broadcast_to((grad != 0).any(1, keepdims=True), grad.shape)


RULES: Mapping[str, MakeRule] = MappingProxyType(
    {
        "sgd": lambda lr, steps: sgd(lr),
        "meta_sgd": lambda lr, steps: meta_sgd(lr),
        "lslr": lambda lr, steps: lslr(lr, max(steps, 1)),
        "meta_curvature": lambda lr, steps: meta_curvature(lr),
        "lstm": lambda lr, steps: lstm(lr),
        "adam": lambda lr, steps: from_optax(optax.adam(lr, eps_root=1e-8)),
    }
)
"""The inner rules by name; all except sgd and adam are learned."""
