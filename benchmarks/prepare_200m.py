"""Two hundred million interactions on one machine, in little memory: ``python -m benchmarks.prepare_200m --folder SCRATCH``.

Generates them as Parquet, prepares a store and trains from it; reports the seconds and the peak memory of each process.
The scratch folder requires 16 GB and is not deleted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_PIECE = 5_000_000


def generate(folder: Path, rows: int, users: int, items: int, seed: int = 0) -> None:
    """Ratings by taste in four dimensions; items popular by a power law; integer user ids and text item ids."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    taste = (0.5 * rng.standard_normal((users, 4))).astype(np.float32)
    kind = (0.7 * rng.standard_normal((items, 4))).astype(np.float32)
    harsh, good = (scale * rng.standard_normal(n, np.float32) for scale, n in ((0.3, users), (0.4, items)))
    names = pa.array([f"B{k * 7919 % 10**8:08d}" for k in range(items)])
    for k, first in enumerate(range(0, rows, _PIECE)):
        n, own = min(_PIECE, rows - first), np.random.default_rng([seed, k])
        user = (users * own.random(n) ** 1.5).astype(np.int64)
        item = np.minimum(100 * ((items / 100 + 1) ** own.random(n) - 1), items - 1).astype(np.int32)
        score = 3.4 + harsh[user] + good[item] + np.einsum("nk,nk->n", taste[user], kind[item])
        score += 0.4 * own.standard_normal(n, np.float32)
        table = {
            "user_id": user * 2654435761 % 2**40,
            "item_id": pa.DictionaryArray.from_arrays(item, names).cast(pa.string()),
            "rating": (np.clip(np.round(2 * score), 1, 10) / 2).astype(np.float32),
            "timestamp": 1_300_000_000 + own.integers(0, 3 * 10**8, n),
        }
        pq.write_table(pa.table(table), folder / f"part-{k:05d}.parquet", row_group_size=1_000_000)


def measured(what: str, command: list[str]) -> dict[str, object]:
    """Run a command to its end; its seconds, and the peak of its resident and of its anonymous memory in GiB."""
    began, peak = time.perf_counter(), {"VmHWM": 0.0, "RssAnon": 0.0}
    child = subprocess.Popen(command, stdout=sys.stderr)
    while child.poll() is None:
        try:
            for line in Path(f"/proc/{child.pid}/status").read_text().splitlines():
                name, _, rest = line.partition(":")
                if name in peak:
                    peak[name] = max(peak[name], int(rest.split()[0]) / 2**20)
        except (OSError, ValueError, IndexError):
            pass
        time.sleep(0.2)
    if child.returncode:
        raise SystemExit(f"{what} ended with status {child.returncode}")
    return {"what": what, "s": round(time.perf_counter() - began), **{k: round(v, 2) for k, v in peak.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder, which must not exist yet")
    parser.add_argument("--rows", type=int, default=200_000_000)
    parser.add_argument("--users", type=int, default=2_500_000)
    parser.add_argument("--items", type=int, default=500_000)
    parser.add_argument("--steps", type=int, default=500)
    given = parser.parse_args()
    program = "import sys; from metarec_jax.cli import main; sys.exit(main())"
    metarec = [sys.executable, "-c", program]
    generate(given.folder / "table", given.rows, given.users, given.items)
    store, run = str(given.folder / "store"), str(given.folder / "run")
    found = [
        measured("prepare", [*metarec, "prepare", str(given.folder / "table"), "--out", store]),
        measured("fit", [*metarec, "fit", store, "--steps", str(given.steps), "--no-evaluate", "--out", run]),
    ]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
