"""`metarec compare`: cells are measured once, what is broken or unsuitable is told, and the choice follows its rule."""

import csv
import dataclasses
import errno
import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest

from metarec_jax import cli
from metarec_jax.baselines.closed_form import item_mean
from metarec_jax.core import MetarecError
from metarec_jax.data.catalogue import catalogue
from metarec_jax.data.interactions import Interactions, Vocabulary
from metarec_jax.data.synthetic import synthetic
from metarec_jax.evaluation import results
from metarec_jax.evaluation.evaluate import evaluate
from metarec_jax.experiment import config as configs
from metarec_jax.experiment.build import build_data, build_split
from metarec_jax.experiment.compare import cells
from metarec_jax.experiment.compare import run as command
from metarec_jax.experiment.compare.entries import all_entries, baseline_of, default_learners, learners_of
from metarec_jax.experiment.protocol import fixed_tasks, liked, rating_range, relevant_from
from metarec_jax.training.checkpoints import lock as run_directory

SMALL = [
    "--steps",
    "4",
    "--tasks",
    "4",
    "--support",
    "2",
    "8",
    "--query",
    "4",
    "--size",
    "2",
    "--scenarios",
    "user_cold",
]
SMALL += ["--support-curve", "2", "--baselines", "item_mean"]
ONE_STEP = ["--inner-steps", "1"]
TRIVIAL = {"random", "popularity", "item_mean", "user_mean", "bias"}


