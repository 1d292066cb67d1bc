"""fit(): chunks of outer steps in one program; between chunks the host validates, saves and reports."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from metarec_jax import signals, tree
from metarec_jax.core import Array, Learner, MetarecError, Method, Params
from metarec_jax.cpu import huge_pages
from metarec_jax.data.draw import TaskData, TaskSource, task_source
from metarec_jax.data.interactions import Interactions
from metarec_jax.rows import check_ids, outside
from metarec_jax.training.devices import budget as memory
from metarec_jax.training.devices import processes, sharding
from metarec_jax.training.feed import Feed
from metarec_jax.training.row_optimizers import RowOptimizer, lazy_adam
from metarec_jax.training.step import BAD_TASK, HIGHEST, LOWEST, Optimizers, TrainState, init_state, make_step

_POLL_SECONDS = 0.5
"""Seconds between two polls of ``stop`` within a chunk, where a single process trains."""
Validate = Callable[[Params], Mapping[str, float]]


class Diverged(MetarecError):
    """The loss of an outer step is not finite. Training again with the same settings fails at the same step."""


class FitResult(NamedTuple):
    """What `fit` returns.

    Attributes:
      params: the best meta-parameters by validation; the last ones without validation.
      history: one dict per chunk: step, loss, tasks_per_s, and validation metrics where there was a validation.
      step: number of outer steps done.
      stopped: "finished", "early stop" or "interrupted".
      method: the learner with these parameters, for `evaluate` and `Recommender`.
      compile_seconds: seconds of compiling the program of the outer steps; 0 where no step was left to do.
    """

    params: Params
    history: list[dict[str, float]]
    step: int
    stopped: str
    method: Method
    compile_seconds: float = 0.0


class Saver(Protocol):
    """A store of states, such as `training.checkpoints.checkpoint.Checkpoints`."""

    def save(self, step: int, state: Any, *, metrics: Any = None, best: bool = False, wait: bool = False) -> None: ...
    def restore(self, like: Any, *, which: str = "latest") -> tuple[int, Any] | None: ...


class LoopState(NamedTuple):
    """A checkpoint: the training state and the state of early stopping. ``best`` is inf before any validation."""

    train: TrainState
    best: np.float32
    stale: np.int32


def fit(
    learner: Learner,
    train: Interactions | TaskSource,
    *,
    steps: int = 2000,
    lr: float = 3e-3,
    optimizer: optax.GradientTransformation | None = None,
    rows: RowOptimizer | optax.GradientTransformation | None = None,
    seed: int = 0,
    params: Params | None = None,
    chunk: int = 50,
    validate: Validate | None = None,
    validate_every: int = 250,
    monitor: str | None = None,
    patience: int | None = 8,
    checkpoints: Saver | None = None,
    save_every: int = 250,
    progress: Callable[[int, dict[str, float]], None] | None = None,
    say: Callable[[str], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    debug: bool = False,
    mesh: Mesh | None = None,
    micro_batches: int | None = None,
    dtype: Any = None,
) -> FitResult:
    """Meta-train a learner.

    The result depends only on the arguments: neither ``chunk`` nor an interruption that is resumed from ``checkpoints``
    changes a bit of it.

    Args:
      learner: the learner.
      train: interactions (then tasks are drawn by `task_source` with its defaults and ``learner.user_rows``), or a
        source of tasks.
      steps: number of outer steps.
      lr: rate of both default optimisers, decayed to a tenth by a cosine.
      optimizer: optimiser of the dense parameters; Adam by default.
      rows: optimiser of the table rows; `lazy_adam` by default. An optax transformation here updates whole tables.
      seed: seed of the initial parameters, the tasks drawn and the learner's own randomness.
      params: initial parameters, which are copied; ``learner.init`` by default.
      chunk: largest number of outer steps per call of the compiled program, during which the host is idle. One program
        runs all lengths.
      validate: ``validate(params) -> {metric: value}``, called every ``validate_every`` steps and at the end.
      validate_every: number of steps between two validations.
      monitor: validation metric by which parameters are selected; smaller is better. By default "error", which
        `validator` returns, or "loss" if ``validate`` returns no "error".
      patience: number of validations without a better value before an early stop; None never stops early.
      checkpoints: store of states: written every ``save_every`` steps, at each validation that is the best so far, and
        at the end (also of an early stop or an interruption); training resumes from the newest. A validation that was
        not saved before a kill is repeated, with the same value.
      save_every: number of steps between two saves.
      progress: called after every chunk with the step and its metrics.
      say: called once, before the first step, with a line on the time of compiling and the memory of the run.
      stop: polled after every chunk, and every half second within one where a single process trains; True saves and
        returns.
      debug: check after every chunk that each id drawn is in its table (JAX would silently take the nearest row). The
        users and items of `task_source` are always checked once, before the first step.
      mesh: devices that share the work, of one process or of several (`sharding.make_mesh`): each adapts its part of
        the tasks, and rows of large tables are partitioned over the axis ``model``. The result is the same up to
        rounding. Every process of a run makes this same call.
      micro_batches: number of equal groups in which a device's tasks adapt, one after the other, with their gradients
        summed: less memory, the same result up to rounding. One by default; on a CPU as many as suits its caches.
      dtype: precision in which the learner computes, such as ``jnp.bfloat16``; parameters and optimisers keep theirs.

    Raises:
      Diverged: a loss is not finite; the message names the step, the task and the last good checkpoint.
      MetarecError: ``validate`` does not return the monitored metric; ``params`` are of another learner; a table lacks
        an id; a count is below 1; the mesh cannot share the tasks equally; the tables, or a batch, do not fit into
        memory (found before they are allocated; the message says how much each takes).

    >>> from metarec_jax.data.synthetic import synthetic
    >>> from metarec_jax.learners.ridge import ridge
    >>> from metarec_jax.models.content import content_model
    >>> data = synthetic(30, 20, ratings_per_user=(5, 10), seed=0).data
    >>> found = fit(ridge(content_model(data.columns, size=2)), data, steps=4, chunk=3)
    >>> found.step, found.stopped, [row["step"] for row in found.history]
    (4, 'finished', [3.0, 4.0])
    """
    for name, count in (("chunk", chunk), ("validate_every", validate_every), ("save_every", save_every)):
        if count < 1:
            raise MetarecError(f"fit: {name} must be 1 or more, got {count}; correct it")
    source = _source(learner, train)
    schedule = optax.cosine_decay_schedule(lr, max(steps, 1), 0.1)
    optimizers = Optimizers(optimizer or optax.adam(schedule), rows or lazy_adam(schedule))
    k_init, k_train = run_keys(seed)
    if params is not None:
        _check_params(learner, params)
    start = _start(learner, optimizers, params, k_init, k_train, keeps_best=validate is not None, mesh=mesh)
    if mesh is not None:
        source = source._replace(data=sharding.replicate(mesh, source.data))
    state = LoopState(start, np.float32(np.inf), np.int32(0))
    last_saved, best_params = -1, start.params
    if checkpoints is not None and (found := checkpoints.restore(state)) is not None:
        last_saved, state = found[0], LoopState(*found[1])
        best = checkpoints.restore(state, which="best") if math.isfinite(float(state.best)) else None
        # Another copy: where the best is the latest, its buffers would be donated, too.
        best_params = jax.tree.map(jnp.copy, best[1][0].params if best is not None else state.train.params)
    huge_pages(state.train)
    done, history, stopped = int(state.train.step), [], "finished"
    run: jax.stages.Compiled | None = None
    compile_seconds = 0.0
    pause = [n for n in (validate_every if validate else 0, save_every if checkpoints else 0) if n]
    block = 1 if processes.count() == 1 else chunk
    feed = Feed(source, done, chunk, jax.device_put if mesh is None else lambda batch: sharding.spread(mesh, batch, 1))

    def length_from(step: int) -> int:
        return min([chunk, steps - step, *(n - step % n for n in pause)])

    while done < steps:
        if patience is not None and int(state.stale) >= patience:
            stopped = "early stop"
            break
        length = length_from(done)
        data = feed.take(length)
        if run is None:
            began = time.perf_counter()
            step = make_step(
                learner, source, optimizers, debug=debug, groups=micro_batches, mesh=mesh, dtype=dtype, steps=steps
            )
            with signals.nothing_to_save():
                lowered = _chunk_runner(step, chunk, source.stream is not None).lower(state.train, data, length, 0)
                run = lowered.compile()
            compile_seconds = time.perf_counter() - began
            needs = _check_memory(run, state.train, keeps_best=validate is not None)
            if say is not None:
                over = "" if mesh is None else f"{sharding.describe(mesh, start.params['tables'])}; "
                say(f"{over}compiled in {compile_seconds:.1f} s{needs}")
        began = polled = time.perf_counter()
        after, parts, first, halted = state.train, [], 0, False
        while first < length and not halted:
            dispatched, last = time.perf_counter(), min(length, first + block)
            after, metrics = run(after, data, last, first)
            if last == length:
                feed.ready(length_from(done + length))
            parts.append({name: values[first:last] for name, values in jax.device_get(metrics).items()})
            now, first = time.perf_counter(), last
            if processes.count() == 1:
                block = max(1, block // 2) if now - dispatched > _POLL_SECONDS else min(2 * block, chunk)
                if last < length and now - polled > _POLL_SECONDS:
                    polled, halted = now, stop()
        length = first
        taken = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        means = _checked(learner, taken, done, last_saved)
        done += length
        row = {"step": float(done), **means, "tasks_per_s": length * source.tasks / (time.perf_counter() - began)}
        state, better = state._replace(train=after), False
        if validate and (done % validate_every == 0 or done == steps):
            values = _validated(validate, after.params)
            metric = monitor or ("error" if "error" in values else "loss")
            if metric not in values:
                raise MetarecError(
                    f"validate() did not return {metric!r}, the metric to monitor; set monitor= to one of "
                    f"{', '.join(sorted(values))}"
                )
            row |= {f"validation_{name}": value for name, value in values.items()}
            value = np.float32(row[f"validation_{metric}"])  # in the precision in which the best one is kept
            better = bool(value < state.best)
            state = (
                state._replace(best=value, stale=np.int32(0))
                if better
                else state._replace(stale=state.stale + np.int32(1))
            )
            if better:
                best_params = jax.tree.map(jnp.copy, after.params)
        history.append(row)
        if progress is not None:
            progress(done, row)
        halted = halted or stop()
        ended = halted or done == steps or (patience is not None and int(state.stale) >= patience)
        if checkpoints is not None and (better or ended or done % save_every == 0):
            checkpoints.save(done, state, metrics=row, best=better, wait=ended)
            last_saved = done
        if halted and done < steps:
            stopped = "interrupted"
            break
    chosen = best_params if validate and math.isfinite(float(state.best)) else state.train.params
    method = Method(chosen, learner.adapt, learner.predict, learner.tables)
    return FitResult(chosen, history, done, stopped, method, compile_seconds)


def run_keys(seed: int) -> tuple[Array, Array]:
    """The keys of a run: one for the initial parameters, one for all that training draws.

    Parameters passed to `fit` should be drawn with the first: ``learner.init(run_keys(seed)[0])``.
    """
    k_init, k_train = jax.random.split(jax.random.key(seed))
    return k_init, k_train


def _validated(validate: Validate, params: Params) -> dict[str, float]:
    """The validation metrics, computed on one device and by one process where that device has all parameters."""

    def values(params: Params) -> dict[str, float]:
        return {name: float(value) for name, value in validate(params).items()}

    if all(leaf.is_fully_replicated for leaf in jax.tree.leaves(params)):
        return processes.decide(lambda: values(jax.tree.map(lambda leaf: leaf.addressable_data(0), params)))
    return values(params)


def _start(
    learner: Learner,
    optimizers: Optimizers,
    params: Params | None,
    k_init: Any,
    k_train: Any,
    *,
    keeps_best: bool,
    mesh: Mesh | None,
) -> TrainState:
    """The state before the first step, in buffers of its own: the step donates them, and the caller keeps theirs.

    On a mesh each device allocates only its part: no device, and no host, holds the whole of a partitioned table.
    """

    def begin() -> TrainState:
        return init_state(learner, optimizers, learner.init(k_init) if params is None else params, k_train)

    shapes = jax.eval_shape(begin)
    shardings = None if mesh is None else sharding.state_shardings(mesh, shapes)

    def size(part: Any, placed: Any) -> int:
        """Bytes of it on a device; on all CPU devices of this process, which share the machine's memory."""
        return memory.size_of(part) if mesh is None else sharding.size_on_device(part, placed) * _sharing(mesh)

    state_size = size(shapes, shardings)
    params_size = size(shapes.params, None if shardings is None else shardings.params)
    memory.check_fits(
        state_size + params_size * keeps_best,
        memory.free(jax.local_devices()[0]),
        f"the parameters ({memory.format_bytes(params_size)}) and their optimisers' state"
        + ", and a copy of the best parameters," * keeps_best,
        "give the tables fewer rows or a smaller size, or take another optimizer for rows",
    )
    if shardings is not None:
        if params is None:
            return jax.jit(begin, out_shardings=shardings)()
        placed = jax.tree.map(sharding.put, params, shardings.params)

        def fresh(params: Params) -> TrainState:
            return jax.tree.map(jnp.copy, init_state(learner, optimizers, params, k_train))

        return jax.jit(fresh, out_shardings=shardings)(placed)
    taken = {id(leaf) for leaf in jax.tree.leaves(params)}

    def own(leaf: Any) -> Any:
        """The leaf itself, or a copy where it is the caller's or is in the state a second time."""
        if id(leaf) in taken or not isinstance(leaf, jax.Array):
            return jnp.copy(leaf)
        taken.add(id(leaf))
        return leaf

    params = jax.jit(learner.init)(k_init) if params is None else params
    return jax.tree.map(own, init_state(learner, optimizers, params, k_train))


