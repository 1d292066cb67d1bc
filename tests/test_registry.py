"""The registry: a learner is one file, one row, one test row; everything else is made from them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from metarec_jax import cli, learners
from metarec_jax.core import MetarecError
from metarec_jax.experiment import config
from metarec_jax.learners import registry
from metarec_jax.options import parsed, spelled

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
from metarec_jax.experiment.build import build_learner
from metarec_jax.experiment.config import Config, LearnerConfig
from metarec_jax.data.synthetic import synthetic
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
