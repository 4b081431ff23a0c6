"""Lines of metrics.jsonl: sums first, one division; a window that survives a restart bit by bit; what a person sees."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import threading

import numpy as np
import pytest

from aromni_jax.config import LossConfig
from aromni_jax.structs import Modality, Task, WeightedSum
from aromni_jax.train import metrics
from aromni_jax.train.metrics import LineFile, MetricsWindow, deterministic, peak_flops
from aromni_jax.train.observe import MetricsFiles, Progress, TensorBoard, format_seconds

LOSS = LossConfig("uniform", 0.5, "predict", 1e-2, 32)


def step_metrics(seed: int, is_finite: bool = True, tasks=(Task.TEXT, Task.CAPTION)) -> dict:
    """What a step reports, fetched: float32 sums of very unequal weight per step."""
    rng = np.random.default_rng(seed)
    cells = (len(Task), len(Modality))
    weight_TM = np.zeros(cells, np.float32)
    weight_TM[list(tasks)] = rng.integers(1, 1000, (len(tasks), len(Modality)))
    nats_TM = (rng.random(cells) * weight_TM).astype(np.float32)
    if not is_finite:
        nats_TM[:] = np.nan

    def pair(total, weight):
        return WeightedSum(np.float32(total), np.float32(weight))

    return {
        "next_token": pair(nats_TM.sum() * 2, weight_TM.sum() * 2),
        "z_loss": pair(nats_TM.sum() * 3, weight_TM.sum() * 2),
        "perceptual": pair(nats_TM[:, 1].sum(), weight_TM[:, 1].sum()),
        "modality": WeightedSum(nats_TM.sum(0), weight_TM.sum(0)),
        "task": WeightedSum(nats_TM.sum(1), weight_TM.sum(1)),
        "task_modality": WeightedSum(nats_TM, weight_TM),
        "accuracy": WeightedSum((weight_TM * 0.25).astype(np.float32), weight_TM),
        "weight_share": weight_TM * 2,
        "num_tokens": np.float32(weight_TM.sum()),
        "num_pairs": np.float32(weight_TM.sum() * 10),
        "num_rows_tokens": np.float32(weight_TM.sum() + 7),
        "loss": np.float32(1),
        "grad_norm": np.float32(rng.random()) if is_finite else np.float32(np.nan),
        "learning_rate": np.float32(1e-3 * seed),
        "is_finite": np.bool_(is_finite),
    }


def window_of(seeds) -> MetricsWindow:
    window = MetricsWindow()
    for seed in seeds:
        window.add(step_metrics(seed))
    return window


def test_a_line_divides_once_after_adding():
    line = window_of([1, 2, 3]).line(3, LOSS)
    steps = [step_metrics(seed) for seed in (1, 2, 3)]

    def mean(name, index=()):
        total = sum(np.float64(np.asarray(step[name].sum)[index]) for step in steps)
        return total / sum(np.float64(np.asarray(step[name].weight)[index]) for step in steps)

    assert line["loss/next_token"] == pytest.approx(mean("next_token"), rel=1e-12)
    assert line["loss/image"] == pytest.approx(mean("modality", 1), rel=1e-12)
    assert line["loss/caption"] == pytest.approx(mean("task", Task.CAPTION), rel=1e-12)
    assert line["loss"] == pytest.approx(
        mean("next_token") + 1e-2 * mean("z_loss") + 0.5 * mean("perceptual"), rel=1e-12
    )
    assert sum(line[f"weight_share/{m.label}"] for m in Modality) == pytest.approx(1)
    assert line["accuracy/text"] == pytest.approx(0.25)
    assert line["learning_rate"] == pytest.approx(3e-3)
    assert line["tokens_seen"] == sum(int(step["num_tokens"]) for step in steps)
    assert 0 < line["useful_token_fraction"] < 1


def test_a_line_has_the_keys_of_the_contract():
    line = window_of([1]).line(1, LOSS)
    promised = {
        "step",
        "loss",
        "loss/text",
        "loss/image",
        "loss/speech",
        "loss/perceptual",
        "grad_norm",
        "skipped_steps",
    }
    promised |= {"learning_rate", "tokens_seen", "useful_token_fraction"}
    promised |= {f"weight_share/{m.label}" for m in Modality}
    assert promised <= set(line)
    assert "loss/caption" in line
    assert "loss/text_to_image" not in line, "a task that did not occur has no loss"
    assert not set(line) & metrics.TIMING_KEYS
    json.dumps(line, allow_nan=False)


def test_windows_do_not_leak_into_each_other():
    window = window_of([1])
    window.line(1, LOSS)
    window.add(step_metrics(2))
    second, alone = window.line(2, LOSS), window_of([2]).line(2, LOSS)
    assert second.pop("tokens_seen") > alone.pop("tokens_seen")
    assert second == alone


@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_a_window_goes_on_bit_by_bit_after_a_restart(cut):
    seeds = [3, 1, 4]
    first = window_of(seeds[:cut])
    restarted = MetricsWindow.from_json(json.loads(json.dumps(first.to_json())))
    for seed in seeds[cut:]:
        restarted.add(step_metrics(seed))
    assert json.dumps(restarted.line(3, LOSS)) == json.dumps(window_of(seeds).line(3, LOSS))


def test_a_bad_step_is_counted_and_left_out():
    window = window_of([1])
    assert window.add(step_metrics(2, is_finite=False)) is False
    line = window.line(2, LOSS)
    assert line["skipped_steps"] == 1
    assert line["loss"] == window_of([1]).line(1, LOSS)["loss"]
    window.add(step_metrics(3, is_finite=False))
    empty = window.line(3, LOSS)
    assert empty["skipped_steps"] == 2
    assert empty["loss"] is None and empty["grad_norm"] is None and empty["loss/text"] is None
    json.dumps(empty, allow_nan=False)


def test_a_modality_without_targets_has_no_loss():
    one = step_metrics(1)
    for name in ("modality",):
        one[name] = WeightedSum(one[name].sum * [1, 0, 1], one[name].weight * [1, 0, 1])
    one["perceptual"] = WeightedSum(np.float32(0), np.float32(0))
    window = MetricsWindow()
    window.add(one)
    line = window.line(1, dataclasses.replace(LOSS, perceptual_weight=0.0))
    assert line["loss/image"] is None and line["loss/perceptual"] is None
    assert line["loss"] is not None


def test_peak_of_known_and_unknown_devices():
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("TPU v5") == peak_flops("TPU v5p") == 459e12
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("cpu") is None


def test_a_file_goes_on_where_the_checkpoint_is(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = LineFile(path, 0)
    for step in (1, 2, 3):
        lines.write({"step": step, "loss": 0.1 * step})
    lines.close()
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')
    lines = LineFile(path, 2)
    assert lines.dropped == 1
    lines.write({"step": 3, "loss": 7})
    lines.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 0.1},
        {"step": 2, "loss": 0.2},
        {"step": 3, "loss": 7},
    ]


def full_line(step: int) -> dict:
    timing = {"tokens_per_second": 1234.0, "step_seconds": 0.5, "data_wait_seconds": 0.0, "mfu": None}
    return window_of([step]).line(step, LOSS) | timing


def test_files_and_events_are_written(tmp_path):
    for hook in (MetricsFiles(tmp_path, 0), TensorBoard(tmp_path, 0)):
        hook.on_start(0, 2)
        hook.on_step(1, None)
        hook.on_step(2, full_line(2))
        hook.on_eval(2, {"loss": 1.5})
        hook.on_save(2)
        hook.on_end(2)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["mfu"] is None
    assert json.loads((tmp_path / "evaluations.jsonl").read_text()) == {"step": 2, "loss": 1.5}
    assert any((tmp_path / "tensorboard").iterdir())
    assert set(deterministic(full_line(2))) == set(full_line(2)) - metrics.TIMING_KEYS


def test_a_run_that_fails_closes_its_lines_after_a_sync_that_has_begun(tmp_path, monkeypatch):
    """The writer of a checkpoint syncs while the loop ends (CI saw "Bad file descriptor" instead of why it failed)."""
    lines = LineFile(tmp_path / "metrics.jsonl", 0)
    closing = threading.Thread(target=lines.close)
    fsync, done = os.fsync, []

    def slow(number):
        closing.start()
        closing.join(0.2)
        done.append(fsync(number))

    monkeypatch.setattr(os, "fsync", slow)
    lines.sync()
    closing.join()
    lines.sync()
    assert done == [None], "the first reached an open file, the second found it closed"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_progress_tells_step_loss_and_time_left(stream):
    progress = Progress(stream=stream, line_every_seconds=0.0)
    progress.on_start(0, 2)
    progress.on_step(1, None)
    progress.on_step(2, full_line(2))
    progress.on_end(2)
    text = stream.getvalue()
    assert "train 2/2 (100%), 0s left: loss " in text
    assert "image" in text and "1,234 tokens/s" in text
    assert ("\r" in text) == stream.isatty()


def test_seconds_in_two_units():
    assert [format_seconds(s) for s in (0.4, 59, 187, 7500, 273600)] == ["0s", "59s", "3m07s", "2h05m", "3d04h"]
