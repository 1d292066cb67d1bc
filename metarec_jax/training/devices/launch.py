"""Several processes as one run: they find each other before JAX computes, and none waits for one that has gone.

The runtime is JAX's own (`jax.distributed`): this is the little that a command needs around it.
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
    """How many processes Slurm's ``srun`` or Open MPI's ``mpirun`` started beside this one, itself included; else 1."""
    for count, others in _LAUNCHERS.items():
        if all(name in os.environ for name in (count, *others)) and os.environ[count].isdecimal():
            return int(os.environ[count])
    return 1


def join(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> bool:
    """Join the other processes of the run; call it before JAX computes anything. Says whether there are any.

    Args:
      coordinator: HOST:PORT at which process 0 can be reached; "auto" leaves all three to JAX (TPU pods, Kubernetes,
        Slurm, Open MPI); None, and nothing else: to JAX where `launched` finds several processes, else alone.
      num_processes, process_id: how many there are, and which this one is, from 0.

    Raises:
      MetarecError: some of the three are given and others not, or the processes did not find each other.

    >>> join()
    False
    """
    given = (coordinator, num_processes, process_id)
    if coordinator == "auto" or (given == (None, None, None) and launched() > 1):
        coordinator = num_processes = process_id = None
    elif given == (None, None, None):
        return False
    elif coordinator is None or num_processes is None or process_id is None:
        raise MetarecError(
            f"the coordinator is {coordinator}, the number of processes {num_processes} and this process {process_id}; "
            "give all three (the same coordinator HOST:PORT everywhere, processes from 0), or none"
        )
    elif not 0 <= process_id < num_processes:
        raise MetarecError(f"this is process {process_id} of {num_processes}; give each one of 0..{num_processes - 1}")
    elif ":" not in coordinator:
        raise MetarecError(f"the coordinator is {coordinator!r}; give HOST:PORT, such as node0:12355")
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
            f"the processes of this run did not find each other ({first}); check that process 0 runs, and that its "
            "HOST:PORT can be reached from here"
        ) from error
    return jax.process_count() > 1


@contextlib.contextmanager
def together(advice: str) -> Iterator[None]:
    """Within it, the loss of another process ends this one in one line, with the status `watch.LOST`.

    Args:
      advice: what to do, for the line.
    """
    host = coordinator_host()
    with watch.watched(host, advice):
        try:
            yield
        except Exception as error:
            if processes.count() == 1:
                raise
            # A collective, or a save that others share in, may fail before the watch has heard who has gone.
            watch.wait_for_news()
            if not isinstance(error, (jax.errors.JaxRuntimeError, processes.Lost)):
                raise
            watch.end(f"another process of this run (here: {first_line(error)})", advice)


def coordinator_host() -> str:
    """Where process 0 can be reached."""
    return jax_private.coordinator_address().rpartition(":")[0]


def leave() -> None:
    """Part from the other processes: what comes after, each does alone."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def cpu_devices(count: int) -> None:
    """Where this process has nothing but CPUs, let it have so many devices; call it before JAX computes anything.

    A number of CPU devices that is set already, in ``XLA_FLAGS``, stands. XLA's pool of threads is made large enough
    that each device can wait for the others in one and compute in another: with two devices and two threads a program
    with collectives was seen to wait for ever (jax 0.10.2); a smaller ``NPROC`` is raised.
    """
    forced = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if forced:
        count = int(forced.group(1))
    elif count > 1:
        with contextlib.suppress(RuntimeError):  # it computes already
            jax.config.update("jax_num_cpu_devices", count)
    if count > 1:
        os.environ["NPROC"] = str(max(threads(), 2 * count + 2))


def agreed(stop: Callable[[], bool]) -> Callable[[], bool]:
    """``stop`` of any process, in all of them at the same call: a signal reaches each at another moment."""

    def anyone() -> bool:
        from jax.experimental import multihost_utils

        return bool(np.any(multihost_utils.process_allgather(np.array([stop()]))))

    return stop if jax.process_count() == 1 else anyone
