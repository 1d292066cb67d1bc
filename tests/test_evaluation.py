"""Evaluation and its report of numbers, on tasks small enough to work out by hand."""

import gc
import json
import math
import threading
import weakref
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metarec_jax.core import MetarecError, Method, Table
from metarec_jax.data.catalogue import Catalogue
from metarec_jax.data.interactions import Interactions, Vocabulary
from metarec_jax.data.synthetic import synthetic
from metarec_jax.data.tasks import TaskSet, make_tasks
from metarec_jax.evaluation import metrics, results, scoring
from metarec_jax.evaluation.evaluate import evaluate
from metarec_jax.evaluation.intervals import estimate
from metarec_jax.evaluation.metrics import at_least, top_rated
from metarec_jax.evaluation.results import ALL, Difference
from metarec_jax.report.write import terminal_table
from metarec_jax.serving.recommender import Recommender

ITEMS = 8
KNOWN = Catalogue(jnp.zeros(40, jnp.int32), jnp.arange(ITEMS + 1, dtype=jnp.int32), {}, {})


def constant(scores):
    """The same score of an item for everyone, whatever the support."""
    table = jnp.asarray(scores, jnp.float32)
    return Method({"score": table}, lambda params, support, key: (), lambda p, adapted, x: p["score"][x["item_id"]])


def support_mean():
    """The mean of the support; 3 without any."""

    def adapt(params, support, key):
        n = support.mask.sum()
        return jnp.where(n > 0, (support.target * support.mask).sum() / jnp.maximum(n, 1.0), 3.0)

    return Method({}, adapt, lambda params, adapted, x: jnp.full(x["item_id"].shape, adapted))


def tasks(*users):
    """Users as (support {item: rating}, query {item: rating})."""

    def column(part, values, dtype):
        width = max(len(user[part]) for user in users)
        rows = [list(values(user[part])) for user in users]
        return np.array([row + [0] * (width - len(row)) for row in rows], dtype)

    def sides(part):
        return (
            column(part, lambda d: d.keys(), np.int32),
            column(part, lambda d: d.values(), np.float32),
            column(part, lambda d: [1] * len(d), np.float32),
        )

    return TaskSet(np.arange(1, len(users) + 1, dtype=np.int32), *sides(0), *sides(1))


TWO = tasks(
    ({1: 5.0, 2: 4.0}, {3: 5.0, 4: 1.0, 5: 4.0}),
    ({1: 2.0}, {3: 2.0, 6: 3.0}),
)
BY_ITEM = constant([0, 0, 0, 4.0, 3.0, 2.0, 1.0, 6.0, 0.5])


def small(methods=None, scenarios=None, **options):
    methods = {"by_item": BY_ITEM, "mean": support_mean()} if methods is None else methods
    options = {"topn": (1, 2), "batch": 4, "baselines": ("by_item",)} | options
    return evaluate(methods, {"user_cold": TWO} if scenarios is None else scenarios, KNOWN, **options)


@pytest.fixture(scope="module")
def report():
    return small(catalogue_ranking=True, catalogue_topn=(2,), curve=(1, 2), rating_range=(1.0, 5.0))


def test_query_metrics_by_hand(report):
    first, second = report.rows("by_item", "user_cold").to_dict("records")
    assert first["mae"] == pytest.approx((1 + 2 + 2) / 3)  # 4 for 5, 3 for 1, 2 for 4
    assert second["mae"] == pytest.approx((2 + 2) / 2)  # 4 for 2, 1 for 3
    assert first["squared_error"] == pytest.approx((1 + 4 + 4) / 3)
    # ranked 5, 1, 4; gains 31, 1; the best two are 31, 15
    assert first["ndcg@2"] == pytest.approx((31 + 1 / math.log2(3)) / (31 + 15 / math.log2(3)))
    assert (first["precision@2"], first["recall@2"], first["mrr@2"], first["hit_rate@1"]) == (0.5, 0.5, 1, 1)
    assert first["auc"] == pytest.approx((1 + 0) / 2)  # item 3 above item 4, item 5 below


