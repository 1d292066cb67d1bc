"""A configuration survives JSON, refuses what it does not know, and builds what it says."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metarec_jax import learners
from metarec_jax.core import MetarecError
from metarec_jax.data.interactions import Interactions, Vocabulary
from metarec_jax.data.synthetic import synthetic
from metarec_jax.experiment import config
from metarec_jax.experiment.build import (
    build_data,
    build_learner,
    build_loss,
    build_model,
    build_params,
    build_source,
    build_split,
    negatives,
    settled,
)
from metarec_jax.experiment.config import (
    Config,
    DataConfig,
    LearnerConfig,
    ModelConfig,
    SplitConfig,
    TaskConfig,
    TrainConfig,
)
from metarec_jax.experiment.protocol import fixed_tasks
from metarec_jax.training.loop import run_keys


def test_json_and_back():
    given = Config(
        data=DataConfig(name="ratings.csv", user_col="uid"),
        split=SplitConfig(scenarios=("user_cold",), by="time"),
        tasks=TaskConfig(support=(2, 8), negatives=0),
        model=ModelConfig(hidden=()),
        learner=LearnerConfig("maml", {"only": ("net",)}),
        train=TrainConfig(lr=1e-2, seed=7),
    )
    assert config.from_dict(json.loads(json.dumps(config.to_dict(given)))) == given


def test_what_is_not_given_has_its_default():
    assert config.from_dict({"train": {"steps": 5}}) == Config(train=TrainConfig(steps=5))
    assert config.from_dict({}) == Config()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trane": {}}, "has no 'trane'; perhaps you meant 'train'"),
        ({"train": {"step": 5}}, "section 'train' has no 'step'; perhaps you meant 'steps'"),
        ({"learner": {"name": "mamml"}}, "learner 'mamml' is not known; perhaps you meant 'maml'"),
        ({"train": {"steps": "many"}}, "train.steps expected a whole number, got 'many'"),
        ({"train": {"steps": 1.5}}, "train.steps expected a whole number"),
        ({"train": {"steps": True}}, "train.steps expected a whole number"),
        ({"train": {"lr": -1}}, "train.lr must be 0 or more, got -1"),
        ({"split": {"test": 1.5}}, "split.test must be between 0 and 0.9"),
        ({"split": {"scenarios": ["cold"]}}, "'cold' is not known; perhaps you meant"),
        ({"tasks": {"support": [3]}}, "tasks.support expected a list of 2 whole numbers"),
        ({"tasks": {"support": [9, 3]}}, "the minimum, 9, is more than the maximum, 3"),
        ({"tasks": {"negatives": -1}}, "tasks.negatives must be 0 or more"),
        ({"model": {"hidden": [64, 0]}}, "model.hidden must be 1 or more, got 0"),
    ],
)
def test_refusals_name_the_field_and_the_remedy(values, message):
    with pytest.raises(MetarecError, match=message.replace(".", r"\.")):
        config.from_dict(values)


def test_a_whole_number_serves_as_a_number():
    assert config.from_dict({"train": {"lr": 1}}).train.lr == 1


@pytest.fixture(scope="module")
def ratings():
    return synthetic(30, 20, ratings_per_user=(8, 12), size=2).data


def test_test_tasks_show_no_more_than_max_history_and_know_all_of_training(ratings):
    given = Config(split=SplitConfig(scenarios=("warm", "item_cold"), test=0.2), tasks=TaskConfig(max_history=2))
    parts = build_split(given.split, ratings)
    found = fixed_tasks(given, parts, parts.test, seed=0, max_users=1000)
    assert set(found) == {"warm", "item_cold"}
    assert found["warm"].support_mask.sum(1).max() == 2
    for tasks in found.values():
        for k, user in enumerate(tasks.user):
            assert sorted(tasks.past[k].indices) == sorted(parts.train.item[parts.train.user == user])


def test_a_warm_start_keeps_the_form_of_the_parameters(ratings):
    given = Config(model=ModelConfig(size=2))
    learner = build_learner(given, ratings)
    params = build_params(given, learner, ratings)
    assert jax.tree.structure(params) == jax.tree.structure(learner.init(jax.random.key(0)))


def test_no_warm_rows_where_the_model_has_no_place_for_them(ratings):
    for given in (Config(train=TrainConfig(warm_start=False)), Config(model=ModelConfig(head="mlp"))):
        assert build_params(given, build_learner(given, ratings), ratings) is None


def test_ridge_wants_vectors():
    with pytest.raises(MetarecError, match="--learner maml"):
        Config(model=ModelConfig(name="meta_recommender"))


def test_clicks_get_negatives_and_a_click_loss(ratings):
    clicks = build_data(DataConfig(name="synthetic:30x20", implicit=True))
    assert clicks.rating is None
    assert negatives(TaskConfig(), clicks) == 4
    assert negatives(TaskConfig(), ratings) == 0
    assert negatives(TaskConfig(negatives=1), ratings) == 1
    assert build_loss(LearnerConfig("maml"), clicks).__name__ == "bce"
    assert build_loss(LearnerConfig("maml", {"loss": "bpr"}), clicks).__name__ == "bpr"
    assert build_loss(LearnerConfig("maml"), ratings).__name__ == "mse"
    assert build_loss(LearnerConfig(), ratings).__name__ == "mae"


def test_columns_are_for_files(tmp_path):
    with pytest.raises(MetarecError, match="user_col is for files"):
        build_data(DataConfig(name="synthetic:30x20", user_col="uid"))
    file = tmp_path / "stars.csv"
    file.write_text("uid,movie,stars\n1,a,5\n1,b,3\n2,a,1\n2,b,2\n")
    data = build_data(DataConfig(name=str(file), user_col="uid", item_col="movie", rating_col="stars"))
    assert data.rating.tolist() == [5, 3, 1, 2]


def test_splits_as_configured(ratings):
    parts = build_split(SplitConfig(scenarios=("user_cold",), test=0.2), ratings)
    assert set(parts.test) == {"user_cold"}
    assert len(np.unique(parts.test["user_cold"].user)) == 6  # 0.2 x 30 users


def short_clicks(longest):
    """Twelve users with 1 to ``longest`` of 3 items."""
    user = np.concatenate([np.full(1 + u % longest, u + 1) for u in range(12)])
    item = np.concatenate([1 + np.arange(1 + u % longest) for u in range(12)])
    return Interactions(user, item, None, None, Vocabulary(np.arange(12)), Vocabulary(np.arange(3)))


@pytest.mark.parametrize(("longest", "sizes"), [(3, {1}), (2, {1}), (1, {0})])
def test_supports_are_as_short_as_the_histories_and_noted(longest, sizes):
    data = short_clicks(longest)
    source = build_source(Config(), data)
    drawn = jax.jit(source.draw)(source.data, jax.random.key(0)).support
    positives = np.asarray((drawn.mask * drawn.target).sum(1))
    assert set(positives.astype(int).tolist()) == sizes
    (note,) = settled(Config(), data)
    assert f"has {longest} interactions" in note
    given = Config(tasks=TaskConfig(support=(3, 8)))
    assert settled(given, data) == ()
    with pytest.raises(MetarecError, match=r"4 interactions .*the maximum is \d\), which --support 3 8"):
        build_source(given, data)


@pytest.mark.parametrize("longest", [1, 2, 3])
def test_an_item_map_of_a_few_items_and_short_histories(longest):
    """Three items hold vectors of three; its start solves for supports that there are."""
    data = short_clicks(longest)
    given = Config(learner=LearnerConfig("item_map", {"size": 16}))
    learner = build_learner(given, data)
    assert learner.tables["item_id"].size == 2 * 3 + 1
    params = build_params(given, learner, data)
    assert (params is None) == (longest == 1)  # nobody has a support and a query: no closed form
    assert params is None or np.isfinite(params["tables"]["item_id"]).all()
    assert any("item_map has vectors of 3, not of size=16" in note for note in settled(given, data))


@pytest.mark.slow
def test_a_gaussian_process_knows_whom_it_counted(ratings):
    """Whatever the tasks say of user rows: with none, a user's own answers would stand in the kernels that predict them."""
    given = Config(learner=LearnerConfig("gaussian_process"), tasks=TaskConfig(tasks=8, user_drop=1.0))
    source = build_source(given, ratings)
    assert np.all(np.asarray(jax.jit(source.draw)(source.data, jax.random.key(0)).query.inputs["user_id"]) > 0)
    learner = build_learner(given, ratings)
    fixed = build_params(given, learner, ratings)["fixed"]
    assert float(np.trace(fixed["pairs"])) == len(ratings)
    with pytest.raises(MetarecError, match="is for ratings, and the data has clicks; give --learner item_map"):
        build_learner(given, replace(ratings, rating=None))


