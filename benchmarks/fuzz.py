"""Hostile inputs: each is read correctly or refused with one message, in bounded time and memory.

    python -m benchmarks.fuzz                            10,000 inputs per family: about 15 minutes on one core
    python -m benchmarks.fuzz --only text,run --inputs 500 --seed 3
    python -m benchmarks.fuzz --only text --at 471       repeat one input in this process, with its traceback
    python -m benchmarks.fuzz --keep faults              save the first input of each fault, as an entry of tests/corpus
    python -m benchmarks.fuzz --atheris 60 --only text   guided by coverage instead, if atheris is installed

An input depends only on family, seed and index, and is the same on every machine (except checkpoints: Orbax names its files
at random). A child process reads them: its address space may grow by `ROOM` bytes beyond that of valid inputs, and each
input has `SECONDS`. A fault is any exception that is not a refusal, a warning, a message that is not readable, inconsistent
data (`hostile.checks`), a loaded file that ran code, a hang, or a crash.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

ROOT = Path(__file__).parent.parent
ROOM = 512 * 2**20
SECONDS = 10
_STUCK = 60
"""Seconds after which a child is killed that does not even answer the alarm."""
_ONE_FILE = {"text": "ratings.csv", "parquet": "ratings.parquet", "histories": "ratings.csv", "config": "config.json"}


def main(arguments: list[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    if given.worker:
        return _work(given.worker, given.seed, given.start, given.inputs, Path(given.scratch))
    names = given.only.split(",") if given.only else None
    if given.atheris:
        return _guided((names or ["text"])[0], given.atheris)
    from benchmarks import hostile

    if unknown := [name for name in names or () if name not in hostile.FAMILIES]:
        print(f"error: no family is named {unknown[0]!r}; there are {', '.join(hostile.FAMILIES)}", file=sys.stderr)
        return 2
    if given.at is not None:
        with TemporaryDirectory() as scratch:
            for name in names or ():
                print(name, given.at, _one(name, given.seed, given.at, Path(scratch)))
        return 0
    rows, faults = [], []
    for name in names or hostile.FAMILIES:
        row, found = _family(name, given.seed, given.inputs)
        rows.append(row)
        faults += found
        _tell(row, header=len(rows) == 1)
        for fault in found:
            print(
                f"    {fault['count']} x {fault['what']}  (first: --only {name} --seed {given.seed} --at {fault['index']})"
            )
            if given.keep:
                hostile.lay(
                    Path(given.keep) / name / f"{given.seed}-{fault['index']}",
                    hostile.spoilt(name, given.seed, fault["index"]),
                )
    print(f"seed {given.seed}; {sum(row['inputs'] for row in rows)} inputs, {len(faults)} different faults")
    if given.json:
        print(json.dumps({"seed": given.seed, "families": rows, "faults": faults}))
    return 1 if faults else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=10_000, help="inputs per family")
    parser.add_argument("--only", help="families, separated by commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at", type=int, help="run only the input with this index")
    parser.add_argument("--keep", metavar="DIR", help="folder for inputs that failed")
    parser.add_argument("--json", action="store_true", help="print the results as one JSON object, on the last line")
    parser.add_argument(
        "--atheris", type=int, metavar="SECONDS", help="let atheris generate the bytes of one family's file"
    )
    for hidden in ("--worker", "--scratch"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def _tell(row: dict[str, Any], header: bool) -> None:
    if header:
        print(
            f"{'family':12} {'inputs':>7} {'read':>7} {'refused':>8} {'faults':>7} {'slowest':>9} {'grew by':>9} {'took':>7}"
        )
    print(
        f"{row['family']:12} {row['inputs']:7} {row['read']:7} {row['refused']:8} {row['faults']:7} "
        f"{row['slowest_s']:7.2f} s {row['grew_mib']:5.0f} MiB {row['seconds']:5.0f} s",
        flush=True,
    )


def _family(name: str, seed: int, inputs: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run one family to its end, with a new child after each that died."""
    began, counts = time.monotonic(), Counter[str]()
    faults: dict[str, dict[str, Any]] = {}
    slowest, grew, start = 0.0, 0.0, 0

    def fault(what: str, index: int) -> None:
        counts["faults"] += 1
        faults.setdefault(what, {"family": name, "what": what, "index": index, "count": 0})["count"] += 1

    while start < inputs:
        with TemporaryDirectory() as scratch:
            died, stopped_at = _child(name, seed, start, inputs - start, Path(scratch))
            for line in (Path(scratch) / "found.jsonl").read_text().splitlines():
                told = json.loads(line)
                if "what" in told:
                    fault(told["what"], told["index"])
                else:
                    counts.update(told["counts"])
                    slowest, grew = max(slowest, told["slowest_s"]), max(grew, told["grew_mib"])
        if died is None:
            break
        fault(died, stopped_at)
        start = stopped_at + 1
    limit = counts["refused at the memory limit"]
    row = {
        "family": name,
        "inputs": inputs,
        "read": counts["read"],
        "refused": counts["refused"] + limit,
        "refused_at_the_memory_limit": limit,
        "faults": counts["faults"],
        "slowest_s": slowest,
        "grew_mib": grew,
        "seconds": time.monotonic() - began,
    }
    return row, list(faults.values())


