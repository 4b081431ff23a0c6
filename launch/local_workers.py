"""Several processes of one command on this machine: their events merged, signals passed on, one exit status."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from typing import IO, Any

Event = dict[str, Any]


class LocalWorkers:
    """Processes that each print one JSON object a line on standard output.

    `on_events` is called with the latest event of every worker (None where one has not said anything yet) whenever one
    has a new event; `say` with every other line that a worker prints, a line that several print alike only once.
    SIGINT and SIGTERM are passed on; the second one kills. A worker that fails leaves the others at their work.
    """

    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        on_events: Callable[[list[Event | None]], None],
        say: Callable[[str], None],
    ) -> None:
        self._commands = commands
        self._on_events, self._say = on_events, say
        self.events: list[Event | None] = [None] * len(commands)
        self._lines: queue.Queue[tuple[int, str | None]] = queue.Queue()
        self._processes: list[subprocess.Popen[str]] = []
        self._signal = 0

    def run(self) -> int:
        """Starts all and waits for all: 0, 128 + the signal that was passed on, or the status of the first failure."""
        caught = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._pass_on) for number in caught}
        try:
            for number, command in enumerate(self._commands):
                self._start(number, command)
            return self._follow()
        finally:
            for process in self._processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
            for caught_signal, handler in before.items():
                signal.signal(caught_signal, handler)

    def _start(self, number: int, command: Sequence[str]) -> None:
        # A session of its own: Ctrl-C reaches a worker once, through us. Without us its pipes break, and it ends.
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        self._processes.append(process)
        for stream in (process.stdout, process.stderr):
            threading.Thread(target=self._read, args=(number, stream), daemon=True).start()

    def _read(self, number: int, stream: IO[str]) -> None:
        for line in stream:
            self._lines.put((number, line.rstrip("\n")))
        self._lines.put((number, None))

    def _pass_on(self, number: int, frame: Any) -> None:
        again, self._signal = bool(self._signal), number
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL if again else number)

    def _follow(self) -> int:
        failure = 0
        said: set[str] = set()
        open_streams = [2] * len(self._processes)
        while any(open_streams):
            try:
                number, line = self._lines.get(timeout=0.2)  # without a timeout no signal would be heard
            except queue.Empty:
                continue
            if line is None:
                open_streams[number] -= 1
                if not open_streams[number]:
                    failure = self._ended(number, failure)
            elif line.startswith("{"):
                self.events[number] = json.loads(line)
                self._on_events(self.events)
            elif line.strip() and line not in said:
                said.add(line)
                self._say(line)
        return 128 + self._signal if self._signal else failure

    def _ended(self, number: int, failure: int) -> int:
        """The exit status so far, with that of worker `number`, which is over."""
        status = self._processes[number].wait()
        if status == 0 or self._signal:
            return failure
        how = f"was ended by signal {-status}" if status < 0 else f"failed with status {status}"
        self._say(f"worker {number} of {len(self._processes)} {how}; what it finished stays")
        return failure or (128 - status if status < 0 else status)
