"""Metric, amortised and memory learners: forms worked out by hand, and what changes nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from worlds import double, largest_difference

from metarec_jax import learners, losses
from metarec_jax.core import Examples, MetarecError, Model, Table, Task
from metarec_jax.learners.neural_process import gaussian_kl, gaussian_nll
from metarec_jax.models.networks import attend

KEY = jax.random.key(0)
PRIOR = np.array([0.5, -0.25, 1.0])
"""Of `world`: the model's own score is 3 + <PRIOR, x>."""


def world(support: int = 5, query: int = 3, seed: int = 0) -> tuple[Model, Task]:
    """Items are vectors of 3 numbers, the user's are two more that all examples share; targets are random ratings."""

    def examples(n: int) -> Examples:
        inputs = {"x": jnp.asarray(rng.normal(size=(n, 3))), "user_group": jnp.array([1])}
        return Examples(inputs, jnp.asarray(rng.integers(1, 6, n).astype(float)), jnp.ones(n))

    rng = np.random.default_rng(seed)
    model = Model(
        init=lambda key: {"tables": {"user_group": jnp.array([[0.0, 0.0], [1.0, 2.0], [-1.0, 0.5]])}},
        apply=lambda params, inputs: 3.0 + inputs["x"] @ jnp.asarray(PRIOR, inputs["x"].dtype),
        tables={"user_group": Table(3, 2, ("user_group",))},
        features=lambda params, inputs: inputs["x"],
        num_features=3,
    )
    return model, Task(examples(support), examples(query))


SMALL = {
    "protonet": learners.protonet,
    "cosine": learners.matching,
    "relation": lambda model: learners.matching(model, similarity="relation", hidden=4),
    "cnp": lambda model: learners.neural_process(model, size=3, width=5, hidden=(4, 4)),
    "tanp": lambda model: learners.neural_process(model, latent=True, clusters=2, size=3, width=5, hidden=(4,)),
    "in_context": lambda model: learners.in_context(model, width=6, heads=2),
    "hypernetwork": lambda model: learners.hypernetwork(model, width=5),
    "leo": lambda model: learners.leo(model, latent=2, inner_lr=0.05, inner_steps=2, width=5),
    "written_head": lambda model: learners.hypernetwork(model, hidden=4, width=5),
    "memory": lambda model: learners.memory(model, slots=2, inner_steps=2),
}
BY_DEFAULT = ("protonet", "memory")
"""One of each kind; the others are slow."""
each = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in BY_DEFAULT)) for name in SMALL]
)


def shaken(learner, seed: int = 1):
    """Parameters away from their start, where last layers are 0 and much would hold for no reason."""
    rng = np.random.default_rng(seed)
    moved = lambda leaf: jnp.asarray(np.asarray(leaf, float) + 0.3 * rng.normal(size=leaf.shape))  # noqa: E731
    return jax.tree.map(moved, jax.jit(learner.init)(KEY))


def served(learner, params, task: Task):
    """Scores of the query by what adapts to the support, in one program."""
    both = jax.jit(lambda params, support, inputs: learner.predict(params, learner.adapt(params, support, KEY), inputs))
    return both(params, task.support, task.query.inputs)


