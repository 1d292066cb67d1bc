"""One of several processes that save and restore a state together; `test_sharded_checkpoint` starts them.

``python tests/sharded_child.py COUNT K PORT SCENARIO=RUN...``: process K of COUNT, each with two devices.
"""

from __future__ import annotations

import os
import resource
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from metarec_jax.core import MetarecError
from metarec_jax.training.checkpoints.checkpoint import Checkpoints, load_params
from metarec_jax.training.devices import processes

IDENTITY = {"data": "abc", "version": 1}
ROWS = 96
"""Rows of the table: 1, 2, 3, 4, 6 and 8 devices share them equally."""


def host_state(step: int, rows: int = ROWS) -> dict[str, Any]:
    """What the state of a step is, on the host; exact in float32, so that adding 1 is the next step's."""
    table = np.arange(rows * 4, dtype=np.float32).reshape(rows, 4)
    return {
        "params": {"table": table + step, "net": [np.float32(step), np.arange(3, dtype=np.float32) + step]},
        "half": np.full(4, step, jnp.bfloat16),
        "empty": np.zeros((0, 4), np.float32),
        "rng": np.array([step, 7], np.uint32),
        "rngs": np.array([[step, k] for k in range(24)], np.uint32),
        "best": np.float32(step / 2),
        "step": step,
    }


SPECS = {"table": PartitionSpec("model"), "rngs": PartitionSpec(("data", "model"))}
KEYS = ("rng", "rngs")


def is_spread(name: str) -> bool:
    """``best`` and ``step`` stay on the host, as the loop's own memory does."""
    return name not in ("best", "step")


def place(name: str, value: Any, mesh: jax.sharding.Mesh) -> Any:
    if not is_spread(name):
        return value
    sharding = NamedSharding(mesh, SPECS.get(name, PartitionSpec()))
    array = jax.make_array_from_callback(np.shape(value), sharding, lambda index: np.asarray(value)[index])
    return jax.random.wrap_key_data(array) if name in KEYS else array


def each(state: Any, function: Any) -> Any:
    """``function(name, leaf)`` of each leaf, under the last name on its path."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(next(p.key for p in reversed(path) if hasattr(p, "key")), leaf), state
    )


def device_state(step: int, mesh: jax.sharding.Mesh, rows: int = ROWS) -> Any:
    return each(host_state(step, rows), lambda name, leaf: place(name, leaf, mesh))


def make_mesh(data: int, model: int) -> jax.sharding.Mesh:
    return jax.make_mesh((data, model), ("data", "model"), (AxisType.Auto,) * 2, devices=jax.devices()[: data * model])


def check(state: Any, step: int, like: Any, rows: int = ROWS) -> None:
    """Assert that this process's parts are those of ``step``, bit for bit, and lie as those of ``like``."""
    wanted = host_state(step, rows)
    assert jax.tree.structure(state) == jax.tree.structure(like)
    for a, b, c in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), jax.tree.leaves(like), strict=True):
        if not isinstance(a, jax.Array):
            assert (a, type(a)) == (b, type(c))
            continue
        assert a.sharding.is_equivalent_to(c.sharding, a.ndim), (a.sharding, c.sharding)
        a = jax.random.key_data(a) if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key) else a
        assert a.dtype == np.asarray(b).dtype
        for shard in a.addressable_shards:
            assert np.asarray(shard.data).tobytes() == np.asarray(b)[shard.index].tobytes(), step


def next_state(state: Any) -> Any:
    """The state of the step after, in the buffers of this one."""
    table = jax.jit(lambda x: x + 1, donate_argnums=0)
    return each(
        state,
        lambda name, x: (
            x + {"best": np.float32(0.5), "step": 1}[name]
            if not is_spread(name)
            else x
            if name == "empty"
            else _next_keys(x)
            if name in KEYS
            else table(x)
        ),
    )


def _next_keys(keys: Any) -> Any:
    """The first word of each key counts the steps."""
    return jax.random.wrap_key_data(jax.jit(lambda d: d.at[..., 0].add(jnp.uint32(1)))(jax.random.key_data(keys)))


def open_run(run: str, **options: Any) -> Checkpoints:
    return Checkpoints(run, **{"identity": IDENTITY, "say": lambda line: print("said:", line, flush=True), **options})


