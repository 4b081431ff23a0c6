"""Writing a checkpoint in pieces, so that it takes little from a training step that computes on the same processors.

Written files stay in the system's memory. A whole checkpoint at once needs that much of it, fresh and cleared: on a
virtual machine, whose host may first have to find it too, this was most of the processors' time for a save
(configs/LOG.md). Nobody reads a checkpoint back soon, so each piece leaves memory once it is on disk, and the next one
takes its place. Between pieces the writer rests, and its work is spread over several steps.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import threading
import time
from collections.abc import Iterable
from typing import Any, get_args, get_type_hints

from orbax.checkpoint import v1 as ocp

PIECE_BYTES = 64 * 2**20
"""Arrays are written together up to this size; a larger one alone."""

_REST = 2.0
"""A rest takes this much of the time of the piece before it: a save takes three times as long."""


def _find_priority() -> Any:
    """The enum that Orbax's option wants its callback to answer with, which has no public name; None if it is gone."""
    try:
        callback = get_args(get_type_hints(ocp.options.MemoryOptions)["serialization_status_callback"])[0]
        return get_type_hints(callback.key_priority)["return"]
    except (AttributeError, IndexError, KeyError, NameError):
        return None


_PRIORITY = _find_priority()


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
    """What Orbax calls, in the thread that writes, before and after each piece of a save; its option
    `memory_options.serialization_status_callback`."""

    def __init__(self) -> None:
        self._hurry = threading.Event()
        self._folder = pathlib.Path()
        self._begin: float | None = None
        self._rest_seconds = 0.0
        self._is_first = True
        self._files: set[pathlib.Path] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> Pieces:
        """Itself: Orbax copies its options, and is to go on calling this one."""
        return self

    def start(self, unfinished: pathlib.Path, is_awaited: bool) -> None:
        """Before a save whose files are below `unfinished` until it is whole; `is_awaited`: somebody waits for it."""
        self._folder, self._begin, self._rest_seconds = unfinished, None, 0.0
        self._is_first = True
        self._files.clear()
        if is_awaited:
            self.hurry()
        else:
            self._hurry.clear()

    def hurry(self) -> None:
        """Ends the rest and those to come: somebody waits for the save."""
        self._hurry.set()

    def key_priority(self, keypath: Any) -> Any:
        """The first array a piece of its own, which Orbax warns without; the others when their turn comes."""
        is_first, self._is_first = self._is_first, False
        return _PRIORITY.SYNCHRONOUS if is_first else _PRIORITY.ASYNCHRONOUS_PRIORITIZED

    def on_transfer_start(self, keypath: Any) -> None:
        """Orbax does not call it yet."""

    def on_transfer_end(self, keypath: Any) -> None:
        """Before a piece is written: called for each of its arrays."""
        if self._begin is None:
            self._hurry.wait(self._rest_seconds)
            self._begin = time.monotonic()

    def on_write_start(self, keypath: Any) -> None:
        """Orbax does not call it yet."""

    def on_write_end(self, keypath: Any) -> None:
        """A piece is on disk: called for each of its arrays."""
        if self._begin is not None:
            written = {file for file in self._folder.rglob("d/*") if file not in self._files}
            forget(written)
            self._files |= written
            self._rest_seconds, self._begin = _REST * (time.monotonic() - self._begin), None
