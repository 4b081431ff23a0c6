"""Watching must never end a run, and says so when it has seen nothing."""

from __future__ import annotations

import logging
import os
import sys

import jax
import jax.numpy as jnp
import pytest

from aromni_jax.train.observe import ProfilerWindow, Progress

LINE = {"loss": 1.5, "tokens_per_second": 10.0, "step_seconds": 0.1, "skipped_steps": 0}


@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress_goes_on_when_nobody_reads_it(is_terminal, monkeypatch):
    read, write = os.pipe()
    stream = os.fdopen(write, "w", buffering=1)
    monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    progress = Progress(stream=stream, line_every_seconds=0.0)
    progress.on_start(0, 3)
    progress.on_step(1, LINE)
    assert "train 1/3" in os.read(read, 1000).decode()
    os.close(read)
    progress.on_step(2, LINE)
    progress.on_step(3, LINE)
    progress.on_end(3)
    with pytest.raises(BrokenPipeError):
        stream.close()


def test_progress_needs_no_standard_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    progress = Progress(line_every_seconds=0.0)
    progress.on_start(0, 1)
    progress.on_step(1, LINE)
    progress.on_end(1)
    assert capsys.readouterr().out == "", "standard output is for results"


def run_window(folder, first, last, *, start=0, total=6, end=None):
    """Steps `start + 1 .. end` as the loop tells them: each while the next one runs."""
    window = ProfilerWindow(folder, first, last)
    end = total if end is None else end
    window.on_start(start, total)
    for step in range(start + 1, end + 1):
        jnp.ones(3).block_until_ready()
        window.on_step(step, None)
    window.on_end(end)


@pytest.fixture
def traced(monkeypatch):
    """What the profiler was told, without its seconds."""
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


@pytest.mark.parametrize(
    "window, run, message",
    [
        ((10, 12), {}, "no profile of steps 10..12: this start began after step 0 and ended after step 6"),
        ((7, 9), {}, "no profile of steps 7..9: this start began after step 0 and ended after step 6"),
        ((2, 3), {"start": 4}, "no profile of steps 2..3: this start began after step 4 and ended after step 6"),
        ((3, 4), {"end": 1}, "no profile of steps 3..4: this start began after step 0 and ended after step 1"),
    ],
)
def test_a_window_that_no_step_meets_is_told(traced, tmp_path, caplog, window, run, message):
    run_window(tmp_path, *window, **run)
    assert message in caplog.text and traced == []


def test_a_run_stopped_before_the_first_step_of_a_begun_recording_has_no_profile(traced, tmp_path, caplog):
    run_window(tmp_path, 3, 4, end=2)
    assert traced == ["start", "stop"] and "no profile of steps 3..4" in caplog.text


@pytest.mark.parametrize(
    "window, run, message",
    [
        ((2, 3), {}, "profile of steps 2..3 written"),
        ((1, 2), {}, "profile of steps 1..2 written"),
        ((5, 9), {}, "profile of steps 5..6 written"),
        ((3, 6), {"end": 4}, "profile of steps 3..4 written"),
        ((2, 6), {"start": 3}, "profile of steps 4..6 written"),
    ],
)
def test_a_profile_is_told_with_the_steps_in_it(traced, tmp_path, caplog, window, run, message):
    with caplog.at_level(logging.INFO):
        run_window(tmp_path, *window, **run)
    assert traced == ["start", "stop"]
    assert message in caplog.text and "no profile" not in caplog.text


def test_a_recording_that_the_end_cuts_short_is_whole_and_lets_go_of_the_profiler(tmp_path):
    for name in ("first", "second"):
        run_window(tmp_path / name, 2, 5, end=3)
        assert list((tmp_path / name / "profile").rglob("*.xplane.pb"))
