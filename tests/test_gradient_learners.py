"""The learners and inner rules beside MAML and ridge, each against the formula of its paper."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from derivatives import P, gradient_of, loss_at_start
from test_closed_forms import KEY, H, quadratic, query_gradient, seed_world, support_gradient
from worlds import content, double, largest_difference, one, seed_model, tasks

from metarec_jax import learners, losses
from metarec_jax.core import Column, MetarecError, Model
from metarec_jax.data.draw import TaskSource
from metarec_jax.data.synthetic import synthetic
from metarec_jax.experiment.build import build_learner, build_optimizers, build_source
from metarec_jax.experiment.config import Config, LearnerConfig, ModelConfig, TaskConfig, TrainConfig
from metarec_jax.learners.cavia import with_context
from metarec_jax.learners.maml_plus_plus import step_weights
from metarec_jax.learners.protomaml import prototypes
from metarec_jax.training.row_optimizers import lazy_adam
from metarec_jax.training.step import Optimizers, init_state, make_step

# MAML++


@pytest.mark.slow
@pytest.mark.parametrize("first_order", [False, True])
def test_maml_plus_plus_anneals(first_order):
    """k = 4, half way: weights (1 - 1/2) / 4 = 1/8 for steps 1 to 3, and 5/8; the first half takes no second derivative."""
    model, task = seed_world()
    learner = learners.maml_plus_plus(
        model, inner_lr=0.05, inner_steps=4, first_order_until=0.6 if first_order else 0.0
    )
    params = jax.jit(learner.init)(KEY)
    rule = learners.lslr(0.05, 4)
    for done, weights in ((0.0, [0.25] * 4), (0.5, [0.125] * 3 + [0.625]), (1.0, [0.0, 0.0, 0.0, 1.0])):
        constants = first_order and done < 0.6
        plain = learners.maml(
            model, inner_steps=4, rule=rule, per_step_losses=jnp.array(weights), first_order=constants
        )
        body = {name: part for name, part in params.items() if name != "progress"}
        at = params | {"progress": jnp.asarray(done, jnp.float32)}
        got = jax.jit(jax.value_and_grad(lambda p: learner.loss(p, task, KEY)[0]))(at)
        want = jax.jit(jax.value_and_grad(lambda p: plain.loss(p, task, KEY)[0]))(body)  # noqa: B023
        assert float(got[0]) == pytest.approx(float(want[0]), rel=1e-6)
        assert float(got[1].pop("progress")) == 0.0
        assert largest_difference(got[1], want[1]) < 1e-6
    whole = learners.maml(model, inner_steps=4, rule=rule, per_step_losses=True)
    assert float(learner.loss(params, task, KEY)[0]) == pytest.approx(float(whole.loss(body, task, KEY)[0]), rel=1e-6)


def test_weights_are_those_of_thin_steps_too():
    """Low-rank steps against plain ones, weights 0.2, 0.8."""
    task = one(tasks(jax.random.key(3), 2), 1)
    losses_ = []
    for low_rank in (True, False):
        weights = jnp.array([0.2, 0.8])
        learner = learners.maml(
            content("mlp"), inner_lr=0.05, inner_steps=2, low_rank=low_rank, per_step_losses=weights
        )
        losses_.append(loss_at_start(learner, task))
    assert losses_[0] == pytest.approx(losses_[1], rel=1e-6)


def test_training_sets_the_progress():
    """After step 3 of 4: 3/4, whatever the optimiser of the other parameters did; the weight of a single step is 1."""
    model, _ = seed_world()
    learner = learners.maml_plus_plus(model, inner_steps=2)
    optimizers = Optimizers(optax.adam(0.1), lazy_adam(0.1))
    batch = tasks(jax.random.key(0), 2, columns={"user_id": Column("id", 400), "item_id": Column("id", 600)})
    step = jax.jit(make_step(learner, TaskSource(batch, lambda data, key: data, 2), optimizers, steps=4))
    state = init_state(learner, optimizers, jax.jit(learner.init)(KEY), KEY)
    for _ in range(3):
        state, _ = step(state, batch)
    assert float(state.params["progress"]) == 0.75
    assert step_weights(1, jnp.array(0.3)).tolist() == [1.0]


# Implicit MAML


@pytest.mark.parametrize("proximal", [0.5, 3.0])
def test_imaml_on_a_quadratic(proximal, float64):
    """The minimum of L_s(q) + s/2 |q - p|^2 is q = (H + s I)^-1 (s p - c), c the gradient of L_s at 0; the meta-gradient
    s (H + s I)^-1 grad L_q(q). 3 different eigenvalues: 3 conjugate-gradient steps."""
    model, task = quadratic()
    task = double(task)
    learner = learners.imaml(model, inner_lr=0.3, inner_steps=300, proximal=proximal, cg_steps=3)
    inverse = np.linalg.inv(H + proximal * np.eye(3))
    q = inverse @ (proximal * P - support_gradient(np.zeros(3), task))
    params = double(jax.jit(learner.init)(KEY))
    np.testing.assert_allclose(learner.adapt(params, task.support, KEY)["rest"]["net/p"], q, rtol=1e-7)
    got = gradient_of(learner, task, params)["net"]["p"]
    np.testing.assert_allclose(got, proximal * inverse @ query_gradient(q, task), rtol=1e-6)


@pytest.mark.slow
def test_imaml_keeps_no_path():
    """1024 inner steps need hardly more memory than 4; MAML through them many times more."""
    batch, model = one(tasks(jax.random.key(0), 2)), content("mlp", size=8)

    def temporaries(learner):
        params = jax.eval_shape(learner.init, KEY)
        compiled = jax.jit(jax.grad(lambda p, t: learner.loss(p, t, KEY)[0])).lower(params, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = (temporaries(learners.imaml(model, inner_steps=k)) for k in (4, 1024))
    assert many < 1.1 * few
    assert temporaries(learners.maml(model, inner_steps=1024, low_rank=False)) > 10 * many


def test_imaml_refuses():
    with pytest.raises(MetarecError, match="imaml: proximal must be between"):
        learners.imaml(seed_model(), proximal=0)


# CAVIA


@pytest.mark.slow
def test_cavia_is_maml_on_the_context_alone():
    """The same loss and gradients as `maml` with ``only=`` the context, which starts at 0."""
    model, task = content("mlp"), one(tasks(jax.random.key(3), 2), 1)
    cavia = learners.cavia(model, size=2, inner_lr=0.3, inner_steps=3)
    maml = learners.maml(with_context(model, 2, "user_id"), inner_lr=0.3, inner_steps=3)
    params, full = jax.jit(cavia.init)(KEY), jax.jit(maml.init)(KEY)
    adapted = jax.eval_shape(cavia.adapt, params, task.support, KEY)
    assert set(adapted["rest"]) == {"context/start"}
    assert adapted["rows"] == {}
    (loss, got), (same, want) = (
        jax.jit(jax.value_and_grad(lambda p, f=learner: f.loss(p, task, KEY)[0]))(at)
        for learner, at in ((cavia, params), (maml, full))
    )
    assert float(loss) == float(same)
    del want["context"]["start"]
    assert largest_difference(got, want) < 1e-6


def test_one_step_of_a_context_by_hand(float64):
    """score = u . v with the unknown user's row u, so c1 = -a M grad_u L_s(u), and scores are (u + M'c1) . v."""
    model, task = content("dot"), double(one(tasks(jax.random.key(3), 2), 1))
    learner = learners.cavia(model, size=2, inner_lr=0.1, inner_steps=1, rule=learners.sgd(0.1), prior=0.0)
    params = double(jax.jit(learner.init)(KEY))
    user = task.support.inputs["user_id"][0]

    def at(row, part):
        tables = params["tables"] | {"user_id": params["tables"]["user_id"].at[user].set(row)}
        return model.apply({**params, "tables": tables}, part.inputs)

    row, mapping = params["tables"]["user_id"][user], params["context"]["map"]
    pull = jax.jit(jax.grad(lambda row: losses.mse(at(row, task.support), task.support.target, task.support.mask)))(row)
    context = -0.1 * mapping @ pull
    adapted = jax.jit(learner.adapt)(params, task.support, KEY)
    np.testing.assert_allclose(adapted["rest"]["context/start"], context, rtol=1e-9)
    want = at(row + context @ mapping, task.query)
    np.testing.assert_allclose(jax.jit(learner.predict)(params, adapted, task.query.inputs), want, rtol=1e-9)


@pytest.mark.slow
def test_a_context_before_dense_layers_is_concatenated(float64):
    """With linear layers alone: w . [u + M'c, v] + b = [w, M w_u] . [u, v, c] + b."""
    model = seed_model()
    params = double(with_context(model, 2, "user_id").init(KEY))
    params["context"]["start"] = jnp.array([0.7, -1.1])
    inputs = {"user_id": jnp.array([5]), "item_id": jnp.array([2, 0, 9])}
    w, b = (np.asarray(params["net"]["params"]["out"][name]) for name in ("kernel", "bias"))
    u, v = params["tables"]["user_id"][jnp.array([5, 5, 5])], params["tables"]["item_id"][inputs["item_id"]]
    wide = np.concatenate([w[:, 0], params["context"]["map"] @ w[:3, 0]])
    want = np.concatenate([u, v, np.tile([0.7, -1.1], (3, 1))], axis=1) @ wide + b
    np.testing.assert_allclose(with_context(model, 2, "user_id").apply(params, inputs), want, rtol=1e-9)


def test_cavia_wants_its_table():
    with pytest.raises(MetarecError, match=r"no table 'user'; choose from item_id, user_id"):
        learners.cavia(seed_model(), table="user")


# Proto-MAML


def test_prototypes_score_as_a_prototypical_network(float64):
    """Two liked and three disliked, k = 0, level = 0: w . x + b = |x - mean of disliked|^2 - |x - mean of liked|^2."""
    rng = np.random.default_rng(0)
    phi, x = rng.normal(size=(6, 3)), rng.normal(size=(4, 3))
    liking = np.array([1.0, 1.0, -1.0, -1.0, -1.0, 0.0])
    learned = {"log_gain": 0.0, "log_prior": -jnp.inf, "level": 0.0}
    head = prototypes(learned, jnp.asarray(phi), jnp.asarray(liking), jnp.array([1.0] * 5 + [0.0]))
    distance = lambda rows: ((x - rows.mean(0)) ** 2).sum(1)  # noqa: E731
    want = distance(phi[2:5]) - distance(phi[:2])
    np.testing.assert_allclose(x @ head["weight"] + head["bias"], want, rtol=1e-10)


def test_the_prototypes_of_clicks(float64):
    """No inner step, a prior of even odds: each click pulls by 1 - 1/2, each miss by 1/2; all weigh alike, so the means
    are plain. And of ratings by twice the residual."""
    model, task = content("dot"), double(one(tasks(jax.random.key(3), 2), 1))
    clicks = task.support._replace(target=jnp.array([1.0, 0, 0, 1, 1, 0]))
    zero = lambda params, inputs: jnp.zeros(max(v.shape[0] for v in inputs.values()))  # noqa: E731
    even = Model(model.init, zero, model.tables, model.features, model.num_features)
    learner = learners.protomaml(even, inner_steps=0, loss=losses.bce)
    params = double(jax.jit(learner.init)(KEY)) | {"prototypes": {"log_gain": 0.0, "log_prior": -1e9, "level": 0.0}}
    params["prototypes"] = jax.tree.map(jnp.asarray, params["prototypes"])
    phi = np.asarray(model.features(params, clicks.inputs))
    up, down = phi[[0, 3, 4]].mean(0), phi[[1, 2, 5]].mean(0)
    head = jax.jit(learner.adapt)(params, clicks, KEY)["rest"]
    np.testing.assert_allclose(head["head/weight"], 2 * (up - down), rtol=1e-9)
    np.testing.assert_allclose(head["head/bias"], down @ down - up @ up, rtol=1e-9)
    ratings = learners.protomaml(model, inner_steps=0)
    residual = np.asarray(task.support.target - model.apply(params, task.support.inputs))
    up = np.maximum(residual, 0) @ phi / np.maximum(residual, 0).sum()
    down = np.maximum(-residual, 0) @ phi / max(np.maximum(-residual, 0).sum(), 1e-30)
    head = jax.jit(ratings.adapt)(params, task.support, KEY)["rest"]
    np.testing.assert_allclose(head["head/weight"], 2 * (up - down), rtol=1e-9)


def test_a_step_of_the_head_by_hand(float64):
    """From the head (w, b) one step of rate a on mse: w - a 2/n phi' (s - t), b - a 2/n sum (s - t)."""
    model, task = content("dot"), double(one(tasks(jax.random.key(3), 2), 1))
    made = [learners.protomaml(model, inner_steps=k, rule=learners.sgd(0.1), prior=0.0) for k in (0, 1)]
    params = double(jax.jit(made[0].init)(KEY))
    start, moved = (learner.adapt(params, task.support, KEY)["rest"] for learner in made)
    phi = np.asarray(model.features(params, task.support.inputs))
    scores = model.apply(params, task.support.inputs) + phi @ start["head/weight"] + start["head/bias"]
    pull = 2 / 6 * np.asarray(scores - task.support.target)
    np.testing.assert_allclose(moved["head/weight"], start["head/weight"] - 0.1 * pull @ phi, rtol=1e-9)
    np.testing.assert_allclose(moved["head/bias"], start["head/bias"] - 0.1 * pull.sum(), rtol=1e-9)


@pytest.mark.parametrize("make", [learners.protomaml, learners.logistic])
def test_without_support_the_prior_speaks(make):
    model, task = content("dot"), one(tasks(KEY, 2))
    learner = make(model)
    params = jax.jit(learner.init)(KEY)
    empty = task.support._replace(mask=jnp.zeros_like(task.support.mask))
    scores = learner.predict(params, learner.adapt(params, empty, KEY), task.query.inputs)
    np.testing.assert_allclose(scores, model.apply(params, task.query.inputs), rtol=1e-6)


@pytest.mark.parametrize("make", [learners.protomaml, learners.logistic])
def test_features_are_required(make):
    bare = Model(lambda key: {}, lambda params, inputs: jnp.zeros(1), {})
    with pytest.raises(MetarecError, match=f"{make.__name__} requires a model with features"):
        make(bare)


# As a run configures them


@pytest.mark.parametrize("head", ["dot", pytest.param("mlp", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "given",
    [
        {"name": "maml", "rule": "lstm"},
        pytest.param({"name": "maml_plus_plus", "first_order_until": 0.3}, marks=pytest.mark.slow),
        pytest.param({"name": "cavia", "size": 3, "first_order": True}, marks=pytest.mark.slow),
        pytest.param({"name": "logistic", "precision": 2.0}, marks=pytest.mark.slow),
        pytest.param({"name": "maml", "rule": "lslr"}, marks=pytest.mark.slow),
        pytest.param({"name": "maml", "rule": "meta_curvature"}, marks=pytest.mark.slow),
        pytest.param({"name": "imaml", "proximal": 2.0}, marks=pytest.mark.slow),
        pytest.param({"name": "protomaml", "only": None}, marks=pytest.mark.slow),
        pytest.param({"name": "protomaml", "inner_steps": 0}, marks=pytest.mark.slow),
    ],
    ids=lambda given: "-".join(map(str, given.values())),
)
def test_a_configured_learner_takes_a_step(given, head):
    """One outer step of every learner and rule, from its options, moves parameters and stays finite."""
    data = synthetic(30, 20, ratings_per_user=(8, 12), size=2, implicit=given["name"] == "logistic").data
    options = {key: value for key, value in given.items() if key != "name"}
    options = options if given["name"] == "logistic" else {"inner_steps": 2} | options
    run = Config(
        model=ModelConfig(size=2, head=head, hidden=(3,)),
        learner=LearnerConfig(given["name"], options),
        tasks=TaskConfig(tasks=2, support=(2, 4), query=3),
        train=TrainConfig(steps=4, warm_start=False),
    )
    learner, optimizers = build_learner(run, data), build_optimizers(run, data)
    params = jax.jit(learner.init)(KEY)
    state = init_state(learner, optimizers, params, KEY)
    source = build_source(run, data)
    state, metrics = jax.jit(make_step(learner, source, optimizers, steps=4))(state, source.data)
    assert np.isfinite(float(metrics["loss"]))
    assert largest_difference(state.params, params) > 0
    if given["name"] == "maml_plus_plus":
        assert float(state.params["progress"]) == 0.25


def test_logistic_is_for_clicks():
    data = synthetic(30, 20, ratings_per_user=(8, 12), size=2).data
    with pytest.raises(MetarecError, match="'logistic' is for clicks, and the data has ratings; give --implicit"):
        build_learner(Config(learner=LearnerConfig("logistic")), data)