@pytest.mark.slow
def test_a_users_row_alone_takes_one_rating_for_less_than_thirty(ratings):
    """The step of the command line's maml is that of prior 30: at one rating a thirty-first of the paper's."""
    moved = {}
    for prior in (None, 30.0, 0.0):
        given = Config(model=ModelConfig(size=2), learner=LearnerConfig("maml", {"inner_steps": 1}))
        learner = build_learner(given, ratings)
        if prior is not None:
            row, rule = ("tables/user_id",), learners.meta_sgd(0.3)
            learner = learners.maml(build_model(given.model, ratings), inner_steps=1, only=row, rule=rule, prior=prior)
        source = build_source(given, ratings)
        support = jax.tree.map(lambda x: x[0], jax.jit(source.draw)(source.data, jax.random.key(0))).support
        params, one = (
            jax.jit(learner.init)(jax.random.key(1)),
            support._replace(mask=(np.arange(len(support.mask)) == 0) * 1.0),
        )
        rows = jax.jit(learner.adapt)(params, one, jax.random.key(0))["rows"]["user_id"]
        moved[prior] = np.asarray(rows[1] if support.inputs["user_id"][0] else rows[0]) - params["tables"]["user_id"][0]
    assert np.abs(moved[0.0]).max() > 1e-3
    np.testing.assert_allclose(moved[None], moved[30.0], rtol=1e-6)
    np.testing.assert_allclose(moved[30.0], moved[0.0] / 31, rtol=1e-3, atol=1e-7)


