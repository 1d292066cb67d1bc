"""Compiled programs are kept between runs: where, how much, and that no disk can break or change a run."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import jax
import pytest

from metarec_jax.experiment import compiled

OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture(autouse=True)
def own_environment(monkeypatch, tmp_path):
    """No cache but what a test asks for; JAX's options and Python's warnings are put back."""
    for name in ("JAX_COMPILATION_CACHE_DIR", "METAREC_COMPILE_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("METAREC_DATA_DIR", str(tmp_path / "data"))
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    with warnings.catch_warnings():
        yield
    for name, value in before.items():
        jax.config.update(name, value)


def folder_of_jax() -> str | None:
    return jax.config.jax_compilation_cache_dir


def test_it_is_on_by_default_in_the_users_cache(tmp_path):
    found = compiled.compile_cache()
    assert found.folder == tmp_path / "data" / "compiled"
    assert found.folder.is_dir()
    assert folder_of_jax() == str(found.folder)
    assert "0 programs" in str(found)


@pytest.mark.parametrize("word", ["off", "OFF", "", " "])
def test_a_word_turns_it_off(monkeypatch, tmp_path, word):
    compiled.compile_cache()
    monkeypatch.setenv("METAREC_COMPILE_CACHE_DIR", word)
    found = compiled.compile_cache()
    assert found.folder is None
    assert folder_of_jax() is None
    assert "every run compiles again" in str(found)


def test_the_variable_moves_it_and_that_of_jax_comes_first(monkeypatch, tmp_path):
    monkeypatch.setenv("METAREC_COMPILE_CACHE_DIR", str(tmp_path / "mine"))
    assert compiled.compile_cache().folder == tmp_path / "mine"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "of jax"))
    assert compiled.compile_cache().folder == tmp_path / "of jax"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    assert compiled.compile_cache().folder is None


def test_a_folder_that_cannot_be_written_is_no_cache(monkeypatch, tmp_path):
    (tmp_path / "data").write_text("a file stands where the folder should")
    found = compiled.compile_cache()
    assert found.folder is None
    assert "cannot be used" in str(found)
    assert folder_of_jax() is None
    monkeypatch.setenv("METAREC_COMPILE_CACHE_DIR", str(tmp_path / "read-only"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert compiled.compile_cache().folder is None
    assert folder_of_jax() is None


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_not_used_for_longest_goes_first(monkeypatch, tmp_path):
    """Entries of 10, 20, 30 and 40 bytes, used at times 4, 1, 3, 2, and room for 80: 10 + 30 + 40 stay."""
    folder = tmp_path / "data" / "compiled"
    folder.mkdir(parents=True)
    for size, used in ((10, 4), (20, 1), (30, 3), (40, 2)):
        path = folder / f"jit_{size}-cache"
        path.write_bytes(bytes(size))
        os.utime(path, (used, used))
    (folder / "not a program").write_bytes(bytes(500))
    monkeypatch.setattr(compiled, "LARGEST", 80)
    found = compiled.compile_cache()
    assert (found.entries, found.size) == (3, 80)
    assert entries(folder) == ["jit_10-cache", "jit_30-cache", "jit_40-cache", "not a program"]
    monkeypatch.setattr(compiled, "LARGEST", 0)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))  # the user's own: not ours to delete
    assert compiled.compile_cache().entries == 3


def test_the_library_alone_keeps_nothing():
    program = "import metarec_jax, metarec_jax.experiment.run, jax; print(jax.config.jax_compilation_cache_dir)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"


PROGRAM = """
    import sys
    import jax, jax.monitoring
    hits = []
    jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None)
    from metarec_jax import learners, models
    from metarec_jax.experiment.compiled import compile_cache
    from metarec_jax.data.synthetic import synthetic
    from metarec_jax.training.loop import fit
    compile_cache()
    data = synthetic(30, 20, ratings_per_user=(5, 10), seed=0).data
    found = fit(learners.ridge(models.content_model(data.columns, size=2)), data, steps=3)
    sums = [x.hex() for x in map(float, jax.tree.leaves(jax.tree.map(lambda a: a.sum(), found.params)))]
    print(len(hits), sums)
"""


@pytest.mark.slow
def test_a_second_start_compiles_nothing_and_gets_the_same_bits(tmp_path):
    """Filling a cache, from it, and from one whose entries are cut short: one result, and nothing on stderr."""
    said = []
    for state in ("empty", "full", "cut short"):
        if state == "cut short":
            for path in tmp_path.glob("*-cache"):
                path.write_bytes(path.read_bytes()[:100])
        variables = os.environ | {"METAREC_COMPILE_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-c", textwrap.dedent(PROGRAM)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=variables)
        assert done.stderr == ""
        said.append(done.stdout.split(maxsplit=1))
    hits = [int(count) for count, _ in said]
    assert hits == [0, len(list(tmp_path.glob("*-cache"))), 0]
    assert len({numbers for _, numbers in said}) == 1
