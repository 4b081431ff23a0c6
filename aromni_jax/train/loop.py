"""The training loop: draws batches, runs the step, watches, saves, stops when asked. It knows no task and no data set.

The device never waits for the host: while step s runs, batch s + 1 is drawn and placed, and the metrics of step s - 1
are fetched. The step is compiled once, for the first batch: an argument of another shape or placement later is an error
instead of a silent recompilation.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Protocol

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from aromni_jax.arrays import PyTree
from aromni_jax.config import TrainConfig
from aromni_jax.structs import PackedBatch
from aromni_jax.train.checkpoint import Checkpointer, Snapshot
from aromni_jax.train.leaves import any_process
from aromni_jax.train.metrics import MetricsWindow
from aromni_jax.train.observe import Hook
from aromni_jax.train.saved_step import RunFacts
from aromni_jax.train.watchdog import Watchdog

log = logging.getLogger(__name__)

MAX_CONSECUTIVE_BAD_STEPS = 100
"""A run whose steps are not finite this often in a row is over: it stops with an error instead of burning hours."""

COMPILE_TIMEOUT_SECONDS = 3600
"""How long processes that have compiled the step wait for those that still do."""


class Batches(Protocol):
    """Where rows come from: the interface of `data_pipelines.pipeline.BatchIterator`; it may end."""

    @property
    def fingerprint(self) -> str: ...

    def __next__(self) -> PackedBatch: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...

    def shares(self, state: dict[str, Any]) -> dict[str, float]:
        """Share of each data set in the targets drawn up to `state`."""
        ...

    def describe_batch(self, step: int) -> list[str]: ...


class StopRequest:
    """SIGTERM and SIGINT become a polite stop: `agreed` is true on every process at the same call. A context manager.

    A second SIGINT interrupts at once. With several processes jax's preemption service spreads the notice: a SIGTERM to
    any one of them stops all, at a call that none has come to yet.
    """

    def __init__(self) -> None:
        self._requested = threading.Event()
        self._num_calls = 0
        self._is_agreed = False
        self._restore: list[tuple[int, Any]] = []

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():
            return self
        signals = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
        self._restore = [(number, signal.signal(number, self._handle)) for number in signals]
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._restore:
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._requested.is_set():
            raise KeyboardInterrupt
        self._requested.set()
        if jax.process_count() > 1:
            # The preemption service listens to SIGTERM only.
            os.kill(os.getpid(), signal.SIGTERM)
        log.warning("%s: finishing this step, then saving", signal.Signals(number).name)

    def agreed(self) -> bool:
        """Whether to stop here; every process must ask as often as the others."""
        # Calls are counted from this start, because jax compares them with the highest number it has heard.
        self._num_calls += 1
        if jax.process_count() > 1:
            self._is_agreed |= bool(multihost_utils.reached_preemption_sync_point(self._num_calls))
        else:
            self._is_agreed = self._requested.is_set()
        return self._is_agreed


@dataclasses.dataclass
class LoopResult:
    """The state after the last step done, its number, and whether the loop was told to stop before the end of the data
    and of the run."""

    state: PyTree
    step: int
    is_interrupted: bool


@dataclasses.dataclass
class _Drawn:
    """A batch on the devices, the data position after it, and how long it was waited for."""

    batch: PyTree
    position: dict[str, Any]
    wait_seconds: float


@dataclasses.dataclass
class _Pending:
    step: int
    metrics: Any
    position: dict[str, Any]
    wait_seconds: float
    is_last: bool = False
    snapshot: Snapshot | None = None
    is_shared: bool = False
    is_local: bool = False


def _has_room_for_a_second(state: PyTree, step: Any) -> bool:
    """Whether every device can hold another `state` while the compiled `step` runs; true where memory has no end that
    jax knows of (a CPU)."""
    memory = step.memory_analysis()
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    known = [limit for limit in limits if limit is not None]
    if memory is None or not known:
        return True
    second = sum(shard.data.nbytes for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards[:1])
    running = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    has_room = running + memory.temp_size_in_bytes + second < 0.95 * min(known)
    return not any_process(not has_room)


Evaluate = Callable[[PyTree, int, Callable[[], bool]], dict[str, Any] | None]
"""`evaluate(state, step, is_stopping)`: what it measured; or None because `is_stopping()`, which all processes must ask
as often as each other (between two batches, for example), told it to give up."""


class TrainLoop:
    """Runs steps `first_step + 1 .. config.total_steps`.

    `step` is a jitted `(state, batch, rate) -> (state, metrics)` that donates the state, and `learning_rate` gives the
    rate of the step after so many; `load`, if given, fetches the compiled step. `place` makes global arrays of the
    rows this process drew; `facts` tells what a checkpoint should say, given the data position and the metrics window;
    `flops` maps (real tokens, attended pairs) of a window to model FLOPs and `peak_flops` is that of the whole mesh.
    `evaluate` runs every `config.eval_every_steps` and its result goes to the hooks; who is asked to stop there, or on
    the way, saves at once, and evaluates at the next start, unless `is_evaluated`. `watchdog` hears what the loop does,
    `started` is the `time.monotonic()` from which the first step is timed, and `start_facts` go into the first line.
    """

    def __init__(
        self,
        *,
        config: TrainConfig,
        step: Any,
        learning_rate: Callable[[int], Any],
        load: Callable[[], Callable[..., Any]] | None = None,
        batches: Batches,
        place: Callable[[PackedBatch], PyTree],
        checkpointer: Checkpointer,
        facts: Callable[[dict[str, Any], dict[str, Any]], RunFacts],
        window: MetricsWindow,
        hooks: Sequence[Hook] = (),
        evaluate: Evaluate | None = None,
        flops: Callable[[float, float], float] | None = None,
        peak_flops: float | None = None,
        watchdog: Watchdog,
        started: float,
        start_facts: dict[str, float] | None = None,
        is_evaluated: bool = True,
    ):
        self._config = config
        self._jitted_step = step
        self._learning_rate = learning_rate
        self._load = load
        self._batches = batches
        self._place = place
        self._checkpointer = checkpointer
        self._facts = facts
        self._window = window
        self._hooks = hooks
        self._evaluate = evaluate
        self._flops = flops
        self._peak_flops = peak_flops
        self._watchdog = watchdog
        self._started = started
        self._pending: list[_Pending] = []
        self._is_first = True
        self._save_stall_seconds = self._lost_seconds = 0.0
        self._start_facts = dict(start_facts or {})
        self._is_evaluated = is_evaluated
        self._num_bad_in_a_row = 0

    def run(self, state: PyTree, first_step: int) -> LoopResult:
        """Trains until the end, of the run or of the data, or until asked to stop; a checkpoint of the last step is on
        disk when it returns.

        Raises:
          ValueError: too many steps in a row were not finite.
        """
        step, is_stopping = first_step, False
        total = self._config.total_steps
        try:
            with StopRequest() as stop:
                drawn = self._draw() if step < total else None
                self._watchdog.enter("compile")
                run_step = self._compile(state, drawn.batch, step) if drawn else None
                for hook in self._hooks:
                    hook.on_start(step, total)
                if not self._is_evaluated:
                    is_stopping = not self._run_evaluation(state, step, stop.agreed)
                self._watchdog.enter("step")
                self._restart_clock()
                while run_step and drawn and not is_stopping:
                    state, metrics = run_step(state, drawn.batch, self._learning_rate(step))
                    step += 1
                    done = _Pending(step, metrics, drawn.position, drawn.wait_seconds)
                    self._pending.append(done)
                    drawn = self._draw() if step < total else None
                    done.is_last = not drawn
                    self._record(keep=1)
                    is_stopping = self._after_step(state, done, stop)
                self._watchdog.enter("save")
                self._checkpointer.wait()
            if step < total and not drawn:
                log.warning("the data ended after step %d of %d: all its epochs have been read", step, total)
        finally:
            for hook in self._hooks:
                hook.on_end(step)
        return LoopResult(state, step, is_interrupted=drawn is not None)

    def _compile(self, state: PyTree, batch: PyTree, step: int) -> Callable[..., tuple[PyTree, Any]]:
        start = time.monotonic()
        rate = self._learning_rate(step)
        compiled = self._load() if self._load else self._jitted_step.lower(state, batch, rate).compile()
        self._checkpointer.prepare(state, has_room=_has_room_for_a_second(state, compiled))
        self._start_facts["compile_seconds"] = time.monotonic() - start
        # Collectives have timeouts of their own (30 s between CPUs), which a process that compiles longer would break.
        barrier = ocp.multihost.sync_global_processes(
            "step compiled",
            operation_id="aromni",
            timeout=COMPILE_TIMEOUT_SECONDS,
            processes=set(range(jax.process_count())),
        )
        asyncio.run(barrier)
        return compiled

    def _draw(self) -> _Drawn | None:
        """The next batch, or None at the end of the data."""
        self._watchdog.enter("data")
        start = time.monotonic()
        local_batch = next(self._batches, None)  # type: ignore[call-overload]
        wait_seconds = time.monotonic() - start
        self._lost_seconds += wait_seconds
        self._watchdog.enter("step")
        if local_batch is None:
            return None
        return _Drawn(self._place(local_batch), self._batches.state(), wait_seconds)

    def _after_step(self, state: PyTree, done: _Pending, stop: StopRequest) -> bool:
        """Evaluates and takes a snapshot after `done`, whose metrics may still be on their way: `_record` writes it.

        Returns whether to stop here.
        """
        config, step = self._config, done.step
        is_evaluating = config.eval_every_steps and step % config.eval_every_steps == 0
        is_stopping = stop.agreed()
        if is_evaluating or is_stopping or done.is_last:
            self._record(keep=0)
        # Whoever stops a run may give it half a minute. After the last step there is no other start to evaluate it.
        if is_evaluating and done.is_last:
            self._run_evaluation(state, step, lambda: False)
        elif is_evaluating and not is_stopping:
            is_stopping = not self._run_evaluation(state, step, stop.agreed)
        is_end = is_stopping or done.is_last
        done.is_shared = is_end or step % config.checkpoint.save_every_steps == 0
        done.is_local = bool(config.checkpoint.local_directory) and step % config.checkpoint.local_every_steps == 0
        if done.is_shared or done.is_local:
            self._watchdog.enter("save")
            start = time.monotonic()
            done.snapshot = self._checkpointer.snapshot(state)
            self._count_stall(time.monotonic() - start)
            self._watchdog.enter("step")
            if not self._pending:
                self._write(done)
        return is_stopping

    def _run_evaluation(self, state: PyTree, step: int, is_stopping: Callable[[], bool]) -> bool:
        """Whether it came to its end, which nothing to do always does."""
        if not self._evaluate:
            return True
        self._watchdog.enter("evaluate")
        results = self._evaluate(state, step, is_stopping)
        if results is not None:
            for hook in self._hooks:
                hook.on_eval(step, results)
        self._watchdog.enter("step")
        self._clock = time.monotonic()
        return results is not None

    def _write(self, done: _Pending) -> None:
        """Hands the snapshot of a recorded step to the checkpointer."""
        assert done.snapshot is not None
        start = time.monotonic()
        facts = self._facts(done.position, self._window.to_json())

        def tell() -> None:
            for hook in self._hooks:
                hook.on_save(done.step)

        self._checkpointer.write(
            done.step, done.snapshot, facts, tell, is_shared=done.is_shared, is_local=done.is_local
        )
        done.snapshot = None
        self._count_stall(time.monotonic() - start)

    def _count_stall(self, seconds: float) -> None:
        self._save_stall_seconds += seconds
        self._lost_seconds += seconds

    def _restart_clock(self) -> None:
        self._clock = time.monotonic()
        self._step_seconds = self._wait_seconds = self._save_stall_seconds = self._lost_seconds = 0.0
        self._num_timed_steps = 0

    def _record(self, keep: int) -> None:
        """Fetches the metrics of all but the newest `keep` steps and writes the lines that are due."""
        while len(self._pending) > keep:
            done = self._pending.pop(0)
            start = time.monotonic()
            metrics = jax.device_get(done.metrics)
            now = time.monotonic()
            is_good = self._window.add(metrics)
            step_seconds = now - self._clock
            self._step_seconds += step_seconds
            self._wait_seconds += done.wait_seconds
            self._num_timed_steps += 1
            self._clock = now
            if self._is_first:
                self._report_first_step(now - self._started)
            self._watchdog.step_done(done.step, step_seconds, done.wait_seconds, step_seconds - (now - start))
            lost_seconds, self._lost_seconds = self._lost_seconds, 0.0
            if is_good:
                self._window.goodput.productive_seconds += step_seconds - lost_seconds
                self._num_bad_in_a_row = 0
            else:
                self._report_bad_step(done.step)
            is_due = done.step % self._config.log_every_steps == 0 or done.is_last
            line = self._line(done) if is_due else None
            for hook in self._hooks:
                hook.on_step(done.step, line)
            if done.snapshot:
                self._write(done)

    def _line(self, done: _Pending) -> dict[str, Any]:
        tokens, pairs = self._window.flops_counts
        num_steps = self._num_timed_steps
        # After a resume inside a window it also holds steps that this process did not time.
        seconds = self._step_seconds * self._window.num_steps / num_steps
        mfu = None
        if self._flops and self._peak_flops:
            mfu = self._flops(tokens, pairs) / (seconds * self._peak_flops)
        line = self._window.line(done.step, self._config.loss)
        line |= {f"data_share/{name}": share for name, share in self._batches.shares(done.position).items()}
        line |= {
            "tokens_per_second": tokens / seconds,
            "step_seconds": self._step_seconds / num_steps,
            "data_wait_seconds": self._wait_seconds / num_steps,
            "save_stall_seconds": self._save_stall_seconds,
            "mfu": mfu,
            "goodput": self._window.goodput.share(),
        }
        # Only the first line of a start has these.
        line |= self._start_facts
        self._start_facts = {}
        self._restart_clock()
        return line

    def _report_first_step(self, seconds: float) -> None:
        self._is_first = False
        self._start_facts["first_step_seconds"] = seconds
        log.info("first step after %.1f s (compile %.1f s)", seconds, self._start_facts["compile_seconds"])

    def _report_bad_step(self, step: int) -> None:
        keys = self._batches.describe_batch(step)
        shown = ", ".join(keys[:50]) + (f" and {len(keys) - 50} more" if len(keys) > 50 else "")
        log.warning("step %d skipped: its loss or gradient is not finite; records in it: %s", step, shown)
        self._num_bad_in_a_row += 1
        if self._num_bad_in_a_row >= MAX_CONSECUTIVE_BAD_STEPS:
            raise ValueError(
                f"{self._num_bad_in_a_row} steps in a row up to step {step} were not finite; lower "
                "optimizer.learning_rate, and go on in another --workdir with init_from"
            )