def parts(task: Task) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Item vectors and residuals of the support, item vectors of the query."""
    x, q = np.asarray(task.support.inputs["x"]), np.asarray(task.query.inputs["x"])
    return x, np.asarray(task.support.target) - 3.0 - x @ PRIOR, q


@each
def test_the_support_is_a_set(name, float64):
    """Trained or not: no order, no padding (be its target nan and its item any), and queries that do not see each other."""
    model, task = world()
    learner = SMALL[name](model)
    params = shaken(learner)

    @jax.jit
    def scores(support, inputs):
        return learner.predict(params, learner.adapt(params, support, KEY), inputs)

    support, inputs = task
    inputs = inputs.inputs
    take = lambda rows: jax.tree.map(lambda a: a if a.shape[0] == 1 else a[rows], support)  # noqa: E731
    want = scores(support, inputs)
    assert largest_difference(want, model.apply(params, inputs)) > 1e-3, (
        "it must have learned something from the support"
    )
    assert largest_difference(scores(take(np.array([3, 1, 4, 0, 2])), inputs), want) < 1e-12
    padded = take(np.array([0, 0, 1, 2, 3, 3, 4]))
    real = jnp.array([0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0])
    x = jnp.where(real[:, None] > 0, padded.inputs["x"], 1e6)
    padded = Examples({**padded.inputs, "x": x}, jnp.where(real > 0, padded.target, jnp.nan), real)
    assert largest_difference(scores(padded, inputs), want) < 1e-12
    for k in range(3):
        alone = scores(support, {**inputs, "x": inputs["x"][k : k + 1]})
        assert largest_difference(alone, want[k : k + 1]) < 1e-12


@each
def test_no_support_is_the_models_own_score(name, float64):
    """Exactly. Of `memory` it is what the memories tell of the profile: nothing, before training."""
    model, task = world()
    learner = SMALL[name](model)
    params = double(jax.jit(learner.init)(KEY)) if name == "memory" else shaken(learner)
    empty = task.support._replace(mask=jnp.zeros(5))
    served = jax.jit(lambda params: learner.predict(params, learner.adapt(params, empty, KEY), task.query.inputs))
    assert largest_difference(served(params), model.apply(params, task.query.inputs)) < 1e-14


@each
def test_a_fractional_weight_has_a_derivative(name, float64):
    """Reasons of clicks are derivatives with respect to the mask: finite, and those of finite differences to 1e-5."""
    model, task = world()
    learner = SMALL[name](model)
    params = shaken(learner)

    @jax.jit
    def total(mask):
        adapted = learner.adapt(params, task.support._replace(mask=mask), KEY)
        return learner.predict(params, adapted, task.query.inputs).sum()

    mask, step = np.array([1.0, 1.0, 0.7, 1.0, 1.0]), 1e-5 * np.eye(5)
    numeric = [(total(mask + d) - total(mask - d)) / 2e-5 for d in step]
    np.testing.assert_allclose(jax.jit(jax.grad(total))(mask), numeric, rtol=1e-5, atol=1e-7)


@each
def test_without_item_vectors_it_says_so(name):
    with pytest.raises(MetarecError, match=r"requires a model with features \(item vectors\); give .* content_model"):
        SMALL[name](world()[0]._replace(features=None))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: learners.protonet(m, classes=0), "protonet: classes must be 1 or more, got 0"),
        (lambda m: learners.matching(m, similarity="cosin"), "'cosin' is not known; perhaps you meant 'cosine'"),
        (lambda m: learners.in_context(m, width=9, heads=2), r"width must be a multiple of heads \(2\), got 9"),
        (lambda m: learners.hypernetwork(m, hidden=-1), "hidden must be 0 or more, got -1"),
        (lambda m: learners.leo(m, latent=0), "latent must be 1 or more, got 0"),
        (lambda m: learners.neural_process(m, size=0), "neural_process: size must be 1 or more, got 0"),
        (lambda m: learners.memory(m, slots=0), "memory: slots must be 1 or more, got 0"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(MetarecError, match=message):
        make(world()[0])


@pytest.mark.slow
def test_sixty_steps_of_leo_are_the_steps_one_by_one_in_a_program_of_the_same_size(float64):
    """The code is that of a plain loop, and the program of sixty steps is as long as that of six."""
    model, task = world()
    learner = learners.leo(model, latent=2, width=4, inner_steps=60, inner_lr=0.02)
    params = double(jax.jit(learner.init)(KEY))
    own, support = params["leo"], task.support
    base, h = model.apply(params, support.inputs), model.features(params, support.inputs)

    def loss(code):
        weights = code @ own["map"]
        return losses.mse(base + h @ weights[:-1] + weights[-1], support.target, where=support.mask)

    code = jax.jit(learners.leo(model, latent=2, width=4, inner_steps=0).adapt)(params, support, KEY)["code"]
    n = float(support.mask.sum())
    rate = own["rate"] * n / (n + jnp.exp(own["log_prior"]))
    slope = jax.jit(jax.grad(loss))
    for _ in range(60):
        code = code - rate * slope(code)
    np.testing.assert_allclose(jax.jit(learner.adapt)(params, support, KEY)["code"], code, rtol=1e-5, atol=1e-7)
    sizes = [
        len(jax.make_jaxpr(learners.leo(model, latent=2, width=4, inner_steps=k).adapt)(params, support, KEY).eqns)
        for k in (6, 60)
    ]
    assert sizes[0] == sizes[1]


def test_attention_weighs_as_copies_do():
    """Weight 2 is the example twice; logits of 300 do not overflow: e^300 (2 * 5 + 1) / (e^300 (2 + 1) + 1) = 11 / 3."""
    logits, values = jnp.array([[300.0, 300.0]]), jnp.array([[5.0], [1.0]])
    assert float(attend(logits, jnp.array([2.0, 1.0]), values)[0, 0]) == pytest.approx(11 / 3)
    assert float(attend(logits, jnp.zeros(2), values)[0, 0]) == 0.0
    assert np.isfinite(jax.grad(lambda w: attend(logits, w, values).sum())(jnp.zeros(2))).all()


def test_protonet_is_the_nearest_class_mean(float64):
    """Hard classes, no prior, a large scale: the score is that of the class whose mean item vector is nearest.

    Two levels of liking: 2 above expectation (around (3, 0, 0)), 2 below (around (-3, 0, 0)).
    """
    model, task = world(8, 6, seed=3)
    rng = np.random.default_rng(0)
    sign = np.repeat([1.0, -1.0], 4)
    x = rng.normal(size=(8, 3)) + sign[:, None] * np.array([3.0, 0, 0])
    target = 3.0 + x @ PRIOR + 2 * sign
    support = Examples({**task.support.inputs, "x": jnp.asarray(x)}, jnp.asarray(target), jnp.ones(8))
    learner = learners.protonet(model, classes=2)
    own = {
        "centre": jnp.array([-2.0, 2.0]),
        "log_sharpness": jnp.array(8.0),
        "log_scale": jnp.full(3, 4.0),
        "log_prior": jnp.array(-1e6),
        "gain": jnp.array(1.0),
    }
    params = double(jax.jit(learner.init)(KEY))
    params = {**params, "protonet": {**params["protonet"], **own}}
    q = 2.0 * rng.normal(size=(20, 3))
    means = np.stack([x[sign < 0].mean(0), x[sign > 0].mean(0)])
    nearest = np.argmin(((q[:, None] - means) ** 2).sum(-1), axis=1)
    adapted = jax.jit(learner.adapt)(params, support, KEY)
    np.testing.assert_allclose(adapted["prototype"], means, rtol=1e-12)
    scores = jax.jit(learner.predict)(params, adapted, {**task.query.inputs, "x": jnp.asarray(q)})
    np.testing.assert_allclose(scores, 3.0 + q @ PRIOR + np.array([-2.0, 2.0])[nearest], rtol=1e-9)
    assert 0 < nearest.mean() < 1


def test_protonet_is_snells_softmax_over_distances(float64):
    """Classes of equal size, no prior: sum_k softmax_k(-|v - c_k|^2) r_k; with 3 examples of prior, the null class has 3."""
    model, task = world(6, 4)
    x, _, q = parts(task)
    level = np.tile([-1.0, 0.0, 1.0], 2)
    support = task.support._replace(target=jnp.asarray(3.0 + x @ PRIOR + level))
    learner = learners.protonet(model, classes=3, sharpness=1e4)
    params = double(jax.jit(learner.init)(KEY))
    means = np.stack([x[level == k].mean(0) for k in (-1, 0, 1)])
    near = np.exp(-((q[:, None] - means) ** 2).sum(-1))
    for log_prior, null in ((-1e6, 0.0), (np.log(3.0), 3.0)):
        params["protonet"]["log_prior"] = jnp.asarray(log_prior)
        scores = served(learner, params, task._replace(support=support))
        want = (2 * near @ np.array([-1.0, 0, 1])) / (null + 2 * near.sum(1))
        np.testing.assert_allclose(scores, 3.0 + q @ PRIOR + want, rtol=1e-7)


def matched(model, task, similarity, temperature):
    learner = learners.matching(model, similarity=similarity)
    params = double(jax.jit(learner.init)(KEY))
    log_prior, log_temperature = jnp.array(-1e12), jnp.log(jnp.asarray(temperature))
    params["matching"] |= {"log_prior": log_prior, "log_temperature": log_temperature}
    return served(learner, params, task)


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
def test_matching_is_softmax_attention(similarity, float64):
    """Without a prior: apply + softmax(temperature sim(v, v_i)) . residuals; temperature 0: their mean, large: the nearest's."""
    model, task = world(7, 5)
    x, e, q = parts(task)
    alike = q @ x.T
    if similarity == "cosine":
        alike = alike / np.sqrt(((q**2).sum(1) + 1e-4)[:, None] * ((x**2).sum(1) + 1e-4))
    if similarity == "euclidean":
        alike = -((q[:, None] - x) ** 2).sum(-1)
    weights = np.exp(2.5 * alike)
    want = {2.5: weights @ e / weights.sum(1), 1e-9: np.full(5, e.mean()), 1e6: e[alike.argmax(1)]}
    for temperature, change in want.items():
        got = matched(model, task, similarity, temperature)
        np.testing.assert_allclose(got, 3.0 + q @ PRIOR + change, rtol=1e-7)


