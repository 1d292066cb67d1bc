"""One run: a recommender trained by a configuration, in memory or in a directory that resumes; measured, asked, saved.

``metarec fit`` and `train` are this file: load the data, hold users and items out, draw tasks, start, train with
validation, keep the best parameters.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import numpy as np

from metarec_jax import signals
from metarec_jax.core import Learner, MetarecError, Method, Params
from metarec_jax.cpu import runs_together
from metarec_jax.data.catalogue import Catalogue, catalogue
from metarec_jax.data.draw import TaskSource
from metarec_jax.data.interactions import Interactions
from metarec_jax.data.splits import Split
from metarec_jax.data.store import held_out
from metarec_jax.evaluation.diagnostics import Convergence
from metarec_jax.evaluation.evaluate import evaluate
from metarec_jax.evaluation.results import Report, merge
from metarec_jax.experiment import config as configs
from metarec_jax.experiment import directory as directories
from metarec_jax.experiment import mixed
from metarec_jax.experiment.build import (
    build_data,
    build_learner,
    build_method,
    build_source,
    build_split,
    build_stream,
    members,
    negatives,
    open_store,
    predicts_ratings,
    resolved,
    settled,
    with_inner_steps,
)
from metarec_jax.experiment.diagnose import diagnose
from metarec_jax.experiment.phases import Phases, on_stderr
from metarec_jax.experiment.protocol import (
    VALIDATION_USERS,
    fixed_tasks,
    liked,
    measuring_options,
    relevant_from,
    training_options,
)
from metarec_jax.learners.mixture import explained
from metarec_jax.serving.recommender import Recommender
from metarec_jax.training.checkpoints import checkpoint
from metarec_jax.training.checkpoints.checkpoint import Checkpoints
from metarec_jax.training.checkpoints.lock import AnotherRun
from metarec_jax.training.devices import launch, processes
from metarec_jax.training.devices.budget import format_bytes
from metarec_jax.training.devices.budget import free as free_memory
from metarec_jax.training.loop import FitResult, fit
from metarec_jax.training.progress import Progress

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from metarec_jax.data.store.held_out import Held
    from metarec_jax.data.store.opened import Store

CURVE = (0, 1, 2, 3, 5, 8, 12, 20, 30, 50)
"""Support sizes at which a run is also measured."""
_MEMBERS = "members"
"""Folder of a mixture's run that holds the checkpoints of each member."""
Say = Callable[[str], None]


class Measurement(NamedTuple):
    """What measuring a run gives.

    Attributes:
      report: the run's method beside the tuned baselines.
      by_inner_steps: the trained parameters after fewer and more inner steps; None without inner steps.
      convergence: of the inner loop on validation tasks; None without inner steps.
      liked: what counts as liked, in words.
    """

    report: Report
    by_inner_steps: Report | None
    convergence: Convergence | None
    liked: str