def test_a_task_without_a_relevant_item_is_left_out_and_counted(report):
    second = report.rows("by_item", "user_cold").iloc[1]
    assert math.isnan(second["precision@1"])
    assert not math.isnan(second["ndcg@1"])  # a gain of 2^3 - 1 is there
    assert report.summary()["by_item"]["user_cold"]["precision@1"].tasks == 1
    counts = report.counts()["user_cold"]
    assert (counts["tasks"], counts["queries"], counts["no_answer"]["precision@1"]) == (2, 5, 1)
    assert "mae" not in counts["no_answer"]


def test_pooled_rmse_weights_every_rating_alike(report):
    pooled = report.summary()["by_item"]["user_cold"]["rmse_pooled"]
    assert pooled.mean == pytest.approx(math.sqrt((1 + 4 + 4 + 4 + 4) / 5))


def test_catalogue_metrics_by_hand(report):
    """First user: items 1 and 2 are known. Left: 7, 3, 4, 5, ... by score; relevant are 3 (rank 2) and 5 (rank 4)."""
    first, second = report.rows("by_item", "user_cold").to_dict("records")
    assert first["catalogue_mrr"] == pytest.approx(1 / 2)
    assert first["catalogue_recall@2"] == pytest.approx(1 / 2)
    assert first["catalogue_precision@2"] == pytest.approx(1 / 2)
    assert first["catalogue_ndcg@2"] == pytest.approx((1 / math.log2(3)) / (1 + 1 / math.log2(3)))
    assert math.isnan(second["catalogue_mrr"])


def test_catalogue_in_small_chunks_of_users_and_items_is_the_same(report, monkeypatch):
    monkeypatch.setattr("metarec_jax.evaluation.scoring._SCORES", ITEMS + 1)
    monkeypatch.setattr("metarec_jax.evaluation.scoring._CHUNK", 4)
    fresh = {"by_item": constant(BY_ITEM.params["score"]), "mean": support_mean()}
    again = small(fresh, catalogue_ranking=True, catalogue_topn=(2,), curve=(1, 2), rating_range=(1.0, 5.0))
    assert again.per_task.equals(report.per_task)


def recording(calls, scores=None):
    """`BY_ITEM` with whole rows of scores, and a note of the users of each call."""

    def everything(params, adapted):
        calls.append(len(adapted))
        return np.tile(params["score"], (len(adapted), 1)) if scores is None else scores()

    adapt = lambda params, support, key: jnp.zeros(())  # noqa: E731
    return Method(BY_ITEM.params, adapt, BY_ITEM.predict, scores=everything)


def test_a_method_that_scores_whole_rows_is_asked_for_them_and_few_users_are_not_padded_to_many(report):
    calls = []
    found = small({"by_item": recording(calls)}, catalogue_ranking=True, catalogue_topn=(2,), batch=256)
    names = [name for name in found.metrics if name.startswith("catalogue")]
    whole, chunks = (r.rows("by_item", "user_cold")[names] for r in (found, report))
    assert whole.equals(chunks)
    assert calls == [2]


def test_an_interrupt_is_heard_between_blocks_of_users(monkeypatch):
    monkeypatch.setattr("metarec_jax.evaluation.scoring._SCORES", ITEMS + 1)  # a user a block
    monkeypatch.setattr("metarec_jax.evaluation.evaluate.runs_together", lambda: 2)
    calls, others = [], []
    stopped = threading.Event()

    def interrupted():
        stopped.set()
        raise KeyboardInterrupt

    def waiting():
        assert stopped.wait(60)
        return np.zeros((1, ITEMS + 1), np.float32)

    many = tasks(*[({1: 1.0}, {k % 7 + 2: 5.0, 1: 1.0}) for k in range(32)])
    methods = {"a": recording(calls, interrupted), "b": recording(others, waiting), "c": recording(others, waiting)}
    with pytest.raises(KeyboardInterrupt):
        small(methods, {"user_cold": many}, catalogue_ranking=True, batch=64)
    assert len(calls) == 1
    assert len(others) < 32


