"""Several processes as one run: they connect before JAX computes, and none waits for one that has ended.

The runtime is that of JAX (`jax.distributed`); this module adds what a command needs around it.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator

import jax
import numpy as np

from metarec_jax import jax_private
from metarec_jax.core import MetarecError
from metarec_jax.cpu import threads
from metarec_jax.messages import first_line
from metarec_jax.training.devices import processes, watch

_HEARTBEAT_SECONDS = 8
_LAUNCHERS = {
    "SLURM_NTASKS": ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"),
    "OMPI_COMM_WORLD_SIZE": ("OMPI_MCA_orte_hnp_uri",),
}


def launched() -> int:
    """Number of processes that Slurm's ``srun`` or Open MPI's ``mpirun`` started, this one included; else 1."""
    for count, others in _LAUNCHERS.items():
        if all(name in os.environ for name in (count, *others)) and os.environ[count].isdecimal():
            return int(os.environ[count])
    return 1


def join(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> bool:
    """Join the other processes of the run, before JAX computes anything. Returns whether there are any.

    Args:
      coordinator: HOST:PORT at which process 0 can be reached; "auto" leaves all three to JAX (TPU pods, Kubernetes,
        Slurm, Open MPI). With all three None, they are left to JAX where `launched` finds several processes; else this
        process runs alone.
      num_processes: number of processes.
      process_id: number of this process, from 0.

    Raises:
      MetarecError: only some of the three are given, or the processes could not connect.

    >>> join()
    False
    """
    alone = (coordinator, num_processes, process_id) == (None, None, None)
    if coordinator == "auto" or (alone and launched() > 1):
        coordinator = num_processes = process_id = None
    elif alone:
        return False
    elif coordinator is None or num_processes is None or process_id is None:
        raise MetarecError(
            f"got coordinator {coordinator}, number of processes {num_processes} and process id {process_id}; "
            "give all three (the same coordinator HOST:PORT everywhere, process ids from 0), or none"
        )
    elif not 0 <= process_id < num_processes:
        raise MetarecError(
            f"the process id of {num_processes} processes must be between 0 and {num_processes - 1}, got {process_id}; "
            "give each process another one"
        )
    elif ":" not in coordinator:
        raise MetarecError(f"the coordinator must be HOST:PORT, got {coordinator!r}; give one such as node0:12355")
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MetarecError(
            f"the processes of this run could not connect ({first}); check that process 0 runs, and that its "
            "HOST:PORT can be reached from here"
        ) from error
    return jax.process_count() > 1


@contextlib.contextmanager
def together(advice: str) -> Iterator[None]:
    """A context in which the loss of another process ends this one, with one line and the status `watch.LOST`.

    Args:
      advice: end of that line: what to do.
    """
    host = coordinator_host()
    with watch.watched(host, advice):
        try:
            yield
        except Exception as error:
            if processes.count() == 1:
                raise
            # A collective, or a shared save, may fail before the watch has heard which process has ended.
            watch.wait_for_news()
            if not isinstance(error, (jax.errors.JaxRuntimeError, processes.Lost)):
                raise
            watch.end(f"another process of this run (here: {first_line(error)})", advice)


def coordinator_host() -> str:
    """Host at which process 0 can be reached."""
    return jax_private.coordinator_address().rpartition(":")[0]


def leave() -> None:
    """Disconnect from the other processes; from here on each runs alone."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def cpu_devices(count: int) -> None:
    """Set the number of CPU devices, for processes without accelerators; call it before JAX computes anything.

    A number that is set already in ``XLA_FLAGS`` is kept. XLA's pool gets enough threads that each device can wait for
    the others in one and compute in another: with two devices and two threads a program with collectives was seen to
    deadlock (jax 0.10.2). A smaller ``NPROC`` is raised.
    """
    forced = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if forced:
        count = int(forced.group(1))
    elif count > 1:
        with contextlib.suppress(RuntimeError):  # JAX computes already
            jax.config.update("jax_num_cpu_devices", count)
    if count > 1:
        os.environ["NPROC"] = str(max(threads(), 2 * count + 2))


def agreed(stop: Callable[[], bool]) -> Callable[[], bool]:
    """Whether ``stop`` is true in any process, the same in all at the same call: signals arrive at different times."""

    def anyone() -> bool:
        from jax.experimental import multihost_utils

        return bool(np.any(multihost_utils.process_allgather(np.array([stop()]))))

    return stop if jax.process_count() == 1 else anyone
