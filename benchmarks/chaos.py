"""Repeated SIGKILL at random moments of a training run: every restart must resume, and the result must be bitwise equal.

    python -m benchmarks.chaos --kills 200 [--processes 2] [--seed 0] [--json]

A small meta-training (second-order MAML on synthetic ratings, tasks drawn on the device from a host stream with a salt per
step, a save every 10 steps and the best by validation) runs through `metarec_jax.training.loop.fit` in a child process. The
child is killed at a random moment of its start-up or training and restarted until it finishes; further runs follow until
the number of kills is reached. With ``--processes 2`` two processes share a mesh: one of them, chosen at random, is killed,
and then the other, as a launcher would do.

Compared with an uninterrupted run, bit for bit: the state that every restart loads (a state that differs is a torn load),
the loss of every chunk, including those repeated after a kill (so the order of the data is the same), and the final
parameters. A restart must load the newest step that was marked when its predecessor died.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import ROOT

STEPS, CHUNK, SAVE_EVERY = 2000, 5, 10
WINDOW = 1.0
"""Seconds of training within which a kill comes; twice as many for several processes, which are slower."""
PATIENCE = 300.0
"""Seconds after which a life that does not end is an error."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments and of the process to kill")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of a run")
    parser.add_argument("--json", action="store_true", help="print only one JSON object on stdout")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--process", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--record", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        train(args.child, args.steps, args.processes, args.process, args.port, args.record)
        return
    with tempfile.TemporaryDirectory(prefix="metarec-chaos-") as scratch:
        found = chaos(Path(scratch), args.kills, args.processes, args.seed, args.steps)
    if args.json:
        print(json.dumps(found))
    else:
        print(table(found))
    sys.exit(0 if found["sound"] else 1)


# The child: a training run that records what it loads and what it computes.


def train(folder: Path, steps: int, processes: int, process: int, port: int, record: bool) -> None:
    """Train in ``folder/run`` until done; with ``record`` keep what all others are compared with in ``folder``."""
    import jax

    from metarec_jax.training.checkpoints.checkpoint import Checkpoints
    from metarec_jax.training.devices import sharding
    from metarec_jax.training.loop import fit

    mesh = None
    if processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=processes, process_id=process)
        mesh = sharding.make_mesh(data=1)
    learner, source, validate = problem()
    reference = folder.parent / f"reference.{process}.json"
    known = {} if record else json.loads(reference.read_text())
    states: dict[str, str] = {}
    losses = (folder / f"losses.{process}").open("a")

    class Watched:
        """Checkpoints that record the digest of each state that is saved, or compare that of the state loaded."""

        def __init__(self, checkpoints: Checkpoints) -> None:
            self._checkpoints = checkpoints

        def save(self, step: int, state: Any, **options: Any) -> None:
            if record:
                states[str(step)] = digest(state)
            self._checkpoints.save(step, state, **options)

        def restore(self, like: Any, *, which: Any = "latest") -> tuple[int, Any] | None:
            found = self._checkpoints.restore(like, which=which)
            if found is None:
                print(f"{which} none", flush=True)
            else:
                same = record or known["states"].get(str(found[0])) == digest(found[1])
                print(f"{which} {found[0]} {'same' if same else 'torn'}", flush=True)
            return found

    def progress(step: int, row: dict[str, float]) -> None:
        losses.write(f"{step} {row['loss'].hex()}\n")
        losses.flush()
        if not begun:
            begun.append(step)
            print("training", flush=True)

    def say(line: str) -> None:
        print("said", line, flush=True)

    begun: list[int] = []
    with Checkpoints(folder / "run", identity={"chaos": steps}, say=say) as checkpoints:
        found = fit(
            learner,
            source,
            steps=steps,
            lr=0.01,
            chunk=CHUNK,
            validate=validate,
            validate_every=3 * SAVE_EVERY,
            patience=None,
            checkpoints=Watched(checkpoints),
            save_every=SAVE_EVERY,
            progress=progress,
            **({} if mesh is None else {"mesh": mesh}),
        )
    final = digest(found.params)
    if record:
        lines = dict(line.split() for line in (folder / f"losses.{process}").read_text().splitlines())
        reference.write_text(json.dumps({"states": states, "losses": lines, "final": final}))
    print("done", final, flush=True)