def test_new_items_are_ranked_among_new_items_where_all_query_items_are_new():
    """Training knew items 1 to 5. The user had 6; of 7 and 8, item 7 stands first, whatever the old items score."""
    known = KNOWN._replace(item_row=jnp.array([0, 1, 2, 3, 4, 5, 0, 0, 0]))
    new, mixed = tasks(({6: 5.0}, {7: 5.0, 8: 1.0})), tasks(({6: 5.0}, {7: 5.0, 1: 1.0}))
    unknown = Method({}, lambda p, s, key: (), lambda p, adapted, x: 9.0 * (x["item_id"] > 0) + x["item_like"][:, 0])
    known = known._replace(item={"item_like": jnp.array([0, 0, 0, 0, 0, 0, 0.5, 0.2, 0.1])[:, None]})
    found = evaluate(
        {"a": unknown}, {"item_cold": new, "warm": mixed}, known, catalogue_ranking=True, catalogue_topn=(1,), batch=4
    )
    assert found.rows("a", "item_cold")["catalogue_mrr"].tolist() == [1.0]
    assert found.rows("a", "warm")["catalogue_mrr"].tolist() == [pytest.approx(1 / 6)]  # after the five old ones
    assert found.settings["rank_new_items"] == ["item_cold"]
    assert found.settings["new_items"] == 3


def test_all_that_a_known_user_had_leaves_the_candidates_beyond_the_cut_of_the_support():
    """User 1 had items 1 to 5 and user 2 item 1; the score falls with the item's row, and each is asked for item 7.

    Of user 1 the support shows two. Among what is left, 6, 7 and 8, item 7 stands second; of user 2 it stands sixth.
    """
    ids = Vocabulary(np.arange(2)), Vocabulary(np.arange(ITEMS))
    past = Interactions(np.array([1] * 5 + [2]), np.array([1, 2, 3, 4, 5, 1]), np.full(6, 5.0, np.float32), None, *ids)
    now = Interactions(np.array([1, 2]), np.array([7, 7]), np.full(2, 5.0, np.float32), None, *ids)
    falling = {"falling": constant(-np.arange(ITEMS + 1.0))}
    options = {"catalogue_ranking": True, "catalogue_topn": (1,), "baselines": ()}
    warm = make_tasks(now, history=past, support=(1, 2))
    found = small(falling, {"warm": warm}, **options)
    assert found.rows("falling", "warm")["catalogue_mrr"].tolist() == [pytest.approx(1 / 2), pytest.approx(1 / 6)]
    assert found.rows("falling", "warm")["support"].tolist() == [2, 1]
    assert found.notes[0] == (
        "warm: the known history of 1 of 2 users exceeds the support of at most 2; rankings exclude all of it"
    )
    alone = small(falling, {"warm": warm.take(np.array([False, True]))}, **options)
    assert alone.rows("falling", "warm")["catalogue_mrr"].tolist() == [pytest.approx(1 / 6)]
    assert not any("more before" in note for note in alone.notes)
    joined = small(falling, {"user_cold": TWO, "warm": warm}, **options)
    assert joined.rows("falling", "warm")["catalogue_mrr"].tolist() == [pytest.approx(1 / 2), pytest.approx(1 / 6)]
    two = Interactions(np.array([1, 1]), np.array([7, 8]), np.full(2, 5.0, np.float32), None, *ids)
    new = make_tasks(two, past=past, query=1)  # the support is one of the two, and item 6 alone stands before the other
    assert small(falling, {"item_cold": new}, **options).rows("falling", "item_cold")["catalogue_mrr"].tolist() == [0.5]


