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
from typing import Any

from aromni_jax.train.watchdog import EXIT_TRY_AGAIN, EXIT_UNEXPECTED, TryAgain
from launch.flags import is_bad_input

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
    """Which launcher set this process up as one of several; None for a process on its own.

    Slurm, Open MPI and GKE say so in the environment. A host of a TPU VM learns it from Google's metadata server, which
    only machines with TPU chips ask.

    Raises:
      ValueError: a machine with TPU chips got no answer.
    """
    counts = {"Slurm": "SLURM_NTASKS", "Open MPI": "OMPI_COMM_WORLD_SIZE"}
    for name, variable in counts.items():
        if int(os.environ.get(variable) or 1) > 1:
            # An interactive allocation has SLURM_NTASKS, but only srun makes tasks.
            if name != "Slurm" or "SLURM_STEP_ID" in os.environ:
                return name
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES", os.environ.get("TPU_WORKER_HOSTNAMES"))
    if "," in (hosts or "") or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ:
        return "GKE"
    return "a TPU VM" if hosts is None and _is_one_of_several_tpu_hosts() else None


def _is_one_of_several_tpu_hosts() -> bool:
    import jax

    # Importing jax sets the variable where it sees no chips, and the key, unless it is set, where it will use them.
    config: Any = jax.config
    platforms: str | None = config.jax_platforms
    if "TPU_SKIP_MDS_QUERY" in os.environ or platforms is None or (platforms and "tpu" not in platforms):
        return False
    slices = re.search(r"MEGASCALE_NUM_SLICES: *'?(\d+)", _metadata("tpu-env"))
    return "," in _metadata("worker-network-endpoints") or (slices is not None and int(slices[1]) > 1)


def _metadata(key: str) -> str:
    """What Google's metadata server says of this machine; "" where it knows nothing of that name."""
    import urllib.error
    import urllib.request

    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/{key}", headers={"Metadata-Flavor": "Google"}
    )
    # A proxy would answer for itself.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(6):
        try:
            with opener.open(request, timeout=10) as answer:
                return str(answer.read().decode())
        except OSError as error:
            if isinstance(error, urllib.error.HTTPError) and error.code == 404:
                return ""
            cause = error
            time.sleep(0.5)
    raise ValueError(
        f"this machine has TPU chips, but the metadata server {server} does not say what hosts belong to it ({cause}); "
        "set TPU_SKIP_MDS_QUERY=1 if it is alone, or give --coordinator_address, --num_processes and --process_id"
    )


def _local_device_ids() -> list[int] | None:
    """What `jax.distributed.initialize` wants: [] is all devices of the node, None leaves the choice to jax.

    jax takes every task of Slurm and Open MPI for one of several on its node, and gives it a single GPU. That is right
    but for the only one there.
    """
    if "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return None
    variables = (
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "SLURM_STEP_TASKS_PER_NODE",
        "SLURM_TASKS_PER_NODE",
        "SLURM_NTASKS_PER_NODE",
    )
    tasks = next((os.environ[name] for name in variables if os.environ.get(name)), "")
    # Slurm writes 1, 1 and 3 tasks on three nodes as "1(x2),3".
    return [] if set(re.sub(r"\(x\d+\)", "", tasks).split(",")) == {"1"} else None


def connect(args: argparse.Namespace) -> None:
    """Calls `jax.distributed.initialize` where this is one of several processes; call it before jax touches a device.

    Raises:
      ValueError: only some of the three flags, a process number outside the run, or as `cluster_environment`.
    """
    import jax

    if args.heartbeat_timeout_seconds < 1:
        raise ValueError(f"--heartbeat_timeout_seconds={args.heartbeat_timeout_seconds} must be at least 1")
    options: dict[str, Any] = {
        "heartbeat_timeout_seconds": args.heartbeat_timeout_seconds,
        "local_device_ids": _local_device_ids(),
    }
    given = [args.coordinator_address, args.num_processes, args.process_id]
    if all(value is None for value in given):
        found = cluster_environment()
        if found:
            log.info("joining the processes started by %s", found)
            jax.distributed.initialize(**options)
        return
    if any(value is None for value in given):
        raise ValueError("--coordinator_address, --num_processes and --process_id go together: give all three or none")
    if not 0 <= args.process_id < args.num_processes:
        raise ValueError(f"--process_id {args.process_id} is not one of 0..{args.num_processes - 1}")
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if args.num_processes > 1:
        jax.distributed.initialize(args.coordinator_address, args.num_processes, args.process_id, **options)


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
        elif is_bad_input(error) or isinstance(error, TryAgain):
            status = 1 if is_bad_input(error) else EXIT_TRY_AGAIN
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