def _check_memory(run: jax.stages.Compiled, state: TrainState, *, keeps_best: bool) -> str:
    """The memory that the compiled run takes, as text; raises MetarecError where it is not free."""
    estimate = memory.estimate(run)
    if estimate is None:
        return ""
    devices = [shard.device for shard in state.step.addressable_shards]
    free, sharing = memory.free(devices[0]), len(devices) if devices[0].platform == "cpu" else 1
    working = memory.format_bytes(estimate.working * sharing)
    arguments = memory.format_bytes(estimate.arguments * sharing)
    shards = [leaf.sharding for leaf in jax.tree.leaves(state.params)]
    best = sharding.size_on_device(state.params, shards) * sharing * keeps_best
    memory.check_fits(
        estimate.working * sharing + best,
        free,
        f"the outer step, in addition to {arguments} of parameters, optimisers' state and data,",
        "draw fewer tasks per step, take fewer inner steps, give more micro_batches, or set remat=True in maml()",
    )
    of_free = "" if free is None else f", of {memory.format_bytes(free)} that are free"
    return f"; a step takes {working} in addition to {arguments} of parameters and data{of_free}"


def _source(learner: Learner, train: Interactions | TaskSource) -> TaskSource:
    """The source of tasks, with its catalogue checked against the learner's tables."""
    if isinstance(train, Interactions):
        train = task_source(train, user_rows=learner.user_rows)
    if not isinstance(train, TaskSource):
        raise MetarecError(
            f"fit() expected Interactions or a task source to train on, got {type(train).__name__}; "
            "give the result of task_source()"
        )
    if isinstance(train.data, TaskData):
        catalogue = train.data.known
        columns = {"user_id": catalogue.user_row, "item_id": catalogue.item_row, **catalogue.user, **catalogue.item}
        check_ids(learner.tables, columns, source="the training data")
    return train


