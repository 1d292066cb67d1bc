"""S3: how many tasks a second where the dense layers alone adapt (MeLU)?

Eight categorical columns (four of the user, four of the item; 2 to 8,030 rows) of 32, concatenated, 64 -> 64 -> 1 with ReLU;
inner SGD at 0.01 on the dense layers; 10 support and 10 query ratings; outer Adam at 1e-3 on everything.
"""

from __future__ import annotations

from benchmarks import rivals
from benchmarks.cells import melu_cell
from benchmarks.harness import Options, Row, compare

CELLS = [(tasks, steps) for tasks in (32, 128) for steps in (1, 5)]
STRONG = ("smart_compile", "whole_melu_low_rank", "whole_melu_low_rank_dense")
SLOW = ("loop", *rivals.LIBRARIES, "vmap_dense", "whole_melu")


def run(options: Options) -> list[Row]:
    rows: list[Row] = []
    for tasks, steps in [(32, 1)] if options.quick else CELLS:
        cell = melu_cell(tasks, steps)
        own = ["lazy"] if options.quick else ["lazy", "dense"]
        theirs = ["whole_melu_low_rank"] if options.quick else [*STRONG, *(SLOW if (tasks, steps) == (32, 1) else ())]
        rows += compare(options, "s3", [*rivals.ours(options, cell, own), *rivals.torch(options, cell, theirs)])
    return rows