def test_before_adapting_and_the_curve(report):
    after, before = report.rows("mean", "user_cold"), report.rows("mean", "user_cold", 0)
    assert after["mae"].tolist() == pytest.approx([(0.5 + 3.5 + 0.5) / 3, (0 + 1) / 2])  # 4.5 and 2
    assert before["mae"].tolist() == pytest.approx([(2 + 2 + 1) / 3, (1 + 0) / 2])  # 3
    assert before["support"].tolist() == [2, 1]
    gain = report.adaptation_gain("mean", "mae", "user_cold")
    assert gain.mean == pytest.approx(((1.5 - 5 / 3) + 0) / 2)
    assert len(report.rows("mean", "user_cold", 2)) == 1  # only one user has two
    one = report.rows("mean", "user_cold", 1)["mae"]
    assert one.iloc[0] == pytest.approx((0 + 4 + 1) / 3)  # shown 5 alone
    curve = report.curve("mae", "user_cold", min_share=0.5)
    line = curve[curve["method"] == "mean"]
    assert line["shown"].tolist() == [0, 1, 2]
    assert line["tasks"].tolist() == [1, 1, 1]  # the same user at every point
    assert line["mean"].tolist() == pytest.approx([5 / 3, 5 / 3, 1.5])
    assert report.curve("mae", "user_cold", min_share=0.6)["shown"].max() == 1


def test_precision_over_fewer_candidates_than_n_is_the_share_of_them():
    """Items 6 to 8 are new: one is in the support, two are candidates, both relevant. Precision is that of the list."""
    known = KNOWN._replace(item_row=jnp.array([0, 1, 2, 3, 4, 5, 0, 0, 0]))
    some = tasks(({6: 5.0}, {7: 5.0, 8: 5.0}), ({7: 4.0}, {6: 4.0, 8: 1.0}))
    found = evaluate(
        {"a": constant(range(9))}, {"item_cold": some}, known, catalogue_ranking=True, catalogue_topn=(1, 10), batch=4
    )
    rows = found.rows("a", "item_cold")
    assert rows["catalogue_precision@10"].tolist() == [1.0, 0.5]
    assert rows["catalogue_recall@10"].tolist() == [1.0, 1.0]
    assert float(metrics.precision(jnp.array([2.0, 1.0]), jnp.ones(2), topn=10)) == 1.0
    assert rows["precision@10"].tolist() == [1.0, 0.5]  # over the query: the same lists


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_candidate_whose_score_is_not_finite_is_refused(bad):
    """No query item has it, but the catalogue is ranked by it: 1 < nan is false, so that it would stand behind all."""
    scores = [bad, 1.0, 2.0, 4.0, 3.0, 2.0, 1.0, 6.0, bad]  # item 0 is none, item 8 in no query
    small({"by_item": constant(scores)})
    with pytest.raises(MetarecError, match="'by_item' returned scores that are not finite for 2 of 2 tasks"):
        small({"by_item": constant(scores)}, catalogue_ranking=True, catalogue_topn=(2,))


def test_debugging_for_nan_does_not_stop_an_evaluation():
    """nan is "no answer" in a metric; what a method itself makes is still watched."""
    with jax.debug_nans(True):
        found = small(catalogue_ranking=True, curve=(1,))
        assert found.counts()["user_cold"]["no_answer"]["precision@1"] == 1
        with pytest.raises(FloatingPointError):
            small({"broken": constant([np.nan] * 9)})


def test_predictions_are_clipped_for_errors_but_not_for_ranking():
    high = constant([0, 0, 0, 9.0, 8.0, 7.0, 9.0, 0, 0])
    clipped = small({"high": high}, rating_range=(1.0, 5.0)).rows("high", "user_cold").iloc[0]
    assert clipped["mae"] == pytest.approx((0 + 4 + 1) / 3)  # 5 for each of 5, 1, 4
    assert clipped["mrr@1"] == 1


def test_ranking_only_methods_get_no_rating_error():
    found = small(ranking_only={"by_item"})
    row = found.summary()["by_item"]["user_cold"]
    assert not {"mae", "rmse", "squared_error", "rmse_pooled"} & set(row)
    assert "ndcg@1" in row
    assert found.best("mae", "user_cold") == "mean"
    assert found.best_baseline("mae", "user_cold") is None
    assert "mae" not in {d.metric for d in found.compare()}


