"""Checkpoints of a run: the latest and the best state, checked by digest, resumed bit for bit.

A run directory holds ``checkpoints/latest/STEP``, ``checkpoints/best/STEP``, ``identity.json`` (what the run is) and
``.lock``. Leaves are stored in a flat list with their paths, shapes, dtypes and sha256: Orbax itself loads a flipped
bit without an error. The sha256 of the files of a step are written last, as the mark that the step is whole
(`training.checkpoints.folders`); they are compared before Orbax opens it, since a failed load floods stderr. Nothing
is pickled.

Where several processes train together (`jax.distributed`), all of them make the same calls at the same steps. Each
writes and reads its own shards; the first holds the lock, compares identities, marks, deletes and chooses; an error in
one is raised in all. Processes, devices and shardings may change between save and restore.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax

from metarec_jax import signals
from metarec_jax.core import MetarecError
from metarec_jax.messages import first_line, printable
from metarec_jax.training.checkpoints import arrays, folders, leaves
from metarec_jax.training.checkpoints import lock as run_directory
from metarec_jax.training.devices import processes

Which = Literal["latest", "best"]
_KINDS: tuple[Which, Which] = ("latest", "best")
_ADVICE = "Use the settings and the version that trained it, or start over (--fresh)"
_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run directory, which stays locked meanwhile. A context manager.

    Args:
      directory: directory of the run; created if missing. Several processes need one that all of them see.
      identity: configuration, data and version of the run, JSON-able; compared with the identity in the directory.
      keep: number of latest, and of best, checkpoints on disk; 2 or more, so that a damaged one can be skipped.
      fresh: delete the checkpoints in the directory.
      say: called with one line per event, such as a damaged checkpoint; this module's logger by default.

    Raises:
      MetarecError: the directory holds a run with another identity, or another process trains in it.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> with tempfile.TemporaryDirectory() as run:
    ...     with Checkpoints(run, identity={"seed": 0}) as checkpoints:
    ...         checkpoints.save(10, {"params": jnp.arange(3.0)})
    ...     with Checkpoints(run, identity={"seed": 0}) as checkpoints:
    ...         checkpoints.restore({"params": jnp.zeros(3)})
    (10, {'params': Array([0., 1., 2.], dtype=float32)})
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        identity: Mapping[str, Any],
        keep: int = 2,
        fresh: bool = False,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.directory = Path(directory).absolute()
        self._keep = keep
        self._say = say or _log.warning
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._outcome: str | None = None  # name of the message on how the pending save ended
        self._lock: int | None = None
        try:
            token = processes.decide(lambda: self._claim(identity, fresh))
            if processes.count() > 1:
                self._lock = run_directory.join(self.directory, token) or self._lock
        except BaseException:
            self._release()
            raise

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(
        self,
        step: int,
        state: Any,
        *,
        metrics: Mapping[str, float] | None = None,
        best: bool = False,
        wait: bool = False,
    ) -> None:
        """Copy ``state`` to the host now and write it in the background: as the latest and, if ``best``, as the best.

        Args:
          step: number of the step.
          state: a pytree of arrays, PRNG keys and numbers; may be donated as soon as this returns. Each of several
            processes passes the same numbers, and its own part of the arrays.
          metrics: numbers stored with the state.
          best: write it as the best, too.
          wait: return only when it is on disk.

        Raises:
          MetarecError: this save, or the one before it in the background, could not be written.
        """
        self.wait()
        step, flat = int(step), leaves.flatten(state)
        extra = {name: float(value) for name, value in (metrics or {}).items()}
        # The best is written first: a run killed in between resumes from it, as from a latest one.
        kinds: list[Which] = ["best", "latest"] if best else ["latest"]
        if processes.count() == 1:
            self._pending = self._worker.submit(self._write, step, flat, extra, kinds)
        else:
            self._write_together(step, flat, extra, kinds)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Return when the save in the background is on disk. Raises MetarecError where it could not be written."""
        pending, self._pending = self._pending, None
        outcome, self._outcome = self._outcome, None
        if outcome is not None and (failure := processes.receive(outcome)):
            self._clear_away()
            # Another process may have failed, and the thread here may still wait for it.
            self._worker.shutdown(wait=False)
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            raise MetarecError(failure)
        if pending is not None:
            pending.result()

    def restore(self, like: Any, *, which: Which = "latest") -> tuple[int, Any] | None:
        """The step and the state of the newest sound checkpoint, or None where there is none.

        A damaged checkpoint is skipped (with one line) for the one before. The best checkpoints hold whole states, so
        ``which="latest"`` takes the newest sound one of both kinds, with one line where that is a best one. Newer
        checkpoints than the restored one are damaged, and deleted.

        Args:
          like: the state's pytree, of arrays or `jax.ShapeDtypeStruct`; its shardings are kept.
          which: "latest", to resume, or "best", which reads only the best checkpoints and deletes nothing.

        Raises:
          MetarecError: the checkpoint's leaves have other names, shapes or dtypes than ``like``; or this machine cannot
            read it (permissions, open files, memory), in which case no older one is taken.
        """
        self.wait()
        kinds: tuple[Which, ...] = _KINDS if which == "latest" else ("best",)
        newest = _newest(self.directory, kinds, like, self._say, together=True)
        if which == "latest":
            processes.decide(lambda: self._forget_after(-1 if newest is None else newest[0]))
        return newest

    def close(self) -> None:
        """Wait for the last save and unlock the directory."""
        try:
            self.wait()
        finally:
            self._release()

    def _release(self) -> None:
        self._worker.shutdown()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _claim(self, identity: Mapping[str, Any], fresh: bool) -> str:
        self._lock, token = run_directory.lock(self.directory)
        if fresh:
            shutil.rmtree(self.directory / "checkpoints", ignore_errors=True)
        holds = any(folders.steps(self._root(kind)) for kind in _KINDS)
        run_directory.identify(self.directory, identity, resumes=holds)
        self._clear_away()
        return token

    def _root(self, kind: Which) -> Path:
        return self.directory / "checkpoints" / kind

    def _clear_away(self) -> None:
        """Delete the files of incomplete saves: they may fill a disk."""
        if processes.is_first():
            for kind in _KINDS:
                folders.sweep(self._root(kind))

    def _forget_after(self, step: int) -> None:
        for kind in _KINDS:
            for later in folders.numbered(self._root(kind)):
                if later > step:
                    folders.delete(self._root(kind) / str(later))

    def _write(self, step: int, flat: list[leaves.Leaf], metrics: dict[str, float], kinds: list[Which]) -> None:
        """Write the state of a single process."""
        described = [leaves.describe(leaf) for leaf in flat]
        try:
            with signals.saving(f"the checkpoint of step {step}"):
                folder = self._root(kinds[0]) / str(step)
                if not _holds(folder, described):
                    folders.make_way(folder)
                    arrays.start(folder, flat, described, metrics).result()
                self._settle(step, kinds, described)
        except Exception as error:  # Orbax and TensorStore raise many types where a disk is full
            raise self._failed(step, error) from error

    def _write_together(
        self, step: int, flat: list[leaves.Leaf], metrics: dict[str, float], kinds: list[Which]
    ) -> None:
        """Start writing each process's part of a state; its arrays are copied when this returns."""
        folder = self._root(kinds[0]) / str(step)
        outcome = processes.next_name()
        try:
            processes.decide(lambda: folders.make_way(folder))
            writing = arrays.start(folder, flat, [leaves.describe(leaf) for leaf in flat], metrics)
        except jax.errors.JaxRuntimeError:  # another process has ended
            raise
        except Exception as error:
            failure = self._failed(step, error)
            processes.send(outcome, str(failure))
            raise failure from error
        self._outcome = outcome
        self._pending = self._worker.submit(self._finish, writing, step, kinds, outcome)

    def _finish(self, writing: Any, step: int, kinds: list[Which], outcome: str) -> None:
        """Wait until all processes have written; the first marks the step and informs the others."""
        try:
            with signals.saving(f"the checkpoint of step {step}"):
                writing.result()
                if processes.is_first():
                    self._settle(step, kinds)
                    processes.send(outcome, "")
        except Exception as error:
            processes.send(outcome, str(self._failed(step, error)))

    def _settle(self, step: int, kinds: list[Which], described: Any = None) -> None:
        """Mark the step that is written, copy it, and delete old ones."""
        written = self._root(kinds[0]) / str(step)
        if not folders.is_whole(written):
            folders.mark(written)
        for kind in kinds[1:]:
            folder = self._root(kind) / str(step)
            if described is None or not _holds(folder, described):
                folders.copy(written, folder)
        for kind in kinds:
            folders.prune(self._root(kind), self._keep)

    def _failed(self, step: int, error: Exception) -> MetarecError:
        """The error to raise where a save failed."""
        self._clear_away()
        good = folders.steps(self._root("latest"))
        kept = f"the checkpoint of step {good[-1]} is good" if good else "there is no earlier one"
        return MetarecError(
            f"could not write the checkpoint of step {step} in {self.directory}: {first_line(error)}; {kept}. "
            "Check the disk and run the same command again to resume"
        )


