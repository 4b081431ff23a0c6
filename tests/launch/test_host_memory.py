"""Freed memory stays with the process: XLA's temporaries are not mapped and cleared again at every step."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from launch.host_memory import computes_on_cpu
from tests.fixtures.source_tree import ROOT

PROGRAM = """
import resource, sys
from launch.host_memory import keep_freed_memory_on_cpu
if sys.argv[1] == "keep":
    keep_freed_memory_on_cpu()
import jax, jax.numpy as jnp
x = jnp.ones((1024, 1024))
step = jax.jit(lambda x: jnp.cumsum(jnp.tile(x, (16, 1)) @ x / 1e3, axis=0)[:1024] / 1e3)
counts = []
for _ in range(21):
    x = step(x).block_until_ready()
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(sorted(after - before for before, after in zip(counts, counts[1:]))[10])
"""


def page_faults(how: str) -> int:
    """Of the median step: the heap may still grow at a few, which is not what is asked."""
    command = [sys.executable, "-c", PROGRAM, how]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return int(subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_temporaries_are_used_again():
    kept, plain = page_faults("keep"), page_faults("plain")
    assert kept < plain / 5, (kept, plain)


@pytest.mark.parametrize(
    "name", ["accel0", "vfio/0", "vfio/12", "nvidia0", "kfd", "dxg", "null", "vfio/vfio", "nvidia-caps", "nvidiactl"]
)
def test_without_a_word_the_devices_of_the_machine_decide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    assert computes_on_cpu(tmp_path) == (name in ("null", "vfio/vfio", "nvidia-caps", "nvidiactl"))


@pytest.mark.parametrize(("chosen", "is_cpu"), [("cpu", True), ("CPU", True), ("tpu", False), ("cuda,cpu", False)])
def test_who_names_a_platform_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str, is_cpu: bool
) -> None:
    (tmp_path / "nvidia0").touch()
    monkeypatch.setenv("JAX_PLATFORMS", chosen)
    assert computes_on_cpu(tmp_path) == is_cpu
