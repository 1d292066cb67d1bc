"""Checkpoints of a run: the latest and the best state, checked by digest, resumed bit for bit. Orbax stands only here.

A run directory holds ``checkpoints/latest/STEP``, ``checkpoints/best/STEP``, ``identity.json`` (what the run is) and
``.lock``. Leaves are stored in a flat list with their paths, shapes, dtypes and sha256 beside them: Orbax alone loads
a flipped bit without a word. The sha256 of the files of a step come last, as the mark that the step is whole; they are
compared before Orbax opens it, since a failed load floods stderr. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np

from metarec_jax.core import MetarecError
from metarec_jax.training import leaves

Which = Literal["latest", "best"]
_SUMS = "sha256.json"
_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run directory, which it holds locked. A context manager.

    Args:
      directory: of the run; made if missing.
      identity: what the run is (configuration, data, version), JSON-able; compared with what the directory holds.
      keep: how many of the latest, and of the best, stay on disk; 2 or more, so that a damaged one can be passed over.
      fresh: forget the checkpoints that are there.
      say: gets one line for each thing worth knowing, such as a damaged checkpoint; default: this module's logger.

    Raises:
      MetarecError: the directory holds a run of another identity, or another process trains in it.

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
        self._open: dict[str, Any] = {}
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.directory)
        try:
            if fresh:
                shutil.rmtree(self.directory / "checkpoints", ignore_errors=True)
            self._identify(json.loads(json.dumps(identity)))
        except BaseException:
            self.close()
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
          state: a pytree of arrays, PRNG keys and numbers; may be donated as soon as this returns.
          metrics: stored beside the state.
          wait: return only when it is on disk.

        Raises:
          MetarecError: this save, or the one before it in the background, could not be written.
        """
        self.wait()
        flat = leaves.flatten(state)
        extra = {name: float(value) for name, value in (metrics or {}).items()}
        # The best goes first: a run killed in between redoes this step from an older "latest", and finds its own best.
        kinds: list[Which] = ["best", "latest"] if best else ["latest"]
        self._pending = self._worker.submit(self._write, int(step), flat, extra, kinds)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Return when the save in the background is on disk. Raises MetarecError where it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def restore(self, like: Any, *, which: Which = "latest") -> tuple[int, Any] | None:
        """The step and the state of the newest sound checkpoint, or None where there is none.

        A damaged checkpoint is passed over (one line says so) for the one before. What the run wrote after the step
        that is restored is deleted: training will write it again.

        Args:
          like: the state's pytree, of arrays or `jax.ShapeDtypeStruct`; its shardings are kept.

        Raises:
          MetarecError: the checkpoint's leaves have other names, shapes or dtypes than ``like``.
        """
        self.wait()
        found = _newest(self.directory, which, like, self._say)
        if which == "latest":
            for kind in ("latest", "best"):
                root = self.directory / "checkpoints" / kind
                for step in [int(p.name) for p in root.glob("*") if p.name.isdigit()]:
                    if found is None or step > found[0]:
                        self._delete(kind, step)
        return found

    def close(self) -> None:
        """Wait for the last save and let go of the directory."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            for manager in self._open.values():
                manager.close()
            self._open.clear()
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def _identify(self, identity: dict[str, Any]) -> None:
        path = self.directory / "identity.json"
        if any(_steps(self.directory, kind) for kind in ("latest", "best")):
            try:
                found = json.loads(path.read_text())
            except (OSError, ValueError):
                found = {}
            differ = different(found, identity)
            if differ:
                raise MetarecError(
                    f"{self.directory} holds another run: {'; '.join(differ)}. "
                    "Give the old settings to resume it, another run directory, or start over (--fresh)"
                )
        partial = path.with_suffix(".tmp")
        partial.write_text(json.dumps(identity, indent=1))
        os.replace(partial, path)

    def _manager(self, kind: str) -> Any:
        if kind not in self._open:
            training = _orbax().training
            self._open[kind] = training.Checkpointer(
                self.directory / "checkpoints" / kind,
                preservation_policy=training.preservation_policies.LatestN(self._keep),
                cleanup_tmp_directories=True,
            )
        return self._open[kind]

    def _delete(self, kind: str, step: int) -> None:
        folder = self.directory / "checkpoints" / kind / str(step)
        if folder.is_dir():
            shutil.rmtree(folder)
            if kind in self._open:
                self._open[kind].reload()

    def _write(self, step: int, flat: list[leaves.Leaf], metrics: dict[str, float], kinds: list[Which]) -> None:
        described = [leaves.describe(leaf) for leaf in flat]
        state = {_name(k): leaf.value for k, leaf in enumerate(flat) if leaf.value.size}  # Orbax refuses empty ones
        for kind in kinds:
            folder = self.directory / "checkpoints" / kind / str(step)
            if step in _steps(self.directory, kind) and _described(folder) == described:
                continue
            self._delete(kind, step)
            try:
                self._manager(kind).save(
                    step, state, force=True, custom_metadata={"leaves": described, "metrics": metrics}
                )
            except (OSError, ValueError) as error:
                raise MetarecError(
                    f"could not write the checkpoint of step {step} in {self.directory}: {_first_line(error)}. "
                    "Check the disk and run the same command again to resume"
                ) from error
            partial = folder.with_name(f"{step}.sums")
            partial.write_text(json.dumps(_sums(folder)))
            os.replace(partial, folder / _SUMS)


def load_params(
    directory: str | os.PathLike[str],
    *,
    which: Which = "best",
    like: Any = None,
    under: str = "params",
    say: Callable[[str], None] | None = None,
) -> Any:
    """The parameters of a run, for serving: only they are read, not the optimiser's moments.

    Args:
      which: "best" takes the latest where the run kept no best one.
      like: their pytree, of arrays or `jax.ShapeDtypeStruct`; None gives nested dicts by the names in the checkpoint.
      under: the entry of the state that holds them; of several, the nearest to the root.

    Raises:
      MetarecError: no checkpoint, none that is sound, or one of other shapes than ``like``.
    """
    run = Path(directory).absolute()
    if which == "best" and not _steps(run, "best"):
        which = "latest"
    if not _steps(run, which):
        raise MetarecError(f"{run} holds no checkpoint; train one first (metarec fit), or name another run directory")
    found = _newest(run, which, like, say or _log.warning, under)
    if found is None:
        raise MetarecError(f"no checkpoint in {run} is sound; train again with --fresh")
    return found[1]


def saved_metrics(directory: str | os.PathLike[str], *, which: Which = "best") -> tuple[int, dict[str, float]] | None:
    """The step of the newest checkpoint and the metrics stored beside it; None where there is none."""
    run = Path(directory).absolute()
    steps = _steps(run, which)
    return (steps[-1], _metadata(run / "checkpoints" / which / str(steps[-1]))["metrics"]) if steps else None


def different(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One phrase for each entry in which two nested mappings differ.

    >>> different({"seed": 0, "model": {"size": 8}}, {"seed": 0, "model": {"size": 16}})
    ['model.size was 8, now 16']
    """
    lines = []
    for name in [*found, *(n for n in wanted if n not in found)]:
        old, new = found.get(name, "absent"), wanted.get(name, "absent")
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += different(old, new, f"{prefix}{name}.")
        elif old != new:
            lines.append(f"{prefix}{name} was {old!r}, now {new!r}")
    return lines


