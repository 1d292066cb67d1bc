"""``metarec fit``: train or resume, on one device or many, then measure and report."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from metarec_jax import options, signals
from metarec_jax.commands.evaluate import last_measurement, measure
from metarec_jax.data.describe import remarks
from metarec_jax.data.interactions import Interactions
from metarec_jax.experiment import config as configs
from metarec_jax.experiment import directory as directories
from metarec_jax.experiment.build import build_mesh, resolved
from metarec_jax.experiment.compiled import compile_cache
from metarec_jax.experiment.phases import Phases
from metarec_jax.experiment.protocol import relevant_from
from metarec_jax.experiment.run import fit_prepared, in_memory, load, open_checkpoints, open_run, prepare
from metarec_jax.serving.history import format_rating
from metarec_jax.training.devices import launch, processes

if TYPE_CHECKING:
    from jax.sharding import Mesh


class Devices(NamedTuple):
    """Who works on a run: the mesh as text, and how this process finds the others. See ``metarec fit --help``."""

    mesh: str | None = None
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def fit(
    config: configs.Config,
    *,
    out: Path | None,
    fresh: bool,
    evaluate: bool,
    data_dir: Path | None,
    as_json: bool,
    devices: Devices,
) -> int:
    """``metarec fit``: train (or resume), then measure and report. Of several processes the first one speaks."""
    sizes = options.mesh_sizes(devices.mesh)
    count, several = sizes.get("data", 1) * sizes.get("model", 1), devices.num_processes or launch.launched()
    launch.cpu_devices(count // max(several, 1))
    launch.join(devices.coordinator, devices.num_processes, devices.process_id)
    with contextlib.ExitStack() as stack:
        if not processes.is_first():
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        return _fit(config, out, fresh, evaluate, data_dir, as_json, build_mesh(sizes))


def _fit(
    config: configs.Config,
    out: Path | None,
    fresh: bool,
    evaluate: bool,
    data_dir: Path | None,
    as_json: bool,
    mesh: Mesh | None,
) -> int:
    compile_cache()
    phases, first = Phases(), processes.is_first()
    signals.keep("nothing was trained yet")
    if first:
        print(f"reading {config.data.name}", file=sys.stderr, flush=True)
    with phases("load"):
        world = load(config, data_dir)
    data = world.data
    config = resolved(config, data, streamed=world.held is not None)
    relevant_from(data, config.tasks.liked_from)  # refused before training
    _print_data(data)
    directory = out or Path("runs") / directories.name_of(data)
    prepared, number, run = None, None, None
    # What cannot be trained is refused before anything is made or cleared.
    if processes.decide(lambda: fresh or directories.result(directory) is None):
        with phases("prepare"):
            prepared = prepare(config, world)
    with open_checkpoints(directory, config, world, fresh=fresh) as checkpoints:
        if fresh and first:
            directories.clear(directory)
        if prepared is None:
            ended = directories.result(directory) or {}
            print(f"{directory} is finished already (--fresh starts over)")
        else:
            trained = fit_prepared(
                config, data, prepared, directory=directory, checkpoints=checkpoints, phases=phases, mesh=mesh
            )
            result, number = trained.result, trained.signal
            ended = {"step": result.step, "stopped": result.stopped}
            if result.stopped == "interrupted":
                number = number or signal.SIGTERM  # one that reached another process
                name = signal.Signals(number).name
                print(f"{name}: saved at step {result.step} of {config.train.steps} in {directory}")
                print("resume: run the same command again")
            else:
                what = f"{result.step} steps ({result.stopped})"
                print(f"trained {f'the mixture of {len(prepared.members)} learners' if prepared.members else what}")
            if mesh is None:
                run = in_memory(config, data, prepared, trained, directory)
        summary: dict[str, Any] = {"run": str(directory), **ended, "phases": phases.seconds}
        checkpoints.wait()
        launch.leave()
        if not first or ended.get("stopped") == "interrupted":
            if as_json and first:
                print(json.dumps(summary))
            return 0 if number is None else 128 + number
        signals.keep(f"the training is kept in {directory}, and the same command measures it")
        if number is not None:
            raise signals.Interrupted(number)
        if evaluate:
            before = last_measurement(directory)
            summary = before or measure(run or open_run(directory), 1, 1000, phases)
            _print_next(directory, data)
        else:
            print(f"trained: {directory}; {phases}")
            print(f"next: metarec evaluate {shlex.quote(str(directory))}")
    if as_json:
        print(json.dumps(summary))
    return 0


def _print_data(data: Interactions) -> None:
    counts = {"users": data.users.num_rows - 1, "items": data.items.num_rows - 1, "interactions": len(data)}
    print(f"{data.name}: {directories.summary({'counts': counts})}")
    features = [*data.user_features, *data.item_features]
    print(f"  features: {', '.join(features) if features else 'none; items never rated are all alike'}")
    for note in (*data.notes, *remarks(data)):
        print(f"  note: {note}")


def _print_next(directory: Path, data: Interactions) -> None:
    popular = int(np.bincount(data.item).argmax())
    title = data.items.decode([popular])[0] if data.titles is None else data.titles[popular - 1]
    rating = ""
    if data.rating is not None:  # one that many give, were the scale a count
        rating = f"={format_rating(np.quantile(data.rating[data.item == popular], 0.75, method='nearest'))}"
    print(f"next: metarec recommend {shlex.quote(str(directory))} --rate {shlex.quote(f'{title}{rating}')} -n 10")
