"""The commands as a person types them, on small made-up data: what they print, what they leave, how they refuse."""

import csv
import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest

from metarec_jax import cli
from metarec_jax.commands import doctor, fit, recommend
from metarec_jax.commands.recommend import parse_rates
from metarec_jax.data.interactions import Interactions, Vocabulary
from metarec_jax.data.synthetic import synthetic
from metarec_jax.experiment import directory as directories
from metarec_jax.serving.history import Names, parse_history
from metarec_jax.serving.recommender import Influence, Recommendation, Recommendations
from metarec_jax.training.checkpoints.checkpoint import Checkpoints, load_params, saved_metrics
from metarec_jax.training.progress import read_history

SMALL = ["--steps", "40", "--tasks", "8", "--support", "2", "8", "--query", "4", "--size", "2"]
SMALL += ["--validate-every", "20", "--save-every", "10", "--scenarios", "user_cold"]
SMALL += ["--mesh", "data=1,model=1"]  # the tests have eight devices; most users have one


@pytest.fixture(scope="module", autouse=True)
def own_folder(tmp_path_factory):
    """A working directory and caches of its own, for this module."""
    folder = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("METAREC_DATA_DIR", str(folder / "cache"))
        patch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        yield folder


@pytest.fixture(scope="module")
def ratings(own_folder):
    """A CSV file of a made-up data set with 80 users and 40 items, under column names of its own."""
    data = synthetic(80, 40, ratings_per_user=(12, 20), size=2).data
    path = own_folder / "stars.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["uid", "film", "stars"])
        for user, item, rating in zip(data.user, data.item, data.rating, strict=True):
            rows.writerow([f"u{user}", f"film {item}", f"{rating:g}"])
    return path


@pytest.fixture(scope="module")
def trained(ratings):
    """The run directory of a finished, measured run."""
    command = ["fit", "stars.csv", "--learner", "ridge", "--user-col", "uid", "--item-col", "film", *SMALL]
    assert cli.main(command) == 0
    return Path("runs/stars")


def failure(capsys, *command):
    """The one line that a command ends with when it is refused."""
    assert cli.main([str(part) for part in command]) == 2
    *before, said = capsys.readouterr().err.strip().splitlines()
    assert not any("error" in line for line in before)
    assert said.startswith("error: ")
    return said


def last_line(capsys):
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


