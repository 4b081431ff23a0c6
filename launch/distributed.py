"""Joining the processes of one run: asked for on the command line, or set up by Slurm, MPI, GKE or a TPU VM."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator

from aromni_jax.train.watchdog import EXIT_TRY_AGAIN, EXIT_UNEXPECTED

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the three flags that name a process; a cluster that sets its own environment needs none of them."""
    group = parser.add_argument_group("several processes (Slurm, MPI, GKE and TPU VMs set these by themselves)")
    group.add_argument("--coordinator_address", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--num_processes", type=int, metavar="N", help="processes in the run")
    group.add_argument("--process_id", type=int, metavar="I", help="this process, 0..N-1")
    group.add_argument(
        "--heartbeat_timeout_seconds",
        type=int,
        default=100,
        metavar="S",
        help="a process not heard of for so long is dead, and all others end (default: 100)",
    )


def cluster_environment() -> str | None:
    """Which launcher set this process up as one of several, by its environment; None for a process on its own."""
    counts = {"Slurm": "SLURM_NTASKS", "Open MPI": "OMPI_COMM_WORLD_SIZE"}
    for name, variable in counts.items():
        if int(os.environ.get(variable) or 1) > 1:
            # An interactive allocation has SLURM_NTASKS, but only srun makes tasks.
            if name != "Slurm" or "SLURM_STEP_ID" in os.environ:
                return name
    if "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ:
        return "TPU"
    return None


def connect(args: argparse.Namespace) -> None:
    """Calls `jax.distributed.initialize` where this is one of several processes; call it before jax touches a device.

    Raises:
      ValueError: only some of the three flags, or a process number outside the run.
    """
    import jax

    if args.heartbeat_timeout_seconds < 1:
        raise ValueError(f"--heartbeat_timeout_seconds={args.heartbeat_timeout_seconds} must be at least 1")
    timeout = {"heartbeat_timeout_seconds": args.heartbeat_timeout_seconds}
    given = [args.coordinator_address, args.num_processes, args.process_id]
    if all(value is None for value in given):
        found = cluster_environment()
        if found:
            log.info("joining the processes started by %s", found)
            jax.distributed.initialize(**timeout)
        return
    if any(value is None for value in given):
        raise ValueError("--coordinator_address, --num_processes and --process_id go together: give all three or none")
    if not 0 <= args.process_id < args.num_processes:
        raise ValueError(f"--process_id {args.process_id} is not one of 0..{args.num_processes - 1}")
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if args.num_processes > 1:
        jax.distributed.initialize(args.coordinator_address, args.num_processes, args.process_id, **timeout)


_CONNECTION = re.compile(
    r"gloo|connection|socket|heartbeat|coordination|peer|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED", re.IGNORECASE
)
"""What the runtime says when another process is gone, as opposed to memory or a bug of our own."""


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """Around work that all processes do together: one of several that fails says why and ends, without waiting.

    A process that ends as usual waits for the others, and for files they write together: for ever, once one has failed.
    When the failure is that another process is gone, this one ends with `EXIT_TRY_AGAIN`; what no user can cause ends
    with `EXIT_UNEXPECTED`. A process on its own just fails.
    """
    import jax

    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        cause = str(error).strip().split("\n")[0][:200]
        status, place = EXIT_UNEXPECTED, f"process {jax.process_index()} of {jax.process_count()}"
        if isinstance(error, jax.errors.JaxRuntimeError) and _CONNECTION.search(str(error)):
            status = EXIT_TRY_AGAIN
            print(
                f"aromni: error: {place} lost another process ({cause}); leaving with status {status}: "
                "start all of them again with the same command",
                file=sys.stderr,
            )
        elif isinstance(error, ValueError):
            status = 1
            print(f"aromni: error: {place}: {cause}", file=sys.stderr)
        else:
            traceback.print_exc()
            print(f"aromni: error: {place} failed: {type(error).__name__}: {cause}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        if jax.process_index() == 0:
            # The others end with it, by a signal: let them say first what they know.
            time.sleep(2)
        os._exit(status)


def quiet_all_but_one() -> None:
    """Leaves the log to process 0; of the others only warnings and errors are heard."""
    import jax

    if jax.process_index() > 0:
        logging.getLogger().setLevel(logging.WARNING)
