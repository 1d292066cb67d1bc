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

from metarec_jax.core import Learner, MetarecError, Method, Params
from metarec_jax.data.interactions import Interactions
from metarec_jax.data.tasks import TaskSource, task_source
from metarec_jax.training.row_optimizers import RowOptimizer, lazy_adam
from metarec_jax.training.step import Optimizers, TrainState, init_state, make_step

Validate = Callable[[Params], Mapping[str, float]]


class FitResult(NamedTuple):
    """What `fit` returns.

    Attributes:
      params: the best meta-parameters by validation; the last ones without validation.
      history: one dict a chunk: step, loss, tasks_per_s, and the validation metrics where they were taken.
      step: outer steps done.
      stopped: "finished", "early stop" or "interrupted".
      method: the learner with these parameters, for `evaluate` and `Recommender`.
    """

    params: Params
    history: list[dict[str, float]]
    step: int
    stopped: str
    method: Method


class Saver(Protocol):
    """Where states go: `training.checkpoint.Checkpoints`."""

    def save(self, step: int, state: Any, *, metrics: Any = None, best: bool = False, wait: bool = False) -> None: ...
    def restore(self, like: Any, *, which: str = "latest") -> tuple[int, Any] | None: ...


class LoopState(NamedTuple):
    """A checkpoint: the training state and what early stopping remembers. ``best`` is inf before any validation."""

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
    monitor: str = "loss",
    patience: int | None = 8,
    checkpoints: Saver | None = None,
    save_every: int = 250,
    progress: Callable[[int, dict[str, float]], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> FitResult:
    """Meta-train a learner.

    The result is a function of the arguments alone: neither ``chunk`` nor an interruption that is resumed from
    ``checkpoints`` changes a bit of it.

    Args:
      train: interactions (then tasks are drawn by `task_source` with its defaults), or a source of tasks.
      steps: outer steps.
      lr: rate of both default optimisers, decayed to a tenth by a cosine.
      optimizer: of the dense parameters; default Adam.
      rows: of the table rows; default `lazy_adam`. An optax transformation here updates whole tables.
      params: where to start; default ``learner.init``.
      chunk: outer steps a compiled call; the host is idle inside.
      validate: ``validate(params) -> {metric: value}``, called every ``validate_every`` steps and at the end.
      monitor: the validation metric that selects; smaller is better.
      patience: validations without a better value before stopping early; None never stops.
      checkpoints: saves every ``save_every`` steps, at every validation and at the end, and resumes from the latest.
      progress: called after every chunk with the step and its metrics.
      stop: polled after every chunk; True saves and returns.

    Raises:
      MetarecError: a loss that is not finite (the step and the last good checkpoint are named), or a monitored metric
        that ``validate`` does not return.
    """
    source = task_source(train) if isinstance(train, Interactions) else train
    schedule = optax.cosine_decay_schedule(lr, max(steps, 1), 0.1)
    optimizers = Optimizers(optimizer or optax.adam(schedule), rows or lazy_adam(schedule))
    k_init, k_train = jax.random.split(jax.random.key(seed))
    params = jax.jit(learner.init)(k_init) if params is None else params
    # A copy: the step donates its state, and the caller's arrays must outlive it.
    start = jax.tree.map(jnp.copy, init_state(learner, optimizers, params, k_train))
    state = LoopState(start, np.float32(np.inf), np.int32(0))
    last_saved, best_params = -1, start.params
    if checkpoints is not None and (found := checkpoints.restore(state)) is not None:
        last_saved, state = found[0], LoopState(*found[1])
        best = checkpoints.restore(state, which="best") if math.isfinite(float(state.best)) else None
        best_params = best[1][0].params if best is not None else state.train.params
    run = _chunk_runner(make_step(learner, source, optimizers))
    done, history, stopped = int(state.train.step), [], "finished"
    pause = [n for n in (validate_every if validate else 0, save_every if checkpoints else 0) if n]
    while done < steps:
        if patience is not None and int(state.stale) >= patience:
            stopped = "early stop"
            break
        length = min([chunk, steps - done, *(n - done % n for n in pause)])
        began = time.perf_counter()
        after, metrics = run(state.train, source.data, length)
        means = _checked(metrics, done, last_saved)
        done += length
        row = {"step": float(done), **means, "tasks_per_s": length * source.tasks / (time.perf_counter() - began)}
        state, better = state._replace(train=after), False
        if validate and (done % validate_every == 0 or done == steps):
            row |= {f"validation_{name}": float(value) for name, value in validate(after.params).items()}
            if f"validation_{monitor}" not in row:
                raise MetarecError(
                    f"validate() returned no {monitor!r}; it returned {sorted(row)}; set monitor= to one of them"
                )
            better = row[f"validation_{monitor}"] < float(state.best)
            value = np.float32(row[f"validation_{monitor}"])
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
        halted = stop()
        if checkpoints is not None and (better or halted or done == steps or done % save_every == 0):
            checkpoints.save(done, state, metrics=row, best=better, wait=halted or done == steps)
            last_saved = done
        if halted and done < steps:
            stopped = "interrupted"
            break
    chosen = best_params if validate and math.isfinite(float(state.best)) else state.train.params
    return FitResult(chosen, history, done, stopped, Method(chosen, learner.adapt, learner.predict))


def _chunk_runner(step: Callable[..., Any]) -> Callable[..., Any]:
    """``run(state, data, length)``: one compiled scan for each length met; the state's buffers are reused."""

    def run(state: TrainState, data: Any, length: int) -> Any:
        return jax.lax.scan(lambda s, _: step(s, data), state, None, length=length)

    return jax.jit(run, static_argnums=2, donate_argnums=0)


def _checked(metrics: Mapping[str, Any], done: int, last_saved: int) -> dict[str, float]:
    """Means of a chunk's metrics, or a clear error at the first loss that is not finite."""
    losses = np.asarray(metrics["loss"])
    bad = np.flatnonzero(~np.isfinite(losses))
    if len(bad):
        kept = f"the checkpoint of step {last_saved} is good" if last_saved >= 0 else "no checkpoint was saved yet"
        raise MetarecError(
            f"the loss of step {done + int(bad[0])} is {losses[bad[0]]}; {kept}; "
            "lower the learning rate or the inner rate"
        )
    return {name: float(np.mean(values)) for name, values in metrics.items()}
