"""How a process that computes on the CPU holds its memory."""

from __future__ import annotations

import ctypes
import os
import platform

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


def keep_freed_memory_on_cpu() -> None:
    """`keep_freed_memory` where the user has said that jax is to compute on the CPU."""
    if os.environ.get("JAX_PLATFORMS", "").lower() == "cpu":
        keep_freed_memory()
