"""Read and group 25 million ratings: wall time and peak memory, from a CSV file and from Parquet.

    python benchmarks/read_25m.py [--rows 25000095] [--json]

The file resembles MovieLens 25M (162,541 users, 59,047 items, half-star ratings, seconds, sorted by user), drawn
from a seed into a temporary folder. Each reading runs in a process of its own: `read`, then the order of the rows by
user and time. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def generate(folder: Path, rows: int, seed: int = 0) -> None:
    """Write the same ratings as ``ratings.csv`` and ``ratings.parquet``."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    rng = np.random.default_rng(seed)
    num_users, num_items = max(2, rows * 162_541 // 25_000_095), max(50, rows * 59_047 // 25_000_095)
    activity = rng.lognormal(0.0, 1.2, num_users)
    per_user = np.minimum(25 + activity / activity.mean() * 1.6 * rows / num_users, num_items // 2).astype(int)
    user = np.repeat(np.arange(1, num_users + 1, dtype=np.int64), per_user)
    # popularity like 1 / rank: the exponential of a uniform draw; ids are spread as MovieLens' are
    rank = np.minimum(num_items ** rng.random(len(user)), num_items - 1).astype(np.int64)
    item = np.sort(rng.choice(209_171, num_items, replace=False) + 1)[rng.permutation(num_items)][rank]
    pair = np.unique(user * 1_000_000 + item)
    pair = pair[np.sort(rng.choice(len(pair), min(rows, len(pair)), replace=False))]
    user, item = pair // 1_000_000, pair % 1_000_000
    del pair, rank
    table = pa.table(
        {
            "userId": user,
            "movieId": item,
            "rating": rng.integers(1, 11, len(user)) / 2,
            "timestamp": rng.integers(789_652_009, 1_574_327_703, len(user)),
        }
    )
    pa.csv.write_csv(table, folder / "ratings.csv")
    pa.parquet.write_table(table, folder / "ratings.parquet")


def measure(path: Path) -> dict[str, float]:
    """Wall seconds of reading and of grouping, and the peak memory of this process."""
    from metarec_jax.data.io.readers import read

    begin = time.perf_counter()
    data = read(path)
    middle, peak = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    by = np.lexsort((data.timestamp, data.user))
    starts = np.flatnonzero(np.diff(data.user[by], prepend=0))
    end = time.perf_counter()
    return {
        "rows": len(data),
        "users": len(starts),
        "items": len(data.items.ids),
        "read_seconds": round(middle - begin, 2),
        "group_seconds": round(end - middle, 2),
        "read_peak_gb": round(peak / 2**20, 2),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=25_000_095)
    parser.add_argument("--json", action="store_true", help="print on one line")
    parser.add_argument("--generate", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.generate is not None:
        generate(args.generate, args.rows)
        return
    if args.measure is not None:
        print(json.dumps(measure(args.measure)))
        return
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        # in a process of its own too: Linux counts a parent's memory into the peak of the child it starts
        subprocess.run([sys.executable, __file__, "--generate", folder, "--rows", str(args.rows)], check=True)
        for form in ("csv", "parquet"):
            path = Path(folder) / f"ratings.{form}"
            begin = time.perf_counter()
            command = [sys.executable, __file__, "--measure", str(path)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            results[form] = json.loads(done.stdout.splitlines()[-1])
            results[form]["file_gb"] = round(path.stat().st_size / 2**30, 2)
            results[form]["process_seconds"] = round(time.perf_counter() - begin, 2)
    print(json.dumps(results, indent=None if args.json else 2))


if __name__ == "__main__":
    main()