def load_params(
    directory: str | os.PathLike[str],
    *,
    which: Which = "best",
    like: Any = None,
    under: str = "params",
    say: Callable[[str], None] | None = None,
) -> Any:
    """The parameters of a run, for serving; the optimiser's moments are not read.

    Args:
      directory: directory of the run.
      which: "best" takes the latest where the run kept no best one.
      like: their pytree, of arrays or `jax.ShapeDtypeStruct`; None gives nested dicts by the names in the checkpoint.
        The precision is the checkpoint's: float32 stays float32 under JAX_ENABLE_X64.
      under: the entry of the state that holds them; of several, the nearest to the root.
      say: as in `Checkpoints`.

    Raises:
      MetarecError: there is no checkpoint, none is sound, or its shapes differ from those of ``like``.
    """
    run = Path(directory).absolute()
    if which == "best" and not folders.steps(run / "checkpoints" / "best"):
        which = "latest"
    if not folders.steps(run / "checkpoints" / which):
        raise MetarecError(f"{run} holds no checkpoint; train one first (metarec fit), or name another run directory")
    newest = _newest(run, (which,), like, say or _log.warning, under)
    if newest is None:
        raise MetarecError(f"all checkpoints in {run} are damaged; train again with --fresh")
    return newest[1]


def saved_metrics(directory: str | os.PathLike[str], *, which: Which = "best") -> tuple[int, dict[str, float]] | None:
    """The step and the metrics of the newest checkpoint whose metadata can be read; None where there is none."""
    root = Path(directory).absolute() / "checkpoints" / which
    for step in folders.steps(root)[::-1]:
        with contextlib.suppress(MetarecError):
            return step, leaves.metadata(root / str(step))["metrics"]
    return None


