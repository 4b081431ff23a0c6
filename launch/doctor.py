"""`aromni doctor`: is this machine, or are all processes of a run, fit to train? Start it the way `train` is started.

aromni doctor --workdir=runs/debug
bash launch/multiprocess.sh 2 -- doctor --workdir=runs/debug
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from launch import distributed

MIN_JAX = (0, 10, 2)
MAX_CLOCK_SKEW_SECONDS = 2.0
"""Heartbeats and logs of processes further apart than this cannot be put in order."""
SLOW_FRACTION = 0.6
"""A process whose chips multiply at less than this share of the median rate holds up all others."""

_MESSAGE_BYTES = 4096
_MIB, _GIB = 1 << 20, 1 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `aromni doctor`."""
    parser.add_argument("--workdir", metavar="DIR", help="folder that every process must be able to write and see")
    parser.add_argument("--expected_devices", type=int, metavar="N", help="devices that all processes have together")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there")
    distributed.add_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Prints a table of all processes; exit status 1 and one line when something is wrong."""
    logging.getLogger("jax").setLevel(logging.ERROR)
    distributed.connect(args)
    import jax

    with distributed.leaving_at_once():
        result = examine(args.workdir)
    found = problems(result, args.expected_devices)
    if jax.process_index() == 0:
        if args.json:
            pathlib.Path(args.json).write_text(json.dumps(result | {"problems": found}, indent=2) + "\n", "utf-8")
        print(describe(result))
        if found:
            raise ValueError("; ".join(found))
    return 1 if found else 0


def examine(workdir: str | None) -> dict[str, Any]:
    """What all processes measured; the same on each of them."""
    import jax

    with _warnings_of_jax() as heard:
        device = jax.local_devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit")
    is_small = device.platform == "cpu"
    own = {
        "process": jax.process_index(),
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("aromni-jax", "jax", "jaxlib", "libtpu", "orbax-checkpoint")},
        "devices": jax.local_device_count(),
        "device_kind": device.device_kind,
        "unused_device": "; ".join(heard)[:500] if is_small and heard else None,
        "device_memory_bytes": memory,
        "host_memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "matmul_flops": _matmul_flops(device, 1024 if is_small else 8192),
        "host_to_device_bytes_per_second": _copy_rate(device, (16 if is_small else 256) * _MIB),
        "workdir": _try_workdir(workdir) if workdir else None,
    }
    processes = _gather(own)
    if workdir:
        # Only now has everyone written.
        seen = _gather({"seen": _seen_in(workdir, len(processes))})
        _remove_probe(workdir)
        for process, other in zip(processes, seen):
            process["workdir_seen"] = other["seen"]
    return {
        "processes": processes,
        "num_devices": jax.device_count(),
        "clock_skew_seconds": _clock_skew(),
        "all_reduce_bytes_per_second": _all_reduce_rate((4 if is_small else 256) * _MIB),
        "workdir": workdir,
    }


def problems(result: dict[str, Any], expected_devices: int | None = None) -> list[str]:
    """What is wrong, one short remark each; [] where nothing is."""
    processes = result["processes"]
    found = []

    def name(process: dict[str, Any]) -> str:
        return f"process {process['process']} ({process['host']})"

    first = processes[0]
    version = first["versions"]["jax"]
    if tuple(int(part) for part in version.split(".")[:3] if part.isdigit()) < MIN_JAX:
        found.append(f"jax {version} is older than {'.'.join(map(str, MIN_JAX))}; pip install --upgrade jax")
    for process in processes[1:]:
        for what in ("python", "versions", "devices", "device_kind"):
            if process[what] != first[what]:
                found.append(
                    f"{name(process)} has {what} {process[what]}, process 0 has {first[what]}; make them equal"
                )
    if expected_devices is not None and result["num_devices"] != expected_devices:
        found.append(f"{result['num_devices']} devices are seen, expected {expected_devices}; is a process missing?")
    rate = statistics.median(process["matmul_flops"] for process in processes)
    all_wrote = not any(process["workdir"] for process in processes)
    for process in processes:
        if process["unused_device"]:
            found.append(
                f"{name(process)} computes with its CPU: {process['unused_device']} Install jax for that device "
                "(pip install '.[tpu]' or '.[gpu]') and its driver, or set JAX_PLATFORMS=cpu if that is meant"
            )
        if process["device_kind"] != "cpu" and process["matmul_flops"] < SLOW_FRACTION * rate:
            share = process["matmul_flops"] / rate
            found.append(f"{name(process)} multiplies at {share:.0%} of the median rate; replace that machine")
        if process["workdir"]:
            found.append(f"{name(process)}: {process['workdir']}")
        elif all_wrote and process.get("workdir_seen", len(processes)) < len(processes):
            found.append(
                f"{name(process)} sees files of {process['workdir_seen']} of {len(processes)} processes in "
                f"{result['workdir']}; give a folder on a file system that all share"
            )
    if result["clock_skew_seconds"] > MAX_CLOCK_SKEW_SECONDS:
        found.append(f"clocks are {result['clock_skew_seconds']:.1f} s apart; start NTP on every machine")
    return found


def describe(result: dict[str, Any]) -> str:
    """The table."""
    first = result["processes"][0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items() if version)
    lines = [
        f"python {first['python']}, {versions}",
        f"{result['num_devices']} x {first['device_kind']} in {len(result['processes'])} process(es)",
        "",
        f"{'process':<8}{'host':<24}{'devices':>8}{'device GiB':>12}{'host GiB':>10}{'TFLOP/s':>10}"
        f"{'to device GB/s':>16}",
    ]
    for process in result["processes"]:
        memory = process["device_memory_bytes"]
        lines.append(
            f"{process['process']:<8}{process['host'][:23]:<24}{process['devices']:>8}"
            f"{f'{memory / _GIB:.1f}' if memory else '-':>12}{process['host_memory_bytes'] / _GIB:>10.1f}"
            f"{process['matmul_flops'] / 1e12:>10.3g}{process['host_to_device_bytes_per_second'] / 1e9:>16.3g}"
        )
    rate = result["all_reduce_bytes_per_second"]
    lines += ["", f"all-reduce: {rate / 1e9:.3g} GB/s per device" if rate else "all-reduce: only one device"]
    lines.append(f"clocks: within {1000 * result['clock_skew_seconds']:.0f} ms")
    return "\n".join(lines)


@contextlib.contextmanager
def _warnings_of_jax() -> Iterator[list[str]]:
    """What jax says while it looks for devices: why one that may be there will not be used."""
    heard: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    logger, listener = logging.getLogger("jax"), Listener()
    level = logger.level
    logger.addHandler(listener)
    logger.setLevel(logging.WARNING)
    try:
        yield heard
    finally:
        logger.setLevel(level)
        logger.removeHandler(listener)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _seconds(work: Callable[[], Any], repeats: int = 3) -> float:
    """The shortest of a few runs, after one that compiles."""
    import jax

    jax.block_until_ready(work())
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(work())
        taken.append(time.perf_counter() - start)
    return min(taken)


def _matmul_flops(device: Any, width: int) -> float:
    """Of one device: ten products of square matrices, bfloat16 but on CPUs, in one program."""
    import jax
    import jax.numpy as jnp

    dtype = jnp.float32 if device.platform == "cpu" else jnp.bfloat16
    matrix = jax.device_put(jnp.full((width, width), 1 / width, dtype), device)
    products = jax.jit(lambda x: jax.lax.fori_loop(0, 10, lambda _, y: y @ x, x))
    return 20 * width**3 / _seconds(lambda: products(matrix))


def _copy_rate(device: Any, num_bytes: int) -> float:
    import jax
    import numpy as np

    array = np.zeros(num_bytes, np.uint8)
    return num_bytes / _seconds(lambda: jax.device_put(array, device))


def _all_reduce_rate(num_bytes: int) -> float | None:
    """Bytes that each device sends a second, 2 (n - 1) / n of the array, where there is more than one device."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    count = jax.device_count()
    if count == 1:
        return None
    mesh = jax.make_mesh((count,), ("all",), axis_types=(jax.sharding.AxisType.Auto,))
    one_each = NamedSharding(mesh, PartitionSpec("all"))
    array = jax.jit(lambda: jnp.ones((count, num_bytes // 4), jnp.float32), out_shardings=one_each)()
    total = jax.jit(lambda x: x.sum(0), out_shardings=NamedSharding(mesh, PartitionSpec()))
    return 2 * (count - 1) / count * num_bytes / _seconds(lambda: total(array))


def _gather(own: dict[str, Any]) -> list[dict[str, Any]]:
    """What every process says, by process; also a meeting point."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return [own]
    text = json.dumps(own).encode()
    assert len(text) <= _MESSAGE_BYTES
    padded = np.frombuffer(text.ljust(_MESSAGE_BYTES), np.uint8)
    return [json.loads(bytes(row)) for row in np.asarray(multihost_utils.process_allgather(padded))]


def _clock_skew() -> float:
    """Largest difference of clocks read right after meeting; the smallest of a few, as processes leave unevenly."""
    import jax

    if jax.process_count() == 1:
        return 0.0
    spreads = []
    for _ in range(6):
        _gather({})
        clocks = [other["clock"] for other in _gather({"clock": time.time()})]
        spreads.append(max(clocks) - min(clocks))
    return min(spreads)


def _probe(workdir: str, process: int) -> pathlib.Path:
    return pathlib.Path(workdir) / f".doctor_{process:05d}"


def _try_workdir(workdir: str) -> str | None:
    """Leaves a file there; what is wrong, if anything."""
    import jax

    from aromni_jax.train import workdir as workdirs

    try:
        workdirs.prepare(workdir)
        _probe(workdir, jax.process_index()).write_text("", encoding="utf-8")
    except (ValueError, OSError) as error:
        return str(error)[:500]
    return None


def _seen_in(workdir: str, num_processes: int) -> int:
    return sum(_probe(workdir, process).exists() for process in range(num_processes))


def _remove_probe(workdir: str) -> None:
    import jax

    with contextlib.suppress(OSError):  # it was never there, which is reported
        _probe(workdir, jax.process_index()).unlink()


if __name__ == "__main__":
    from launch.cli import run_module

    run_module(__file__)