def test_the_prior_counts_examples(float64):
    """Temperature 0 and a prior of 3 examples: the sum of 7 residuals over 3 + 7."""
    model, task = world(7, 5)
    _, e, q = parts(task)
    learner = learners.matching(model, similarity="dot", temperature=1e-12, prior=3.0)
    params = double(jax.jit(learner.init)(KEY))
    scores = served(learner, params, task)
    np.testing.assert_allclose(scores, 3.0 + q @ PRIOR + e.sum() / 10, rtol=1e-6)


def test_relation_is_a_network_of_both_vectors(float64):
    """exp(c . relu(A v + b + B v_i)), normalised with the prior, weighs the residuals."""
    model, task = world(7, 5)
    x, e, q = parts(task)
    learner = learners.matching(model, similarity="relation", hidden=4)
    params = shaken(learner)
    own = jax.tree.map(np.asarray, params["matching"])
    q4, x4 = np.exp(own["log_scale"]) * q, np.exp(own["log_scale"]) * x
    a = q4 @ own["net"]["query"]["kernel"] + own["net"]["query"]["bias"]
    g = np.maximum(a[:, None] + x4 @ own["net"]["support"]["kernel"], 0) @ own["net"]["out"]
    change = np.exp(g) @ e / (np.exp(own["log_prior"]) + np.exp(g).sum(1))
    scores = served(learner, params, task)
    np.testing.assert_allclose(scores, 3.0 + q @ PRIOR + own["gain"] * change, rtol=1e-8)


