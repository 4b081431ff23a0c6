"""Leaves no process waiting for ever: a heartbeat file per process, a report of who holds up the others, and an end
with the stacks of all threads when no step ends for too long.

One thread per process does all of it, beside the loop. Nobody is ended because of a file: file systems show changes
late. A dead process is noticed by jax's own heartbeats (`--heartbeat_timeout_seconds`); the files say which one it was.
"""

from __future__ import annotations

import ctypes
import dataclasses
import faulthandler
import json
import logging
import os
import pathlib
import signal
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable

from aromni_jax.train import workdir as workdirs

log = logging.getLogger(__name__)

EXIT_TRY_AGAIN = 75
"""Exit status of a process that hung, lost another one or could not save (EX_TEMPFAIL): start the whole run again, it
will go on."""

EXIT_UNEXPECTED = 70
"""Exit status after an error that no user can cause as far as we know (EX_SOFTWARE): a bug, memory, a broken machine.
Starting again may help, so launchers do, a number of times; never after 1 and 2, errors of the user."""

EXIT_HELD = int(signal.SIGALRM)
"""Exit status of a process whose watchdog could not run, because something held the interpreter: 14. Start again."""

LONG_PHASES = ("start", "compile", "evaluate", "save")
LONG_FACTOR = 6
"""Compiling, restoring, evaluating and saving may take this many times as long as a step."""

BEAT_EVERY_SECONDS = 15.0
REPORT_EVERY_SECONDS = 60.0
_SLOW_HOST_FRACTION = 0.2
"""A process whose host takes this share of a step more than the median one is named."""


class TryAgain(Exception):
    """What another start may get past; it ends a process with `EXIT_TRY_AGAIN`."""


@dataclasses.dataclass(frozen=True)
class Heartbeat:
    """What a process last said of itself. `host_seconds` is the part of a step in which it did not wait for devices."""

    process: int
    host: str
    pid: int
    phase: str
    step: int
    time: float
    step_seconds: float
    data_wait_seconds: float
    host_seconds: float

    def __str__(self) -> str:
        return f"process {self.process} ({self.host}) in phase '{self.phase}' after step {self.step}"


def read_heartbeats(workdir: pathlib.Path) -> list[tuple[float, Heartbeat]]:
    """(when it was written by the clock of the file system, heartbeat) of every process, by process."""
    found = []
    for path in sorted((workdir / workdirs.HEARTBEATS).glob("[0-9]*.json")):
        try:
            found.append((path.stat().st_mtime, Heartbeat(**json.loads(path.read_text(encoding="utf-8")))))
        except (OSError, ValueError, TypeError):
            continue  # being replaced, or of another version
    return found


def describe_stragglers(beats: list[tuple[float, Heartbeat]], every_seconds: float) -> list[str]:
    """One line per process that is silent, behind, or slow on its host; and the spread of `step_seconds` if any is."""
    running = [beat for _, beat in beats if beat.step_seconds]
    if len(beats) < 2 or not running:
        return []
    newest, furthest = max(when for when, _ in beats), max(beat.step for beat in running)
    step_seconds = statistics.median(beat.step_seconds for beat in running)
    host_seconds = statistics.median(beat.host_seconds for beat in running)
    # A file is up to one beat old, and that many steps may have ended since.
    allowed_steps = 2 + every_seconds / step_seconds
    lines = []
    for when, beat in beats:
        if newest - when > 3 * every_seconds:
            lines.append(f"{beat}: silent for {newest - when:.0f} s")
        elif furthest - beat.step > allowed_steps:
            lines.append(f"{beat}: {furthest - beat.step} steps behind")
        elif beat.host_seconds - host_seconds > _SLOW_HOST_FRACTION * step_seconds:
            lines.append(
                f"{beat}: its host takes {beat.host_seconds:.2f} s of each step, {beat.data_wait_seconds:.2f} s of "
                f"them for data; the median is {host_seconds:.2f} s"
            )
    if lines:
        seconds = sorted(beat.step_seconds for beat in running)
        lines.append(f"a step takes {seconds[0]:.2f} to {seconds[-1]:.2f} s on {len(running)} processes")
    return lines


