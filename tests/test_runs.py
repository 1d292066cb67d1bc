"""What a run serves: the numbers it was trained for, with derivatives that tell what moved a score."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metarec_jax.core import Examples, MetarecError
from metarec_jax.data.catalogue import catalogue
from metarec_jax.data.synthetic import synthetic
from metarec_jax.experiment import config
from metarec_jax.experiment import directory as directories
from metarec_jax.experiment.build import build_learner, build_model
from metarec_jax.experiment.run import Run
from metarec_jax.serving.recommender import Recommender
from metarec_jax.training.checkpoints.checkpoint import Checkpoints

DATA = synthetic(30, 20, ratings_per_user=(8, 12), size=2).data


@pytest.mark.parametrize(
    "given", ["maml:inner_steps=2:first_order=true", pytest.param("reptile:inner_steps=2", marks=pytest.mark.slow)]
)
def test_first_order_in_training_is_no_silence_on_why(given):
    learned = config.learner_of(given, {})
    whole = config.Config(model=config.ModelConfig(size=2), learner=learned)
    learner = build_learner(whole, DATA)
    params = learner.init(jax.random.key(0))
    served = Run(whole, DATA, catalogue(DATA), learner, params).method
    inputs = {"user_id": jnp.zeros(1, jnp.int32), "item_id": jnp.arange(1, 4)}
    inputs |= {name: jnp.asarray(f.values)[jnp.arange(1, 4)] for name, f in DATA.item_features.items()}
    inputs |= {name: jnp.asarray(f.values)[:1] for name, f in DATA.user_features.items()}
    support = Examples(inputs, jnp.array([5.0, 1.0, 4.0]), jnp.ones(3))
    for a, b in zip(
        jax.tree.leaves(jax.jit(learner.adapt)(params, support, jax.random.key(1))),
        jax.tree.leaves(jax.jit(served.adapt)(served.params, support, jax.random.key(1))),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    ids = DATA.items.ids[:2].tolist()
    best = Recommender(served, DATA, catalogue(DATA)).recommend({ids[0]: DATA.rating.max(), ids[1]: 2.0}, n=1)[0]
    told = sum(i.contribution for i in best.because)
    assert abs(told) > 0.01
    np.testing.assert_allclose(told, best.score - best.prior, rtol=0.03, atol=2e-3)


def test_other_numbers_of_inner_steps():
    """Trained with 2 steps: 0, 1, 2 and 4 are shown; 2 are the run's own numbers, 0 steps move nothing."""
    whole = config.Config(
        model=config.ModelConfig(size=2), learner=config.LearnerConfig("maml", {"inner_steps": 2, "only": None})
    )
    learner = build_learner(whole, DATA)
    run = Run(whole, DATA, catalogue(DATA), learner, jax.jit(learner.init)(jax.random.key(0)))
    shown = run.by_inner_steps()
    assert list(shown) == [0, 1, 2, 4]
    rows = {"user_id": jnp.zeros(1, jnp.int32), "item_id": jnp.arange(1, 4)}
    rows |= {name: jnp.asarray(f.values)[jnp.arange(1, 4)] for name, f in DATA.item_features.items()}
    rows |= {name: jnp.asarray(f.values)[:1] for name, f in DATA.user_features.items()}
    support = Examples(rows, jnp.array([5.0, 1.0, 4.0]), jnp.ones(3))

    def scored(method):
        both = jax.jit(lambda params, support: method.predict(params, method.adapt(params, support, None), rows))
        return both(method.params, support)

    scores = {k: scored(method) for k, method in shown.items()}
    own = run.method
    np.testing.assert_allclose(scores[2], scored(own), rtol=1e-6)
    prior = build_model(whole.model, DATA).apply({k: v for k, v in own.params.items() if k != "rule"}, rows)
    np.testing.assert_allclose(scores[0], prior, rtol=1e-6)
    assert float(np.abs(scores[4] - scores[2]).max()) > 1e-3
    assert replace(run, config=config.Config()).by_inner_steps() == {}


def test_two_parts_differ_by_their_rows():
    part = DATA.take(np.arange(len(DATA)) > 0)
    assert directories.rows_digest(part) == directories.rows_digest(DATA.take(np.arange(1, len(DATA))))
    assert directories.rows_digest(part) != directories.rows_digest(DATA)


def test_another_partition_under_the_same_name_is_another_run(tmp_path):
    file = tmp_path / "part.csv"
    whole = config.Config(split=config.SplitConfig(partition=str(file)))
    file.write_text("user_id,item_id,state\n1,2,warm\n")
    before = directories.identity(whole, DATA)
    assert directories.identity(whole, DATA) == before
    file.write_text("user_id,item_id,state\n1,2,user_cold\n")
    assert directories.identity(whole, DATA) != before


def test_a_run_of_a_time_when_options_were_stored_otherwise_is_refused_with_the_reason(tmp_path):
    """Its options stood beside the learner's name, also those of other learners: what it was trained with is not known."""
    with Checkpoints(tmp_path, identity=directories.identity(config.Config(), DATA)):
        directories.write(tmp_path, config.Config(), DATA, DATA, catalogue(DATA))
    directories.write_json(tmp_path / "result.json", {"step": 1, "stopped": "finished"})
    assert directories.read(tmp_path).config == config.Config()
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["config"]["learner"] = {"name": "ridge", "inner_lr": None, "inner_steps": 5, "slots": 8, "loss": "auto"}
    directories.write_json(tmp_path / "config.json", stored)
    with pytest.raises(MetarecError) as refused:
        directories.read(tmp_path)
    assert "was trained by an earlier version, whose options were stored otherwise; train it again" in str(
        refused.value
    )
    assert "\n" not in str(refused.value)
