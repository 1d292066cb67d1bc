"""Strict by default: rank promotion raises, float64 is a fixture, real data is an environment variable."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

# Tests compile many small programs and run each once: compile fast, run slow. Before jax is imported.
_FAST_COMPILE = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1 "
    "--xla_force_host_platform_device_count=8"  # for meshes; all else runs on the first of them
)
if version("jaxlib").startswith("0.10."):  # later ones abort on the flag
    _FAST_COMPILE += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{_FAST_COMPILE} {os.environ.get('XLA_FLAGS', '')}"

from metarec_jax.cpu import tune_cpu  # noqa: E402

tune_cpu()  # as the command line does: a child process, which inherits the flags, then computes the same bits

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def float64():
    """Everything in double precision, for derivatives."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets; the test skips where ``METAREC_TEST_DATA`` does not name one."""
    folder = os.environ.get("METAREC_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs real data: set METAREC_TEST_DATA to a folder with ml-1m/ and ml-100k/ in it")
    return Path(folder)
