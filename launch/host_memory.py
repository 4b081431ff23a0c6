"""How this process holds memory while XLA computes on the CPU."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory where jax computes on the CPU; does nothing elsewhere.

    XLA's CPU backend asks for the temporaries of a program at every call. glibc maps such large pieces afresh and the
    kernel clears them page by page, which costs a small model a fifth of its step. Memory then never shrinks.
    """
    import jax

    if jax.default_backend() != "cpu" or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_M_TOP_PAD, 64 * 2**20)