def _child(name: str, seed: int, start: int, inputs: int, scratch: Path) -> tuple[str | None, int]:
    """How a child died, or None, and the input it was at."""
    (scratch / "found.jsonl").touch()
    (scratch / "at").write_text(str(start))
    command = [sys.executable, "-m", "benchmarks.fuzz", "--worker", name, "--scratch", str(scratch)]
    command += ["--seed", str(seed), "--start", str(start), "--inputs", str(inputs)]
    # One arena and one pool: what each further one reserves would count as growth.
    env = os.environ | {"MALLOC_ARENA_MAX": "1", "ARROW_DEFAULT_MEMORY_POOL": "system", "JAX_PLATFORMS": "cpu"}
    with (scratch / "stderr").open("w") as stderr:
        child = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=stderr)
    seen, since = "", time.monotonic()
    while True:
        try:
            status = child.wait(timeout=1)
            break
        except subprocess.TimeoutExpired:
            at = (scratch / "at").read_text()
            if at != seen:
                seen, since = at, time.monotonic()
            elif time.monotonic() - since > _STUCK:
                child.kill()
                child.wait()
                status = None
                break
    index = int((scratch / "at").read_text() or start)
    if status == 0:
        return None, index
    if status is None:
        return f"hangs: {_STUCK} s, and no answer to the alarm", index
    lines = [line for line in (scratch / "stderr").read_text(errors="replace").splitlines() if line.strip()]
    why = next((line for line in lines if "what()" in line or "Error" in line), lines[-1] if lines else "")
    ended = signal.Signals(-status).name if status < 0 else f"status {status}"
    return f"dies with {ended}: {why.strip()[:160]}", index


class _Late(BaseException):
    """An input took too long."""


def _late(number: int, frame: FrameType | None) -> None:
    raise _Late


def _work(name: str, seed: int, start: int, inputs: int, scratch: Path) -> int:
    """The child: inputs ``start`` to ``start + inputs``, each told where it fails, and the counts at the end."""
    import pyarrow as pa

    from benchmarks import hostile

    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    os.chdir(scratch)
    folder = scratch / "input"
    for files in hostile.FAMILIES[name].good():  # what is imported and compiled on first use is no growth
        hostile.lay(folder, files)
        hostile.entered(hostile.FAMILIES[name], folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
    signal.signal(signal.SIGALRM, _late)
    counts, slowest = Counter[str](), 0.0
    with (scratch / "found.jsonl").open("a") as found, (scratch / "at").open("w") as at:
        for index in range(start, start + inputs):
            at.seek(0)
            at.write(str(index))
            at.flush()
            hostile.lay(folder, hostile.spoilt(name, seed, index))
            began = time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                counts[hostile.entered(hostile.FAMILIES[name], folder)] += 1
            except (Exception, _Late) as error:
                signal.setitimer(signal.ITIMER_REAL, 0)
                found.write(json.dumps({"what": _signature(error), "index": index}) + "\n")
                found.flush()
            signal.setitimer(signal.ITIMER_REAL, 0)
            slowest = max(slowest, time.monotonic() - began)
        grew = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        found.write(json.dumps({"counts": counts, "slowest_s": slowest, "grew_mib": grew}) + "\n")
    os._exit(0)  # some libraries' threads complain when Python ends


def _signature(error: BaseException) -> str:
    """A fault by what was raised and where, so that the same one is counted once."""
    from benchmarks.hostile import Wrong

    if isinstance(error, Wrong):
        return str(error).split(": ")[0][:100]
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "metarec_jax" in f.filename] or frames[-1:]
    where = f"{Path(own[-1].filename).name}:{own[-1].lineno}"
    return f"hangs: {SECONDS} s in {where}" if isinstance(error, _Late) else f"{type(error).__name__} in {where}"


def _one(name: str, seed: int, index: int, scratch: Path) -> str:
    from benchmarks import hostile

    hostile.lay(scratch, hostile.spoilt(name, seed, index))
    return hostile.entered(hostile.FAMILIES[name], scratch)


def _guided(name: str, seconds: int) -> int:
    """Let atheris find the bytes of the one file of a family, led by the lines of this package that they reach."""
    if name not in _ONE_FILE:
        print(f"error: {name!r} is not of one file; there are {', '.join(_ONE_FILE)}", file=sys.stderr)
        return 2
    try:
        import atheris  # type: ignore[import-not-found]
    except ImportError:
        print("error: atheris is not installed; pip install atheris", file=sys.stderr)
        return 2
    with atheris.instrument_imports(include=["metarec_jax"]):
        from benchmarks import hostile

    family = hostile.FAMILIES[name]
    with TemporaryDirectory() as scratch:
        folder, corpus = Path(scratch) / "input", Path(scratch) / "corpus"
        corpus.mkdir()
        for k, files in enumerate(family.good()):
            for file, content in files.items():
                (corpus / f"{k}-{file}").write_bytes(content)

        def enter(content: bytes) -> None:
            hostile.lay(folder, {_ONE_FILE[name]: content})
            hostile.entered(family, folder)

        options = [f"-max_total_time={seconds}", f"-timeout={SECONDS}", "-max_len=4096", f"-artifact_prefix={name}-"]
        atheris.Setup([sys.argv[0], *options, str(corpus)], enter)
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