def test_relevance_and_gain_are_arguments():
    same = small(relevant=at_least(4.0)).per_task
    assert same.equals(small(relevant=4.0).per_task)
    top = small(relevant=top_rated(1), gain="binary").rows("by_item", "user_cold").to_dict("records")
    assert (top[0]["ndcg@1"], top[1]["ndcg@1"]) == (1, 0)  # 5 stands first; 3 does not
    assert small(relevant=top_rated(1)).settings["relevant"] == "the 1 highest targets of the list"


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (1.0, 69_016.0), (-10.0, 10.0)])
def test_any_scale_has_its_gain(low, high):
    """By item 4, 3, 2: the lowest first, then the highest, then the middle. Gains 0, 31 and 2^2.5 - 1."""
    middle = (low + high) / 2
    found = small(scenarios={"user_cold": tasks(({1: low}, {3: low, 4: high, 5: middle}))}, rating_range=(low, high))
    assert found.settings["gain"] == "scaled"
    half = 2**2.5 - 1
    wanted = (31 / math.log2(3)) / (31 + half / math.log2(3))
    assert found.rows("by_item", "user_cold")["ndcg@2"].iloc[0] == pytest.approx(wanted, rel=1e-5)
    assert small(rating_range=(1.0, 5.0)).settings["gain"] == "exp"


def test_batch_size_and_scenario_company_change_nothing():
    alone = small(catalogue_ranking=True)
    other = small(catalogue_ranking=True, batch=1)
    assert alone.per_task.equals(other.per_task)
    joined = small(scenarios={"user_cold": TWO, "warm": tasks(({1: 1.0}, {2: 1.0, 3: 5.0}))}, catalogue_ranking=True)
    columns = ["mae", "ndcg@1", "catalogue_mrr"]
    a, b = (r.rows("by_item", "user_cold")[columns].to_numpy() for r in (alone, joined))
    np.testing.assert_array_equal(a, b)
    assert joined.scenarios == ["user_cold", "warm"]


def test_second_evaluation_compiles_nothing():
    def traced():
        return sum(program.traced for kinds in scoring._programs.values() for program in kinds.values())

    methods = {"mean": support_mean()}
    small(methods)
    before = traced()
    small({"mean": methods["mean"]._replace(params={})})
    assert traced() == before


def test_a_method_that_nobody_has_any_more_is_forgotten():
    """A closure that holds a table, as a user's own method may: evaluated with the catalogue, then dropped."""

    class Held:
        pass

    def evaluated(seed):
        held = Held()
        held.table = jnp.asarray(np.random.default_rng(seed).normal(size=9), jnp.float32)
        predict = lambda p, adapted, x: held.table[x["item_id"]]  # noqa: E731
        method = Method({}, lambda p, support, key: held.table.mean(), predict)
        small({"own": method, "by_item": BY_ITEM}, catalogue_ranking=True, catalogue_topn=(2,), curve=(1,))
        return weakref.ref(held), len(scoring._programs)

    first, programs = evaluated(0)
    second, again = evaluated(1)
    gc.collect()
    assert first() is None
    assert second() is None
    assert again <= programs + 2  # those of the first may wait for the collector, no longer
    assert len(scoring._programs) <= programs


def test_draws_depend_on_the_seed_and_the_task_only():
    noise = Method(
        {}, lambda p, support, key: jax.random.uniform(key), lambda p, adapted, x: jnp.full(x["item_id"].shape, adapted)
    )
    mae = lambda **options: small({"noise": noise}, **options).rows("noise", "user_cold")["mae"].tolist()  # noqa: E731
    assert mae() == mae(batch=1)
    assert mae() != mae(seed=1)


def test_clicks_have_nothing_to_rank_inside_the_query():
    clicks = tasks(({1: 1.0, 2: 0.0}, {3: 1.0, 4: 1.0}), ({1: 1.0}, {7: 1.0}))
    found = small(scenarios={"user_cold": clicks}, relevant=1, catalogue_ranking=True, catalogue_topn=(2,), curve=(1,))
    assert not any(m.startswith(("ndcg", "auc", "mrr")) for m in found.metrics)
    assert any("over all candidates only" in note for note in found.notes)
    assert found.rows("by_item", "user_cold")["catalogue_mrr"].tolist() == [0.5, 1.0]
    assert found.curve("catalogue_mrr", "user_cold")["shown"].tolist() == [0, 1, 0, 1]