@pytest.mark.parametrize("command", ["fit", "evaluate", "recommend", "compare", "data", "doctor"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    assert f"  metarec {command}" in capsys.readouterr().out


def test_help_imports_nothing_heavy():
    program = (
        "import sys, metarec_jax.cli as c\n"
        "try: c.main(['--help'])\n"
        "except SystemExit: print(sorted({'jax', 'numpy', 'pandas', 'orbax', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for command in ("fit", "evaluate", "recommend", "compare", "data", "doctor"):
        assert command in done.stdout


def test_the_defaults_of_the_command_line_are_those_of_the_configuration():
    chosen = cli.config.LearnerConfig("mixture")  # auto
    assert cli.configured(cli.Options()) == cli.config.Config(learner=chosen)


def test_fit_leaves_all_that_the_other_commands_need(trained):
    left = {path.name for path in trained.iterdir()}
    assert left >= {"config.json", "data.parquet", "catalogue.npz", "metrics.jsonl", "result.json", "checkpoints"}
    assert left >= {"report.md", "report.html", "evaluation"}
    assert [line["step"] for line in read_history(trained / "metrics.jsonl")][-1] == 40
    assert directories.result(trained) == {"step": 40, "stopped": "finished"}


def test_the_same_command_again_says_that_it_is_finished(trained, capsys):
    assert (
        cli.main(
            ["fit", "stars.csv", "--learner", "ridge", "--user-col", "uid", "--item-col", "film", *SMALL, "--json"]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "finished already" in out
    assert "metarec recommend runs/stars" in out
    found = json.loads(out.strip().splitlines()[-1])
    assert set(found["results"]) > {"ridge", "als", "bias", "random", "item_mean", "ease_liked", "als_liked"}


def test_another_configuration_is_refused_by_the_field(trained, capsys):
    said = failure(
        capsys,
        "fit",
        "stars.csv",
        "--learner",
        "ridge",
        "--user-col",
        "uid",
        "--item-col",
        "film",
        *SMALL,
        "--lr",
        "0.5",
    )
    assert "config.train.lr was None, now 0.5" in said
    assert "--fresh" in said


def test_other_data_is_refused(trained, ratings, capsys):
    lines = ratings.read_text().splitlines()
    (ratings.parent / "fewer.csv").write_text("\n".join(lines[:-1]))
    command = [
        "fit",
        "fewer.csv",
        "--learner",
        "ridge",
        "--user-col",
        "uid",
        "--item-col",
        "film",
        *SMALL,
        "--out",
        trained,
    ]
    said = failure(capsys, *command)
    assert re.search(
        r"fewer.csv \(last changed 20\S+ \S+, [\d,]+ bytes\) is not the data that runs/stars was trained on", said
    )
    counts = f"the run has {len(lines) - 1:,} interactions of 80 users"
    assert counts in said
    assert f"the data now has {len(lines) - 2:,} interactions" in said
    assert "Put the old data back to resume the run" in said
    assert not re.search("[0-9a-f]{16}", said)
    worse = lines[-1].rpartition(",")[0] + ",9"
    (ratings.parent / "fewer.csv").write_text("\n".join([*lines[:-1], worse]))
    assert "as many of each, but other ids, ratings, times or features" in failure(capsys, *command)


def test_a_directory_in_use_is_refused(trained, capsys):
    stored = json.loads((trained / "identity.json").read_text())
    with Checkpoints(trained, identity=stored):
        said = failure(
            capsys, "fit", "stars.csv", "--learner", "ridge", "--user-col", "uid", "--item-col", "film", *SMALL
        )
    assert "in use by another process" in said


def test_evaluate_prints_one_object_last(trained, capsys):
    assert cli.main(["evaluate", str(trained), "--seeds", "2", "--json"]) == 0
    found = last_line(capsys)
    mae = found["results"]["ridge"]["user_cold"]["mae"]
    assert set(mae) == {"mean", "se", "low", "high"}
    assert mae["low"] <= mae["mean"] <= mae["high"]
    assert found["seeds"] == [0, 1]
    assert found["counts"]["user_cold"]["users"] == 8  # a tenth of 80
    assert (trained / "evaluation" / "per_task.parquet").is_file()


def test_recommend_by_title_and_why(trained, capsys):
    assert cli.main(["recommend", str(trained), "--rate", "film 3=5", "--rate", "FILM 4=1", "-n", "4"]) == 0
    out = capsys.readouterr().out
    ranks = [line for line in out.splitlines() if line[:4].strip().isdigit()]
    assert len(ranks) == 4
    assert not any(line.endswith(("film 3", "film 4")) for line in ranks)  # what was seen is dropped
    assert "because of" in out
    assert "film 3=5" in out


def test_recommend_a_table(trained, capsys, own_folder):
    table = own_folder / "new.csv"
    table.write_text("user_id,item_id,rating\nann,film 1,5\nann,nothing,4\nbob,film 2,1\n")
    out = own_folder / "out" / "recs.csv"
    assert cli.main(["recommend", str(trained), "--history", str(table), "-n", "3", "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "6 recommendations for 2 users" in said.out
    assert "skipped: no item is called 'nothing'" in said.err
    rows = list(csv.DictReader(out.open()))
    assert [(row["user_id"], row["rank"]) for row in rows] == [(u, r) for u in ("ann", "bob") for r in "123"]
    scores = [float(row["score"]) for row in rows[:3]]
    assert scores == sorted(scores, reverse=True)


def test_one_user_alone_may_ask(trained, capsys, own_folder):
    table = own_folder / "one.csv"
    table.write_text("film,stars\nfilm 1,5\n".replace("film,", "item,"))
    assert cli.main(["recommend", str(trained), "--history", str(table), "-n", "2", "--json"]) == 0
    said = last_line(capsys)
    assert [row["rank"] for row in said["recommendations"]] == [1, 2]
    assert said["unknown"] == []


def test_no_history_is_the_prior(trained, capsys):
    assert cli.main(["recommend", str(trained), "-n", "1"]) == 0
    assert "nothing is known" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        ("film 3", "gives no rating"),
        ("=5", 'gives no item; write --rate "ITEM='),
        ("", "gives neither item nor rating"),
        ("film 3=good", "is not a rating from"),
        ("film 3=nan", "is not a rating from"),
        ("film 3=77", "is not a rating from"),
        ("flim 3=5", "perhaps you meant 'film 3'"),
    ],
)
def test_rates_that_cannot_be_understood(trained, capsys, rate, message):
    assert message in failure(capsys, "recommend", trained, "--rate", rate)


def test_recommend_refusals(trained, capsys, own_folder):
    table = own_folder / "foreign.csv"
    table.write_text("user_id,item_id,rating\na,x,5\na,y,4\n")
    assert "none of the 2 items" in failure(capsys, "recommend", trained, "--history", table)
    assert "two commands" in failure(capsys, "recommend", trained, "--history", table, "--rate", "film 1=5")
    assert "no file" in failure(capsys, "recommend", trained, "--history", own_folder / "none.csv")
    table.write_text("who,stars\nann,5\nbob,4\n")
    assert "no item column" in failure(capsys, "recommend", trained, "--history", table)
    table.write_text("user_id,item_id\nann,film 1\n")
    assert "no rating column" in failure(capsys, "recommend", trained, "--history", table)
    table.write_text("user_id,item_id,rating\nann,film 1,\n")
    assert "every row of" in failure(capsys, "recommend", trained, "--history", table)
    table.write_text("user_id,item_id,rating\nann,film 1,77\n")
    assert "the rating of 'film 1' by user 'ann': expected a number from" in failure(
        capsys, "recommend", trained, "--history", table
    )
    assert "is a folder" in failure(capsys, "recommend", trained, "--history", own_folder)


def test_runs_that_are_not_there(trained, capsys, own_folder):
    assert "perhaps you meant runs/stars" in failure(capsys, "evaluate", "runs/star")
    (own_folder / "empty").mkdir()
    assert "is not a run directory" in failure(capsys, "recommend", own_folder / "empty")


def test_a_foreign_vocabulary_is_refused(trained, capsys):
    """The data of another run, put in place of a run's own."""
    mine, folder = trained / "data.parquet", trained
    kept = {name: (folder / name).read_bytes() for name in ("data.parquet", "data.parquet.sha256")}
    directories.write_cache(synthetic(80, 40, ratings_per_user=(12, 20), size=2, seed=1).data, mine)
    try:
        assert "is not the data that" in failure(capsys, "recommend", trained, "--rate", "film 3=5")
        mine.write_bytes(b"rubbish")
        assert "is damaged" in failure(capsys, "recommend", trained, "--rate", "film 3=5")
    finally:
        for name, raw in kept.items():
            (folder / name).write_bytes(raw)


@pytest.mark.parametrize(("name", "raw"), [("catalogue.npz", b"PK\x03"), ("config.json", b"[]"), ("config.json", b"{")])
def test_damaged_files_are_told(trained, capsys, name, raw):
    kept = (trained / name).read_bytes()
    try:
        (trained / name).write_bytes(raw)
        assert "is damaged" in failure(capsys, "recommend", trained, "--rate", "film 3=5")
    finally:
        (trained / name).write_bytes(kept)


def test_a_split_that_is_no_longer_the_one_trained_on_is_not_measured(trained, capsys):
    """What the partition now holds out may have been learned."""
    kept = (trained / "config.json").read_text()
    try:
        (trained / "config.json").write_text(json.dumps(json.loads(kept) | {"train": "of other rows"}))
        assert "trained on other rows" in failure(capsys, "evaluate", trained)
    finally:
        (trained / "config.json").write_text(kept)


def test_evaluate_wants_a_draw_and_a_user(trained, capsys):
    assert "--seeds must be 1 or more, and is 0" in failure(capsys, "evaluate", trained, "--seeds", "0")
    assert "--max-users must be 1 or more" in failure(capsys, "evaluate", trained, "--max-users", "-1")
    assert "--max-history must be 1 or more" in failure(capsys, "evaluate", trained, "--max-history", "0")


def test_what_cannot_be_trained_leaves_the_directory_as_it_was(trained, ratings, capsys):
    command = [
        "fit",
        "stars.csv",
        "--learner",
        "ridge",
        "--user-col",
        "uid",
        "--item-col",
        "film",
        *SMALL,
        "--support",
        "500",
        "600",
    ]
    before = sorted(path.name for path in trained.iterdir())
    assert "no user has 501 interactions" in failure(capsys, *command, "--fresh")
    assert sorted(path.name for path in trained.iterdir()) == before
    failure(capsys, *command, "--out", "runs/never")
    assert not Path("runs/never").exists()
    assert "cannot be a run directory" in failure(capsys, *command[:-3], "--out", "stars.csv")


@pytest.mark.slow
def test_fit_by_default_runs_on_data_too_small_for_every_scenario(own_folder, capsys):
    """Everyone clicked all ten items: nobody has a support and a query of the one item held out."""
    rows = "".join(f"{user},{item}\n" for user in range(30) for item in range(10))
    (own_folder / "full.csv").write_text(f"user,item\n{rows}")
    command = [
        "fit",
        "full.csv",
        "--learner",
        "ridge",
        "--steps",
        "2",
        "--tasks",
        "4",
        "--query",
        "2",
        "--size",
        "2",
        "--no-evaluate",
    ]
    assert cli.main([*command, "--mesh", "data=1,model=1"]) == 0
    said = capsys.readouterr().out
    assert "note: item_cold is not tested: " in said
    assert "note: both_cold is not tested: " in said
    explicit = [*command, "--out", "runs/explicit", "--scenarios", "warm", "item_cold"]
    refusal = failure(capsys, *explicit)
    assert "too few to test item_cold (" in refusal
    assert "use --scenarios warm (" in refusal


def test_without_a_comparison_the_last_line_is_json_too(trained, capsys):
    command = [
        "fit",
        "stars.csv",
        "--learner",
        "ridge",
        "--user-col",
        "uid",
        "--item-col",
        "film",
        *SMALL,
        "--no-evaluate",
        "--json",
    ]
    assert cli.main(command) == 0
    found = last_line(capsys)
    assert (found["run"], found["step"], found["stopped"]) == ("runs/stars", 40, "finished")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/a"),
            "error: runs/a: No space left on device; free some",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device; free some space"),
        (
            PermissionError(errno.EACCES, "Permission denied", "x.csv"),
            "x.csv: Permission denied; change its permissions",
        ),
        (
            OSError(errno.EMFILE, "Too many open files", "x"),
            "x: Too many open files; raise the limit of open files: ulimit -n",
        ),
        (
            NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"),
            "a/b: Not a directory; a part of this path is a file",
        ),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a"), "a: Is a directory; give the path of a file"),
        (OSError(errno.EXDEV, "Invalid cross-device link", "a", None, "b"), "a -> b: Invalid cross-device link"),
        (OSError("the reader gave up"), "error: the reader gave up"),
        (MemoryError(), "the memory of this machine does not suffice"),
    ],
)
def test_what_the_system_refuses_is_named_by_its_cause(monkeypatch, capsys, error, said):
    def refused(**_):
        raise error

    monkeypatch.setattr("metarec_jax.commands.doctor.doctor", refused)
    monkeypatch.delenv("METAREC_DEBUG", raising=False)
    line = failure(capsys, "doctor")
    assert said in line
    assert "check the path" not in line
    for command, debug in ((["doctor", "--debug"], "0"), (["--debug", "doctor"], ""), (["doctor"], "1")):
        monkeypatch.setenv("METAREC_DEBUG", debug)
        assert cli.main(command) == 2
        first, *_, last = capsys.readouterr().err.strip().splitlines()
        assert (first, last) == ("Traceback (most recent call last):", line)


def test_a_run_that_may_not_be_read_is_not_called_damaged(trained, capsys, monkeypatch):
    def denied(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(directories, "read_cache", denied)
    said = failure(capsys, "recommend", trained, "--rate", "film 3=5")
    assert "data.parquet: Permission denied; change its permissions" in said
    assert "damaged" not in said


@pytest.mark.parametrize(
    "command",
    [pytest.param(c, marks=pytest.mark.slow) for c in (["doctor"], ["recommend", "runs/stars", "--rate", "film 3=5"])],
    ids=lambda c: c[0],
)
def test_a_platform_that_is_not_there_is_one_line(trained, command):
    environment = os.environ | {"JAX_PLATFORMS": "cuda"}
    program = [sys.executable, "-m", "metarec_jax.cli", *command]
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: JAX_PLATFORMS is cuda, and JAX can start only cpu here; unset it, or set JAX_PLATFORMS=cpu"
    ]


@pytest.fixture(scope="module")
def named(own_folder):
    """A run on columns of odd names, with two films of one title, one called as another's id, and features of users."""
    rng = np.random.default_rng(0)
    with (own_folder / "odd.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["who", "thing", "mark", "when"])
        rows.writerows([u, i, rng.integers(1, 6), u] for u in range(30) for i in rng.permutation(12)[:8] + 1)
    titles = ["Heat", "Alien", "Hamlet", "Hamlet", "2", *[f"Film {k}" for k in range(6, 13)]]
    rows = "".join(f'{k + 1},"{title}"\n' for k, title in enumerate(titles))
    (own_folder / "films.csv").write_text(f"thing,title\n{rows}")
    people = "".join(f"{u},{20 + 1.5 * u},{'FM'[u % 2]}\n" for u in range(30))
    (own_folder / "people.csv").write_text(f"who,age,gender\n{people}")
    columns = ["--user-col", "who", "--item-col", "thing", "--rating-col", "mark", "--timestamp-col", "when"]
    files = ["--item-features", "films.csv", "--user-features", "people.csv"]
    assert (
        cli.main(["fit", "odd.csv", "--learner", "ridge", *columns, *files, *SMALL, "--steps", "2", "--no-evaluate"])
        == 0
    )
    return Path("runs/odd")


def test_a_history_under_the_names_that_the_run_was_trained_with(named, capsys, own_folder):
    table = own_folder / "odd_new.csv"
    table.write_text("who,thing,mark,when\na,7,5,2\na,7,1,1\nb,Heat,1,1\n")
    assert cli.main(["recommend", str(named), "--history", str(table), "-n", "11", "--json"]) == 0
    said = capsys.readouterr()
    rows = json.loads(said.out.strip().splitlines()[-1])["recommendations"]
    assert {(user, len([r for r in rows if r["user_id"] == user])) for user in "ab"} == {("a", 11), ("b", 11)}
    assert "1 repeated ratings or clicks" in said.err
    once = own_folder / "once.csv"  # the last in time counts; and other names are given
    once.write_text("item,who,thing,stars\nx,a,7,5\nx,b,1,1\n")
    command = ["recommend", str(named), "--history", str(once), "-n", "11", "--rating-col", "stars", "--json"]
    assert cli.main([*command, "--item-col", "thing"]) == 0
    assert last_line(capsys)["recommendations"] == rows
    assert "has no column 'nope'" in failure(capsys, *command, "--item-col", "nope")
    assert "--item-col names a column of --history" in failure(capsys, "recommend", named, "--item-col", "thing")


def test_a_title_of_two_items_and_one_that_is_an_id(named, capsys):
    refusal = failure(capsys, "recommend", named, "--rate", "Hamlet=5")
    assert refusal == "error: 2 items are called Hamlet, ids 3 and 4: give the id"
    assert cli.main(["recommend", str(named), "--rate", "Hamlet=5", "--rate", "2=5", "-n", "12", "--json"]) == 0
    said = capsys.readouterr()
    assert "skipped: 2 items are called Hamlet, ids 3 and 4: give the id" in said.err
    rows = json.loads(said.out.strip().splitlines()[-1])["recommendations"]
    assert {row["item_id"] for row in rows} == {1, *range(3, 13)}  # of id 2 and title "2" the id counts


def test_a_history_of_everything_is_refused_for_one_user_and_noted_for_many(named, capsys, own_folder):
    rates = [part for k in range(1, 13) for part in ("--rate", f"{k}=3")]
    assert "nothing to recommend: all 12 items are in the history" in failure(capsys, "recommend", named, *rates)
    table = own_folder / "all.csv"
    table.write_text("who,thing,mark\n" + "".join(f"a,{k},3\n" for k in range(1, 13)) + "b,1,3\n")
    assert cli.main(["recommend", str(named), "--history", str(table)]) == 0
    assert "note: user a: nothing to recommend: all 12 items" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".parquet"])
def test_lists_are_written_in_the_format_that_the_name_tells(named, capsys, own_folder, suffix):
    out = own_folder / "out" / f"recs{suffix}"
    assert cli.main(["recommend", str(named), "--rate", "Heat=5", "-n", "3", "--out", str(out), "--json"]) == 0
    wanted = last_line(capsys)["recommendations"]
    read = {".csv": pd.read_csv, ".json": pd.read_json, ".parquet": pd.read_parquet}
    table = pd.read_json(out, lines=True) if suffix == ".jsonl" else read[suffix](out)
    assert list(table.columns) == ["rank", "item_id", "title", "predicted", "score", "because"]
    assert table["item_id"].tolist() == [row["item_id"] for row in wanted]
    np.testing.assert_allclose(table["score"], [row["score"] for row in wanted], rtol=1e-5)


def test_another_format_is_refused_before_anything_is_computed(capsys):
    refusal = failure(capsys, "recommend", "runs/none", "--out", "recs.xlsx")
    assert "must end in one of .csv, .json, .jsonl, .parquet" in refusal


def test_a_user_of_whom_only_features_are_known(named, capsys, own_folder):
    assert cli.main(["recommend", str(named), "--user", "age=41.5", "--user", "gender=X", "-n", "3", "--json"]) == 0
    said = capsys.readouterr()
    assert "only features are known" in said.out
    assert "note: user_gender 'X' is not in the data, and counts as unknown" in said.err
    alone = json.loads(said.out.strip().splitlines()[-1])["recommendations"]
    people = own_folder / "new_people.csv"
    people.write_text("who,age,gender,shoe\n7,41.5,X,9\n8,,F,9\n")
    assert cli.main(["recommend", str(named), "--user-features", str(people), "-n", "3", "--json"]) == 0
    said = capsys.readouterr()
    assert "not used, since the run has only the user features user_age, user_gender: shoe" in said.err
    rows = json.loads(said.out.strip().splitlines()[-1])["recommendations"]
    assert [row["user_id"] for row in rows] == [7, 7, 7, 8, 8, 8]
    assert [row["item_id"] for row in rows[:3]] == [row["item_id"] for row in alone]
    np.testing.assert_allclose([r["score"] for r in rows[:3]], [r["score"] for r in alone], rtol=1e-5)
    assert "there is no user feature 'shoe'" in failure(capsys, "recommend", named, "--user", "shoe=9")
    assert "expected FEATURE=VALUE" in failure(capsys, "recommend", named, "--user", "age")
    assert "two commands" in failure(capsys, "recommend", named, "--user", "age=3", "--user-features", people)


def test_a_feedback_that_lowers_a_score_is_no_reason_for_it(capsys):
    because = (Influence(1, "Heat", 2.0, -0.288), Influence(2, None, 5.0, 0.1))
    recommend._show(Recommendations((Recommendation(3, "Alien", 7.0, 3.0, because, predicted=5.0),)))
    first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["1", "5.000", "Alien"]
    assert second.strip() == "because of 2=5 (+0.100), in spite of Heat=2 (-0.288)"


def test_the_next_command_survives_a_shell_and_rates_as_the_data_does(capsys):
    title, rating = """He said "$HOME" isn't `it`""", np.array([1, 2, 3, 4, 69016], np.float32)
    ids = Vocabulary(np.arange(5))
    data = Interactions(np.arange(1, 6), np.ones(5, int), rating, None, ids, ids, titles=np.array([title] * 5))
    fit._print_next(Path("runs/a b"), data)
    words = shlex.split(capsys.readouterr().out.removeprefix("next: "))
    assert words == ["metarec", "recommend", "runs/a b", "--rate", f"{title}=4", "-n", "10"]


def test_a_flag_that_turns_off_says_so(capsys):
    with pytest.raises(SystemExit):
        cli.main(["fit", "--help"])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--no-warm-start do not initialise item embeddings by matrix factorisation" in said


def test_rates_of_clicks_are_told_to_be_unused(ratings):
    clicks = synthetic(10, 10, ratings_per_user=(5, 8), implicit=True).data
    columns = parse_rates(["film 3", "film 4=2", "film 4=2"], clicks)
    assert columns == {"item_id": ["film 3", "film 4", "film 4"], "rating": [1.0, 2.0, 2.0]}
    known = clicks.items.ids[:2].tolist()
    notes = parse_history({"item_id": known, "rating": [1.0, 2.0]}, clicks, Names(clicks)).notes
    assert "are ignored" in notes[0]


@pytest.mark.slow
def test_a_run_is_served_by_an_application_that_computes_in_float64(trained, capsys):
    """JAX_ENABLE_X64: the parameters stay as they were trained, and the list is the same."""
    command = ["recommend", "runs/stars", "--rate", "film 3=5", "-n", "3", "--json"]
    lists = []
    for precise in (False, True):
        with jax.enable_x64(precise):
            assert cli.main(command) == 0
        lists.append(last_line(capsys)["recommendations"])
    assert [row["item_id"] for row in lists[0]] == [row["item_id"] for row in lists[1]]
    np.testing.assert_allclose([r["score"] for r in lists[0]], [r["score"] for r in lists[1]], rtol=1e-4)


def test_unknown_data(capsys):
    assert "ml-1m" in failure(capsys, "fit", "ml1m")
    assert "user_col" in failure(capsys, "data", "synthetic:20x20", "--user-col", "uid")


def test_data_and_doctor(ratings, capsys):
    assert cli.main(["data", str(ratings), "--user-col", "uid", "--item-col", "film", "--json"]) == 0
    out = capsys.readouterr().out
    assert "80 users with 40 items" in out
    assert json.loads(out.splitlines()[-1])["counts"]["users"] == 80
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for fact in ("jax", "devices", "threads", "compiled", "data", "GiB free"):
        assert fact in out


def test_doctor_names_the_extras_that_are_missing(capsys, monkeypatch):
    """Each package of an extra that a user may want, and the command that brings it."""
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for package, extra in (("duckdb", "store"), ("grain", "store"), ("tensorboardX", "tensorboard")):
        [line] = [line for line in out.splitlines() if line.startswith(package)]
        assert "not installed" in line
        assert f"pip install 'metarec_jax[{extra}]'" in line
    assert "metarec prepare" in out


@pytest.mark.slow
def test_a_loss_that_explodes_is_told(ratings, capsys):
    command = [
        "fit",
        "stars.csv",
        "--learner",
        "ridge",
        "--user-col",
        "uid",
        "--item-col",
        "film",
        *SMALL,
        "--out",
        "runs/wild",
    ]
    said = failure(capsys, *command, "--learner", "maml", "--inner-lr", "1e30")
    assert "the loss of step" in said


def start(*command):
    program = "import sys; from metarec_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", program, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_step(child):
    """Read stderr until training has told of a step."""
    for line in child.stderr:
        if line.startswith("step "):
            return
    raise AssertionError("training told of no step")


LONG = [*SMALL, "--steps", "400", "--validate-every", "10", "--patience", "1000", "--no-evaluate", "--out"]
LONG = ["fit", "stars.csv", "--learner", "ridge", "--user-col", "uid", "--item-col", "film", *LONG]


@pytest.fixture(scope="module")
def uninterrupted(trained):
    """A longer run, from beginning to end in one process."""
    assert cli.main([*LONG, "runs/whole"]) == 0
    return "runs/whole"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_and_resumed_is_as_if_never_stopped(uninterrupted, capsys, number):
    """SIGTERM saves and exits with 143, after SIGKILL the last checkpoint serves; either way the same bits come out."""
    out = f"runs/{number.name}"
    with start(*LONG, out) as child:
        wait_for_step(child)
        child.send_signal(number)
        said = child.communicate()[0]
    if number == signal.SIGTERM:
        assert child.returncode == 143
        assert "SIGTERM: saved at step" in said
        assert "resume" in said
    assert "has not been trained to its end" in failure(capsys, "evaluate", out)
    saved = saved_metrics(out, which="latest")
    assert saved is None or saved[0] < 400
    assert cli.main([*LONG, out]) == 0
    said = capsys.readouterr()
    assert "trained 400 steps" in said.out
    assert saved is None or f"resuming at step {saved[0]}" in said.err
    stopped_at = set() if saved is None else {saved[0]}  # within a chunk, where ten steps take long
    assert {line["step"] for line in read_history(f"{out}/metrics.jsonl")} == {*range(10, 401, 10)} | stopped_at
    for which in ("latest", "best"):
        resumed, whole = (load_params(folder, which=which) for folder in (out, uninterrupted))
        for name, table in whole["tables"].items():
            np.testing.assert_array_equal(resumed["tables"][name], table)
