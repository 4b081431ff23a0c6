"""Watching a run: the hook protocol, metrics files, TensorBoard, a progress line with time left, a profiler window."""

from __future__ import annotations

import contextlib
import logging
import math
import pathlib
import sys
import time
from typing import Any, TextIO

from aromni_jax.train import workdir as workdirs
from aromni_jax.train.metrics import LineFile

log = logging.getLogger(__name__)


class Hook:
    """What the loop tells whoever watches; override what you need. Hooks run on every process, and only look."""

    def on_start(self, step: int, total_steps: int) -> None:
        """Before the first step: `step` steps are already done."""

    def on_step(self, step: int, line: dict[str, Any] | None) -> None:
        """After each step, one step late; `line` is the line of `metrics.jsonl` where one is due, else None."""

    def on_eval(self, step: int, results: dict[str, Any]) -> None:
        """After an evaluation."""

    def on_save(self, step: int) -> None:
        """Before a checkpoint of `step` is written, in the thread that writes it."""

    def on_end(self, step: int) -> None:
        """After the last step, also when the run was told to stop or failed."""


class MetricsFiles(Hook):
    """`metrics.jsonl` and `evaluations.jsonl`, continued from `first_step`. For process 0."""

    def __init__(self, workdir: pathlib.Path, first_step: int):
        self._metrics = LineFile(workdir / workdirs.METRICS_FILE, first_step)
        self._evaluations = LineFile(workdir / workdirs.EVALUATIONS_FILE, first_step)
        if self._metrics.dropped:
            log.info("dropped %d lines of %s after step %d", self._metrics.dropped, workdirs.METRICS_FILE, first_step)

    def on_step(self, step: int, line: dict[str, Any] | None) -> None:
        if line is not None:
            self._metrics.write(line)

    def on_eval(self, step: int, results: dict[str, Any]) -> None:
        self._evaluations.write({"step": step, **results})

    def on_save(self, step: int) -> None:
        self._metrics.sync()
        self._evaluations.sync()

    def on_end(self, step: int) -> None:
        self._metrics.close()
        self._evaluations.close()


class TensorBoard(Hook):
    """Scalars for TensorBoard below `workdir/tensorboard`; events after `first_step` of an earlier try are purged. For
    process 0."""

    def __init__(self, workdir: pathlib.Path, first_step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1 if first_step else None)

    def _write(self, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def on_step(self, step: int, line: dict[str, Any] | None) -> None:
        if line is not None:
            self._write(step, line)

    def on_eval(self, step: int, results: dict[str, Any]) -> None:
        self._write(step, {f"eval/{name}": value for name, value in results.items()})

    def on_end(self, step: int) -> None:
        self._writer.close()


def format_seconds(seconds: float) -> str:
    """`42s`, `3m07s`, `2h05m`, `3d04h`: two units, no more."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


class Progress(Hook):
    """Step, losses, speed and time left: one line that is drawn over on a terminal, a new line now and then elsewhere.

    Time left follows an average over about the last fifty steps, so that it recovers from a slow start. A run outlives
    whoever reads its output: what cannot be written is left out.
    """

    def __init__(self, label: str = "train", stream: TextIO | None = None, line_every_seconds: float = 10.0):
        self._label = label
        self._stream: TextIO | None = stream or sys.stderr  # None where the process has no standard error
        self._is_terminal = self._stream is not None and self._stream.isatty()
        self._line_every = 0.25 if self._is_terminal else line_every_seconds
        self._seconds_per_step = 0.0
        self._num_seen = 0
        self._facts = ""

    def on_start(self, step: int, total_steps: int) -> None:
        self._total = total_steps
        self._last_time = time.monotonic()
        self._last_drawn = -math.inf

    def on_step(self, step: int, line: dict[str, Any] | None) -> None:
        now = time.monotonic()
        self._num_seen += 1
        rate = max(1 / self._num_seen, 0.02)
        self._seconds_per_step += rate * (now - self._last_time - self._seconds_per_step)
        self._last_time = now
        if line is not None:
            self._facts = self._describe(line)
        is_due = now - self._last_drawn >= self._line_every and (self._is_terminal or line is not None)
        if is_due or (step >= self._total and line is not None):
            self._last_drawn = now
            self._draw(step)

    @staticmethod
    def _describe(line: dict[str, Any]) -> str:
        losses = {name: line.get(f"loss/{name}") for name in ("text", "image", "speech")}
        parts = [f"{name} {value:.3f}" for name, value in losses.items() if value is not None]
        loss = "not finite" if line["loss"] is None else f"{line['loss']:.3f}"
        facts = f"loss {loss}" + (f" ({', '.join(parts)})" if parts else "")
        facts += f", {line['tokens_per_second']:,.0f} tokens/s, {line['step_seconds']:.2f} s/step"
        if line.get("mfu"):
            facts += f", MFU {line['mfu']:.1%}"
        if line["skipped_steps"]:
            facts += f", {line['skipped_steps']} skipped"
        return facts

    def _draw(self, step: int) -> None:
        left = format_seconds((self._total - step) * self._seconds_per_step)
        text = f"{self._label} {step}/{self._total} ({step / self._total:.0%}), {left} left"
        text += f": {self._facts}" if self._facts else ""
        if self._is_terminal:
            done = round(20 * step / self._total)
            text = f"\r\x1b[2K[{'#' * done}{'.' * (20 - done)}] {text}"
        self._write(text if self._is_terminal else text + "\n")

    def _write(self, text: str) -> None:
        if self._stream is not None:
            with contextlib.suppress(OSError):
                self._stream.write(text)
                self._stream.flush()

    def on_end(self, step: int) -> None:
        if self._is_terminal:
            self._write("\n")


class ProfilerWindow(Hook):
    """Records steps `first`..`last` with the JAX profiler into `workdir/profile`, for TensorBoard or XProf.

    A run that ends inside the window leaves a profile of the steps it came to, one that ends before it says so.
    """

    def __init__(self, workdir: pathlib.Path, first: int, last: int):
        if not 1 <= first <= last:
            raise ValueError(f"profiler window {first}:{last} must be FIRST:LAST with 1 <= FIRST <= LAST")
        self._folder, self._first, self._last = workdir / "profile", first, last
        self._start = self._end = 0
        self._is_recording = self._has_profile = False

    def on_start(self, step: int, total_steps: int) -> None:
        self._start, self._end = step, min(self._last, total_steps)
        self.on_step(step, None)

    def on_step(self, step: int, line: dict[str, Any] | None) -> None:
        import jax

        # Hooks hear of a step while the next one runs: steps first..last run between the calls for first-1 and last.
        if not self._is_recording and self._first - 1 <= step < self._end:
            jax.profiler.start_trace(str(self._folder))
            self._is_recording = True
        elif self._is_recording and step >= self._end:
            self._stop(step)

    def _stop(self, step: int) -> None:
        import jax

        jax.profiler.stop_trace()
        self._is_recording = False
        first = max(self._first, self._start + 1)
        # The recording begins a step early, and a run may be stopped just then.
        if step >= first:
            self._has_profile = True
            log.info("profile of steps %d..%d written to %s", first, step, self._folder)

    def on_end(self, step: int) -> None:
        if self._is_recording:
            self._stop(step)
        if not self._has_profile:
            log.warning(
                "no profile of steps %d..%d: this start began after step %d and ended after step %d; "
                "choose --profile_steps between them",
                self._first,
                self._last,
                self._start,
                step,
            )
