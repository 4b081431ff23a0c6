"""Writing a checkpoint in pieces, so that it takes little from a training step.

Written files stay in the system's memory. A whole checkpoint at once needs that much of it, fresh and cleared: on a
virtual machine, whose host may first have to find it too, this was most of the processors' time for a save
(configs/LOG.md). Nobody reads a checkpoint back soon, so each piece leaves memory once it is on disk, and the next one
takes its place.

An accelerator's pieces are larger. Without them the whole state goes to the host at once: 13 GB held up one H200 for 7
seconds, probably because what the loop fetches of each step stood in line behind it.

Where the processors are the devices, most of the work of saving a small state is Orbax's Python, about a millisecond an
array, and even threads of the lowest priority take time from a step whose threads wait for each other. So there the
writer rests between pieces and also within them, and its work is spread over many steps.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import pathlib
import threading
import time
from collections.abc import Iterable
from typing import Any, get_args, get_type_hints

from orbax.checkpoint import v1 as ocp

_REST = 2.0
"""The rest after a piece takes this much of the time of its writing: a large save takes three times as long."""

_WORK_SECONDS = 0.001
"""A thread that has computed this long for a save rests when it next may, ..."""

_REST_SECONDS = 0.04
"""... this long, which is about a step of a small model."""

_SHARE_WITH_RESTS = 0.75
"""Rests end after this share of the time between the last two saves, so that the next one need not wait."""


def _find_priority() -> Any:
    """The enum that Orbax's option wants its callback to answer with, which has no public name; None if it is gone."""
    try:
        callback = get_args(get_type_hints(ocp.options.MemoryOptions)["serialization_status_callback"])[0]
        return get_type_hints(callback.key_priority)["return"]
    except (AttributeError, IndexError, KeyError, NameError):
        return None


_PRIORITY = _find_priority()


def piece_bytes(platform: str) -> int:
    """Arrays are written together up to this size; a larger one alone."""
    return (64 if platform == "cpu" else 256) * 2**20


def is_possible() -> bool:
    """Whether this Orbax can write in pieces; an Orbax of another time writes all at once, which only costs speed."""
    return _PRIORITY is not None


def forget(files: Iterable[pathlib.Path]) -> None:
    """Asks the system to drop files from memory, as far as they are on disk and where it can be asked."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in files:
        # Only advice: a file that another process has renamed meanwhile must not end a save.
        with contextlib.suppress(OSError):
            with open(file, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Pieces:
    """When a save rests. Also what Orbax calls, in the threads that write, before and after each piece of a save; its
    option `memory_options.serialization_status_callback`."""

    def __init__(self) -> None:
        self._hurry = threading.Event()
        self._folder = pathlib.Path()
        self._started: float | None = None
        self._last_rest = math.inf
        self._begin: float | None = None
        self._rested_seconds = 0.0
        self._is_first = True
        self._files: set[pathlib.Path] = set()
        self._loop_thread = 0
        self._thread = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> Pieces:
        """Itself: Orbax copies its options, and is to go on calling this one."""
        return self

    def start(self, unfinished: pathlib.Path, is_awaited: bool) -> None:
        """Before a save whose files are below `unfinished` until it is whole, in the thread of the loop, which itself
        never rests; `is_awaited`: somebody waits for it."""
        now = time.monotonic()
        self._last_rest = math.inf if self._started is None else now + _SHARE_WITH_RESTS * (now - self._started)
        self._started, self._loop_thread = now, threading.get_ident()
        self._folder, self._begin = unfinished, None
        self._is_first = True
        self._files.clear()
        if is_awaited:
            self.hurry()
        else:
            self._hurry.clear()

    def hurry(self) -> None:
        """Ends the rest and those to come: somebody waits for the save."""
        self._hurry.set()

    def rest(self, seconds: float = _REST_SECONDS) -> None:
        """Keeps a thread that writes waiting, unless the save is in a hurry."""
        begin = time.monotonic()
        if threading.get_ident() != self._loop_thread:
            self._hurry.wait(max(min(begin + seconds, self._last_rest) - begin, 0.0))
        self._thread.worked = time.thread_time()
        self._rested_seconds += time.monotonic() - begin

    def pause(self) -> None:
        """To be called often between small parts of a save: rests if this thread has worked for long enough."""
        if self._hurry.is_set() or threading.get_ident() == self._loop_thread:
            return
        with contextlib.suppress(RuntimeError):
            # Orbax writes all arrays of a piece in tasks of one event loop, of a thread of its own.
            asyncio.get_running_loop().set_task_factory(self._make_task)
        if time.thread_time() - getattr(self._thread, "worked", 0.0) > _WORK_SECONDS:
            self.rest()

    def _make_task(self, loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        """A task that pauses before it begins, and with it the whole loop."""

        async def paused() -> Any:
            self.pause()
            return await coroutine

        return asyncio.Task(paused(), loop=loop, **options)

    def key_priority(self, keypath: Any) -> Any:
        """The first array a piece of its own, which Orbax warns without; the others when their turn comes."""
        self.pause()
        is_first, self._is_first = self._is_first, False
        return _PRIORITY.SYNCHRONOUS if is_first else _PRIORITY.ASYNCHRONOUS_PRIORITIZED

    def on_transfer_start(self, keypath: Any) -> None:
        """Orbax does not call it yet."""

    def on_transfer_end(self, keypath: Any) -> None:
        """Before a piece is written: called for each of its arrays."""
        if self._begin is None:
            self._begin, self._rested_seconds = time.monotonic(), 0.0
        self.pause()

    def on_write_start(self, keypath: Any) -> None:
        """Orbax does not call it yet."""

    def on_write_end(self, keypath: Any) -> None:
        """A piece is on disk: called for each of its arrays."""
        if self._begin is not None:
            written = {file for file in self._folder.rglob("d/*") if file not in self._files}
            forget(written)
            self._files |= written
            worked = time.monotonic() - self._begin - self._rested_seconds
            self._begin = None
            self.rest(max(_REST * worked, _REST_SECONDS))
