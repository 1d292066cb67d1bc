"""Reports joined, the choice among methods, and cells on disk."""

import numpy as np
import pandas as pd
import pytest

from metarec_jax.baselines.closed_form import item_mean, random
from metarec_jax.core import MetarecError
from metarec_jax.data.catalogue import catalogue
from metarec_jax.data.splits import split
from metarec_jax.data.synthetic import synthetic
from metarec_jax.data.tasks import make_tasks
from metarec_jax.evaluation import results
from metarec_jax.evaluation.evaluate import evaluate
from metarec_jax.evaluation.results import ALL, Report
from metarec_jax.experiment.compare import cells
from metarec_jax.experiment.compare.cells import Cell
from metarec_jax.experiment.compare.choice import Choice, Cost, by_support, choose, gap, join, over_seeds, overall
from metarec_jax.experiment.compare.report import advice, next_step
from metarec_jax.experiment.config import Config, DataConfig
from metarec_jax.experiment.protocol import rating_range


def test_reports_joined_are_as_if_from_one_call():
    data = synthetic(60, 30, ratings_per_user=(12, 20), size=2).data
    parts = split(data, ["user_cold"], test=0.3, validation=0.0)
    known = catalogue(data, parts.train)
    methods = {"item_mean": item_mean(parts.train, known), "random": random(parts.train, known)}
    given = {"rating_range": rating_range(data), "catalogue_ranking": True, "curve": (2,)}
    whole, apart = [], []
    for seed in (0, 1):
        tasks = {"user_cold": make_tasks(parts.test["user_cold"], query=4, seed=seed)}
        whole.append(evaluate(methods, tasks, known, baselines=("random",), seed=seed, **given))
        each = [evaluate({n: m}, tasks, known, baselines=("random",), seed=seed, **given) for n, m in methods.items()]
        apart.append(join(each))
        if seed:
            with pytest.raises(MetarecError, match="not measured on the same tasks"):
                join(
                    [each[0], whole[0]._replace() if hasattr(whole[0], "_replace") else apart[0]][:1]
                    + [_renamed(apart[0])]
                )
    one, other = over_seeds(apart), results.merge(whole)
    columns = ["method", "scenario", "seed", "task", "shown"]
    pd.testing.assert_frame_equal(
        one.per_task.sort_values(columns, ignore_index=True), other.per_task.sort_values(columns, ignore_index=True)
    )
    assert one.summary() == other.summary()
    assert one.baselines == other.baselines == ("random",)
    with pytest.raises(MetarecError, match="repeat"):
        join([each[0], each[0]])


def _renamed(report):
    frame = report.per_task[report.per_task["method"] == "random"].copy()
    frame["method"] = pd.Categorical(["other"] * len(frame), ["other"])
    return Report(frame, report.settings | {"ranking_only": []}, (), {"other": {}})


def made_up(means, tasks=40, noise=0.01, scenarios=("user_cold",), curve=()):
    """Errors by method: a mean, or one a scenario, of ``tasks`` users, plus noise drawn for each method."""
    rng, rows = np.random.default_rng(0), []
    for k, scenario in enumerate(scenarios):
        for shown in (ALL, *curve):
            for name, mean in means.items():
                mean = mean(shown) if callable(mean) else mean[k] if isinstance(mean, tuple) else mean
                error = np.full(tasks, np.nan) if mean is None else mean + noise * rng.normal(size=tasks)
                facts = {
                    "method": name,
                    "scenario": scenario,
                    "seed": 0,
                    "task": np.arange(tasks),
                    "user": np.arange(tasks),
                }
                rows.append(pd.DataFrame(facts | {"shown": shown, "support": 9, "queries": 5, "mae": error}))
    frame = pd.concat(rows, ignore_index=True)
    frame["method"] = pd.Categorical(frame["method"], list(means))
    frame["scenario"] = pd.Categorical(frame["scenario"], list(scenarios))
    settings = {"curve": list(curve), "ranking_only": [], "topn": [5], "catalogue_topn": []}
    return Report(frame, settings, tuple(means)[:1], {name: {} for name in means})


def costs(names, **ms):
    return {name: Cost(1.0, ms.get(name, 0.1), 0.01, 2.0 * ms.get(name, 0.1), 0.1) for name in names}


def test_the_best_is_taken_where_it_is_shown_to_be_better():
    report = made_up({"bias": 0.9, "ridge": 0.7, "maml": 0.8})
    choice = choose(report, costs(report.methods), "mae", report.methods)
    assert (choice.method, choice.best, choice.gap) == ("ridge", "ridge", None)
    assert list(choice.over_simpler) == ["bias"]
    assert choice.over_simpler["bias"].mean == pytest.approx(0.2, abs=0.01)
    said = advice(choice, report, costs(report.methods), {})
    assert said[0].startswith("Use ridge: mean MAE 0.7")
    assert "bias, the nearest, by 0.1" in said[1] or "bias, the nearest, by 0.2" in said[1]


