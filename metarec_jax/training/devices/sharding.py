"""Devices in a mesh: the placement of each array of a run, and each device's part of a step.

A mesh has two axes. The tasks of a batch are partitioned over all devices. The rows of a large table are partitioned
over the axis ``model``, and each of the ``data`` groups of devices holds a whole table; everything else is on every
device. Only ids, rows and gradients of the batch move between devices in a step, never a table.

The adaptation of a device's own tasks is inside `jax.shard_map`, so that the learner's code is not partitioned, and
computes the same as on one device. Source: the hybrid of data and model parallelism of Naumov et al., "Deep Learning
Recommendation Model for Personalization and Recommendation Systems", 2019, in TorchRec's two-dimensional form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from metarec_jax.core import Array, MetarecError
from metarec_jax.rows import LARGE

DATA, MODEL = "data", "model"
TASKS = P((DATA, MODEL))


def make_mesh(data: int | None = None, model: int | None = None) -> Mesh:
    """A mesh of ``data x model`` devices; by default of all devices.

    Args:
      data: number of groups of devices, each of which holds every table.
      model: number of devices that share the rows of a table; by default the largest power of two that divides them.

    Raises:
      MetarecError: a number below 1, or more devices than there are.

    >>> dict(make_mesh(data=1, model=1).shape)
    {'data': 1, 'model': 1}
    """
    devices = jax.devices()
    if model is None:
        model = len(devices) // (data or 1)
        model = model & -model if data is None else max(model, 1)
    data = max(len(devices) // model, 1) if data is None else data
    if data < 1 or model < 1:
        raise MetarecError(f"the sizes of a mesh must be 1 or more, got data={data}, model={model}; correct them")
    if data * model > len(devices):
        raise MetarecError(
            f"a mesh of data={data}, model={model} requires {data * model} devices, and there are {len(devices)}; "
            "give smaller numbers, or start more processes"
        )
    grid = np.array(devices[: data * model]).reshape(data, model)
    return Mesh(grid, (DATA, MODEL), axis_types=(AxisType.Auto, AxisType.Auto))


def check_tasks(mesh: Mesh, tasks: int) -> None:
    """Raise MetarecError where the devices of the mesh cannot share ``tasks`` equally."""
    if tasks % mesh.size:
        raise MetarecError(
            f"a batch has {tasks} tasks, and {mesh.size} devices cannot share them equally; "
            f"draw {-(-tasks // mesh.size) * mesh.size} tasks per step, or give another mesh"
        )


def is_cut(mesh: Mesh, num_rows: int) -> bool:
    """Whether a table of ``num_rows`` is partitioned over the devices: it is large, and they can share it equally."""
    return mesh.shape[MODEL] > 1 and num_rows >= LARGE and num_rows % mesh.shape[MODEL] == 0


def state_shardings(mesh: Mesh, shapes: Any) -> Any:
    """The sharding of each leaf of a `TrainState` with these shapes: large tables and their optimisers' rows are
    partitioned, the rest is on every device."""
    whole = NamedSharding(mesh, P())
    tables: Mapping[str, Any] = shapes.params["tables"]

    def like(num_rows: int) -> Callable[[Any], NamedSharding]:
        cut = is_cut(mesh, num_rows)
        return lambda leaf: NamedSharding(mesh, P(MODEL)) if cut and leaf.shape[:1] == (num_rows,) else whole

    placed = jax.tree.map(lambda leaf: whole, shapes)
    return placed._replace(
        params={**placed.params, "tables": {n: like(t.shape[0])(t) for n, t in tables.items()}},
        tables={n: jax.tree.map(like(tables[n].shape[0]), state) for n, state in shapes.tables.items()},
    )


def put(value: Any, sharding: NamedSharding) -> Array:
    """An array that is the same in every process, with the given sharding."""
    if jax.process_count() == 1:
        return jax.device_put(value, sharding)
    if jax.dtypes.issubdtype(getattr(value, "dtype", np.float32), jax.dtypes.prng_key):
        data = put(jax.random.key_data(value), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(value))
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return jax.device_put(value, sharding)
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def replicate(mesh: Mesh, values: Any) -> Any:
    """A pytree on every device of the mesh."""
    return jax.tree.map(lambda value: put(value, NamedSharding(mesh, P())), values)


def spread(mesh: Mesh, values: Any, axis: int = 0) -> Any:
    """Host arrays, partitioned over all devices along ``axis``, that of the tasks."""
    spec = P(*[None] * axis, (DATA, MODEL))
    return jax.tree.map(lambda value: put(value, NamedSharding(mesh, spec)), values)


def spread_inside(mesh: Mesh, batch: Any) -> Any:
    """`spread` within a compiled program, for arrays that are computed there."""
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, TASKS)), batch)


def each_device(mesh: Mesh, work: Callable[..., Any], arguments: Any, results: Any) -> Callable[..., Any]:
    """``work`` on each device's own part of its arguments; ``arguments``, ``results``: a spec, or a pytree of specs.

    Replication is not tracked inside (``check_vma=False``): else a learner's own gradient with respect to weights that
    all devices share would silently be summed over them, and a scan that starts from zeros would have a type error.
    """
    return jax.shard_map(work, mesh=mesh, in_specs=arguments, out_specs=results, check_vma=False)


def mean_over_devices(values: Any) -> Any:
    """The mean of the values over the devices, sent as one vector; within `each_device`."""
    flat, unflatten = ravel_pytree(values)
    return unflatten(jax.lax.pmean(flat, (DATA, MODEL)))


def from_all(own: Array) -> Array:
    """The arrays of all devices, joined along the leading axis in the order of the tasks; within `each_device`."""
    return jax.lax.all_gather(own, (DATA, MODEL), tiled=True)


def take_rows(table: Array, ids: Array) -> Array:
    """Rows of a table that is partitioned over ``model``, for this device's own ids; within `each_device`.

    Each device of a group looks up the rows that it has for the ids of all; a sum gives each device its rows. The other
    terms of that sum are zeros: the rows are exact.

    Args:
      table: ``[num_rows / model, size]``, this device's rows.
      ids: int32 ``[t, n]``, rows of the whole table; the same number on every device.

    Returns:
      ``[t, n, size]``.
    """
    local, own = _local(table, jax.lax.all_gather(ids, MODEL, tiled=True))
    rows = jnp.where(own[..., None], table[local], 0)
    return jax.lax.psum_scatter(rows, MODEL, tiled=True)


def gather_updates(table: Array, ids: Array, grads: Array, cut: bool) -> tuple[Array, Array]:
    """The ids and gradients of all devices, for this device's rows of a table; within `each_device`.

    Ids become local; those of other devices' rows point beyond the last row, where nothing is written, with a gradient
    of 0. The order is that of the tasks of the batch.
    """
    ids, grads = from_all(ids), from_all(grads)
    if not cut:
        return ids, grads
    local, own = _local(table, ids)
    return jnp.where(own, local, table.shape[0]), jnp.where(own[:, None], grads, 0)


def _local(table: Array, ids: Array) -> tuple[Array, Array]:
    """Positions in this device's rows (0 for rows of another device), and whether each row is its own."""
    at = ids - jax.lax.axis_index(MODEL) * table.shape[0]
    own = (at >= 0) & (at < table.shape[0])
    return jnp.where(own, at, 0), own


def describe(mesh: Mesh, shapes: Mapping[str, Any]) -> str:
    """One line on a mesh and the tables of a run; ``shapes`` are the tables, or their shapes."""
    cut = [name for name, table in shapes.items() if is_cut(mesh, table.shape[0])]
    large = [name for name, table in shapes.items() if table.shape[0] >= LARGE and name not in cut]
    devices = f"{mesh.size} devices (data={mesh.shape[DATA]}, model={mesh.shape[MODEL]})"
    parts = [f"tasks over {devices}"]
    if cut:
        parts.append(f"rows of {', '.join(cut)} partitioned over {mesh.shape[MODEL]} devices")
    if large and mesh.shape[MODEL] > 1:
        parts.append(f"{', '.join(large)} on every device, since {mesh.shape[MODEL]} does not divide its rows")
    return "; ".join(parts)


def size_on_device(shapes: Any, shardings: Any) -> int:
    """Bytes of arrays with these shapes that one device holds."""
    total = 0
    for leaf, sharding in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
            sharding = NamedSharding(sharding.mesh, P())
        total += math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return total