class _Alarm:
    """Ends the process with `EXIT_HELD` and the stacks of all threads, unless it is set again in time.

    It needs no Python to run: the kernel's timer, and a handler that is `_exit` of the C library itself (it is called
    with the number of the signal). `faulthandler` could end the process too, but only with the status 1 of a user's
    error, which nobody restarts.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)
        self._libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
        self._libc.signal.restype = ctypes.c_void_p
        self._before = self._libc.signal(signal.SIGALRM, ctypes.cast(self._libc._exit, ctypes.c_void_p))
        faulthandler.register(signal.SIGALRM, file=sys.__stderr__ or 2, all_threads=True, chain=True)

    def set(self, seconds: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def close(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.unregister(signal.SIGALRM)
        self._libc.signal(signal.SIGALRM, self._before)


class Watchdog:
    """Watches one process of a run; a context manager. `seconds` is how long a step may take (0: watches nothing).

    The loop says what it does with `enter` and what it has done with `step_done`. `leave` ends the process; it runs
    after the stacks of all threads went to standard error and to `heartbeats/hang_PROCESS.txt`.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        seconds: float,
        process: int = 0,
        num_processes: int = 1,
        leave: Callable[[int], object] = os._exit,
    ):
        self._workdir = workdir
        self._folder = workdir / workdirs.HEARTBEATS
        self._seconds = seconds
        self._process, self._num_processes = process, num_processes
        self._leave = leave
        self._every = min(BEAT_EVERY_SECONDS, seconds / 4)
        self._host = socket.gethostname()
        self._phase, self._step = "start", 0
        self._since = self._reported = time.monotonic()
        self._timing = (0.0, 0.0, 0.0)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._seconds:
            self._folder.mkdir(exist_ok=True)
            if self._process == 0:
                # Of an earlier start, which may have had more processes.
                for path in self._folder.glob("[0-9]*.json"):
                    if int(path.stem) >= self._num_processes:
                        path.unlink(missing_ok=True)
            self._alarm = _Alarm()
            self._set_alarm()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._seconds:
            self._ending.set()
            self._thread.join()
            self._alarm.close()

    def enter(self, phase: str) -> None:
        """The loop begins something else: the clock starts anew."""
        self._phase = phase
        self._since = time.monotonic()

    def step_done(self, step: int, step_seconds: float, data_wait_seconds: float, host_seconds: float) -> None:
        """A step has ended, with its times; they are smoothed over about ten steps."""
        self._step = step
        fresh = (step_seconds, data_wait_seconds, host_seconds)
        rate = 0.1 if self._timing[0] else 1.0
        self._timing = tuple(old + rate * (new - old) for old, new in zip(self._timing, fresh))  # type: ignore[assignment]
        self.enter("step")

    def heartbeat(self) -> Heartbeat:
        """What this process would say of itself now."""
        step_seconds, wait_seconds, host_seconds = self._timing
        return Heartbeat(
            self._process,
            self._host,
            os.getpid(),
            self._phase,
            self._step,
            round(time.time(), 3),
            round(step_seconds, 4),
            round(wait_seconds, 4),
            round(host_seconds, 4),
        )

    def _watch(self) -> None:
        while True:
            self._beat()
            self._set_alarm()
            quiet_seconds = time.monotonic() - self._since
            if quiet_seconds > self._seconds * (LONG_FACTOR if self._phase in LONG_PHASES else 1):
                self._give_up(quiet_seconds)
                return
            if self._process == 0 and time.monotonic() - self._reported > max(REPORT_EVERY_SECONDS, 4 * self._every):
                self._reported = time.monotonic()
                for line in describe_stragglers(read_heartbeats(self._workdir), self._every):
                    log.warning("%s", line)
            if self._ending.wait(self._every):
                return

    def _set_alarm(self) -> None:
        # Later than this thread would act.
        self._alarm.set(LONG_FACTOR * self._seconds + 4 * self._every)

    def _beat(self) -> None:
        try:
            beat = dataclasses.asdict(self.heartbeat())
            workdirs.write_text(self._folder / f"{self._process:05d}.json", json.dumps(beat) + "\n")
        except OSError as error:
            log.warning("heartbeat not written: %s", error)

    def _give_up(self, quiet_seconds: float) -> None:
        others = [beat for _, beat in read_heartbeats(self._workdir) if beat.process != self._process]
        last = sorted(others, key=lambda beat: (beat.step, beat.phase == "step"))[:4]
        message = (
            f"aromni train: error: no step ended for {quiet_seconds:.0f} s (watchdog_seconds={self._seconds:g}): "
            + "; ".join(map(str, [self.heartbeat(), *last]))
            + f". Leaving with status {EXIT_TRY_AGAIN}; the same command goes on from the last checkpoint"
        )
        path = self._folder / f"hang_{self._process:05d}.txt"
        try:
            print(message, file=sys.stderr, flush=True)
            with open(path, "w", encoding="utf-8") as file:
                print(time.strftime("%Y-%m-%dT%H:%M:%S%z"), message, file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
            print(f"stacks of all threads: {path}", file=sys.stderr, flush=True)
        finally:
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
            self._leave(EXIT_TRY_AGAIN)
