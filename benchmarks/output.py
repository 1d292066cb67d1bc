"""Results as JSON, a Markdown table and a plot, named by the machine."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Options, Row

COLUMNS = ("side", "variant", "tasks/s", "us a step (range)", "x best torch (range)", "compile s", "peak MiB", "note")
PACKAGES = ("metarec_jax", "jax", "jaxlib", "flax", "optax", "numpy")


def machine() -> dict[str, Any]:
    """The CPU's model, cores and memory, and the accelerator if JAX sees one."""
    found = {"cpu": _cpu(), "cores": os.cpu_count(), "system": platform.platform(terse=True)}
    asked = subprocess.run(
        [sys.executable, "-c", "import jax; d = jax.devices(); print(d[0].platform, len(d), d[0].device_kind)"],
        capture_output=True,
        text=True,
    )
    kind, count, name = (asked.stdout.splitlines() or ["cpu 1 cpu"])[-1].split(maxsplit=2)
    if kind != "cpu":
        found |= {"device": name, "devices": int(count)}
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def machine_name(of: dict[str, Any]) -> str:
    """A file name for a machine.

    >>> machine_name({"cpu": "AMD EPYC", "cores": 2})
    'amd-epyc-2-cores'
    >>> machine_name({"cpu": "AMD EPYC", "cores": 2, "device": "NVIDIA H100", "devices": 1})
    'nvidia-h100'
    """
    text = f"{of['cpu']} {of['cores']} cores"
    if "device" in of:
        text = of["device"] if of["devices"] == 1 else f"{of['device']} x{of['devices']}"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def header(options: Options, questions: Sequence[str], began: datetime.datetime) -> dict[str, Any]:
    """Machine, versions, date, commit and command of a run."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()}
    if options.torch_python:
        asked = [options.torch_python, "-c", "import torch; print(torch.__version__)"]
        versions["torch"] = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    arguments = [a.replace(options.torch_python, "TORCH_PYTHON") if options.torch_python else a for a in sys.argv[1:]]
    return {
        "machine": machine(),
        "versions": versions,
        "date": began.isoformat(timespec="seconds"),
        "minutes": round((datetime.datetime.now(datetime.UTC) - began).total_seconds() / 60, 1),
        "commit": _commit(),
        "command": shlex.join(["python", "-m", "benchmarks", *arguments]),
        "questions": list(questions),
        "quick": options.quick,
        "rounds": options.rounds,
        "core": options.core,
        "notes": options.notes,
    }


def _commit() -> str:
    """The commit, with "+" where files differ from it; empty outside git."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        changed = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def markdown(about: dict[str, Any], rows: Sequence[Row], asked: dict[str, str]) -> str:
    """The tables of a run, one for each cell of each question; ``asked`` has the questions' first lines."""
    of = about["machine"]
    place = f"{of['cpu']}, {of['cores']} cores" + (f", {of['devices']} x {of['device']}" if "device" in of else "")
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    pin = f"pinned to core {about['core']}" if about["core"] is not None else "not pinned"
    lines = [
        f"# {place}",
        "",
        f"`{about['command']}`",
        "",
        f"{about['date']}, commit {about['commit'] or 'unknown'}, {about['minutes']} minutes, {about['rounds']} rounds, "
        f"{pin}. {versions}.",
    ]
    if about["quick"]:
        lines += ["", "**A quick run**: short blocks, few cells; not for quoting."]
    for question, text in asked.items():
        mine = [row for row in rows if row.question == question]
        if not mine:
            continue
        lines += ["", f"## {text}"]
        for cell in dict.fromkeys(_cell(row) for row in mine):
            lines += [
                "",
                *([f"{cell}:", ""] if cell else []),
                "| " + " | ".join(COLUMNS) + " |",
                "|---" * len(COLUMNS) + "|",
            ]
            lines += ["| " + " | ".join(_fields(row)) + " |" for row in mine if _cell(row) == cell]
    if about["notes"]:
        lines += ["", "## Left out", "", *(f"- {note}" for note in about["notes"])]
    return "\n".join(lines) + "\n"


def _cell(row: Row) -> str:
    parts = [(row.tasks, "tasks"), (row.inner_steps, "inner steps"), (row.items, "items")]
    return ", ".join(f"{value:,} {name}" for value, name in parts if value is not None)


def _fields(row: Row) -> list[str]:
    def number(value: float | None, digits: int = 0) -> str:
        return "" if value is None else f"{value:,.{digits}f}"

    def within(value: float | None, given: Any, digits: int) -> str:
        if value is None:
            return ""
        return number(value, digits) + (f" ({number(given[0], digits)} to {number(given[1], digits)})" if given else "")

    known = ("us_per_step", "us_per_step_range", "ratio_range", "note", "rounds", "cpu_us_per_step", "device", "torch")
    rest = "; ".join(f"{k} {_short(v)}" for k, v in row.extra.items() if k not in known and v is not None)
    return [
        row.side,
        row.variant,
        number(row.tasks_per_s),
        within(row.extra.get("us_per_step"), row.extra.get("us_per_step_range"), 0),
        within(row.ratio_to_best_torch, row.extra.get("ratio_range"), 2),
        number(row.compile_s, 1),
        number(row.peak_mib),
        "; ".join(part for part in (row.extra.get("note"), rest) if part).replace("|", "/"),
    ]


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def plot(about: dict[str, Any], rows: Sequence[Row], path: Path) -> bool:
    """Tasks a second of ours, the best PyTorch and the best library, by cell; False where there is nothing to draw."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    timed = [row for row in rows if row.tasks_per_s and row.tasks and row.side != "floor" and row.inner_steps]
    questions = list(dict.fromkeys(row.question for row in timed))
    if not questions:
        return False
    figure, axes = plt.subplots(1, len(questions), figsize=(1 + 4.5 * len(questions), 4), squeeze=False)
    for axis, question in zip(axes[0], questions, strict=True):
        mine = [row for row in timed if row.question == question]
        cells = list(dict.fromkeys(_cell(row) for row in mine))
        sides = ("ours", "torch", "library")
        for at, side in enumerate(sides):
            best = [
                max((r.tasks_per_s or 0 for r in mine if (r.side, _cell(r)) == (side, c)), default=0) for c in cells
            ]
            spots = [k + 0.27 * (at - 1) for k in range(len(cells))]
            if any(best):
                axis.bar(spots, best, 0.27, label=f"best of {side}")
        axis.set_yscale("log")
        axis.set_xticks(range(len(cells)), [c.replace(", ", "\n") for c in cells], fontsize=7)
        axis.set_title(question)
        axis.set_ylabel("tasks a second")
        axis.legend(fontsize=7)
    figure.suptitle(machine_name(about["machine"]))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def write(folder: Path, about: dict[str, Any], rows: Sequence[Row], asked: dict[str, str]) -> list[Path]:
    """Write ``MACHINE.json``, ``MACHINE.md`` and ``MACHINE.png`` into a folder; what was there of that name is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / machine_name(about["machine"])
    files = [stem.with_name(f"{stem.name}.{end}") for end in ("json", "md", "png")]
    files[0].write_text(json.dumps({**about, "rows": [row.as_dict() for row in rows]}, indent=1) + "\n")
    files[1].write_text(markdown(about, rows, asked))
    return files if plot(about, rows, files[2]) else files[:2]
