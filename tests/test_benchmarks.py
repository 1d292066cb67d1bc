"""The speed benchmark's harness: what a row says, how workers take turns, what the command answers. No PyTorch here."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import cells, harness, output  # noqa: E402

command = importlib.import_module("benchmarks.__main__")

FIELDS = {
    "question",
    "variant",
    "side",
    "tasks",
    "inner_steps",
    "items",
    "tasks_per_s",
    "compile_s",
    "peak_mib",
    "ratio_to_best_torch",
}
ABOUT = {
    "machine": {"cpu": "Abacus", "cores": 2, "system": "Linux"},
    "versions": {"jax": "1.2"},
    "date": "2026-01-01T00:00:00+00:00",
    "minutes": 3.0,
    "commit": "abc1234",
    "command": "python -m benchmarks s1",
    "rounds": 3,
    "core": 1,
    "quick": False,
    "notes": ["no torch"],
}

FAKE_WORKER = """
import json, sys
sys.path.insert(0, {root!r})
from benchmarks.protocol import Cell, serve

def setup(cell):
    if cell["variant"] == "missing":
        raise ImportError("no such library")
    print("chatter on stdout")
    return Cell(lambda blocks: None, 4, 1.5, {{"device": "fake", "pinned": "cores" not in cell}})

serve(setup)
"""


def row(**changed):
    if changed:
        return harness.Row(**{"question": "s1", "variant": "lazy", "side": "ours", **changed})
    return harness.Row("s1", "lazy", "ours", 32, 1, 3706, 1234.5, 2.0, 300.0, 3.1, {"us_per_step": 25.9})


def test_a_row_is_one_flat_object_with_every_field():
    flat = row().as_dict()
    assert set(flat) == FIELDS | {"us_per_step"}
    assert json.loads(json.dumps(flat)) == flat


def test_fields_that_do_not_apply_are_null():
    assert set(row(question="costs").as_dict()) == FIELDS
    assert row(question="costs").as_dict()["tasks_per_s"] is None


def test_the_markdown_has_a_table_a_cell_and_says_what_was_left_out():
    rows = [row(), row(tasks=128, inner_steps=5, tasks_per_s=7.0, extra={"note": "learns nothing", "bytes": 12345})]
    text = output.markdown(ABOUT, rows, {"s1": "S1: how fast?", "s2": "S2: how large?"})
    assert "## S1: how fast?" in text
    assert "S2" not in text  # no rows, no heading
    assert "32 tasks, 1 inner steps, 3,706 items:" in text
    assert "| ours | lazy | 1,234 | 26 | 3.10 | 2.0 | 300 |  |" in text
    assert "learns nothing; bytes 12,345" in text
    assert text.endswith("## Left out\n\n- no torch\n")
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {len(output.COLUMNS) + 1}


def test_results_are_named_by_the_machine(tmp_path):
    files = output.write(tmp_path, ABOUT, [row()], {"s1": "S1: how fast?"})
    assert [f.name for f in files] == ["abacus-2-cores.json", "abacus-2-cores.md", "abacus-2-cores.png"]
    assert json.loads(files[0].read_text())["rows"] == [row().as_dict()]


def test_sides_take_turns_and_the_best_torch_is_one(tmp_path, monkeypatch):
    """Ours at 10 us a step, torch at 20 and 40, one that learns nothing at 1: ratios 2, 1, 0.5, and 20 / 1."""
    steps = {"ours": 10e-6, "fast": 20e-6, "slow": 40e-6, "nothing": 1e-6}
    turns: list[str] = []

    class Fake(harness.Worker):
        def __init__(self, contender, core=None):
            self.contender, self.turns, self.ready = contender, [], {"compile_s": 1.0, "device": "fake"}

        def turn(self, seconds):
            turns.append(self.contender.variant)
            step = steps[self.contender.variant]
            self.turns.append({"step_s": step, "cpu_s": step, "steps": 1, "peak_mib": 5.0})

        def close(self):
            pass

    monkeypatch.setattr(harness, "Worker", Fake)
    cell = cells.seed_cell(32, 1)
    sides = [
        harness.Contender(name, "ours" if name == "ours" else "torch", "m", cell, counts=name != "nothing")
        for name in steps
    ]
    rows = harness.compare(harness.Options(rounds=2), "s1", sides)
    assert turns == list(steps) * 2
    assert {r.variant: r.ratio_to_best_torch for r in rows} == {"ours": 2.0, "fast": 1.0, "slow": 0.5, "nothing": 20.0}
    assert rows[0].tasks_per_s == 3_200_000  # 32 / 10 us


def test_a_worker_answers_and_one_that_cannot_leaves_a_note(tmp_path, monkeypatch):
    (tmp_path / "fake_worker.py").write_text(FAKE_WORKER.format(root=str(ROOT)))
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    core = harness.cores()[0]
    sides = [
        harness.Contender(name, "torch", "fake_worker", {**cells.seed_cell(4, 1), "variant": name}, cores=[core])
        for name in ("there", "missing")
    ]
    options = harness.Options(quick=True, rounds=1)
    rows = harness.compare(options, "s1", sides)
    assert [(r.variant, r.compile_s, r.extra["pinned"]) for r in rows] == [("there", 1.5, True)]
    assert "no such library" in options.notes[0]


def test_list_shows_every_question(capsys):
    assert command.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(command.QUESTIONS)
    assert "S1: how many tasks a second" in lines[0]


def test_a_question_that_does_not_exist_is_one_clear_error(capsys):
    assert command.main(["s11"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "'s11'" in said
    assert "perhaps you meant 's1'" in said


def test_a_torch_interpreter_that_has_none_is_one_clear_error(capsys, tmp_path):
    assert command.main(["s1", "--torch-python", str(tmp_path / "python")]) == 2
    assert "cannot import torch" in capsys.readouterr().err


def test_a_question_that_cannot_be_asked_is_a_note(monkeypatch):
    monkeypatch.setitem(command.QUESTIONS, "s1", "not_there")
    options = harness.Options()
    assert command.ask("s1", options) == []
    assert "not_there" in options.notes[0]


def test_batches_have_distinct_items_in_a_task_and_distinct_users_in_a_batch():
    made = cells.batches({**cells.seed_cell(50, 1, 100), "batches": 2})
    assert made.ids.shape == (2, 50, 20, 2)
    items = np.sort(made.ids[..., 1], axis=-1)
    assert (items[..., 1:] > items[..., :-1]).all()
    assert all(len(np.unique(batch[:, 0, 0])) == 50 for batch in made.ids)
    assert items.max() < 100


def test_the_floor_counts_each_row_once():
    """See `bytes_per_step`: one user, 20 items, two unknown rows of 776 bytes, 164 of the batch, 1,560 of the dense."""
    floor = importlib.import_module("benchmarks.s6_floor")
    assert floor.bytes_per_step({**cells.seed_cell(1, 1, 50), "batches": 1}) == 23 * 776 + 164 + 1560


@pytest.mark.parametrize("name", ["s1_outer_step", "s2_catalogue", "s3_dense_layers", "s6_floor"])
def test_without_torch_only_our_side_is_asked(name, monkeypatch):
    """Every contender of a run without an interpreter for torch is ours; S6 asks for our rows alone."""
    module = importlib.import_module(f"benchmarks.{name}")
    asked: list[harness.Contender] = []
    monkeypatch.setattr(module, "compare", lambda options, question, some: asked.extend(some) or [])
    monkeypatch.setattr(module, "subprocess", None, raising=False)
    options = harness.Options(quick=True)
    if name == "s6_floor":
        module._cells(options)
    else:
        module.run(options)
    assert asked
    assert {c.side for c in asked} == {"ours"}