def _newest(
    run: Path,
    kinds: Sequence[Which],
    like: Any,
    say: Callable[[str], None],
    under: str | None = None,
    *,
    together: bool = False,
) -> tuple[int, Any] | None:
    """The newest sound step, and its state; with ``together`` all processes agree on the same one.

    Of a step that is saved in several kinds the first of ``kinds`` is taken.
    """
    roots = {kind: run / "checkpoints" / kind for kind in kinds}
    decide = processes.decide if together else lambda choose: choose()

    def newest_first() -> list[tuple[int, Which]]:
        return sorted(((n, kind) for kind in kinds for n in folders.numbered(roots[kind])), key=lambda s: -s[0])

    for step, kind in decide(newest_first):
        folder = roots[kind] / str(step)
        damage, refusal, state = decide(functools.partial(_damage, folder)), None, None
        if damage is None:
            damage, refusal, state = _load(folder, like, under)
            if together:
                answers = [json.loads(message) for message in processes.gather(json.dumps([damage, refusal]))]
                damage, refusal = (next((a[k] for a in answers if a[k]), None) for k in (0, 1))
        if refusal is not None:
            raise MetarecError(_printable(f"the checkpoint of step {step} in {run} {refusal}"))
        reports = not together or processes.is_first()
        if damage is None:
            if kind != kinds[0] and reports:
                say(f"the newest sound checkpoint in {run} is the best one, of step {step}; it is taken")
            return step, state
        if reports:
            say(_printable(f"skipped the damaged checkpoint of step {step} in {run} ({damage})"))
    return None


def _damage(folder: Path) -> str | None:
    """The damage of the files of a step, as text; raises MetarecError where this machine cannot read them."""
    try:
        return folders.damage(folder)
    except OSError as error:
        raise MetarecError(
            f"the checkpoint {folder} cannot be read and is not changed: {first_line(error)}; make it readable and run "
            "the same command again"
        ) from error


def _printable(message: str) -> str:
    """A message, shortened and without control characters: parts of it come from a damaged file."""
    return printable(message if len(message) <= 1000 else f"{message[:700]} ... {message[-250:]}")


def _load(folder: Path, like: Any, under: str | None) -> tuple[str | None, str | None, Any]:
    """The damage of a step with files that match its mark, the reason to refuse it, and its state; two are None."""
    try:
        described = leaves.metadata(folder)["leaves"]
        chosen = dict(enumerate(described)) if under is None else leaves.below(described, under)
        if like is not None and (differs := leaves.mismatch(chosen.values(), like, precision=under is None)):
            return None, f"does not match this program: {differs}. {_ADVICE}", None
        expected = {} if like is None else leaves.by_path(like)
        values, damage = arrays.read(folder, chosen, expected)
        if damage is not None:
            return damage, None, None
        state = leaves.nested(values) if like is None else leaves.unflatten([values[path] for path in expected], like)
        return None, None, state
    except Exception as error:  # from memory or from Orbax: no reason to take an older step, and to delete this one
        return None, f"is whole, but cannot be read: {first_line(error)}", None


def _holds(folder: Path, described: list[dict[str, Any]]) -> bool:
    """Whether a step is on disk and whole, with bitwise the same leaves."""
    try:
        return folders.is_whole(folder) and leaves.metadata(folder)["leaves"] == described
    except (OSError, ValueError, KeyError, TypeError):
        return False
