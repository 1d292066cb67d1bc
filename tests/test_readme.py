"""What the README prints is what works."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import metarec_jax as mr
from metarec_jax import cli

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.slow
def test_python_is_the_command_line(tmp_path, monkeypatch, capsys):
    """Both Python blocks and `metarec fit`, on a small synthetic data set in place of ML-1M, give one figure."""
    monkeypatch.setenv("METAREC_DATA_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    made, by_hand = (
        block.replace('"ml-1m"', '"synthetic:120x80"')
        .replace('{"Toy Story (1995)": 5, "Heat (1995)": 2}', "{1: 3.0, 2: 1.0}")
        .replace("steps=1000", "steps=20, scenarios=('user_cold',)")
        .replace("rating_range=(1, 5)", "rating_range=SPAN")
        for block in blocks("python")[:2]
    )
    exec(compile(made, "README.md", "exec"), {})
    figure, best = capsys.readouterr().out.strip().splitlines()
    assert best.startswith("Recommendation(item_id=")
    assert mr.open_run("runs/mine").recommender().recommend({1: 3.0, 2: 1.0})[0].item_id == int(best[23:].split(",")[0])
    rating = mr.load("synthetic:120x80").rating
    exec(compile(by_hand, "README.md", "exec"), {"SPAN": (float(rating.min()), float(rating.max()))})
    assert capsys.readouterr().out.strip() == figure
    assert (
        cli.main(
            ["fit", "synthetic:120x80", "--learner", "ridge", "--steps", "20", "--scenarios", "user_cold", "--json"]
        )
        == 0
    )
    shown = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert f"mean={shown['results']['ridge']['user_cold']['mae']['mean']:.6f}"[:11] in figure


def test_both_set_up_commands_are_there():
    commands = "\n".join(blocks("sh"))
    assert re.search(r"^python -m venv \.venv && .*pip install.* && .*metarec fit ml-1m$", commands, flags=re.MULTILINE)
    assert re.search(r"^python -m venv \.venv && .*pip install.* && .*pytest$", commands, flags=re.MULTILINE)
