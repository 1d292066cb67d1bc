"""Speed compared with PyTorch, in one run on one machine.

    python -m benchmarks                     all questions: about an hour on two cores
    python -m benchmarks --quick             the same in five minutes: fewer cells, shorter blocks
    python -m benchmarks s1 s2 --json        selected questions; the results as JSON on stdout
    python -m benchmarks --list              list the questions
    python -m benchmarks --check             compare every rival's outer gradient with ours, at float64

The sides of a pair alternate in one run, pinned to the same core (on an accelerator: the same device). PyTorch is not a
dependency of this package: it has a separate environment, and its rows are omitted without one.

    python -m venv .torch && .torch/bin/pip install torch==2.13.0 numpy
    python -m benchmarks --torch-python .torch/bin/python

(`higher`, `torchopt` and `learn2learn`, installed there too, add their rows; see benchmarks/README.md.) A full run writes
MACHINE.json, MACHINE.md and MACHINE.png into benchmarks/results/, where the newest of each machine is kept. A quick or
partial run writes into benchmarks/results/partial/, which git ignores, unless --out names another folder.
"""

from __future__ import annotations

import argparse
import datetime
import difflib
import importlib
import importlib.util
import json
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

from benchmarks import output
from benchmarks.harness import ROOT, Options, Row, Unavailable, cores

QUESTIONS = {
    "s1": "s1_outer_step",
    "s2": "s2_catalogue",
    "s3": "s3_dense_layers",
    "s4": "s4_time_to_quality",
    "s5": "s5_new_user",
    "s6": "s6_floor",
    "costs": "costs",
}
HOW_TO_TORCH = (
    "no interpreter with torch: PyTorch's rows are left out. "
    "python -m venv .torch && .torch/bin/pip install torch==2.13.0 numpy, then --torch-python .torch/bin/python"
)


def main(arguments: list[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    if given.list:
        for name, module in QUESTIONS.items():
            print(f"{name:6s} {_first_line(module)}")
        return 0
    unknown = [name for name in given.questions if name not in QUESTIONS]
    if unknown:
        near = difflib.get_close_matches(unknown[0], QUESTIONS, 1)
        hint = f"perhaps you meant {near[0]!r}" if near else "see --list"
        print(f"error: no question is named {unknown[0]!r}; there are {', '.join(QUESTIONS)}; {hint}", file=sys.stderr)
        return 2
    python = _torch_python(given.torch_python)
    if given.torch_python and not python:
        print(f"error: {given.torch_python!r} cannot import torch; give an interpreter that can", file=sys.stderr)
        return 2
    if given.check:
        from benchmarks.check import check

        return check(python)
    if given.core is not None and given.core not in cores():
        print(f"error: core {given.core} is not among those allowed, {cores()}; give one of them", file=sys.stderr)
        return 2
    questions = given.questions or list(QUESTIONS)
    accelerator = "device" in output.machine()
    core = None if accelerator else (cores()[-1] if given.core is None else given.core)
    options = Options(given.quick, given.rounds or (3 if given.quick else 5), core, python)
    if python is None:
        options.note(HOW_TO_TORCH)
    began = datetime.datetime.now(datetime.UTC)
    asked_all = True
    for name in questions:
        try:
            options.done += ask(name, options)
        except KeyboardInterrupt:
            options.note(f"interrupted in {name}; the questions before it are kept")
            asked_all = False
            break
    about = output.header(options, questions, began)
    asked = {name: _first_line(QUESTIONS[name]) for name in questions}
    full = not given.quick and asked_all and set(questions) == set(QUESTIONS)
    folder = given.out or ROOT / "benchmarks" / "results" / ("" if full else "partial")
    files = output.write(folder, about, options.done, asked)
    if given.json:
        print(json.dumps({**about, "rows": [row.as_dict() for row in options.done]}))
    else:
        print(output.markdown(about, options.done, asked))
    print("wrote " + ", ".join(str(file) for file in files), file=sys.stderr)
    return 0 if asked_all else 130


def ask(name: str, options: Options) -> list[Row]:
    """The rows of one question; a question that cannot be asked, or that fails, leaves a note."""
    print(f"== {name}: {_first_line(QUESTIONS[name])}", file=sys.stderr, flush=True)
    try:
        return importlib.import_module(f"benchmarks.{QUESTIONS[name]}").run(options)
    except (Unavailable, ImportError) as reason:
        options.note(f"{name}: {reason}")
    except Exception as error:  # one question's fault must not cost the others' hour: it is shown, and noted
        traceback.print_exc()
        options.note(f"{name} failed: {type(error).__name__}: {error}")
    return []


def _first_line(module: str) -> str:
    """The question that a module's docstring opens with, read without importing it."""
    found = importlib.util.find_spec(f"benchmarks.{module}")
    if found is None or found.origin is None:
        return "(not in this checkout)"
    text = Path(found.origin).read_text()
    return text.split('"""', 2)[1].strip().splitlines()[0]


def _torch_python(asked: str | None) -> str | None:
    """An interpreter that imports torch: the one asked for, else this one."""
    path = asked or sys.executable
    python = str(Path(path).absolute()) if Path(path).exists() else shutil.which(path)
    if python is None:
        return None
    command = [python, "-c", "import torch, numpy"]
    return python if subprocess.run(command, capture_output=True).returncode == 0 else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help="questions to run; default: all")
    parser.add_argument("--list", action="store_true", help="print the questions")
    parser.add_argument("--quick", action="store_true", help="finish within five minutes on two cores; not for quoting")
    parser.add_argument("--check", action="store_true", help="compare every rival's outer gradient with ours and stop")
    parser.add_argument("--json", action="store_true", help="print the results as one line of JSON, progress on stderr")
    parser.add_argument(
        "--torch-python", metavar="PATH", help="interpreter with torch (default: this one, if it has torch)"
    )
    parser.add_argument("--core", type=int, help="CPU core for both sides (default: the last one allowed)")
    parser.add_argument(
        "--rounds", type=int, help="number of rounds in which the sides alternate (default: 5, quick 3)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