def problem() -> tuple[Any, Any, Any]:
    """A learner with a table that is cut over devices, a source that needs its host stream, and a validation."""
    import jax
    import jax.numpy as jnp

    from metarec_jax import learners, models
    from metarec_jax.data.draw import TaskSource, task_source
    from metarec_jax.data.synthetic import synthetic

    data = synthetic(300, 5000, ratings_per_user=(8, 20), seed=0).data
    tasks = 16
    drawn = task_source(data, tasks=tasks, support=(2, 6), query=3, user_rows="own")
    model = models.meta_recommender(data.users.num_rows, data.items.num_rows, size=8)
    learner = learners.maml(model, inner_lr=0.05, inner_steps=2)

    def stream(step: int) -> Any:
        while True:  # as a file read in order: step k gets the k-th salt
            yield {"salt": np.full(tasks, np.random.default_rng(step).integers(2**31), np.int32)}
            step += 1

    def draw(data: Any, key: Any) -> Any:
        return drawn.draw(data[0], jax.random.fold_in(key, data[1]["salt"][0]))

    held = jax.jit(drawn.draw)(drawn.data, jax.random.key(1))
    held = jax.tree.map(np.asarray, held)

    @jax.jit
    def loss(params: Any) -> Any:
        keys = jax.random.split(jax.random.key(2), tasks)
        return jnp.mean(jax.vmap(lambda task, key: learner.loss(params, task, key)[0])(held, keys))

    return learner, TaskSource(drawn.data, draw, tasks, stream), lambda params: {"loss": float(loss(params))}


def digest(state: Any) -> str:
    """sha256 of the bytes of each leaf, or of what of it lies on this process's devices."""
    import jax

    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        total.update(jax.tree_util.keystr(path).encode())
        if hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        parts = leaf.addressable_shards if isinstance(leaf, jax.Array) else []
        for part in sorted({str(p.index): np.asarray(p.data) for p in parts}.items()) or [("", np.asarray(leaf))]:
            total.update(part[0].encode() + np.ascontiguousarray(part[1]).tobytes())
    return total.hexdigest()


# The parent: kills, starts again, compares.


class Life:
    """The child process, or processes, from a start to an end."""

    def __init__(self, folder: Path, steps: int, processes: int, record: bool = False) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.chaos", "--child", str(folder)]
        command += ["--steps", str(steps), "--processes", str(processes), "--port", str(port)]
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        if processes > 1:  # JAX keeps compiled programs of the first process alone: the others compile in every life
            env["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        self.errors = folder / "stderr"
        self.processes = [
            subprocess.Popen(
                [*command, "--process", str(k), *(["--record"] if record else [])],
                cwd=ROOT,
                env=env,
                stdout=subprocess.PIPE,
                stderr=self.errors.open("w"),
                text=True,
            )
            for k in range(processes)
        ]
        self.said: list[list[str]] = [[] for _ in self.processes]

    def wait_until_training(self) -> float:
        """The seconds that have gone when the first chunk is done, or when the process has ended."""
        began = time.perf_counter()
        for line in self.processes[0].stdout or ():
            self.said[0].append(line.strip())
            if line.startswith("training"):
                break
        return time.perf_counter() - began

    def ends_within(self, seconds: float) -> bool:
        try:
            for process in self.processes:
                process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self, draw: random.Random) -> None:
        """SIGKILL to one, then to the others."""
        for process in draw.sample(self.processes, len(self.processes)):
            process.kill()
            if len(self.processes) > 1:
                time.sleep(draw.uniform(0, 0.1))

    def read(self) -> list[list[str]]:
        """What each process said; all must have ended."""
        for lines, process in zip(self.said, self.processes, strict=True):
            lines += [line.strip() for line in process.stdout or ()]
            process.wait()
        return self.said


def chaos(scratch: Path, kills: int, processes: int, seed: int, steps: int) -> dict[str, Any]:
    """Runs killed and resumed until there were so many kills; what was seen, counted."""
    began = time.perf_counter()
    tell(f"an uninterrupted run of {steps} steps")
    (scratch / "reference").mkdir()
    life = Life(scratch / "reference", steps, processes, record=True)
    starts = [life.wait_until_training()]
    said = life.read()
    if any(not lines or not lines[-1].startswith("done") for lines in said):
        raise SystemExit(f"the uninterrupted run failed:\n{life.errors.read_text()[-3000:]}")
    reference = [json.loads((scratch / f"reference.{k}.json").read_text()) for k in range(processes)]
    tell(f"done in {time.perf_counter() - began:.0f} s")
    draw, count, wrong, run = random.Random(seed), Counter[str](), list[str](), 0
    while count["kills"] < kills:
        folder = scratch / f"run{run}"
        folder.mkdir()
        live(folder, kills, processes, steps, starts, draw, count, wrong, reference)
        shutil.rmtree(folder)
        run += 1
        tell(f"run {run} ended: {dict(count)}")
    names = (
        "kills",
        "in_startup",
        "in_training",
        "in_mid_save",
        "resumed",
        "from_nothing",
        "torn_loads",
        "chunks_redone",
    )
    return {
        "processes": processes,
        "seed": seed,
        "steps": steps,
        "runs": run,
        **{name: count[name] for name in names},
        "checkpoints_passed_over": count["passed_over"],
        "final_equal": count["final_equal"],
        "start_seconds": round(min(starts), 2),
        "wrong": wrong,
        "sound": not wrong and count["final_equal"] == run,
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]), 1),
    }


