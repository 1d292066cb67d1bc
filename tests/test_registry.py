"""The registry: a learner is one file, one row, one test row; everything else is made from them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from worlds import largest_difference

from metarec_jax import cli, learners
from metarec_jax.core import MetarecError
from metarec_jax.experiment import config
from metarec_jax.experiment.build import build_data, build_learner, build_optimizers, build_params, build_source
from metarec_jax.learners import registry
from metarec_jax.options import parsed, spelled
from metarec_jax.training.loop import fit, run_keys
from metarec_jax.tree import partition

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", registry.ROWS)
def test_each_learner_explains_its_options(name):
    """Each option has a default that passes its own bounds, a help, and a spelling that is read back."""
    assert registry.factory(name) is getattr(learners, name)
    assert registry.complete(name, {}) == {key: f.default for key, (_, f) in registry.options(name).items()}
    for key, (kind, f) in registry.options(name).items():
        assert f.metadata["help"], f"{name}: the docstring's Args has no entry for {key}"
        assert parsed(spelled(f.default), kind) == f.default
    registry.complete(name, registry.row(name).small)


KINDS = {"ratings": False, "clicks": True}
TRAINED = [
    (name, kind)
    for name, row in registry.ROWS.items()
    for kind in KINDS
    if row.built_from != "methods"
    and (row.feedback == kind or (row.feedback == "any" and (kind == "ratings" or row.start == "base")))
]


BY_DEFAULT = {("ridge", "ratings"), ("item_map", "clicks")}
"""A start from a factorisation, one in closed form and one from a trained model; the others are slow."""


@pytest.mark.parametrize(
    ("name", "kind"), [pytest.param(*one, marks=[pytest.mark.slow] * (one not in BY_DEFAULT)) for one in TRAINED]
)
def test_each_learner_trains_from_a_configuration(name, kind):
    """Built, started and stepped as `metarec fit` does: the loss is finite, something moves, and what is fixed does not."""
    row = registry.row(name)
    given = config.Config(
        data=config.DataConfig("synthetic:60x30", implicit=KINDS[kind]),
        model=config.ModelConfig(size=2),
        learner=config.LearnerConfig(name, row.small),
        tasks=config.TaskConfig(tasks=4, support=(2, 4), query=3),
        train=config.TrainConfig(steps=2),
    )
    data = build_data(given.data)
    learner, source = build_learner(given, data), build_source(given, data)
    started = build_params(given, learner, data)
    params = learner.init(run_keys(0)[0]) if started is None else started
    optimizers = build_optimizers(given, data)
    found = fit(learner, source, steps=2, params=params, optimizer=optimizers.dense, rows=optimizers.rows)
    assert np.isfinite(found.history[-1]["loss"])
    before, after = (partition(tree, None)[0] for tree in (params, found.params))
    moved = {path for path, leaf in after.items() if largest_difference(leaf, before[path]) > 0}
    assert moved, "no parameter moves"
    assert not any(path.startswith("fixed/") for path in moved)
    if row.start == "base":
        assert started is not None
        assert not moved & {"tables/user_id", "tables/item_id", "net/params/mean"}, "the trained model stays as it is"


@pytest.mark.slow
@pytest.mark.parametrize(
    "learner", ["fine_tune", "dropout_net", "meta_embedding", "mwuf --tasks-of items", "cvar --implicit"]
)
def test_the_command_line_trains_measures_and_serves(learner, tmp_path, capsys):
    run = str(tmp_path / "run")
    small = [
        "--size",
        "2",
        "--tasks",
        "8",
        "--steps",
        "4",
        "--validate-every",
        "2",
        "--scenarios",
        "user_cold",
        "--test",
        "0.2",
    ]
    assert cli.main(["fit", "synthetic:80x40", "--learner", *learner.split(), *small, "--out", run]) == 0
    out = capsys.readouterr().out
    assert ("tasks are of items" in out) == ("items" in learner)
    assert f"report: {run}" in out
    assert cli.main(["recommend", run, "--rate", "3=4", "--rate", "5=2", "-n", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["recommendations"]
    assert len(found) == 2
    assert all(np.isfinite(row["score"]) for row in found)


def test_the_registry_is_read_without_jax():
    code = "import sys, metarec_jax.learners, metarec_jax.experiment.config; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("leoo", "learner 'leoo' is not known; perhaps you meant 'leo'"),
        ("leo:latents=8", "leo has no option 'latents'; perhaps you meant 'latent'; its options are: latent, inner_lr"),
        ("ridge:inner_lr=9", "ridge has no option 'inner_lr'; its options are: precision, bias_precision, loss"),
        ("leo:latent=0", "leo:latent must be 1 or more, got 0"),
        ("leo:latent=many", "leo:latent expected a whole number, got 'many'"),
        ("leo:latent", "'latent' is not option=value"),
        ("ridge:precision=0", "ridge:precision must be between 1e-06 and"),
        ("maml:rule=sgdd", "maml:rule: 'sgdd' is not known; perhaps you meant 'sgd'"),
    ],
)
def test_a_wrong_option_is_refused_with_the_learners_own(text, message):
    with pytest.raises(MetarecError, match=re.escape(message)):
        registry.parse(text)


def test_a_flag_is_another_name_of_an_option():
    found = config.learner_of("cavia", {"context": 3, "inner_steps": 2})
    assert (found.options["size"], found.options["inner_steps"]) == (3, 2)
    assert config.learner_of("maml", {"only": ("all",)}).options["only"] is None
    assert str(config.learner_of("leo:inner_steps=2", {"context": 4})) == "leo:latent=4:inner_steps=2"
    with pytest.raises(MetarecError, match="--slots is not an option of ridge; its options are: precision"):
        config.learner_of("ridge", {"slots": 3})
    known = {flag for name in registry.ROWS for flag in config.flags_of(name)}
    assert known == {f for f in config.LearnerFlags.__dataclass_fields__ if f != "name"}, (
        "every flag is of some learner"
    )


def test_the_command_lists_them(capsys):
    assert cli.main(["learners"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in registry.ROWS)
    assert cli.main(["learners", "leo"]) == 0
    assert "length of the code (default: 8)" in capsys.readouterr().out


def test_doctor_names_every_learner_of_each_family(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for family in registry.FAMILIES:
        names = [name for name, row in registry.ROWS.items() if row.family == family]
        assert f"{family}: {', '.join(names)}" in out


def test_three_hunks_add_a_learner(tmp_path):
    """The diff of docs/extending.md, applied to a copy of the package: it trains, is listed, and passes its test row."""
    page = (ROOT / "docs" / "extending.md").read_text()
    diff = re.search(r"```diff\n(.*?)```", page, re.DOTALL)[1]
    assert diff.count("\n@@") == 3
    for folder in ("metarec_jax", "tests"):
        subprocess.run(["cp", "-r", str(ROOT / folder), str(tmp_path)], check=True)
    subprocess.run(["git", "apply", "--unsafe-paths", "-"], input=diff, text=True, cwd=tmp_path, check=True)
    code = """
from metarec_jax import cli
from metarec_jax.data.synthetic import synthetic
from metarec_jax.experiment.build import build_learner
from metarec_jax.experiment.config import Config, LearnerConfig
from metarec_jax.training.loop import fit
data = synthetic(30, 20, ratings_per_user=(8, 12), size=2).data
learner = build_learner(Config(learner=LearnerConfig("mean_residual", {"prior": 2.0})), data)
assert fit(learner, data, steps=2).step == 2
assert cli.main(["learners", "mean_residual"]) == 0
import test_by_hand
test_by_hand.test_a_prediction_by_hand("mean_residual")
"""
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{tmp_path / 'tests'}"}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert "the prior, in examples (default: 3.0)" in ran.stdout