@pytest.fixture(scope="module", autouse=True)
def own_folder(tmp_path_factory):
    """A working directory and caches of its own, for this module, with 60 users' ratings in it."""
    folder = tmp_path_factory.mktemp("compare")
    data = synthetic(60, 30, ratings_per_user=(12, 20), size=2).data
    with (folder / "stars.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["user_id", "item_id", "rating"])
        for user, item, rating in zip(data.user, data.item, data.rating, strict=True):
            rows.writerow([f"u{user}", f"i{item}", f"{rating:g}"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("METAREC_DATA_DIR", str(folder / "cache"))
        patch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        yield folder


@pytest.fixture
def work(monkeypatch):
    """What is trained or fitted, in order: "learner" for each training, names for baselines."""
    done = []
    fit, fit_plain = command.fit, command.fit_plain
    monkeypatch.setattr(command, "fit", lambda *a, **k: done.append("learner") or fit(*a, **k))
    monkeypatch.setattr(command, "fit_plain", lambda name, *a, **k: done.append(name) or fit_plain(name, *a, **k))
    return done


def run(*options):
    steps = ONE_STEP if any("maml" in option for option in options) else []  # refused where no learner has them
    return cli.main(["compare", "stars.csv", *SMALL, *steps, *options])


@pytest.fixture(scope="module")
def compared(own_folder):
    """The folder of a comparison of MAML with the trivial baselines."""
    assert run("--learners", "maml") == 0
    return own_folder / "runs" / "compare-stars"


def found(folder):
    return json.loads((folder / "compare.json").read_text())


def test_the_table_has_every_method_and_what_each_costs(compared):
    told = found(compared)
    assert set(told["results"]) == {"maml"} | TRIVIAL
    assert told["seeds"] == [0]
    assert told["main_metric"] == "mae"
    assert told["failed"] == {}
    assert {d["method"] for d in told["comparison"]} == {"maml"}
    # Ids alone: 61 + 31 rows of 2 numbers in float32, and more.
    assert all(cost["latency_ms"] > 0 and cost["train_seconds"] > 0 for cost in told["costs"].values())
    assert told["costs"]["maml"]["parameters_mib"] > 90 * 2 * 4 / 2**20
    assert told["costs"]["item_mean"]["user_kib"] == 0
    assert told["convergence"]["maml"]["steps"] == [0, 1, 2, 3]
    for name in ("compare.md", "compare.html", "plots/cold_start_mae.png", "plots/inner_loop.png"):
        assert (compared / name).is_file()
    assert "Convergence of the inner loop" in (compared / "compare.md").read_text()


def test_the_same_command_again_trains_nothing_and_says_the_same(compared, work, capsys):
    before = found(compared)
    assert run("--learners", "maml") == 0
    assert work == []
    assert found(compared) == before
    said = capsys.readouterr()
    assert "6 of 6 cells are already measured" in said.err
    assert "MAE minus that of the best baseline" in said.out


@pytest.mark.slow
def test_a_longer_command_measures_what_is_new_and_a_cell_is_a_direct_evaluation(compared, tmp_path, work):
    """Seed 1 splits the users by split seed 0 + 1, and draws support and query with seed 1."""
    shutil.copytree(compared / "cells", tmp_path / "cells")
    assert run("--learners", "maml", "--seeds", "2", "--out", str(tmp_path)) == 0
    assert work.count("learner") == 1
    assert sorted(set(work) - {"learner"}) == sorted(TRIVIAL)
    assert len(work) == 6
    assert found(tmp_path)["seeds"] == [0, 1]
    told = results.load(next((tmp_path / "cells").glob("item_mean-seed1-*"))).summary()["item_mean"]["user_cold"]["mae"]
    config = configs.Config(
        data=configs.DataConfig(name="stars.csv"),
        split=configs.SplitConfig(scenarios=("user_cold",), seed=1),
        tasks=configs.TaskConfig(query=4),
    )
    data = build_data(config.data)
    parts = build_split(config.split, data)
    known = catalogue(data, parts.train)
    tasks = fixed_tasks(config, parts, parts.test, seed=1, max_users=1000)
    fitted = {"item_mean": item_mean(parts.train, known)}
    span, relevant = rating_range(data), relevant_from(data)
    direct = evaluate(fitted, tasks, known, rating_range=span, relevant=relevant, seed=1)
    assert told == direct.summary()["item_mean"]["user_cold"]["mae"]


@pytest.mark.parametrize(
    ("ratings", "point"),
    [
        ([1, 2, 3, 4, 4, 5], 4),  # 1..5: three quarters of the scale
        ([0.5, 2, 3, 4, 4.5, 5], 3.875),
        ([-1, -1, 1], 0.5),
        ([0, 0, 0, 1], 0.75),
        (list(range(1, 101)), 75.25),
        ([*range(1, 100), 69_016], 76),  # counts: a quarter of them has 76 or more; 51,762 has one
        ([1] + [98, 99, 100] * 40, 100),  # a scale of which only the upper end is used
        ([3, 3, 3], 3),
    ],
)
def test_from_what_rating_on_an_item_is_liked(ratings, point):
    n = len(ratings)
    ids = Vocabulary(np.arange(n))
    rows = np.arange(1, n + 1)
    data = Interactions(rows, rows, np.array(ratings, np.float32), None, ids, ids)
    assert relevant_from(data) == pytest.approx(point)
    assert f"ratings of {point:g} or more" in liked(data)
    if min(ratings) < max(ratings):
        assert relevant_from(data, max(ratings)) == max(ratings)
        for wrong in (min(ratings), max(ratings) + 1):
            with pytest.raises(MetarecError, match="--liked-from must be above"):
                relevant_from(data, wrong)


@pytest.mark.parametrize(
    ("change", "anew"),
    [
        ({"train": configs.TrainConfig(lr=0.01)}, {"ridge", "deepfm"}),
        ({"learner": "ridge:precision=2.0"}, {"ridge"}),
        ({"model": configs.ModelConfig(size=3)}, {"ridge"}),
        ({"tasks": configs.TaskConfig(query=3)}, {"ridge", "deepfm", "als"}),
        ({"data": configs.DataConfig(name="another/path.csv")}, set()),
    ],
)
def test_another_setting_measures_the_cells_that_read_it(change, anew):
    def identities(learner="ridge", **sections):
        config = dataclasses.replace(configs.Config(), **sections)
        rows = {"ridge": learners_of(config, (learner,), {})[0]}
        rows |= {name: baseline_of(config, name) for name in ("deepfm", "als")}
        base = {"data": "digest", "version": "1"}
        return {name: command._identity(row, 0, base, 100, (1,), 4.0) for name, row in rows.items()}

    before, after = identities(), identities(**change)
    assert {name for name in before if before[name] != after[name]} == anew


@pytest.mark.slow
def test_a_damaged_cell_is_measured_again(compared, work):
    before = found(compared)["results"]
    rows = next((compared / "cells").glob("user_mean-seed0-*")) / "per_task.parquet"
    rows.write_bytes(rows.read_bytes()[:-9])
    assert run("--learners", "maml") == 0
    assert work == ["user_mean"]
    assert found(compared)["results"] == before
    changed = pd.read_parquet(rows)  # a sound file of other numbers: its digest tells
    changed["mae"] += 1.0
    changed.to_parquet(rows)
    assert run("--learners", "maml") == 0
    assert work == ["user_mean", "user_mean"]
    assert found(compared)["results"] == before


@pytest.mark.slow
def test_the_report_of_a_fit_has_the_curves_of_its_inner_loop(tmp_path, capsys):
    """One inner step, at the default rate, lowers the loss of the support."""
    options = [*SMALL[: SMALL.index("--support-curve")], *ONE_STEP, "--learner", "maml", "--mesh", "data=1,model=1"]
    assert cli.main(["fit", "stars.csv", *options, "--out", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert told["convergence"]["trained"] == 1
    assert told["convergence"]["support_loss"][1] < told["convergence"]["support_loss"][0]
    assert "## Convergence of the inner loop" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "plots" / "inner_loop.png").is_file()


@pytest.mark.slow
def test_a_broken_run_continues(tmp_path, work, monkeypatch):
    """Interrupted in the fourth of six cells: the three before are kept, the rest is done by the next command."""

    def stopping(name, *args, **given):
        if name == "user_mean":
            raise KeyboardInterrupt
        return before(name, *args, **given)

    before = command.fit_plain
    out = ["--learners", "ridge:precision=4", "--out", str(tmp_path)]
    with monkeypatch.context() as broken:
        broken.setattr(command, "fit_plain", stopping)
        assert run(*out) == 130
    assert work == ["random", "popularity", "item_mean"]
    assert not (tmp_path / "compare.json").exists()
    work.clear()
    assert run(*out) == 0
    assert work == ["user_mean", "bias", "learner"]
    assert "ridge:precision=4" in found(tmp_path)["results"]


@pytest.mark.slow
def test_an_interrupted_training_continues_where_it_was(tmp_path, monkeypatch):
    """Stopped after its first chunk: saved at step 4 of 8 and resumed there; the numbers are those of an unbroken run."""
    steps, fit = [], command.fit
    out = ["--learners", "ridge", "--steps", "8", "--save-every", "4"]

    def watched(*args, stop, progress, **given):
        def noted(step, row):
            steps.append(step)
            progress(step, row)

        return fit(*args, stop=lambda: stopping or stop(), progress=noted, **given)

    monkeypatch.setattr(command, "fit", watched)
    stopping = True
    assert run(*out, "--out", str(tmp_path / "broken")) == 130
    assert list((tmp_path / "broken" / "cells").glob("*.training"))
    stopping = False
    assert run(*out, "--out", str(tmp_path / "broken")) == 0
    assert steps == [4, 8]
    assert not list((tmp_path / "broken" / "cells").glob("*.training"))
    assert run(*out, "--out", str(tmp_path / "whole")) == 0
    broken, whole = (found(tmp_path / name)["results"]["ridge"] for name in ("broken", "whole"))
    assert broken == whole


@pytest.mark.slow
def test_what_diverges_and_what_does_not_suit_is_told_and_the_others_go_on(tmp_path, work, capsys):
    """An inner rate of 1e30 makes the loss infinite in training: kept as a failure. logistic wants clicks: refused
    before training, so that it is asked again each time."""
    command = ["--learners", "maml:inner_lr=1e30:rule=sgd:only=all,logistic,ridge", "--out", str(tmp_path)]
    assert run(*command) == 0
    told = found(tmp_path)
    bad = "maml:inner_lr=1e30:rule=sgd:only=all"
    assert set(told["failed"]) == {bad, "logistic"}
    assert "lower the learning rate or the inner rate" in told["failed"][bad]
    assert "is for clicks" in told["failed"]["logistic"]
    assert set(told["results"]) == {"ridge"} | TRIVIAL
    out = capsys.readouterr().out
    assert f"not in the table: {bad}: the loss of step" in out
    assert work.count("learner") == 2
    work.clear()
    assert run(*command) == 0
    assert work == []


@pytest.mark.slow
def test_a_failure_that_may_pass_keeps_the_training_and_so_does_one_that_another_process_holds(
    tmp_path, monkeypatch, capsys
):
    """The disk is full at step 8 of 12; then another process trains there; then the run goes on from step 4."""
    steps, full, fit = [], True, command.fit

    def watched(*args, progress, **given):
        def noted(step, row):
            if step == 8 and full:
                raise OSError(errno.ENOSPC, "No space left on device")
            steps.append(step)
            progress(step, row)

        return fit(*args, progress=noted, **given)

    monkeypatch.setattr(command, "fit", watched)
    out = ["--learners", "ridge", "--steps", "12", "--save-every", "4", "--out", str(tmp_path)]
    assert run(*out) == 0
    assert "not measured: No space left on device; free some space" in capsys.readouterr().err
    assert found(tmp_path)["failed"]["ridge"].startswith("not measured (the same command tries again): No space left")
    [training] = (tmp_path / "cells").glob("*.training")
    full = False
    handle, _ = run_directory.lock(training)
    try:
        assert run(*out) == 0
        assert "is in use by another process" in found(tmp_path)["failed"]["ridge"]
        assert run(*out, "--fresh") == 2
        assert "is in use by another process" in capsys.readouterr().err
        assert list((tmp_path / "cells").glob("item_mean-*"))
    finally:
        os.close(handle)
    assert steps == [4]
    assert run(*out) == 0
    assert steps == [4, 8, 12]
    assert found(tmp_path)["failed"] == {}
    assert not training.exists()


def test_a_failure_kept_by_an_earlier_version_is_measured_again(tmp_path):
    """It kept every failure of a training that had begun; only a divergence is a result."""
    cells.write(tmp_path / "cell", cells.Cell(None, None, diverged="the loss of step 3 is nan"), {"seed": 0})
    assert cells.read(tmp_path / "cell", {"seed": 0}).diverged == "the loss of step 3 is nan"
    told = json.loads((tmp_path / "cell" / "cell.json").read_text())
    told["failed"] = told.pop("diverged")
    (tmp_path / "cell" / "cell.json").write_text(json.dumps(told))
    assert cells.read(tmp_path / "cell", {"seed": 0}) is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--learners", "rigde"], "perhaps you meant 'ridge'"),
        (["--baselines", "asl"], "perhaps you meant 'als'"),
        (["--learners", "maml:inner_step=1"], "perhaps you meant 'inner_steps'"),
        (["--learners", "maml:inner_steps=-1"], "maml:inner_steps must be 0 or more, got -1"),
        (["--learners", "maml:inner_steps=one"], "maml:inner_steps expected a whole number"),
        (["--seeds", "0"], "--seeds must be 1 or more"),
        (["--max-ms", "0"], "--max-ms must be above 0"),
        (["--support-curve", "-1"], "--support-curve expected support sizes of 0 or more, got -1"),
    ],
)
def test_bad_words_end_before_any_work(options, said, tmp_path, work, capsys):
    assert cli.main(["compare", "stars.csv", *options, "--out", str(tmp_path / "none")]) == 2
    assert said in capsys.readouterr().err
    assert work == []
    assert not (tmp_path / "none").exists()


def test_rows_are_in_order_of_simplicity():
    data = synthetic(20, 10, ratings_per_user=(5, 6)).data
    config = configs.Config()
    ours = learners_of(config, ("neural_process", "maml:inner_steps=1", "protonet", "ridge"), {})
    names = [entry.name for entry in all_entries(config, data, ours, None)]
    assert [n for n in names if n in ("item_mean", "als", "ridge", "protonet", "maml:inner_steps=1", "neural_process")] == [
        "item_mean", "als", "ridge", "protonet", "maml:inner_steps=1", "neural_process"
    ]  # fmt: skip
    assert ours[1].config.learner.options["inner_steps"] == 1
    assert default_learners(data) == ("ridge", "gaussian_process", "protonet", "maml", "neural_process")
    clicks = synthetic(20, 10, ratings_per_user=(5, 6), implicit=True).data
    assert default_learners(clicks) == ("ridge", "item_map", "protonet", "maml", "neural_process")
    assert not {"bias", "item_mean", "user_mean"} & {e.name for e in all_entries(config, clicks, [], None)}