def _newest(
    run: Path, which: Which, like: Any, say: Callable[[str], None], under: str | None = None
) -> tuple[int, Any] | None:
    for step in reversed(_steps(run, which)):
        folder = run / "checkpoints" / which / str(step)
        try:
            if _sums(folder) != json.loads((folder / _SUMS).read_text()):
                raise ValueError("the digest of its files does not match")
            described = _metadata(folder)["leaves"]
            chosen = dict(enumerate(described)) if under is None else leaves.below(described, under)
            differs = None if like is None else leaves.mismatch(list(chosen.values()), like)
            values = {} if differs else _read(folder, chosen)
        except Exception as error:  # Orbax and TensorStore raise anything on damaged files
            say(f"passed over the damaged checkpoint of step {step} in {run} ({_first_line(error)})")
            continue
        if differs:
            raise MetarecError(
                f"the checkpoint of step {step} in {run} does not fit this program: {differs}. "
                "Use the settings and the version that trained it, or start over (--fresh)"
            )
        return step, leaves.nested(values) if like is None else leaves.unflatten(list(values.values()), like)
    return None


def _read(folder: Path, chosen: dict[int, dict[str, Any]]) -> dict[str, np.ndarray]:
    """The values of these leaves by path, each checked against its digest."""
    ocp = _orbax()
    empty = {k: np.empty(d["shape"], leaves.host_dtype(d["dtype"])) for k, d in chosen.items()}
    like = {_name(k): value for k, value in empty.items() if value.size}
    partial = ocp.options.PyTreeOptions(loading=ocp.options.PyTreeOptions.Loading(partial_load=True))
    with ocp.Context(pytree_options=partial):
        loaded = ocp.load(folder, like, checkpointable_name="state") if like else {}
    values = {}
    for k, d in chosen.items():
        values[d["path"]] = np.asarray(loaded.get(_name(k), empty[k]))
        if leaves.describe(leaves.Leaf(d["path"], values[d["path"]], d["dtype"])) != d:
            raise ValueError(f"the digest of {d['path']} does not match")
    return values


def _steps(run: Path, kind: str) -> list[int]:
    """Steps that were written whole, ascending."""
    root = run / "checkpoints" / kind
    return sorted(int(p.name) for p in root.iterdir() if (p / _SUMS).exists()) if root.is_dir() else []


def _sums(folder: Path) -> dict[str, str]:
    """sha256 of every file of a step but the list of them."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != _SUMS)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def _metadata(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]


def _described(folder: Path) -> Any:
    try:
        return _metadata(folder)["leaves"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _name(k: int) -> str:
    return f"{k:05d}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _lock(directory: Path) -> int | None:
    """Hold the directory until closed or until this process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows has none: two runs in one directory are then the user's care
        return None
    handle = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(handle, 20).decode(errors="replace").strip()
        os.close(handle)
        raise MetarecError(
            f"{directory} is in use by another process{f' (pid {holder})' if holder else ''}; "
            "wait for it, stop it, or name another run directory"
        ) from error
    os.truncate(handle, 0)
    os.write(handle, str(os.getpid()).encode())
    return handle


def _orbax() -> Any:
    import absl.logging
    from orbax.checkpoint import v1

    absl.logging.set_verbosity(absl.logging.ERROR)
    logging.getLogger("orbax").setLevel(logging.ERROR)
    return v1