def encoded(net, read):
    """`networks.encoder` in NumPy."""
    relu, dense = lambda a: np.maximum(a, 0), lambda name, a: a @ net[name]["kernel"] + net[name].get("bias", 0)
    pooled = relu(dense("each_1", relu(dense("each_0", read)))).sum(0) / (np.exp(net["log_prior"]) + len(read))
    first = lambda r: relu(dense("all_0", r))  # noqa: E731
    return dense("all_1", first(pooled) - first(np.zeros_like(pooled)))


@pytest.mark.parametrize("hidden", [0, 4])
def test_a_hypernetwork_writes_the_users_weights(hidden, float64):
    """<w, [v, 1]>; with a hidden layer <w, [relu((1 + scale) (A v + b) + shift), 1]>: all of one encoding, in NumPy."""
    model, task = world()
    x, e, q = parts(task)
    learner = learners.hypernetwork(model, hidden=hidden, width=5)
    params = shaken(learner)
    own = jax.tree.map(np.asarray, params["hypernetwork"])
    x, h = np.exp(own["log_scale"]) * x, np.exp(own["log_scale"]) * q
    written = encoded(own["net"], np.concatenate([x, e[:, None], e[:, None] * x], 1))
    w = written[: (hidden or 3) + 1]
    if hidden:
        scale, shift = written[5:9], written[9:]
        h = np.maximum((h @ own["kernel"] + own["bias"]) * (1 + scale) + shift, 0)
    scores = served(learner, params, task)
    np.testing.assert_allclose(scores, 3.0 + q @ PRIOR + h @ w[:-1] + w[-1], rtol=1e-9)


@pytest.mark.slow
def test_leo_steps_in_its_code(float64):
    """z from the encoder, then twice z - rate 5 / (5 + prior) dL/dz; with L = mean((c + [x, 1] M' z - r)^2) the gradient is, in NumPy,
    2/S M [x, 1]' ([x, 1] M' z - e)."""
    model, task = world()
    x, e, q = parts(task)
    learner = learners.leo(model, latent=2, inner_lr=0.05, inner_steps=2, width=5)
    params = shaken(learner)
    own = jax.tree.map(np.asarray, params["leo"])
    read = np.exp(own["log_scale"]) * x
    code = encoded(own["net"], np.concatenate([read, e[:, None], e[:, None] * read], 1))
    x, h = (np.append(a, np.ones((len(a), 1)), 1) for a in (x, q))
    rate = own["rate"] * 5 / (5 + np.exp(own["log_prior"]))
    for _ in range(2):
        code = code - rate * (2 / len(e) * own["map"] @ x.T @ (x @ own["map"].T @ code - e))
    adapted = learner.adapt(params, task.support, KEY)
    np.testing.assert_allclose(adapted["code"], code, rtol=1e-9)
    scores = learner.predict(params, adapted, task.query.inputs)
    np.testing.assert_allclose(scores, 3.0 + q @ PRIOR + h @ own["map"].T @ code, rtol=1e-9)


