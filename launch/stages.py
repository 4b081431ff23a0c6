"""A job of several stages: each runs once, is marked when it is done, and the same command goes on where it stopped.

A stage is done when its marker `stages/NAME.json` says so for the same inputs; the marker is written last, whole or not
at all. One line shows the stage, the percentage and the time left of the whole job, from what each stage is expected to
cost and how fast this machine has been so far.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

Report = Callable[[float, str], None]
"""Called by a running stage with the fraction of it that is done and a few words on how it goes."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of a job.

    `run(report)` does the work, or goes on with it, and returns JSON-ready facts for later stages and the page.
    `inputs` is everything its result depends on besides the stages before it. A stage that is `replaceable` runs again
    when its inputs changed; any other one refuses to, because its result cost something.
    """

    name: str
    expected_seconds: float
    inputs: dict[str, Any]
    run: Callable[[Report], dict[str, Any]]
    replaceable: bool = False


class ProgressLine:
    """The one line: drawn over on a terminal, a new line now and then elsewhere."""

    def __init__(self, stages: Sequence[Stage], stream: TextIO | None = None, line_every_seconds: float = 10.0) -> None:
        self._stages = stages
        self._stream = stream or sys.stderr
        self._is_terminal = self._stream.isatty()
        self._line_every = 0.2 if self._is_terminal else line_every_seconds
        self._done: set[str] = set()
        self._spent = self._expected = 0.0
        self._last_drawn = 0.0

    def skip(self, stage: Stage) -> None:
        """A stage that was done before this start: it takes no more time and says nothing about speed."""
        self._done.add(stage.name)

    def finish(self, stage: Stage, seconds: float, resumed: bool) -> None:
        """A stage that ran; how long it took says how fast this machine is, unless part of it was done before."""
        self._done.add(stage.name)
        if not resumed:
            self._spent, self._expected = self._spent + seconds, self._expected + stage.expected_seconds
        self.say(f"{stage.name}: done in {format_seconds(seconds)}")

    def update(self, stage: Stage, fraction: float, seconds: float, first_fraction: float, words: str) -> None:
        """Draws the line where it is due; `first_fraction` of the stage was done when this start began."""
        now = time.monotonic()
        if now - self._last_drawn < self._line_every:
            return
        self._last_drawn = now
        # A machine twice as slow in the stages so far is taken to be twice as slow in those to come.
        slowness = (self._spent + 30.0) / (self._expected + 30.0)
        guessed = stage.expected_seconds * slowness * (1 - fraction)
        gained = fraction - first_fraction
        measured = seconds / gained * (1 - fraction) if gained > 0.01 else guessed
        trust = min(1.0, gained * 5)
        left = trust * measured + (1 - trust) * guessed
        left += sum(s.expected_seconds for s in self._stages if s.name not in self._done and s is not stage) * slowness
        total = sum(s.expected_seconds for s in self._stages)
        before = sum(s.expected_seconds for s in self._stages if s.name in self._done)
        share = (before + fraction * stage.expected_seconds) / total
        number = self._stages.index(stage) + 1
        text = f"stage {number} of {len(self._stages)}: {stage.name} {fraction:.0%} | all {share:.0%}, "
        text += f"{format_seconds(left)} left" + (f" | {words}" if words else "")
        if self._is_terminal:
            bar = round(20 * share)
            self._stream.write(f"\r\x1b[2K[{'#' * bar}{'.' * (20 - bar)}] {text}"[:240])
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def say(self, text: str) -> None:
        """A line that stays."""
        start = "\r\x1b[2K" if self._is_terminal else ""
        self._stream.write(f"{start}{text}\n")
        self._stream.flush()


def format_seconds(seconds: float) -> str:
    """`48 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def run_stages(
    stages: Sequence[Stage], workdir: pathlib.Path, *, stream: TextIO | None = None
) -> dict[str, dict[str, Any]]:
    """Runs what is not done yet, in order, and returns the marker of every stage: name -> {seconds, facts, ...}.

    Raises:
      ValueError: a finished stage was made from other inputs and may not be made again.
    """
    folder = workdir / "stages"
    folder.mkdir(parents=True, exist_ok=True)
    line = ProgressLine(stages, stream)
    markers: dict[str, dict[str, Any]] = {}
    upstream = ""
    for stage in stages:
        identity = json.dumps({"upstream": upstream, "inputs": stage.inputs}, sort_keys=True)
        upstream = hashlib.sha256(identity.encode()).hexdigest()[:16]
        path = folder / f"{stage.name}.json"
        marker = json.loads(path.read_text()) if path.exists() else None
        if marker and marker["fingerprint"] == upstream:
            markers[stage.name] = marker
            line.skip(stage)
            continue
        if marker and not stage.replaceable:
            raise ValueError(_what_changed(stage, marker, workdir))
        with _stopwatch(folder / f"{stage.name}.seconds") as (spent_before, seconds):
            first: list[float] = []

            def report(fraction: float, words: str, stage=stage, seconds=seconds, first=first) -> None:
                first.append(fraction) if not first else None
                line.update(stage, min(max(fraction, 0.0), 1.0), seconds(), first[0], words)

            report(0.0, "")
            if spent_before:
                first.clear()
            facts = stage.run(report)
            marker = {
                "fingerprint": upstream,
                "inputs": stage.inputs,
                "seconds": spent_before + seconds(),
                "facts": facts,
            }
        write_atomically(path, json.dumps(marker, indent=1) + "\n")
        (folder / f"{stage.name}.seconds").unlink(missing_ok=True)
        markers[stage.name] = marker
        line.finish(stage, marker["seconds"], resumed=bool(spent_before))
    return markers


@contextlib.contextmanager
def _stopwatch(path: pathlib.Path) -> Iterator[tuple[float, Callable[[], float]]]:
    """Yields (seconds spent by earlier, interrupted starts; a clock of this one) and keeps their sum on disk."""
    before = float(path.read_text()) if path.exists() else 0.0
    start = time.monotonic()
    try:
        yield before, lambda: time.monotonic() - start
    finally:
        write_atomically(path, f"{before + time.monotonic() - start:.3f}")


def _what_changed(stage: Stage, marker: dict[str, Any], workdir: pathlib.Path) -> str:
    old, new = marker["inputs"], stage.inputs
    changed = [
        f"{key}: {old.get(key)!r} then, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ] or ["a stage before it changed"]
    return (
        f"{workdir} was started with other settings (stage {stage.name!r}; {'; '.join(changed)}); "
        "set them back, or choose another --workdir"
    )


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes `text` whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