def live(
    folder: Path,
    kills: int,
    processes: int,
    steps: int,
    starts: list[float],
    draw: random.Random,
    count: Counter[str],
    wrong: list[str],
    reference: list[dict[str, Any]],
) -> None:
    """One run to its end, killed on the way; ``count`` and ``wrong`` are added to."""
    newest = None  # the step that the next life must load
    left: set[str] = set()
    while True:
        life = Life(folder, steps, processes)
        early = draw.random() < 0.15
        moment = draw.uniform(0, min(starts) if early else WINDOW * min(processes, 2))
        if not early:
            starts.append(life.wait_until_training())
        if count["kills"] >= kills:
            moment = PATIENCE
        ended = life.ends_within(moment)
        if not ended:
            life.kill(draw)
        said = life.read()
        inspect(said, newest, count, wrong)
        if ended or moment == PATIENCE:
            break
        count["kills"] += 1
        count["in_startup" if early else "in_training"] += 1
        if any(line.startswith("latest") for line in said[0]):  # what stood beyond the step it loaded, it has deleted
            left = {name for name in left if newest is not None and number(name) < newest}
        left, before = leftovers(folder / "run" / "checkpoints"), left
        count["in_mid_save"] += bool(left - before)
        newest = max(marked(folder / "run" / "checkpoints" / "latest"), default=None)
        tell(
            f"kill {count['kills']} {moment:.3f} s into {'start-up' if early else 'training'}: {', '.join(left - before) or 'no save'}"
        )
    for k, lines in enumerate(said):
        last = lines[-1] if lines else "nothing"
        if last == f"done {reference[k]['final']}":
            count["final_equal"] += k == 0
        else:
            wrong.append(f"process {k} ended with {last!r}: {life.errors.read_text()[-500:]}")
    for k in range(processes):
        seen = Counter[str]()
        for line in (folder / f"losses.{k}").read_text().splitlines():
            step, _, loss = line.partition(" ")
            seen[step] += 1
            if loss != reference[k]["losses"].get(step) and line.count(" ") == 1:
                wrong.append(f"process {k} had another loss at step {step}")
        if seen.keys() != reference[k]["losses"].keys():
            wrong.append(f"process {k} left out steps")
        count["chunks_redone"] += sum(n - 1 for n in seen.values()) if k == 0 else 0


def inspect(said: list[list[str]], newest: int | None, count: Counter[str], wrong: list[str]) -> None:
    """Compare what a life loaded with what it had to load."""
    for k, lines in enumerate(said):
        for line in lines:
            word, *rest = line.split()
            if word == "said":
                count["passed_over"] += 1
            if word not in ("latest", "best"):
                continue
            if rest[-1] == "torn":
                count["torn_loads"] += 1
                wrong.append(f"process {k} loaded a torn state: {line}")
            if word == "latest":
                if k == 0:
                    count["from_nothing" if rest == ["none"] else "resumed"] += 1
                if rest[0] != str(newest).lower():
                    wrong.append(f"process {k} loaded {rest[0]}, and step {newest} was whole")


def marked(root: Path) -> list[int]:
    return [int(p.parent.name) for p in root.glob("*/sha256.json") if p.parent.name.isdigit()]


def leftovers(root: Path) -> set[str]:
    """What is of a save, or of a deletion, that was under way."""
    there = [p for kind in ("latest", "best") for p in (root / kind).glob("*")]
    return {f"{p.parent.name}/{p.name}" for p in there if not p.name.isdigit() or not (p / "sha256.json").exists()}


def number(name: str) -> int:
    """The step of a leftover such as ``latest/20.orbax-checkpoint-tmp``."""
    return int(name.partition("/")[2].partition(".")[0])


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(found: dict[str, Any]) -> str:
    rows = [
        ("processes", found["processes"]),
        ("runs, each to its end", found["runs"]),
        ("SIGKILLs", found["kills"]),
        ("  in start-up / in training", f"{found['in_startup']} / {found['in_training']}"),
        ("  with a save under way", found["in_mid_save"]),
        ("lives that resumed / that found nothing saved yet", f"{found['resumed']} / {found['from_nothing']}"),
        ("torn loads", found["torn_loads"]),
        ("chunks done again, each with the same loss", found["chunks_redone"]),
        ("runs whose parameters are the uninterrupted run's, bit for bit", found["final_equal"]),
        ("seconds, and of processor time", f"{found['seconds']:.0f} / {found['cpu_seconds']:.0f}"),
    ]
    lines = [f"| {name} | {value} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines, *(f"WRONG: {line}" for line in found["wrong"])])


if __name__ == "__main__":
    main()
