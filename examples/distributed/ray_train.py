"""A recipe for Ray Train: each worker joins JAX's own runtime and calls `fit`. Ray is not a dependency; not run here.

pip install 'ray[train]' && python ray_train.py /shared/ratings.parquet /shared/run
"""

from __future__ import annotations

import subprocess
import sys


def worker(settings: dict[str, str]) -> None:
    """One process of the run: the command line, told by Ray who it is."""
    from ray import train

    context = train.get_context()
    command = ["metarec", "fit", settings["data"], "--out", settings["out"], "--coordinator", settings["coordinator"]]
    command += ["--num-processes", str(context.get_world_size()), "--process-id", str(context.get_world_rank())]
    subprocess.run(command, check=True)


def main() -> None:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.data_parallel_trainer import DataParallelTrainer

    ray.init()
    head = ray.util.get_node_ip_address()  # rank 0 must be placed here, or give its address
    DataParallelTrainer(
        worker,
        train_loop_config={"data": sys.argv[1], "out": sys.argv[2], "coordinator": f"{head}:12355"},
        scaling_config=ScalingConfig(num_workers=4, use_gpu=True),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=-1)),  # all workers start again, and resume
    ).fit()


if __name__ == "__main__":
    main()