def test_the_simpler_is_taken_where_the_advantage_may_be_none():
    """maml leads by 0.001 with noise of 0.1 over 40 users: the interval reaches zero, so ridge, which is simpler, stays.

    bias is 0.2 worse, far beyond 2 * sqrt(2) * 0.1 / sqrt(40) = 0.045."""
    report = made_up({"bias": 0.9, "ridge": 0.701, "maml": 0.7}, noise=0.1)
    # Noise may turn the order of two near means: whichever is best, the simpler of the two is taken.
    choice = choose(report, costs(report.methods), "mae", report.methods)
    assert choice.method == "ridge"
    assert list(choice.over_simpler) == ["bias"]
    reverse = choose(report, costs(report.methods), "mae", ["maml", "ridge", "bias"])
    assert reverse.method == "maml"
    other = {choice.best, reverse.best}
    assert len(other) == 1
    loser = choice if choice.best == "maml" else reverse
    assert loser.gap.low <= 0 < loser.gap.high
    said = advice(loser, report, costs(report.methods), {"cavia": "diverged"})
    assert f"its advantage over the simpler {loser.method} is" in said[1]
    assert "cavia (diverged)" in said[-1]
    assert len(said) <= 5


def test_few_users_do_not_show_that_the_simpler_is_worse():
    report = made_up({"bias": 0.9, "ridge": 0.7}, tasks=9)
    choice = choose(report, costs(report.methods), "mae", report.methods)
    assert (choice.method, choice.best) == ("bias", "ridge")
    assert "no verdict: 9 users, at least 10 are required" in advice(choice, report, costs(report.methods), {})[1]
    report = made_up({"bias": 0.9, "ridge": 0.7}, tasks=10)
    assert choose(report, costs(report.methods), "mae", report.methods).method == "ridge"


def test_budgets_leave_methods_out():
    report = made_up({"popularity": None, "bias": 0.9, "ridge": 0.7, "maml": 0.6})
    took = costs(report.methods, ridge=1.0, maml=5.0)
    assert choose(report, took, "mae", report.methods).method == "maml"
    choice = choose(report, took, "mae", report.methods, max_ms=2.0)
    assert choice.method == "ridge"
    assert choice.left_out == {"popularity": "has no mae", "maml": "5 ms per user, over 2"}
    assert choose(report, took, "mae", report.methods, max_mib=1.0).method == "bias"
    with pytest.raises(MetarecError, match="no method is within the budgets"):
        choose(report, took, "mae", report.methods, max_ms=0.01)


def test_scenarios_count_alike():
    """0.2 better in one scenario, 0.1 worse in the other: 0.05 better over both, whatever noise there is, none here."""
    report = made_up({"a": (0.5, 0.8), "b": (0.7, 0.7)}, noise=0.0, scenarios=("user_cold", "item_cold"))
    assert overall(report, "a", "mae") == pytest.approx(0.65)
    ahead = gap(report, "a", "b", "mae")
    assert ahead.mean == pytest.approx(0.05)
    assert (ahead.low, ahead.high) == (pytest.approx(0.05), pytest.approx(0.05))


def test_the_best_by_support():
    """als: 1.0 - 0.1 k, ridge: 0.9 - 0.05 k for k ratings shown: ridge is better below 2, als above."""
    report = made_up(
        {"als": lambda k: 1.0 - 0.1 * (9 if k == ALL else k), "ridge": lambda k: 0.9 - 0.05 * (9 if k == ALL else k)},
        noise=0.0,
        curve=(0, 1, 4),
    )
    assert by_support(report, "mae", "user_cold", report.methods) == [(0, "ridge"), (1, "ridge"), (4, "als")]
    assert by_support(report, "mae", "user_cold", ["als"]) == [(0, "als"), (1, "als"), (4, "als")]


def test_a_cell_is_whole_or_not_there(tmp_path):
    report = made_up({"ridge": 0.7})
    identity = {"seed": 0, "config": {"lr": None}}
    where = cells.place(tmp_path, "a/b c", 3, identity)
    assert where.parent == tmp_path
    assert where.name.startswith("a-b-c-seed3-")
    assert cells.read(where, identity) is None
    cell = Cell(report, Cost(1.0, 2.0, 3.0, 4.0, 5.0))
    cells.write(where, cell, identity)
    cells.write(where, cell, identity)  # over itself
    again = cells.read(where, identity)
    assert again.cost == cell.cost
    assert again.convergence is again.failed is None
    pd.testing.assert_frame_equal(again.report.per_task, report.per_task)
    assert cells.read(where, {"seed": 1}) is None
    cells.write(where, Cell(None, None, diverged="diverged"), identity)
    assert cells.read(where, identity) == Cell(None, None, diverged="diverged")
    (where / "cell.json").write_text("[1")
    assert cells.read(where, identity) is None
    assert [p.name for p in tmp_path.iterdir()] == [where.name]


def test_a_cell_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cells.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        cells.write(tmp_path / "x", Cell(made_up({"ridge": 0.7}), Cost(1.0, 2.0, 3.0, 4.0, 5.0)), {})
    assert list(tmp_path.iterdir()) == []


def test_the_next_command_trains_what_is_recommended_or_the_best_learner():
    ours = {"ridge:precision=4": Config(data=DataConfig(name="my data.csv", implicit=True))}
    choice = Choice("ridge:precision=4", "ridge:precision=4", "mae", None, {}, {})
    report = made_up({"als": 0.5, "ridge:precision=4": 0.6})
    assert next_step(choice, report, ours) == ("next: metarec fit 'my data.csv' --implicit --learner ridge:precision=4")
    plain = next_step(choice._replace(method="als"), report, ours)
    assert plain.startswith(
        "als is a plain method, which metarec fit does not train; Python fits and serves it (mr.fit_"
    )
    assert plain.endswith(
        "The best learner here is ridge:precision=4; next: metarec fit 'my data.csv' --implicit --learner ridge:precision=4"
    )