def test_a_warm_start_and_training_draw_from_keys_of_their_own(ratings):
    """Parameters are drawn from one half of the seed's key, training from the other; neither from the key that was split."""
    given = Config(model=ModelConfig(size=2), train=TrainConfig(seed=3))
    learner, used = build_learner(given, ratings), []

    def init(key):
        used.append(key)
        return learner.init(key)

    build_params(given, learner._replace(init=init), ratings)
    of_training, root = run_keys(3)[1], jax.random.key(3)
    assert len(used) == 1
    assert not any(jnp.array_equal(jax.random.key_data(used[0]), jax.random.key_data(k)) for k in (of_training, root))


@pytest.mark.parametrize("name", ["cvar", "dropout_net"])
def test_a_row_that_the_loss_reads_enters_training(ratings, name):
    """With the unknown row in its place there would be nothing to rebuild, and nothing to drop."""
    for tasks in (TaskConfig(), TaskConfig(user_drop=1.0)):
        source = build_source(Config(learner=LearnerConfig(name), tasks=tasks), ratings)
        assert np.all(np.asarray(jax.jit(source.draw)(source.data, jax.random.key(0)).query.inputs["user_id"]) > 0)


def test_the_common_row_is_the_mean_of_the_users_who_train(ratings):
    given = Config(model=ModelConfig(size=2), learner=LearnerConfig("mwuf", {"hidden": 2}))
    train = ratings.take(ratings.user > 5)
    params = build_params(given, build_learner(given, ratings), train)
    rows = np.asarray(params["tables"]["user_id"])[np.unique(train.user)]
    assert np.abs(rows).max() > 0.1
    np.testing.assert_allclose(params["common"], rows.mean(0), atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"model": ModelConfig(head="mlp")}, {"train": TrainConfig(warm_start=False)}], ids=["mlp", "cold"]
)
@pytest.mark.parametrize("name", ["meta_embedding", "mwuf", "cvar"])
def test_rows_are_made_for_a_trained_model_only(name, options):
    """A frozen random model would be all that the made rows could serve."""
    with pytest.raises(MetarecError, match=f"learner '{name}' makes rows for a model that a factorisation has trained"):
        Config(learner=LearnerConfig(name), **options)


def test_a_generator_that_trains_its_model_too_starts_anywhere():
    given = Config(learner=LearnerConfig("meta_embedding", {"freeze": False}), model=ModelConfig(head="mlp"))
    assert given.learner.options["freeze"] is False


@pytest.mark.parametrize(("tasks_of", "side"), [("users", "user"), ("items", "item")])
def test_rows_of_content_require_features_of_the_side_of_the_tasks(ratings, tasks_of, side):
    bare = replace(ratings, user_features={}, item_features={})
    given = Config(data=DataConfig(tasks_of=tasks_of), learner=LearnerConfig("meta_embedding"))
    with pytest.raises(MetarecError, match=f"the data has no {side} features; give --{side}-features"):
        build_learner(given, bare)