def test_json_has_the_promised_shape(report):
    text = json.loads(json.dumps(report.to_json()))
    assert set(text["results"]["mean"]["user_cold"]["mae"]) == {"mean", "se", "low", "high"}
    assert text["results"]["mean"]["user_cold"]["mae"]["mean"] == pytest.approx((1.5 + 0.5) / 2)
    assert text["before_adapting"]["mean"]["user_cold"]["mae"]["mean"] == pytest.approx((5 / 3 + 0.5) / 2)
    assert text["seeds"] == [0]
    assert text["counts"]["user_cold"]["tasks"] == 2
    assert set(text["times"]["mean"]) == {"seconds_per_user", "first_call_seconds"}
    assert {(d["method"], d["baseline"]) for d in text["comparison"]} == {("mean", "by_item")}


def test_save_and_load(report, tmp_path):
    again = results.load(report.save(tmp_path / "evaluation"))
    assert again.per_task.astype({"method": str, "scenario": str}).equals(
        report.per_task.astype({"method": str, "scenario": str})
    )
    assert again.to_json() == report.to_json()
    with pytest.raises(MetarecError, match=r"per_task\.parquet"):
        results.load(tmp_path)


def test_merge_keeps_a_users_tasks_together():
    """The same two users under two seeds are still two users: the interval does not shrink."""
    one, two = small(), small(seed=1)
    both = results.merge([one, two])
    assert both.seeds == [0, 1]
    a, b = (r.summary()["mean"]["user_cold"]["mae"] for r in (one, both))
    assert (b.mean, b.tasks) == (pytest.approx(a.mean), 2 * a.tasks)
    assert (b.se, b.low, b.high) == (pytest.approx(a.se), pytest.approx(a.low), pytest.approx(a.high))
    assert both.by_seed("mae")["seed"].tolist() == [0, 1] * 2
    assert both.paired("mean", "by_item", "mae", "user_cold").tasks == 4
    with pytest.raises(MetarecError, match="repeat"):
        results.merge([one, one])
    with pytest.raises(MetarecError, match="differ"):
        results.merge([one, small(gain="linear", seed=1)])


def test_paired_difference_by_hand(report):
    d = report.paired("mean", "by_item", "mae", "user_cold")
    gaps = [1.5 - 5 / 3, 0.5 - 2]
    assert d.mean == pytest.approx(sum(gaps) / 2)
    assert d.se == pytest.approx(abs(gaps[0] - gaps[1]) / 2)  # sd / sqrt(2) of two numbers
    half = 12.706 * d.se  # t with one degree of freedom
    assert (d.low, d.high) == (pytest.approx(d.mean - half, rel=1e-3), pytest.approx(d.mean + half, rel=1e-3))
    assert isinstance(d, Difference)
    assert (d.users, d.better, d.worse) == (2, False, False)


def test_the_best_baseline_knows_the_direction():
    both = small({"a": BY_ITEM, "b": support_mean(), "c": support_mean()}, baselines={"a", "b"})
    assert both.best_baseline("mae", "user_cold") == "b"  # 1.0 against 1.83
    assert both.best_baseline("mrr@2", "user_cold") == "a"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": {}}, "no method"),
        ({"gain": "cubic"}, "exp, linear"),
        ({"rating_range": (5.0, 1.0)}, "lowest, highest"),
        ({"rating_range": (1.0, 4.0)}, "1 to 4.*from 1 to 5"),
        ({"scenarios": {"user_cold": tasks(({1: -1.0}, {2: 1.0, 3: -1.0}))}}, r"rating_range=\(lowest, highest\)"),
        (
            {"scenarios": {"user_cold": tasks(({1: -1.0}, {2: 1.0, 3: -1.0}))}, "gain": "exp"},
            "'exp' expects targets from 0 to 100, got -1 to 1",
        ),
        ({"scenarios": {"warm": TWO.take(np.arange(0))}}, "warm"),
        ({"methods": {"broken": constant([np.nan] * 9)}}, "'broken'.*not finite.*2 of 2"),
    ],
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(MetarecError, match=message):
        small(**options)


