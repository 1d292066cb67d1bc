"""Networks that learners use in addition to the model: flax modules as pairs of pure functions, and an attention.

A learner holds a `Net` and never sees flax. Every network of a support is a weighted sum over its examples, so that
their order does not matter and an example of weight 0 has no effect.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from metarec_jax.core import Array
from metarec_jax.options import POSITIVE, bounded


class Net(NamedTuple):
    """A network as two pure functions: ``init(key) -> params`` and ``apply(params, *arguments, method=None)``."""

    init: Callable[[Array], Any]
    apply: Callable[..., Any]


def attend(logits: Array, weight: Array, values: Array, null: Array | float = 0.0) -> Array:
    """Softmax attention with a null key of value 0: ``sum_i w_i e^{a_i} v_i / (e^null + sum_i w_i e^{a_i})``.

    The result is 0 where all weights are 0. It may be differentiated with respect to weights above 0; at 0 that
    derivative is 0.

    Args:
      logits: ``[q, n]``; weight: ``[n]``, 0 or more; values: ``[n, d]``, finite.
      null: the logit of the null key, finite.

    Returns:
      ``[q, d]``.

    >>> attend(jnp.zeros((1, 3)), jnp.array([1.0, 1.0, 0.0]), jnp.array([[6.0], [3.0], [9.0]]))  # 9 / (1 + 2)
    Array([[3.]], dtype=float32)
    """
    real = weight > 0
    logits = jnp.where(real[None], logits, 0.0)
    shown = jnp.where(real[None], jax.lax.stop_gradient(logits), -jnp.inf)
    top = jnp.maximum(shown.max(1, keepdims=True, initial=-jnp.inf), jax.lax.stop_gradient(null))
    each = jnp.where(real[None], weight[None] * jnp.exp(jnp.where(real[None], logits - top, 0.0)), 0.0)
    return (each @ values) / (jnp.exp(null - top) + each.sum(1, keepdims=True))


@bounded
def encoder(inputs: int, width: int, outputs: int, prior: Annotated[float, POSITIVE] = 3.0) -> Net:
    """A set as one vector: ``f(r) - f(0)`` with ``r = sum_i w_i h(x_i) / (prior + sum_i w_i)``; 0 for an empty set.

    ``apply(params, x [n, inputs], weight [n]) -> [outputs]``; h and f are dense layers of ``width`` units, the prior is
    learned. Raises MetarecError where ``prior`` is not above 0.
    Source: Zaheer et al., "Deep Sets", 2017.
    """
    return _net(_Encoder(width, outputs, prior), jnp.zeros((1, inputs)), jnp.ones(1))


def decoder(inputs: int, condition: int, hidden: tuple[int, ...], outputs: int, *, film: int = 0) -> Net:
    """Dense layers with ReLU on the concatenation of x and a condition z; the last layer starts at 0.

    ``apply(params, x [n, inputs], z [condition], task [film]) -> [n, outputs]``. With ``film``, the length of a task
    vector, that vector scales and shifts the units of each layer: ``h = relu((1 + A task) * (W x + b) + B task)``.
    Source: Perez et al., "FiLM: Visual Reasoning with a General Conditioning Layer", 2018.
    """
    return _net(_Decoder(hidden, outputs), jnp.zeros((1, inputs)), jnp.zeros(condition), jnp.zeros(film))


def relation(inputs: int, hidden: int) -> Net:
    """Similarity of two vectors: ``g(x, y) = c . relu(A x + B y + b)``.

    ``apply(params, x [q, inputs], y [n, inputs]) -> [q, n]``. The layer is one sum over units; XLA fuses it, so that no
    array of ``q n hidden`` numbers is allocated.
    """
    return _net(_Relation(hidden), jnp.zeros((1, inputs)), jnp.zeros((1, inputs)))


def transformer(inputs: int, width: int, layers: int, heads: int) -> Net:
    """Tokens of a support that attend to each other, and tokens of queries that attend only to the support.

    - ``apply(params, x [n, inputs], residual [n], weight [n], method="read") -> (keys, values)``, each
      ``[layers, n, heads, width / heads]``;
    - ``apply(params, x [q, inputs], keys, values, weight, method="answer") -> [q]``, which starts at 0.

    A token is a linear map of its vector plus an embedding of its residual; in a query a learned vector replaces that
    embedding. Blocks are pre-norm, the same for both kinds of token.
    """
    one = jnp.zeros((1, inputs))
    return _net(_Transformer(width, layers, heads), one, jnp.zeros(1), jnp.ones(1), one)


def _net(module: nn.Module, *example: Array) -> Net:
    def apply(params: Any, *arguments: Array, method: str | None = None) -> Any:
        return module.apply({"params": params}, *arguments, method=method)

    return Net(lambda key: module.init(key, *example)["params"], apply)


class _Encoder(nn.Module):
    width: int
    outputs: int
    prior: float

    @nn.compact
    def __call__(self, x: Array, weight: Array) -> Array:
        log_prior = self.param("log_prior", nn.initializers.constant(jnp.log(self.prior)), ())
        hidden = nn.relu(nn.Dense(self.width, name="each_0")(x))
        hidden = nn.relu(nn.Dense(self.width, name="each_1")(hidden))
        pooled = (weight @ hidden) / (jnp.exp(log_prior) + weight.sum())
        first, last = nn.Dense(self.width, name="all_0"), nn.Dense(self.outputs, use_bias=False, name="all_1")
        return last(nn.relu(first(pooled)) - nn.relu(first(jnp.zeros_like(pooled))))


class _Decoder(nn.Module):
    hidden: tuple[int, ...]
    outputs: int

    @nn.compact
    def __call__(self, x: Array, z: Array, task: Array) -> Array:
        for k, units in enumerate(self.hidden):
            x = nn.Dense(units, name=f"dense_{k}")(x)
            if k == 0 and z.size:
                x = x + nn.Dense(units, use_bias=False, name="of_z")(z)[None]
            if task.size:
                x = x * (1.0 + nn.Dense(units, use_bias=False, name=f"scale_{k}")(task)[None])
                x = x + nn.Dense(units, use_bias=False, name=f"shift_{k}")(task)[None]
            x = nn.relu(x)
        return nn.Dense(self.outputs, kernel_init=nn.initializers.zeros, name="out")(x)


class _Relation(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x: Array, y: Array) -> Array:
        a = nn.Dense(self.hidden, name="query")(x)
        b = nn.Dense(self.hidden, use_bias=False, name="support")(y)
        out = self.param("out", nn.initializers.normal(self.hidden**-0.5), (self.hidden,))
        return jnp.sum(nn.relu(a[:, None] + b[None]) * out[None, None], axis=-1)


class _Block(nn.Module):
    """Pre-norm attention and dense layers. Keys and values of a token are computed from its normalised state."""

    width: int
    heads: int

    def setup(self) -> None:
        self.before, self.between = nn.LayerNorm(), nn.LayerNorm()
        self.to_query, self.to_key, self.to_value, self.from_heads = (
            nn.Dense(self.width, use_bias=False) for _ in range(4)
        )
        self.up, self.down = nn.Dense(2 * self.width), nn.Dense(self.width)

    def keys_and_values(self, state: Array) -> tuple[Array, Array]:
        normed = self.before(state)
        return self.split(self.to_key(normed)), self.split(self.to_value(normed))

    def split(self, a: Array) -> Array:
        return a.reshape(a.shape[0], self.heads, -1)

    def __call__(self, state: Array, keys: Array, values: Array, weight: Array) -> Array:
        queries = self.split(self.to_query(self.before(state)))
        logits = jnp.einsum("qhd,nhd->hqn", queries, keys) / queries.shape[-1] ** 0.5
        attended = jax.vmap(attend, (0, None, 1), out_axes=1)(logits, weight, values)
        state = state + self.from_heads(attended.reshape(state.shape))
        return state + self.down(nn.gelu(self.up(self.between(state))))


class _Transformer(nn.Module):
    width: int
    layers: int
    heads: int

    def setup(self) -> None:
        self.blocks = [_Block(self.width, self.heads, name=f"block_{k}") for k in range(self.layers)]
        self.of_vector = nn.Dense(self.width)
        self.of_residual = [nn.Dense(self.width), nn.Dense(self.width, use_bias=False)]
        self.asked = self.param("asked", nn.initializers.normal(0.1), (self.width,))
        self.last = nn.LayerNorm()
        self.out = nn.Dense(1, kernel_init=nn.initializers.zeros)

    def read(self, x: Array, residual: Array, weight: Array) -> tuple[Array, Array]:
        first, second = self.of_residual
        state = self.of_vector(x) + second(jnp.tanh(first(residual[:, None])))
        memory = []
        for block in self.blocks:
            memory.append(block.keys_and_values(state))
            state = block(state, *memory[-1], weight)
        keys, values = zip(*memory, strict=True)
        return jnp.stack(keys), jnp.stack(values)

    def answer(self, x: Array, keys: Array, values: Array, weight: Array) -> Array:
        state = self.of_vector(x) + self.asked[None]
        for k, block in enumerate(self.blocks):
            state = block(state, keys[k], values[k], weight)
        return self.out(self.last(state))[:, 0]

    def __call__(self, x: Array, residual: Array, weight: Array, asked: Array) -> Array:
        return self.answer(asked, *self.read(x, residual, weight), weight)