def test_a_conditional_neural_process_by_hand(float64):
    """g(v, z) - g(v, 0) with z encoded from the support: dense layers in NumPy; the loss is -log N with g's deviation."""
    model, task = world()
    x, e, q = parts(task)
    learner = learners.neural_process(model, size=3, width=5, hidden=(4,), prior_weight=0.25)
    params = shaken(learner)
    own = jax.tree.map(np.asarray, params["neural_process"])
    net, scale = own["decoder"], np.exp(own["log_scale"])
    z = encoded(own["to_z"], np.concatenate([scale * x, e[:, None], e[:, None] * scale * x], 1))

    def g(z):
        h = scale * q @ net["dense_0"]["kernel"] + net["dense_0"]["bias"] + z @ net["of_z"]["kernel"]
        return np.maximum(h, 0) @ net["out"]["kernel"] + net["out"]["bias"]

    mean, target = 3.0 + q @ PRIOR + (g(z) - g(0 * z))[:, 0], np.asarray(task.query.target)
    deviation = 0.1 + 0.9 * np.log1p(np.exp(g(z)[:, 1]))
    scores = served(learner, params, task)
    np.testing.assert_allclose(scores, mean, rtol=1e-9)
    nll = np.mean(0.5 * ((target - mean) / deviation) ** 2 + np.log(deviation))
    value, metrics = learner.loss(params, task, KEY)
    prior = np.mean((3.0 + q @ PRIOR - target) ** 2)
    assert float(value) == pytest.approx(nll + 0.25 * prior)
    assert float(metrics["query_loss"]) == pytest.approx(np.mean((mean - target) ** 2))


def test_the_divergence_of_gaussians_is_that_of_an_integral(float64):
    """KL = integral p log(p / q) for N(0.3, 0.5^2) and N(-0.4, 0.8^2), by the trapezium rule; the sum over components."""
    x = np.linspace(-8, 8, 40_001)
    log = lambda m, s: -0.5 * ((x - m) / s) ** 2 - np.log(s * np.sqrt(2 * np.pi))  # noqa: E731
    p, q = log(0.3, 0.5), log(-0.4, 0.8)
    want = np.trapezoid(np.exp(p) * (p - q), x)
    got = gaussian_kl(jnp.array([0.3, 1.0]), jnp.array([0.5, 2.0]), jnp.array([-0.4, 1.0]), jnp.array([0.8, 2.0]))
    assert float(got) == pytest.approx(want, rel=1e-9)


@pytest.mark.slow
def test_the_bound_of_a_latent_neural_process(float64):
    """kl_weight times KL(q(support, query) || q(support)) over 3 query examples; none where the query tells nothing new."""
    model, task = world()
    of = lambda weight: learners.neural_process(  # noqa: E731
        model, latent=True, clusters=2, size=3, width=5, hidden=(4,), kl_weight=weight
    )
    params = shaken(of(0.0))
    (without, metrics), (with_kl, _) = (of(weight).loss(params, task, KEY) for weight in (0.0, 2.0))
    assert float(metrics["kl"]) > 1e-4
    assert float(with_kl - without) == pytest.approx(2.0 * float(metrics["kl"]) / 3)
    unasked = Task(task.support, task.query._replace(mask=jnp.zeros(3)))
    assert float(of(1.0).loss(params, unasked, KEY)[1]["kl"]) == pytest.approx(0.0, abs=1e-12)


def test_a_likelihood_without_examples_is_0_and_has_no_gradient():
    value, slope = jax.value_and_grad(lambda m: gaussian_nll(m, jnp.ones(2), jnp.full(2, jnp.nan), jnp.zeros(2)))(
        jnp.zeros(2)
    )
    assert float(value) == 0.0
    assert slope.tolist() == [0.0, 0.0]