def with_table(rows, held=None, column="item_id"):
    """A method that reads one table, said to have ``rows`` rows, and having ``held``."""
    params = {"tables": {"score": jnp.zeros((rows if held is None else held, 1))}}
    predict = lambda p, adapted, x: p["tables"]["score"][x[column], 0]  # noqa: E731
    return Method(params, lambda p, support, key: (), predict, {"score": Table(rows, 1, (column,))})


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (with_table(5), r"'small'.*table 'score' has 5 rows.*'item_id'.*8"),
        (with_table(31), r"'small'.*31 rows.*catalogue 9"),
        (with_table(ITEMS + 1, held=5), r"'small'.*'score' of 5 rows.*9"),
        (with_table(ITEMS + 1, column="item_genre"), r"'small'.*column 'item_genre'.*user_id, item_id"),
    ],
)
def test_tables_and_catalogue_must_agree(method, message):
    """JAX clamps an index past the end: without this, every item past it has the score of the last row."""
    with pytest.raises(MetarecError, match=message):
        small({"mean": support_mean(), "small": method})
    data = synthetic(10, ITEMS, ratings_per_user=(4, 6), size=2).data
    if "item_genre" not in message:
        with pytest.raises(MetarecError, match=message.removeprefix("'small'.*")):
            Recommender(method, data, KNOWN)


def test_tables_that_agree_are_taken():
    small({"equal": with_table(ITEMS + 1), "rounded": with_table(ITEMS + 1, held=16)})
    new = KNOWN._replace(item_row=jnp.append(KNOWN.item_row[:5], jnp.zeros(ITEMS - 4, jnp.int32)))
    evaluate({"older": with_table(5)}, {"user_cold": TWO}, new, batch=4)  # items that came after it: row 0


@pytest.mark.parametrize(
    ("part", "row", "message"),
    [
        ("query_item", ITEMS + 1, "'user_cold' have query item rows 0..9, .* has 0..8"),
        ("support_item", -1, "'user_cold' have support item rows -1..2, .* has 0..8"),
        ("user", 40, "'user_cold' have user rows 2..40, .* has 0..39"),
    ],
)
def test_tasks_of_another_vocabulary_are_refused(part, row, message):
    rows = getattr(TWO, part).copy()
    rows.flat[0] = row
    with pytest.raises(MetarecError, match=message):
        small(scenarios={"user_cold": replace(TWO, **{part: rows})})


def test_an_empty_scenario_is_noted():
    found = small(scenarios={"user_cold": TWO, "both_cold": TWO.take(np.arange(0))})
    assert found.notes == ("both_cold: skipped, no tasks",)
    assert found.scenarios == ["user_cold"]


def test_unknown_names_are_told(report):
    with pytest.raises(MetarecError, match="by_item, mean"):
        report.rows("nobody", "user_cold")
    with pytest.raises(MetarecError, match="squared_error"):
        report.paired("mean", "by_item", "rmse_pooled", "user_cold")
    assert (report.per_task["shown"] == ALL).sum() == 4


def test_standard_error_and_interval_of_independent_users():
    """400 normal numbers: se = sd / 20, and t with 399 degrees of freedom is 1.966."""
    x = np.random.default_rng(0).normal(size=(400, 1))
    e = estimate(x, np.arange(400))
    assert e.se[0] == pytest.approx(x.std(ddof=1) / 20)
    assert e.low[0] == pytest.approx(e.mean[0] - 1.966 * e.se[0], rel=1e-3)
    assert e.high[0] == pytest.approx(e.mean[0] + 1.966 * e.se[0], rel=1e-3)


SHAPES = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "heavy tails": lambda rng, shape: rng.standard_t(4, size=shape),
    "mostly ties": lambda rng, shape: rng.choice([-0.5, -0.2, 0.0, 0.2, 0.5], shape, p=[0.05, 0.15, 0.6, 0.15, 0.05]),
    "a little skewed": lambda rng, shape: rng.gamma(4.0, size=shape) - 4.0,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("users", [10, 20, 30])