def save(run: str) -> None:
    """Steps 1 to 4, each in the donated buffers of the one before; 2 is the best."""
    mesh = make_mesh(1, jax.device_count())
    state = device_state(1, mesh)
    with open_run(run) as checkpoints:
        for step in range(1, 5):
            checkpoints.save(step, state, metrics={"loss": step / 10}, best=step == 2)
            state = next_state(state)
        step, restored = checkpoints.restore(device_state(0, mesh))
        assert step == 4
        check(restored, 4, state)
        step, restored = checkpoints.restore(device_state(0, mesh), which="best")
        assert step == 2
        check(restored, 2, state)


def resume(run: str) -> None:
    """Restore on a mesh of other axes and from shapes alone, save the next step."""
    mesh = make_mesh(2, jax.device_count() // 2)
    live = device_state(0, mesh)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x, live
    )
    with open_run(run) as checkpoints:
        step, restored = checkpoints.restore(like)
        check(restored, step, live)
        checkpoints.save(step + 1, next_state(restored), best=True, wait=True)
        print("resumed at", step, flush=True)
    params = load_params(run, like=like["params"])
    rest = {name: leaf for name, leaf in device_state(step + 1, mesh).items() if name != "params"}
    check({**rest, "params": params}, step + 1, live)


def refusals(run: str) -> None:
    """What one process refuses all refuse, in the same words."""
    mesh = make_mesh(1, jax.device_count())
    refused(lambda: open_run(run, identity=IDENTITY | {"version": 2}))
    with open_run(run) as checkpoints:
        refused(lambda: checkpoints.restore(device_state(0, mesh, ROWS * 2)))
        step, restored = checkpoints.restore(device_state(0, mesh))
        check(restored, step, device_state(0, mesh))
    elsewhere = run if jax.process_index() == 0 else f"{run}-elsewhere"
    refused(lambda: open_run(elsewhere))


def locked(run: str) -> None:
    refused(lambda: open_run(run))


def full(run: str) -> None:
    """The disk of the last process takes no more than a kilobyte a file: the save fails in all, the old step stays."""
    mesh = make_mesh(1, jax.device_count())
    state = each(device_state(1, mesh, 9600), lambda name, x: noise(x) if name == "table" else x)
    with open_run(run) as checkpoints:
        checkpoints.save(1, state, wait=True)
        if jax.process_index() == jax.process_count() - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        refused(lambda: checkpoints.save(2, state, wait=True))
        processes.gather("told")  # the end of the first is the end of all
        processes.leave(0)


def noise(x: Any) -> Any:
    """Numbers that do not compress."""
    return jax.jit(lambda x: jax.random.normal(jax.random.key(0), x.shape), out_shardings=x.sharding)(x)


def forever(run: str) -> None:
    """Save and save until killed."""
    mesh = make_mesh(1, jax.device_count())
    with open_run(run) as checkpoints:
        like = device_state(0, mesh)
        found = checkpoints.restore(like)
        step, state = (0, like) if found is None else found
        check(state, step, like)
        print("from", step, flush=True)
        while True:
            step, state = step + 1, next_state(state)
            checkpoints.save(step, state, best=step % 3 == 0)
            print(step, flush=True)


def alone(run: str) -> None:
    """The first process, once it has parted from the others, reads the parameters that all have written."""
    jax.distributed.shutdown()
    if jax.process_index() == 0:
        print("alone:", np.asarray(load_params(run)["net"]["0"]), flush=True)


def refused(action: Any) -> None:
    try:
        action()
    except MetarecError as error:
        print("refused:", error, flush=True)
    else:
        raise AssertionError("not refused")


SCENARIOS = {
    "save": save,
    "resume": resume,
    "resume_one": resume,
    "refusals": refusals,
    "locked": locked,
    "full": full,
    "alone": alone,
    "forever": forever,
}


def main() -> None:
    count, k, port, *scenarios = sys.argv[1:]
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=int(count), process_id=int(k))
    for scenario in scenarios:
        name, run = scenario.split("=")
        print(f"{name}:", flush=True)
        SCENARIOS[name](run)


if __name__ == "__main__":
    main()
