"""From the sums a step reports to one line of `metrics.jsonl`: added over the steps of a window, divided once.

A window reaches from one logged step to the next. Its sums are part of every checkpoint, so that a run which was killed
in the middle of a window writes, after resuming, the very line an uninterrupted run would have written.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import threading
import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from aromni_jax.config import LossConfig
from aromni_jax.structs import Modality, Task, WeightedSum
from aromni_jax.train import workdir as workdirs

TIMING_KEYS = frozenset(
    {
        "tokens_per_second",
        "step_seconds",
        "data_wait_seconds",
        "save_stall_seconds",
        "first_step_seconds",
        "compile_seconds",
        "restore_seconds",
        "restored_bytes",
        "mfu",
        "goodput",
    }
)
"""Keys of a line that depend on the machine and the moment. Every other key is a function of config and data: after a
resume on the same mesh its values are bit-identical to those of an uninterrupted run."""

PEAK_FLOPS: dict[str, float] = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}
"""Dense bf16 FLOP/s of one jax device by the beginning of its `device_kind`, from the vendors' data sheets."""


def peak_flops(device_kind: str) -> float | None:
    """Peak of one device, None where it is unknown (a CPU); the longest matching name counts."""
    names = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(names, key=len)] if names else None


def deterministic(line: dict[str, Any]) -> dict[str, Any]:
    """The part of a line that a resume must reproduce bit by bit."""
    return {key: value for key, value in line.items() if key not in TIMING_KEYS}


@dataclasses.dataclass
class Goodput:
    """Seconds of a run, over all its starts, and how many of them made steps that it kept.

    Every checkpoint carries the productive seconds up to its step. What a crash threw away is missing from them after
    the restart, and is part of the time that has passed since `first_start` (`time.time()`), like compiling, restoring,
    evaluating, saving, waiting for data, steps that were not finite, and the time in which nothing ran.
    """

    productive_seconds: float = 0.0
    first_start: float = dataclasses.field(default_factory=lambda: time.time())

    def share(self) -> float:
        """Productive seconds by all seconds since the first start."""
        return self.productive_seconds / max(time.time() - self.first_start, self.productive_seconds, 1e-9)


_WEIGHTED = ("next_token", "z_loss", "perceptual", "modality", "task", "accuracy")


def _ratio(total: Any, weight: Any) -> float | None:
    return float(total / weight) if weight else None