def test_interval_covers_the_truth_about_95_times_of_100(users, shape):
    """4,000 evaluations of so few users, the true mean 0: the interval holds it, and p says the same, in each."""
    x = SHAPES[shape](np.random.default_rng(0), (users, 4000))
    e = estimate(x, np.arange(users))
    covered = (e.low <= 0) & (e.high >= 0)
    assert 0.925 <= covered.mean() <= 0.98
    np.testing.assert_array_equal(covered, e.p_value >= 0.05)


def test_interval_of_users_who_repeat():
    """An interval that drew rows would cover far less: the four rows of a user are nearly one."""
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(30, 2000)), 4, axis=0) + 0.2 * rng.normal(size=(120, 2000))
    e = estimate(x, np.repeat(np.arange(30), 4))
    assert 0.93 <= ((e.low <= 0) & (e.high >= 0)).mean() <= 0.97


def test_p_and_interval_by_hand():
    gap = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    users = np.arange(6)
    e = estimate(np.stack([gap, np.zeros(6), np.ones(6)], 1), users)
    assert e.p_value[0] == pytest.approx(0.0059, abs=0.0001)  # t = 3.5 / 0.7638 = 4.583 with 5 degrees of freedom
    assert e.low[0] == pytest.approx(3.5 - 2.5706 * 0.7638, abs=1e-3)
    assert e.p_value.tolist()[1:] == [1.0, 0.0]  # no difference at all; the same difference for everyone
    assert (e.low[1], e.high[1], e.low[2], e.high[2]) == (0, 0, 1, 1)
    alone = estimate(gap[:1, None], users[:1])
    assert alone.mean[0] == 1.0
    assert np.isnan([alone.se[0], alone.low[0], alone.high[0], alone.p_value[0]]).all()
    nothing = estimate(np.full((3, 1), np.nan), np.arange(3))
    assert np.isnan(nothing.mean[0])
    assert nothing.users[0] == 0


def test_infinity_counts_and_is_not_left_out():
    e = estimate(np.array([[1.0, 1.0], [np.inf, np.nan], [2.0, 3.0]]), np.arange(3))
    assert (e.mean[0], e.low[0], e.high[0]) == (np.inf, np.inf, np.inf)
    assert e.mean[1] == 2.0


def test_a_method_that_overflows_does_not_look_better():
    """Scores of 1e25: the square of the error is beyond float32. By tasks left out, it would be as good as the rest."""
    rows = [0.0, 0, 0, 4.0, 3.0, 2.0, 1e25, 6.0, 0.5]  # item 6 is in the query of the second user alone
    found = small({"wild": constant(rows), "by_item": BY_ITEM})
    summary = found.summary()
    assert summary["wild"]["user_cold"]["squared_error"].mean == math.inf
    assert summary["wild"]["user_cold"]["rmse_pooled"].mean == math.inf
    assert summary["wild"]["user_cold"]["squared_error"].tasks == 2
    assert found.best("squared_error", "user_cold") == "by_item"
    assert found.paired("wild", "by_item", "squared_error", "user_cold").mean == math.inf
    note = next(note for note in found.notes if note.startswith("wild"))
    assert "2 of 4 rows have infinite rmse, squared_error" in note
    assert not any(note.startswith("by_item") for note in found.notes)
    json.dumps(found.to_json(), allow_nan=False)
    assert "inf" in terminal_table(found)


def test_two_methods_that_overflow_alike_are_level():
    rows = [0.0, 0, 0, 4.0, 3.0, 2.0, 1e25, 6.0, 0.5]
    found = small({"a": constant(rows), "b": constant(rows)}, baselines=("b",))
    assert found.paired("a", "b", "squared_error", "user_cold").mean == 0


def test_progress_counts_the_tasks_of_every_point_of_the_curve():
    seen = []
    small(curve=(1, 2), progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == [2, 4, 6, 7]  # whole supports, none, one; two, which one of the tasks has
    assert {total for _, total in seen} == {7}
