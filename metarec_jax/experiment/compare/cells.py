"""The cells of a comparison on disk: each is measured once, and is there whole or not at all. Nothing is pickled.

``FOLDER/NAME-seedN-DIGEST/`` holds the rows of one method under one seed (`results.Report.save`) and ``cell.json``: its
identity, what it cost, the sha256 of the other files. The digest is of the identity, so that a cell that was measured
with other settings is another folder.
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
    """One method under one seed, measured; or the reason why it could not be.

    Attributes:
      report: of the method alone; cost: what it takes; both None where there is nothing measured.
      convergence: of its inner loop, where it has one.
      diverged: why training cannot end, in one line: a result, kept like any other.
      passing: why the cell is not measured this time, in one line; never kept, since it may pass.
    """

    report: Report | None
    cost: Cost | None
    convergence: Convergence | None = None
    diverged: str | None = None
    passing: str | None = None

    @property
    def failed(self) -> str | None:
        """Why there is no report, in words for the table."""
        if self.passing is not None:
            return f"not measured (the same command tries it again): {self.passing}"
        return self.diverged


def place(folder: Path, name: str, seed: int, identity: Mapping[str, Any]) -> Path:
    """Where the cell of this identity lies, or would.

    >>> place(Path("cells"), "maml:inner_steps=1", 0, {"steps": 5}).name
    'maml-inner_steps-1-seed0-49bd0f441903'
    """
    plain = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)[:60]
    return folder / f"{plain}-seed{seed}-{_digest(identity)}"


def _digest(identity: Mapping[str, Any]) -> str:
    return files.sha256(json.dumps(identity, sort_keys=True).encode())[:12]


def write(where: Path, cell: Cell, identity: Mapping[str, Any]) -> None:
    """Lay a cell down, in one step; one that is there is replaced."""
    where.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=where.parent))
    try:
        if cell.report is not None:
            cell.report.save(partial)
        told = {
            "identity": identity,
            "cost": None if cell.cost is None else cell.cost._asdict(),
            "convergence": None if cell.convergence is None else diagnostics.to_json(cell.convergence),
            "diverged": cell.diverged,
            "files": {name: files.sha256(partial / name) for name in _FILES if (partial / name).is_file()},
        }
        (partial / "cell.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(where, ignore_errors=True)
        os.replace(partial, where)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read(where: Path, identity: Mapping[str, Any]) -> Cell | None:
    """The cell, or None where there is none, it is damaged, or of another identity."""
    try:
        told = json.loads((where / "cell.json").read_text(encoding="utf-8"))
        if told["identity"] != json.loads(json.dumps(identity)):
            return None
        if told.get("diverged") is not None:
            return Cell(None, None, diverged=str(told["diverged"]))
        if any(told["files"][name] != files.sha256(where / name) for name in _FILES):
            return None
        curves = told["convergence"]
        return Cell(
            results.load(where), Cost(**told["cost"]), None if curves is None else diagnostics.from_json(curves)
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, MetarecError):
        return None
