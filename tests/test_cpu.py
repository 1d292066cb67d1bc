"""Flags and pages for a CPU."""

from __future__ import annotations

import os
import subprocess
import sys

import jax.numpy as jnp
import pytest

from metarec_jax import cpu


def flags(monkeypatch, before: str | None) -> str:
    if before is None:
        monkeypatch.delenv("XLA_FLAGS", raising=False)
    else:
        monkeypatch.setenv("XLA_FLAGS", before)
    assert cpu.tune_cpu() == ("xla_backend_extra_options=mine" not in (before or ""))
    return os.environ["XLA_FLAGS"]


def test_flags_are_added_once_and_yours_are_left(monkeypatch):
    fresh = flags(monkeypatch, None)
    assert fresh.startswith("--xla_backend_extra_options=xla_cpu_disable_loop_unrolling")
    assert flags(monkeypatch, fresh) == fresh
    assert flags(monkeypatch, "--xla_dump_to=x").startswith("--xla_dump_to=x --xla_backend_extra_options=")
    assert flags(monkeypatch, "--xla_backend_extra_options=mine").count("xla_backend_extra_options") == 1


@pytest.mark.parametrize(
    ("jaxlib", "known"), [("0.10.2", True), ("0.12.0", True), ("0.13.0", False), ("strange", False)]
)
def test_a_flag_that_xla_may_not_know_is_left_out(monkeypatch, jaxlib, known):
    """XLA ends the process on an unknown flag: only versions in which it was seen get it."""
    monkeypatch.setattr(cpu, "version", lambda package: jaxlib)
    assert ("ynn" in flags(monkeypatch, None)) == known


def test_xla_accepts_the_flags():
    """In a fresh process: the flags are read, and a program runs."""
    code = "import metarec_jax as mr; assert mr.tune_cpu(); import jax.numpy as jnp; print(jnp.arange(4).sum())"
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "6"), done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="huge pages are asked of Linux")
def test_huge_pages_change_nothing_in_the_array():
    table = jnp.arange(2**20, dtype=jnp.float32)
    given = cpu.huge_pages({"table": table, "small": jnp.ones(3), "other": "not an array"}, least=2**20)
    assert given in (0, *range(table.nbytes - 2 * 4096, table.nbytes + 1))  # 0: a kernel without them
    assert float(table.sum()) == float(jnp.arange(2**20, dtype=jnp.float32).sum())
    assert cpu.huge_pages(table, least=2**30) == 0