@dataclass(frozen=True, eq=False)
class Run:
    """A trained recommender, and all that it was trained with.

    Attributes:
      config: how it was trained.
      data: what it was trained and tested on.
      catalogue: of ``data``; items that training never saw have row 0.
      learner: as configured; of a mixture, the first member.
      params: the trained parameters, the best by validation.
      directory: where it is on disk; None for a run in memory.
      part: of a run that streamed a store, int8 ``[data.users.num_rows]``: which users of ``data`` were held out.
      trained_on: digest of the interactions it was trained on, where it was noted.
    """

    config: configs.Config
    data: Interactions
    catalogue: Catalogue
    learner: Learner
    params: Params
    directory: Path | None = None
    part: np.ndarray | None = None
    trained_on: str | None = None

    @cached_property
    def parts(self) -> Split:
        """The data as it was split: train, validation and test.

        Raises:
          MetarecError: the split is another one now, so that the run may have learned what is held out.
        """
        if self.part is not None:
            parts = held_out.split_of(self.data, self.part)
        else:
            parts = build_split(self.config.split, self.data)
        if self.trained_on not in (None, directories.rows_digest(parts.train)):
            back = f"put {self.config.split.partition} back, or " if self.config.split.partition else ""
            raise MetarecError(
                f"{self.directory} was trained on other rows than its split gives now, so it may have learned what is "
                f"held out; {back}train again with --fresh"
            )
        return parts

    @cached_property
    def method(self) -> Method:
        """The trained method.

        A `mixture` is rebuilt from its parameters, with the functions of its members.

        It adapts as in training, to the same numbers; but where training treated inner gradients as constants (Reptile,
        first order), a derivative through this adaptation is whole: without it no feedback would seem to move a score.
        """
        options = self.config.learner.options
        if self.config.learner.name == "mixture":
            return mixed.rebuild(self.config, self.data, self.params)
        first_order = self.config.learner.name == "reptile" or options.get("first_order")
        learner = self._with_steps(options["inner_steps"]) if first_order else self.learner
        return build_method(self.config, learner, self.params)

    @cached_property
    def baselines(self) -> dict[str, Method]:
        """The plain methods by name, tuned on validation tasks."""
        return self._plain(self._threshold, on_stderr)

    @property
    def _threshold(self) -> float:
        return relevant_from(self.data, self.config.tasks.liked_from)

    def _plain(self, liked_from: float, say: Say) -> dict[str, Method]:
        on_stderr("tuning the baselines")
        validation = fixed_tasks(self.config, self.parts, self.parts.validation, seed=0, max_users=VALIDATION_USERS)
        tuned = mixed.Tuned(self.directory, self.config, self.data, liked_from)
        return mixed.plain(self.parts.train, self.catalogue, validation, tuned, liked_from, say)

    def by_inner_steps(self) -> dict[int, Method]:
        """The trained parameters adapted by 0 to twice the inner steps of training; {} for learners without them."""
        name, options = self.config.learner.name, self.config.learner.options
        if name not in ("maml", "reptile") or options["rule"] == "lslr":  # which has rates of its own for each step
            return {}
        trained = options["inner_steps"]
        learners = {k: self._with_steps(k) for k in sorted({0, 1, (trained + 1) // 2, trained, 2 * trained})}
        return {k: Method(self.params, one.adapt, one.predict, one.tables) for k, one in learners.items()}

    def _with_steps(self, inner_steps: int) -> Learner:
        """The run's learner with another number of inner steps, second order."""
        chosen = with_inner_steps(self.config.learner, inner_steps)
        assert chosen is not None, "asked of learners that take inner steps"
        return build_learner(dataclasses.replace(self.config, learner=chosen), self.data)

    def recommender(self, *, by: Literal["list", "rating"] = "list") -> Recommender:
        """The method as a service: adapts to a user, recommends, and says why.

        Args:
          by: order of the items: "list", by what the user may like where the method has that; "rating", by the
            predicted rating.
        """
        return Recommender(
            self.method,
            self.data,
            self.catalogue,
            negatives=negatives(self.config.tasks, self.data),
            predicts_ratings=predicts_ratings(self.config, self.data),
            by=by,
        )

    def evaluate(self, *, seeds: int = 1, max_users: int = 1000, liked_from: float | None = None) -> Report:
        """Measure on the test part, beside the tuned baselines; the table that ``metarec fit`` prints.

        Args:
          seeds: draws of support and query to average over.
          max_users: test users per scenario, at most; more are sampled.
          liked_from: rating from which an item counts as liked; None: as in training.
        """
        return self.measure(seeds=seeds, max_users=max_users, liked_from=liked_from).report

    def measure(
        self,
        *,
        seeds: int = 1,
        max_users: int = 1000,
        liked_from: float | None = None,
        phases: Phases | None = None,
        say: Say | None = None,
    ) -> Measurement:
        """`evaluate`, with what a report shows beside it.

        Args:
          seeds, max_users, liked_from: as in `evaluate`.
          phases: times the parts, and prints progress.
          say: called with a line per tuned baseline.
        """
        config, data, phases = self.config, self.data, phases or Phases()
        liked_from = config.tasks.liked_from if liked_from is None else liked_from
        liking = liked(data, liked_from)
        validation = fixed_tasks(config, self.parts, self.parts.validation, seed=0, max_users=VALIDATION_USERS)
        with phases("baselines"):
            threshold = relevant_from(data, liked_from)
            baselines = self.baselines if threshold == self._threshold else self._plain(threshold, say or _nothing)
        methods: dict[str, Method] = {config.learner.name: self.method} | baselines
        with phases("evaluate"):
            on_stderr(f"evaluating {len(methods)} methods")
            reports = [
                evaluate(
                    methods,
                    fixed_tasks(config, self.parts, self.parts.test, seed=seed, max_users=max_users),
                    self.catalogue,
                    catalogue_ranking=True,
                    curve=CURVE,
                    baselines=tuple(baselines),
                    seed=seed,
                    progress=phases.progress,
                    **measuring_options(data, methods, liked_from, {config.learner.name: config}),
                )
                for seed in range(seeds)
            ]
            by_steps = self._measure_inner_steps(max_users, liked_from)
            curves = diagnose(config, data, self.params, self.catalogue, validation)
        report = merge(reports)
        if config.learner.name == "mixture":
            report = dataclasses.replace(report, notes=(*report.notes, *explained(self.params)))
        return Measurement(report, by_steps, curves, liking)

    def _measure_inner_steps(self, max_users: int, liked_from: float | None) -> Report | None:
        """`by_inner_steps` on new users, else on the first of the test scenarios."""
        methods = {str(k): method for k, method in self.by_inner_steps().items()}
        if not methods:
            return None
        test = self.parts.test
        scenario = "user_cold" if "user_cold" in test else next(iter(test))
        return evaluate(
            methods,
            fixed_tasks(self.config, self.parts, {scenario: test[scenario]}, seed=0, max_users=max_users),
            self.catalogue,
            catalogue_ranking=self.data.implicit,
            **measuring_options(self.data, methods, liked_from, dict.fromkeys(methods, self.config)),
        )

    def save(self, path: str | os.PathLike[str]) -> Run:
        """Write the run into a new directory, for `open_run` and the command line; returns it as it is there.

        Raises:
          MetarecError: there is something else at the path.
        """
        to = Path(path)
        if to.exists() and (not to.is_dir() or any(to.iterdir())):
            raise MetarecError(f"{to} exists and is not an empty folder; give the path of a new one")
        to.mkdir(parents=True, exist_ok=True)
        directories.write(to, self.config, self.data, self.parts.train, self.catalogue, self.part)
        with Checkpoints(to, identity=directories.identity(self.config, self.data), say=_nothing) as checkpoints:
            checkpoints.save(0, {"params": self.params}, best=True, wait=True)
        directories.write_json(to / "result.json", {"step": self.config.train.steps, "stopped": "finished"})
        return dataclasses.replace(self, directory=to)

    def __repr__(self) -> str:
        where = "in memory" if self.directory is None else str(self.directory)
        return f"Run({self.config.learner} on {self.data.name}, {where})"


def open_run(directory: str | os.PathLike[str]) -> Run:
    """Open a run that has ended.

    Raises:
      MetarecError: no run there, one that is still to be trained, or one whose files do not belong together.
    """
    stored = directories.read(directory)
    if stored.config.learner.name == "mixture":
        learner = build_learner(next(iter(members(stored.config, stored.data.items.num_rows).values())), stored.data)
        params = mixed.shaped(stored.config, stored.data, checkpoint.load_params(stored.directory))
    else:
        learner = build_learner(stored.config, stored.data)
        like = jax.eval_shape(learner.init, jax.random.key(0))
        params = checkpoint.load_params(stored.directory, like=like)
    return Run(
        stored.config, stored.data, stored.catalogue, learner, params, stored.directory, stored.part, stored.trained_on
    )


class World(NamedTuple):
    """What a run learns from. Of a store that is streamed, ``data`` is the part that came into memory."""

    data: Interactions
    store: Store | None = None
    held: Held | None = None

    @property
    def digest(self) -> str | None:
        """The digest of the store, if it is streamed."""
        return None if self.held is None or self.store is None else self.store.digest


class Prepared(NamedTuple):
    """What training needs, built from a configuration; ``part`` as in `Run`.

    Attributes:
      members: of a mixture, the learners that it trains, each with its configuration; learner and source are those of
        the first one.
    """

    parts: Split
    learner: Learner
    source: TaskSource
    catalogue: Catalogue
    part: np.ndarray | None
    members: Mapping[str, tuple[configs.Config, Prepared]] = MappingProxyType({})


def load(config: configs.Config, data_dir: Path | None = None, say: Say = print) -> World:
    """The data in memory; of a store that does not fit there, the users held out and a sample of the others."""
    store = open_store(config.data)
    if store is None:
        return World(build_data(config.data, data_dir=data_dir))
    from metarec_jax.data.store import opened

    free, needed = free_memory(jax.local_devices()[0]), store.bytes_in_memory
    size = f"{store.path}: {store.interactions:,} interactions take about {format_bytes(needed)} of memory"
    if processes.decide(lambda: free is None or needed < free / 2):
        say(f"{size}: all are loaded")
        return World(opened.load(store))
    say(f"{size}, of {format_bytes(free or 0)} that are free: they are streamed")
    held = held_out.hold_out(
        store,
        validation=config.split.validation,
        test=config.split.test,
        seed=config.split.seed,
        user_rows=config.tasks.user_rows,
    )
    say("  in memory: users held out, and a sample of the others for a warm start and the baselines")
    return World(held.data, store, held)


def prepare(config: configs.Config, world: World, say: Say = print) -> Prepared:
    """All that may refuse the configuration, and is quick. A mixture's members are named in it (`resolved`)."""
    data, held = world.data, world.held
    parts = build_split(config.split, data) if held is None else held.split
    for line in _split_lines(parts):
        say(line)
    if config.learner.name == "mixture":
        if not config.learner.options["members"]:
            raise MetarecError(
                "a mixture is trained by mr.train or metarec fit; or name its members, as in mixture:members=ridge"
            )
        prepared = {
            name: (one, _prepared(one, world, parts, say)) for name, one in members(config, data.items.num_rows).items()
        }
        say(f"  {config.learner.name} of {', '.join(prepared)} and the plain methods")
        first = next(iter(prepared.values()))[1]
        return first._replace(members=prepared)
    return _prepared(config, world, parts, say)


def _prepared(config: configs.Config, world: World, parts: Split, say: Say) -> Prepared:
    data, held = world.data, world.held
    learner = build_learner(config, data)
    jax.eval_shape(learner.init, jax.random.key(0))
    if world.store is not None and held is not None:
        source = build_stream(config, world.store, held)
        say(f"  streaming the histories of {len(held.users):,} users")
        return Prepared(parts, learner, source, held.known, held.part)
    source = build_source(config, parts.train)
    for note in settled(config, parts.train):
        say(f"  note: {note}")
    return Prepared(parts, learner, source, catalogue(data, parts.train, config.tasks.user_rows), None)


def _split_lines(parts: Split) -> Iterator[str]:
    yield f"  training on {len(parts.train):,} interactions of {len(np.unique(parts.train.user)):,} users"
    for name, part in parts.test.items():
        yield f"  held out for test, {name}: {len(part):,} of {len(np.unique(part.user)):,} users"
    for reason, count in parts.dropped.items():
        yield f"  left out: {count:,} ({reason})"
    for note in parts.notes:
        yield f"  note: {note}"


def open_checkpoints(
    directory: Path, config: configs.Config, world: World, *, fresh: bool = False, say: Say = print
) -> Checkpoints:
    """The checkpoints of the run that this configuration and data make in ``directory``, which is made.

    Raises:
      MetarecError: the directory cannot be made, or holds another run.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MetarecError(f"{directory} cannot be a run directory ({error.strerror}); give another") from error
    identity = directories.identity(config, world.data, world.digest)
    try:
        return Checkpoints(directory, identity=identity, fresh=fresh, say=say)
    except AnotherRun as error:
        if error.other_data:
            raise MetarecError(directories.other_data(directory, config, world.data)) from error
        raise


class Trained(NamedTuple):
    """How a training ended: the result, and the number of the signal that came, if any did.

    ``baselines``: the plain methods that a mixture was fitted with; None where there is none.
    """

    result: FitResult
    signal: int | None
    baselines: Mapping[str, Method] | None = None


def fit_prepared(
    config: configs.Config,
    data: Interactions,
    prepared: Prepared,
    *,
    directory: Path | None = None,
    checkpoints: Checkpoints | None = None,
    phases: Phases | None = None,
    mesh: Mesh | None = None,
    quiet: bool = False,
) -> Trained:
    """Train to the end, or until a signal; with checkpoints, from where they are.

    Args:
      directory: where the run is written; None for a training in memory.
    """
    if directory is not None and processes.is_first():
        directories.write(directory, config, data, prepared.parts.train, prepared.catalogue, prepared.part)
    fit_one = _fit_mixture if prepared.members else _fit_learner
    trained = fit_one(config, data, prepared, directory, checkpoints, phases or Phases(), mesh, quiet)
    if directory is not None and processes.is_first() and trained.result.stopped != "interrupted":
        ended = {"step": trained.result.step, "stopped": trained.result.stopped}
        directories.write_json(directory / "result.json", ended)
    return trained


def _fit_learner(
    config: configs.Config,
    data: Interactions,
    prepared: Prepared,
    directory: Path | None,
    checkpoints: Checkpoints | None,
    phases: Phases,
    mesh: Mesh | None,
    quiet: bool,
) -> Trained:
    """Train one learner; ``directory`` holds its checkpoints and metrics."""
    steps, written = config.train.steps, directory if processes.is_first() else None
    with phases("warm start"):
        options = _options(config, data, prepared)
    if directory is not None:
        signals.keep(functools.partial(_what_is_kept, directory, steps))
    with (
        phases("train", silent=True),
        launch.together("start all of them again with the same command to resume"),
        signals.StopSignal() as stop,
        Progress(
            steps,
            tasks=config.tasks.tasks,
            path=None if written is None else written / "metrics.jsonl",
            tensorboard=None if written is None else written / "tensorboard",
            quiet=quiet or not processes.is_first(),
        ) as progress,
    ):
        progress.note("compiling the outer step")
        result = fit(
            prepared.learner,
            prepared.source,
            checkpoints=None if checkpoints is None else _Resuming(checkpoints, progress),
            progress=progress.update,
            say=progress.start,
            stop=launch.agreed(lambda: bool(stop)),
            mesh=mesh,
            **options,
        )
    return Trained(result, stop.number)


def _fit_mixture(
    config: configs.Config,
    data: Interactions,
    prepared: Prepared,
    directory: Path | None,
    checkpoints: Checkpoints | None,
    phases: Phases,
    mesh: Mesh | None,
    quiet: bool,
) -> Trained:
    """Train the members one after the other, fit the plain methods, and learn the weights on validation tasks."""
    parts, known = prepared.parts, prepared.catalogue
    say: Say = _nothing if quiet else on_stderr
    validation = fixed_tasks(config, parts, parts.validation, seed=0, max_users=VALIDATION_USERS)
    liked_from = relevant_from(data, config.tasks.liked_from)
    tuned, lines = mixed.Tuned(directory, config, data, liked_from), list[str]()
    plain = functools.partial(mixed.plain, parts.train, known, validation, tuned, liked_from)
    methods: dict[str, Method] = {}
    trained = None
    # Plain methods are tuned on the host while the members train, which keeps few cores busy.
    with _Aside(tuned.stop, processes.count() == 1 and runs_together() > 1) as aside:
        baselines_later = aside.submit(plain, lines.append)
        for number, (name, (own, member)) in enumerate(prepared.members.items(), 1):
            say(f"member {number} of {len(prepared.members)}: {name}")
            folder = None if directory is None else directory / _MEMBERS / name
            with contextlib.ExitStack() as stack:
                kept = None
                if folder is not None:
                    kept = stack.enter_context(open_checkpoints(folder, own, World(data), say=say))
                trained = _fit_learner(own, data, member, folder, kept, phases, mesh, quiet)
                if kept is not None:
                    kept.wait()
            if trained.result.stopped == "interrupted":
                return trained
            methods[name] = build_method(own, member.learner, trained.result.params)
        assert trained is not None
        if directory is not None:
            signals.keep(f"the members of the mixture are kept in {directory}, and the same command goes on from there")
        with phases("tune"):
            say("tuning the plain methods")
            baselines = baselines_later()
    for line in lines:
        say(line)
    with phases("mixture"):
        say("learning the weights of the mixture")
        configured = {name: own for name, (own, _) in prepared.members.items()}
        method = mixed.weighted(methods, baselines, configured, data, validation, known, liked_from)
    for line in explained(method.params):
        say(f"  {line}")
    result = trained.result._replace(params=method.params, method=method, stopped="finished")
    if checkpoints is not None:
        checkpoints.save(result.step, {"params": result.params}, best=True, wait=True)
    return Trained(result, None, baselines)


class _Aside:
    """One call in a thread beside the caller; or, not ``aside``, when its result is asked for."""

    def __init__(self, stop: Callable[[], None], aside: bool) -> None:
        self._stop, self._pool = stop, ThreadPoolExecutor(1) if aside else None

    def __enter__(self) -> _Aside:
        return self

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        if self._pool is None:
            return functools.partial(function, *arguments)
        return self._pool.submit(function, *arguments).result

    def __exit__(self, *_: object) -> None:
        self._stop()  # of a call that has ended this is nothing
        if self._pool is not None:
            self._pool.shutdown()


def _options(config: configs.Config, data: Interactions, prepared: Prepared) -> dict[str, Any]:
    """The arguments of `fit` beside learner and source."""
    parts, learner, _, known = prepared[:4]
    validation = fixed_tasks(config, parts, parts.validation, seed=0, max_users=VALIDATION_USERS)
    return training_options(config, learner, data, parts.train, known, validation)


class Recipe(NamedTuple):
    """What `train` gives to `fit`: ``fit(recipe.learner, recipe.source, **recipe.options)``.

    Attributes:
      parts: train, validation and test.
      catalogue: of the data; items that training never sees have row 0.
      source: tasks drawn from the training part.
      options: start, optimisers, validation, steps and the rest, as keyword arguments of `fit`.
    """

    parts: Split
    catalogue: Catalogue
    learner: Learner
    source: TaskSource
    options: dict[str, Any]


def recipe(learner: str | configs.LearnerConfig, data: Interactions, **settings: Any) -> Recipe:
    """The parts of `train`, to take apart or to change: the same recommender, trained by hand.

    Args:
      learner, settings: as for `train`.

    >>> import metarec_jax as mr
    >>> made = mr.recipe("ridge", mr.synthetic(60, 40, ratings_per_user=(8, 12)), steps=4, size=2)
    >>> mr.fit(made.learner, made.source, **made.options).step
    4
    """
    config = configs.configure(learner, None, settings)
    prepared = prepare(config, World(data), _nothing)
    options = _options(config, data, prepared)
    return Recipe(prepared.parts, prepared.catalogue, prepared.learner, prepared.source, options)


def _what_is_kept(directory: Path, steps: int) -> str:
    """What is on disk of a training that a signal ended without another save."""
    saved = checkpoint.saved_metrics(directory, which="latest")
    if saved is None:
        return "nothing was trained yet"
    return f"step {saved[0]} of {steps} is kept in {directory}, and the same command resumes there"


class _Resuming:
    """Checkpoints that report where training goes on."""

    def __init__(self, checkpoints: Checkpoints, progress: Progress) -> None:
        self._progress, self.save = progress, checkpoints.save
        self._checkpoints = checkpoints

    def restore(self, like: Any, *, which: Any = "latest") -> tuple[int, Any] | None:
        restored = self._checkpoints.restore(like, which=which)
        if which == "latest" and restored is not None:
            self._progress.resume(restored[0])
            self._progress.note(f"resuming at step {restored[0]}")
        return restored


def train(
    learner: str | configs.LearnerConfig = "auto",
    data: Interactions | str | os.PathLike[str] = "ml-1m",
    directory: str | os.PathLike[str] | None = None,
    *,
    fresh: bool = False,
    data_dir: str | os.PathLike[str] | None = None,
    mesh: Mesh | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Run:
    """Train a recommender as ``metarec fit`` does: the same split, tasks, start, optimisers, validation and early stop.

    Args:
      learner: a name of the registry with options, such as ``"leo:latent=4"`` (``metarec learners`` lists them);
        "auto" is the `mixture` of learners that suit the data and of plain methods.
      data: interactions, the name of a data set, or the path of a file, a folder or a task store.
      directory: where the run is written; interrupted, the same call resumes there. None: in memory.
      fresh: start over, whatever the directory holds.
      data_dir: cache of named data sets.
      mesh: devices to share the work (`make_mesh`).
      quiet: print no progress.
      settings: options of ``metarec fit`` by their names there: ``steps``, ``lr``, ``seed``, ``size``, ``scenarios``,
        ``split_seed``, ``support``, ``user_col``, ...

    Returns:
      The run: `Run.evaluate`, `Run.recommender`, `Run.save`.

    Raises:
      MetarecError: an unknown learner, option or setting; data that cannot be learned from; a directory of another run.
      KeyboardInterrupt: a signal came; what was trained is saved in the directory.

    >>> import metarec_jax as mr
    >>> run = mr.train("ridge", mr.synthetic(60, 40, ratings_per_user=(8, 12)), steps=4, size=2, quiet=True)
    >>> run
    Run(ridge on synthetic:60x40, in memory)
    >>> len(run.recommender().recommend({1: 3.0, 2: 1.0}, n=2))
    2
    """
    config = configs.configure(learner, None if isinstance(data, Interactions) else os.fspath(data), settings)
    say: Say = _nothing if quiet else on_stderr
    world = World(data) if isinstance(data, Interactions) else load(config, _path(data_dir), say)
    config = resolved(config, world.data, streamed=world.held is not None)
    to = _path(directory)
    if to is not None and not fresh and directories.result(to) is not None:
        with open_checkpoints(to, config, world, say=say):  # refuses another run
            return open_run(to)
    prepared = prepare(config, world, say)
    with contextlib.ExitStack() as stack:
        checkpoints = None
        if to is not None:
            checkpoints = stack.enter_context(open_checkpoints(to, config, world, fresh=fresh, say=say))
            if fresh:
                directories.clear(to)
        trained = fit_prepared(
            config,
            world.data,
            prepared,
            directory=to,
            checkpoints=checkpoints,
            phases=Phases(say=say),
            mesh=mesh,
            quiet=quiet,
        )
        if checkpoints is not None:
            checkpoints.wait()
    if trained.result.stopped == "interrupted":
        raise signals.Interrupted(trained.signal) if trained.signal is not None else KeyboardInterrupt
    return in_memory(config, world.data, prepared, trained, to)


def in_memory(
    config: configs.Config, data: Interactions, prepared: Prepared, trained: Trained, directory: Path | None
) -> Run:
    """The run that a training of this process made, without reading it back."""
    run = Run(config, data, prepared.catalogue, prepared.learner, trained.result.params, directory, prepared.part)
    run.__dict__["parts"] = prepared.parts  # as `cached_property` keeps it
    if trained.baselines is not None:
        run.__dict__["baselines"] = dict(trained.baselines)
    return run


def _path(path: str | os.PathLike[str] | None) -> Path | None:
    return None if path is None else Path(path)


def _nothing(line: str) -> None:
    return