@pytest.mark.slow
def test_in_context_is_a_masked_transformer(float64):
    """Support and query side by side in one sequence, one mask: column j is seen where j is of the support. In NumPy.

    Each head is a softmax with one more logit, 0, of value 0; the change counts 5 / (5 + prior).
    """
    model, task = world()
    x, e, q = parts(task)
    learner = learners.in_context(model, width=6, heads=2)
    params = shaken(learner)
    own = jax.tree.map(np.asarray, params["in_context"])
    net, every = own["net"], np.exp(own["log_scale"]) * np.concatenate([x, q])
    dense = lambda at, a: a @ at["kernel"] + at.get("bias", 0)  # noqa: E731

    def norm(at, a):
        a = a - a.mean(1, keepdims=True)
        return a / np.sqrt((a**2).mean(1, keepdims=True) + 1e-6) * at["scale"] + at["bias"]

    told = dense(net["of_residual_1"], np.tanh(dense(net["of_residual_0"], e[:, None])))
    state = dense(net["of_vector"], every) + np.concatenate([told, np.tile(net["asked"], (3, 1))])
    seen = (np.arange(8) < 5)[None]
    for block in (net["block_0"], net["block_1"]):
        normed = norm(block["before"], state)
        heads = []
        for part in (slice(0, 3), slice(3, 6)):
            asked, key, value = (dense(block[name], normed)[:, part] for name in ("to_query", "to_key", "to_value"))
            weight = np.exp(asked @ key.T / np.sqrt(3)) * seen
            heads.append(weight @ value / (1 + weight.sum(1, keepdims=True)))
        state = state + dense(block["from_heads"], np.concatenate(heads, 1))
        up = np.asarray(jax.nn.gelu(dense(block["up"], norm(block["between"], state))))
        state = state + dense(block["down"], up)
    change = dense(net["out"], norm(net["last"], state[5:]))[:, 0] * 5 / (5 + np.exp(own["log_prior"]))
    scores = served(learner, params, task)
    np.testing.assert_allclose(scores, 3.0 + q @ PRIOR + change, rtol=1e-9)


def test_memory_reads_by_profile_and_takes_one_step_by_hand(float64):
    """Profile (1, 2); a = softmax(sharpness cos); d and P start from the slots; one step of the clipped gradient,
    of which a prior of 15 examples leaves 5 a quarter.

    With r = apply + P v . d + b - target: dL/dd = 2/n sum r P v, dL/db = 2/n sum r, dL/dP = 2/n sum r d v'.
    """
    model, task = world()
    x, e, q = parts(task)
    learner = learners.memory(model, slots=2, inner_steps=1, prior=15.0)
    params = shaken(learner)
    params["tables"]["user_group"] = params["tables"]["user_group"].at[1].set(jnp.array([1.0, 2.0]))
    own = jax.tree.map(np.asarray, params["memory"])
    key, profile = own["key"], np.array([1.0, 2.0])
    cosine = key @ profile / np.sqrt(((key**2).sum(1) + 1e-4) * (5 + 1e-4))
    a = np.exp(np.exp(own["log_sharpness"]) * cosine)
    a /= a.sum()
    d, matrix = a @ own["user"], np.eye(3) + np.einsum("k,kij->ij", a, own["preference"])
    r = x @ matrix.T @ d[:3] + d[3] - e
    grads = [
        np.append(2 / 5 * r @ x @ matrix.T, 2 / 5 * r.sum()),
        2 / 5 * np.einsum("n,i,nj->ij", r, d[:3], x),
    ]
    shrink = 0.25 * min(1.0, 5.0 / np.sqrt(sum((g**2).sum() for g in grads) + 1e-4))
    rates = own["log_rate"]
    d1 = d - np.exp(rates["user"]) * shrink * grads[0]
    matrix1 = matrix - np.exp(rates["preference"]) * shrink * grads[1]
    adapted = jax.jit(learner.adapt)(params, task.support, KEY)
    np.testing.assert_allclose(adapted["user"], d1, rtol=1e-9)
    np.testing.assert_allclose(adapted["preference"], matrix1, rtol=1e-9)
    scores = jax.jit(learner.predict)(params, adapted, task.query.inputs)
    np.testing.assert_allclose(scores, 3.0 + q @ PRIOR + q @ matrix1.T @ d1[:3] + d1[3], rtol=1e-9)
    assert a.min() > 0.01