def _check_params(learner: Learner, params: Params) -> None:
    """Raise MetarecError where ``params`` do not have the names and shapes of the learner's own."""
    expected = tree.partition(jax.eval_shape(learner.init, jax.random.key(0)), None)[0]
    got = tree.partition(params, None)[0]
    if different := sorted(expected.keys() ^ got.keys()):
        fault = "params lack" if different[0] in expected else "params have, and the learner does not have,"
        raise MetarecError(f"{fault} {different[0]!r}; start from learner.init of the same learner")
    for name, leaf in expected.items():
        if jnp.shape(got[name]) != leaf.shape:
            raise MetarecError(
                f"params have {name!r} of shape {list(jnp.shape(got[name]))}, and the learner expects "
                f"{list(leaf.shape)}; start from learner.init of the same learner and data"
            )


def _chunk_runner(step: Callable[..., Any], capacity: int, streamed: bool = False) -> jax.stages.Wrapped:
    """``run(state, data, last, first) -> (state, metrics [capacity])``: steps first..last of a chunk, in one program.

    The state's buffers are donated; metrics outside of ``first..last`` are 0.
    """
    step = jax.jit(step)  # traced once, for the shapes of its metrics and for the loop

    def run(state: TrainState, data: Any, last: int, first: int = 0) -> Any:
        def body(k: Any, carry: tuple[TrainState, dict[str, Any]]) -> tuple[TrainState, dict[str, Any]]:
            state, metrics = step(carry[0], Feed.one(data, k, streamed))
            return state, {name: carry[1][name].at[k].set(value) for name, value in metrics.items()}

        shapes = jax.eval_shape(step, state, Feed.one(data, 0, streamed))[1]
        empty = {name: jnp.zeros((capacity, *m.shape), m.dtype) for name, m in shapes.items()}
        return jax.lax.fori_loop(first, last, body, (state, empty))

    return jax.jit(run, donate_argnums=0)


