"""Starting `aromni train` as a user does, watching its workdir, and comparing what two runs wrote."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable

from aromni_jax.train.metrics import deterministic

ROOT = pathlib.Path(__file__).parents[2]


def environment(cache: pathlib.Path, devices: int = 1) -> dict[str, str]:
    """A user's environment with `devices` CPU devices and a compilation cache that the runs of a test share."""
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return kept | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
        "PYTHON": sys.executable,
    }


def start(workdir: pathlib.Path, cache: pathlib.Path, *overrides: str, devices: int = 1) -> subprocess.Popen[str]:
    """`aromni train` on the debug config in a process of its own; standard error is kept for `finish`."""
    command = [sys.executable, "-m", "launch.cli", "train", "--config=configs/pretrain.py:debug"]
    command += [f"--workdir={workdir}", *overrides]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(cache, devices), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )


def finish(process: subprocess.Popen[str], expected: int | None = 0) -> str:
    """Waits and returns standard error; fails on another exit status than `expected` (None: any)."""
    _, error = process.communicate(timeout=600)
    assert expected is None or process.returncode == expected, error
    return error


def run(workdir: pathlib.Path, cache: pathlib.Path, *overrides: str, devices: int = 1, expected: int = 0) -> str:
    """One start from beginning to end; returns standard error."""
    return finish(start(workdir, cache, *overrides, devices=devices), expected)


def when(process: subprocess.Popen[str], condition: Callable[[], bool], timeout_seconds: float = 600) -> bool:
    """Waits until `condition` holds while the process lives; False when it ended first."""
    end = time.monotonic() + timeout_seconds
    while time.monotonic() < end:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.001)
    process.kill()
    raise AssertionError(f"the run did not get there in {timeout_seconds} s: {process.communicate()[1]}")


def lines(workdir: pathlib.Path) -> list[dict]:
    """All lines of metrics.jsonl, as they are."""
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def reproducible(workdir: pathlib.Path) -> list[dict]:
    """The part of every line that does not depend on time and machine."""
    return [deterministic(line) for line in lines(workdir)]


def checkpoint_names(workdir: pathlib.Path) -> set[str]:
    """Entries of the checkpoints folder, half-written ones included."""
    folder = workdir / "checkpoints"
    return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
