"""What a CPU is told: threads enough that programs which wait for each other's threads do not wait for ever."""

from __future__ import annotations

import os

import jax
import pytest

from metarec_jax import cpu


@pytest.mark.parametrize(
    ("cores", "set_by_user", "wanted"), [(1, None, None), (2, None, "8"), (16, None, "16"), (2, "3", "3")]
)
def test_threads_are_asked_for_on_few_cores(monkeypatch, cores, set_by_user, wanted):
    """One core computes in line; what the user set stands."""
    monkeypatch.setattr(cpu, "cores", lambda: cores)
    monkeypatch.setenv("NPROC", "")  # so that what is set here is taken back
    monkeypatch.delenv("NPROC")
    if set_by_user is not None:
        monkeypatch.setenv("NPROC", set_by_user)
    cpu.tune_cpu()
    assert os.environ.get("NPROC") == wanted


def test_called_after_jax_has_computed_it_says_that_it_is_too_late(monkeypatch):
    """XLA has read its flags: nothing is changed. Where the flags were there before, all is well."""
    jax.block_until_ready(jax.numpy.ones(()))
    assert cpu.tune_cpu() is True  # conftest.py was in time
    monkeypatch.setenv("XLA_FLAGS", "--xla_some_flag")
    with pytest.warns(UserWarning, match="call it first"):
        assert cpu.tune_cpu() is False
    assert os.environ["XLA_FLAGS"] == "--xla_some_flag"


@pytest.mark.parametrize(("threads", "at_once"), [("2", 1), ("7", 1), ("8", 2), ("none", 1)])
def test_two_programs_run_at_once_only_with_threads_enough(monkeypatch, threads, at_once):
    monkeypatch.setattr(cpu, "cores", lambda: 2)
    monkeypatch.setenv("NPROC", threads)
    assert cpu.runs_together() == at_once