def _checked(learner: Learner, metrics: Mapping[str, Any], done: int, last_saved: int) -> dict[str, float]:
    """Means of a chunk's metrics; raises at the first step with an id out of range or a loss that is not finite."""
    for name, table in learner.tables.items():
        if HIGHEST + name in metrics:
            low, high = metrics[LOWEST + name], metrics[HIGHEST + name]
            bad = np.flatnonzero((low < 0) | (high >= table.num_rows))
            if len(bad):
                wrong = int(low[bad[0]] if low[bad[0]] < 0 else high[bad[0]])
                raise MetarecError(outside(name, table, wrong, f"step {done + int(bad[0])}"))
    losses = np.asarray(metrics["loss"])
    bad = np.flatnonzero(~np.isfinite(losses))
    if len(bad):
        kept = f"the checkpoint of step {last_saved} is good" if last_saved >= 0 else "no checkpoint was saved yet"
        task = int(metrics[BAD_TASK][bad[0]])
        raise Diverged(
            f"the loss of step {done + int(bad[0])} is {losses[bad[0]]}, first in task {task} of its batch; {kept}; "
            "lower the learning rate or the inner rate"
        )
    unreported = (LOWEST, HIGHEST, BAD_TASK)
    return {name: float(np.mean(m)) for name, m in metrics.items() if not name.startswith(unreported)}


def _sharing(mesh: Mesh) -> int:
    """Number of devices of the mesh that share the memory of this process, as CPU devices do."""
    local = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    return len(local) if local and local[0].platform == "cpu" else 1
