"""Write the arrays of a step into a folder, and read them. The only module that uses Orbax.

Leaves are stored in a flat list, named by their numbers; `training.checkpoints.leaves` has their paths,
shapes and digests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from metarec_jax.training.checkpoints import leaves
from metarec_jax.training.checkpoints.quiet import quiet

_CHUNK = 64 * 2**20
"""Bytes of a chunk of an array, so that a process which restores a part reads little more than that part."""


def read(folder: Path, chosen: dict[int, dict[str, Any]], like: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The values of the chosen leaves by path, on the host or with the sharding of the leaf in ``like``; or a fault."""
    ocp = _orbax()
    targets = {k: leaves.target(d, like.get(d["path"])) for k, d in chosen.items()}
    arrays = {_name(k): target for k, target in targets.items() if target.size}
    options = {
        "pytree_options": ocp.options.PyTreeOptions(loading=ocp.options.PyTreeOptions.Loading(partial_load=True)),
        # Each process reads independently: none waits for one that fails, or that has ended.
        "multiprocessing_options": ocp.options.MultiprocessingOptions(
            primary_host=None, active_processes={ocp.multihost.process_index()}
        ),
    }
    with quiet(), ocp.Context(**options):
        loaded = ocp.load(folder, arrays, checkpointable_name="state") if arrays else {}
    values = {}
    for k, d in chosen.items():
        value = loaded[_name(k)] if _name(k) in loaded else leaves.empty(targets[k])
        values[d["path"]] = value
        if "sha256" in d and isinstance(value, np.ndarray) and leaves.digest(value) != d["sha256"]:
            return {}, f"the digest of {d['path']} does not match"
    return values, None


def start(folder: Path, flat: list[leaves.Leaf], described: list[dict[str, Any]], metrics: dict[str, float]) -> Any:
    """Start writing leaves into a new folder; ``result()`` of the returned object waits for the end."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet())
        writing = _start(folder, flat, described, metrics)
        return _Writing(writing, stack.pop_all())


class _Writing:
    """A save that is under way."""

    def __init__(self, writing: Any, until_the_end: contextlib.ExitStack) -> None:
        self._writing, self._until_the_end = writing, until_the_end

    def result(self) -> None:
        """Wait for the end of the save; raises the error of one that failed."""
        with self._until_the_end:
            self._writing.result()


def _start(folder: Path, flat: list[leaves.Leaf], described: list[dict[str, Any]], metrics: dict[str, float]) -> Any:
    ocp = _orbax()
    arrays = {_name(k): leaf.value for k, leaf in enumerate(flat) if leaf.value.size}  # Orbax refuses empty ones
    saving = ocp.options.ArrayOptions.Saving
    options = {
        "file_options": ocp.options.FileOptions(skip_sync_file_validations=True),
        # In the background Orbax would wait five minutes for a folder that cannot be made.
        "async_options": ocp.options.AsyncOptions(create_directories_asynchronously=False),
        "array_options": ocp.options.ArrayOptions(
            saving=saving(storage_options=saving.StorageOptions(chunk_byte_size=_CHUNK))
        ),
    }
    with ocp.Context(**options):
        return ocp.save_async(folder, arrays, custom_metadata={"leaves": described, "metrics": metrics})


def _name(k: int) -> str:
    return f"{k:05d}"


def _orbax() -> Any:
    from orbax.checkpoint import v1

    return v1
