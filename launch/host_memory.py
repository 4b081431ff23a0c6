"""How a process that computes on the CPU holds its memory."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

_ACCELERATORS = ("accel[0-9]*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd", "dxg")
"""What Linux calls TPUs (two ways), GPUs of NVIDIA and AMD, and GPUs under Windows."""

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def keep_freed_memory() -> None:
    """Makes glibc keep what is freed; does nothing with another C library. Call it before jax starts its threads.

    XLA's CPU backend asks for the temporaries of a program at every call. glibc maps such large pieces afresh and the
    kernel clears them page by page: a fifth of the processors' time while the quickstart trains (configs/LOG.md).
    Memory then never shrinks, so this is not for hosts of accelerators (`keep_freed_memory_on_cpu`).
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)  # Never. A number here ends at 2 GiB, which large steps pass at every call.
    libc.mallopt(_M_TOP_PAD, 64 * 2**20)
    # Threads' own arenas are small and give memory back however they are told not to.
    libc.mallopt(_M_ARENA_MAX, 1)


def computes_on_cpu(devices: Path = Path("/dev")) -> bool:
    """Whether jax will compute on the CPU, asked before it starts: the user says so, or says nothing and no device of
    this machine is an accelerator."""
    chosen = os.environ.get("JAX_PLATFORMS", "").lower()
    if chosen:
        return chosen == "cpu"
    return not any(found for pattern in _ACCELERATORS for found in devices.glob(pattern))


def keep_freed_memory_on_cpu() -> None:
    """`keep_freed_memory` where jax will compute on the CPU."""
    if computes_on_cpu():
        keep_freed_memory()