class MetricsWindow:
    """Sums since the last line, and counts since the start of the run. Host side, float64.

    `add` takes what `train.step` reports (`StepMetrics`), fetched to the host. A step that was skipped because it was
    not finite is counted and its sums are left out: they would make the whole window NaN.
    """

    def __init__(self) -> None:
        self.goodput = Goodput()
        self.tokens_seen = 0
        self.skipped_steps = 0
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, np.ndarray] = {}
        self._num_steps = 0
        self._num_good = 0
        self._learning_rate = 0.0

    def _add(self, name: str, value: Any) -> None:
        value = np.asarray(value, np.float64)
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def add(self, metrics: dict[str, Any]) -> bool:
        """Adds one step; returns whether the step counted (was finite)."""
        is_finite = bool(metrics["is_finite"])
        self._num_steps += 1
        self._learning_rate = float(metrics["learning_rate"])
        self.tokens_seen += int(metrics["num_tokens"])
        for name in ("num_tokens", "num_pairs", "num_rows_tokens"):
            self._add(name, metrics[name])
        if not is_finite:
            self.skipped_steps += 1
            return False
        self._num_good += 1
        self._add("grad_norm", metrics["grad_norm"])
        self._add("weight_share", metrics["weight_share"])
        for name in _WEIGHTED:
            value: WeightedSum = metrics[name]
            self._add(f"{name}.sum", value.sum)
            self._add(f"{name}.weight", value.weight)
        return True

    @classmethod
    def of_evaluation(cls, batches: Iterable[dict[str, Any]], loss: LossConfig) -> dict[str, Any]:
        """Losses, weight shares and accuracies (the keys of `line`) over what `make_eval_step` reported, by batch."""
        window = cls()
        for metrics in batches:
            window.add(metrics | {"is_finite": True, "learning_rate": 0.0, "grad_norm": 0.0})
        return window._losses(loss)

    def line(self, step: int, loss: LossConfig) -> dict[str, Any]:
        """The deterministic part of a line, and the start of the next window.

        Cross-entropies are in nats per target that counts; `loss` is the objective. None where nothing was summed.
        """
        line = {"step": step, **self._losses(loss)}
        tokens, rows_tokens = self._sums["num_tokens"], self._sums["num_rows_tokens"]
        line |= {
            "grad_norm": _ratio(self._sums.get("grad_norm", np.float64(0)), self._num_good),
            "learning_rate": self._learning_rate,
            "tokens_seen": self.tokens_seen,
            "useful_token_fraction": _ratio(tokens, rows_tokens),
            "skipped_steps": self.skipped_steps,
        }
        self._reset()
        return line

    def _losses(self, loss: LossConfig) -> dict[str, Any]:
        nothing = np.zeros((len(Task), len(Modality)))

        def mean(name: str, index: Any = ()) -> float | None:
            sums = self._sums.get(f"{name}.sum")
            return None if sums is None else _ratio(sums[index], self._sums[f"{name}.weight"][index])

        next_token, z_loss, perceptual = mean("next_token"), mean("z_loss"), mean("perceptual")
        total = None
        if next_token is not None:
            total = next_token + loss.z_loss_weight * (z_loss or 0.0) + loss.perceptual_weight * (perceptual or 0.0)
        line: dict[str, Any] = {"loss": total}
        line |= {f"loss/{modality.label}": mean("modality", modality) for modality in Modality}
        tasks = {task: mean("task", task) for task in Task}
        # Task.TEXT is the text of plain documents; its key must not hide the loss of the text modality.
        line |= {f"loss/{_task_key(task)}": value for task, value in tasks.items() if value is not None}
        line |= {"loss/next_token": next_token, "loss/z": z_loss, "loss/perceptual": perceptual}
        share_TM = self._sums.get("weight_share", nothing)
        line |= {f"weight_share/{m.label}": _ratio(share_TM[:, m].sum(), share_TM.sum()) for m in Modality}
        right, counted = self._sums.get("accuracy.sum", nothing), self._sums.get("accuracy.weight", nothing)
        line |= {f"accuracy/{m.label}": _ratio(right[:, m].sum(), counted[:, m].sum()) for m in Modality}
        return line

    @property
    def num_steps(self) -> int:
        """Steps in the window so far."""
        return self._num_steps

    @property
    def flops_counts(self) -> tuple[float, float]:
        """(real tokens, attended pairs) of the window, for `models.config.train_flops`. Read before `line`."""
        return float(self._sums["num_tokens"]), float(self._sums["num_pairs"])

    def to_json(self) -> dict[str, Any]:
        """For the checkpoint: JSON writes a float64 so that it reads back bit by bit."""
        return {
            "goodput": dataclasses.asdict(self.goodput),
            "tokens_seen": self.tokens_seen,
            "skipped_steps": self.skipped_steps,
            "num_steps": self._num_steps,
            "num_good": self._num_good,
            "learning_rate": self._learning_rate,
            "sums": {name: value.tolist() for name, value in self._sums.items()},
        }

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> MetricsWindow:
        """Inverse of `to_json`."""
        window = cls()
        if "goodput" in saved:  # not in checkpoints of before it was counted
            window.goodput = Goodput(**saved["goodput"])
        window.tokens_seen = saved["tokens_seen"]
        window.skipped_steps = saved["skipped_steps"]
        window._num_steps = saved["num_steps"]
        window._num_good = saved["num_good"]
        window._learning_rate = saved["learning_rate"]
        window._sums = {name: np.asarray(value, np.float64) for name, value in saved["sums"].items()}
        return window


def _task_key(task: Task) -> str:
    return "text_documents" if task.label in {modality.label for modality in Modality} else task.label


class LineFile:
    """Appends objects to a JSON lines file (`metrics.jsonl`), each line handed to the system at once.

    Opening drops what a run wrote after `last_step`, the checkpoint it goes on from, and a line cut short.
    """

    def __init__(self, path: pathlib.Path, last_step: int):
        self.dropped = workdirs.truncate_json_lines(path, last_step)
        self._file = open(path, "a", encoding="utf-8")
        self._lock = threading.Lock()

    def write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """To disk: called before a checkpoint, whose lines would otherwise be missing after a power cut."""
        with self._lock:
            if not self._file.closed:  # a run that failed; closing has handed all lines to the system
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """After a `sync` that another thread has begun."""
        with self._lock:
            self._file.close()
