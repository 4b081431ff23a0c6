"""Joining the processes of one run: asked for on the command line, or set up by Slurm, MPI, GKE or a TPU VM."""

from __future__ import annotations

import argparse
import logging
import os

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the three flags that name a process; a cluster that sets its own environment needs none of them."""
    group = parser.add_argument_group("several processes (Slurm, MPI, GKE and TPU VMs set these by themselves)")
    group.add_argument("--coordinator_address", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--num_processes", type=int, metavar="N", help="processes in the run")
    group.add_argument("--process_id", type=int, metavar="I", help="this process, 0..N-1")


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

    given = [args.coordinator_address, args.num_processes, args.process_id]
    if all(value is None for value in given):
        found = cluster_environment()
        if found:
            log.info("joining the processes started by %s", found)
            jax.distributed.initialize()
        return
    if any(value is None for value in given):
        raise ValueError("--coordinator_address, --num_processes and --process_id go together: give all three or none")
    if not 0 <= args.process_id < args.num_processes:
        raise ValueError(f"--process_id {args.process_id} is not one of 0..{args.num_processes - 1}")
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if args.num_processes > 1:
        jax.distributed.initialize(args.coordinator_address, args.num_processes, args.process_id)


def quiet_all_but_one() -> None:
    """Leaves the log to process 0; of the others only warnings and errors are heard."""
    import jax

    if jax.process_index() > 0:
        logging.getLogger().setLevel(logging.WARNING)
