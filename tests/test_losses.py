"""Losses: arithmetic in numpy, and no nan at any order of derivative."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metarec_jax.losses import LOSSES, bce, bpr, mse, sampled_softmax

NAMES = sorted(LOSSES)
S = np.array([0.3, -1.2, 2.0, 0.7, -0.5], np.float32)
T = np.array([1.0, 0.0, 1.0, 0.0, 0.0], np.float32)
W = np.array([1.0, 1.0, 0.5, 0.25, 1.0], np.float32)


def slow(name: str, s: np.ndarray, t: np.ndarray, w: np.ndarray) -> float:
    """The definition, one loop."""
    top = bottom = 0.0
    for i in range(len(s)):
        if name == "mse":
            top, bottom = top + w[i] * (s[i] - t[i]) ** 2, bottom + w[i]
        elif name == "mae":
            top, bottom = top + w[i] * abs(s[i] - t[i]), bottom + w[i]
        elif name == "bce":
            top, bottom = top + w[i] * (np.log1p(np.exp(s[i])) - t[i] * s[i]), bottom + w[i]
        elif name == "bpr":
            for j in range(len(s)):
                if t[i] > t[j]:
                    top, bottom = top + w[i] * w[j] * np.log1p(np.exp(s[j] - s[i])), bottom + w[i] * w[j]
        elif t[i] > 0:
            rest = sum(w[j] * np.exp(s[j]) for j in range(len(s)) if t[j] == 0)
            top, bottom = top - w[i] * np.log(np.exp(s[i]) / (np.exp(s[i]) + rest)), bottom + w[i]
    return top / bottom


@cache
def derivatives(name: str):
    """One program: value, first, second and third derivative by the scores, and the derivative by the weights."""

    def f(s, t, w):
        return LOSSES[name](s, t, where=w)

    orders = (f, jax.grad(f), jax.hessian(f), jax.jacfwd(jax.hessian(f)), jax.grad(f, 2))
    return jax.jit(lambda s, t, w: [order(s, t, w) for order in orders])


@pytest.mark.parametrize("name", NAMES)
def test_equals_its_definition_with_fractional_weights(name):
    np.testing.assert_allclose(LOSSES[name](S, T, where=W), slow(name, S, T, W), rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_leading_axes_are_batch_and_no_mask_means_all(name):
    batch = np.stack([S, S[::-1]])[:, None]
    out = LOSSES[name](jnp.asarray(batch), jnp.asarray(np.stack([T, T[::-1]])[:, None]))
    assert out.shape == (2, 1)
    np.testing.assert_allclose(out[:, 0], slow(name, S, T, np.ones(5)), rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_masked_out_changes_neither_value_nor_derivatives(name):
    garbage = jnp.array([1e30, jnp.nan, jnp.inf])
    pad = lambda a, v: jnp.concatenate([jnp.asarray(a), v])  # noqa: E731
    s, t, w = pad(S, garbage), pad(T, garbage[::-1]), pad(W, jnp.zeros(3))
    (value, slope, hessian, third, _), want = derivatives(name)(s, t, w), derivatives(name)(S, T, W)
    np.testing.assert_allclose(value, want[0], rtol=1e-6)
    np.testing.assert_allclose(slope[:5], want[1], rtol=1e-5)
    assert not np.any(slope[5:])
    np.testing.assert_allclose(hessian[:5, :5], want[2], rtol=1e-4, atol=1e-6)
    assert np.isfinite(third).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", [np.zeros(5), np.ones(5), T])
def test_lists_with_nothing_to_learn_have_finite_derivatives_of_every_order(name, target):
    for where in (np.zeros(5, np.float32), np.ones(5, np.float32), W):
        for derivative in derivatives(name)(S, target.astype(np.float32), where):
            assert np.isfinite(derivative).all()
    assert float(LOSSES[name](S, target, where=np.zeros(5, np.float32))) == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_derivative_with_respect_to_a_weight_is_the_finite_difference(name):
    step = 1e-3
    for i in range(5):
        up, down = W.astype(np.float64), W.astype(np.float64)
        up[i] += step
        down[i] -= step
        difference = (slow(name, S, T, up) - slow(name, S, T, down)) / (2 * step)
        np.testing.assert_allclose(derivatives(name)(S, T, W)[4][i], difference, atol=1e-4)


def test_arithmetic_by_hand():
    assert float(mse(jnp.array([3.0, 1.0]), jnp.array([1.0, 1.0]))) == 2.0  # (2^2 + 0) / 2
    np.testing.assert_allclose(bce(jnp.zeros(2), jnp.array([0.0, 1.0])), np.log(2), rtol=1e-6)
    # ratings 5 > 3 > 1 make three pairs; the differences of scores are 1, 2 and 1
    np.testing.assert_allclose(
        bpr(jnp.array([2.0, 1.0, 0.0]), jnp.array([5.0, 3.0, 1.0])),
        (2 * np.log1p(np.exp(-1)) + np.log1p(np.exp(-2))) / 3,
        rtol=1e-6,
    )
    # scores of 1000: the exponentials overflow unless they are shifted; -log(e^1000 / (e^1000 + e^999)) = log(1 + 1/e)
    np.testing.assert_allclose(
        sampled_softmax(jnp.array([1000.0, 999.0]), jnp.array([1.0, 0.0])), np.log1p(np.exp(-1)), rtol=1e-4
    )
