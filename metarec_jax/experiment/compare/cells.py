"""The cells of a comparison on disk. Each is measured once and written atomically; nothing is pickled.

``FOLDER/NAME-seedN-DIGEST/`` holds the rows of one method under one seed (`results.Report.save`) and ``cell.json``: its
identity, its cost, and the sha256 of the other files. The digest is that of the identity, so that other settings give
another folder.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from metarec_jax import files
from metarec_jax.core import MetarecError
from metarec_jax.evaluation import diagnostics, results
from metarec_jax.evaluation.diagnostics import Convergence
from metarec_jax.evaluation.results import Report
from metarec_jax.experiment.compare.choice import Cost

_FILES = ("per_task.parquet", "summary.json")


class Cell(NamedTuple):
    """The measurement of one method under one seed, or the reason why there is none.

    Attributes:
      report: of this method only; cost: its time and memory. Both are None if it was not measured.
      convergence: of its inner loop, if it has one.
      diverged: how training diverged, in one line; a result, kept like any other.
      passing: the temporary fault that prevented the measurement, in one line; never kept.
    """

    report: Report | None
    cost: Cost | None
    convergence: Convergence | None = None
    diverged: str | None = None
    passing: str | None = None

    @property
    def failed(self) -> str | None:
        """Why there is no report, as the table prints it."""
        if self.passing is not None:
            return f"not measured (the same command tries again): {self.passing}"
        return self.diverged


def place(folder: Path, name: str, seed: int, identity: Mapping[str, Any]) -> Path:
    """The path of the cell with this identity.

    >>> place(Path("cells"), "maml:inner_steps=1", 0, {"steps": 5}).name
    'maml-inner_steps-1-seed0-49bd0f441903'
    """
    plain = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)[:60]
    return folder / f"{plain}-seed{seed}-{_digest(identity)}"


def _digest(identity: Mapping[str, Any]) -> str:
    return files.sha256(json.dumps(identity, sort_keys=True).encode())[:12]


def write(path: Path, cell: Cell, identity: Mapping[str, Any]) -> None:
    """Write a cell atomically; it replaces an existing one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=path.parent))
    try:
        if cell.report is not None:
            cell.report.save(partial)
        facts = {
            "identity": identity,
            "cost": None if cell.cost is None else cell.cost._asdict(),
            "convergence": None if cell.convergence is None else diagnostics.to_json(cell.convergence),
            "diverged": cell.diverged,
            "files": {name: files.sha256(partial / name) for name in _FILES if (partial / name).is_file()},
        }
        (partial / "cell.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(path, ignore_errors=True)
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read(path: Path, identity: Mapping[str, Any]) -> Cell | None:
    """The cell at ``path``; None if it is absent or damaged, or has another identity."""
    try:
        facts = json.loads((path / "cell.json").read_text(encoding="utf-8"))
        if facts["identity"] != json.loads(json.dumps(identity)):
            return None
        if facts.get("diverged") is not None:
            return Cell(None, None, diverged=str(facts["diverged"]))
        if any(facts["files"][name] != files.sha256(path / name) for name in _FILES):
            return None
        curves = facts["convergence"]
        return Cell(
            results.load(path), Cost(**facts["cost"]), None if curves is None else diagnostics.from_json(curves)
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, MetarecError):
        return None
