"""The loop by itself: a step of a few numbers, batches that are their own index, real checkpoints."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import time

import jax
import numpy as np
import pytest

from aromni_jax.config import CheckpointConfig
from aromni_jax.train import loop as loops
from aromni_jax.train import metrics, saved
from aromni_jax.train.observe import Hook
from aromni_jax.train.watchdog import TryAgain
from tests.fixtures.toy_run import At, CountedBatches, config_of, lines_of, toy_step, train


def test_trains_every_batch_once_and_saves_the_end(tmp_path):
    result, batches = train(tmp_path)
    assert (result.step, result.is_interrupted) == (10, False)
    assert float(result.state["params"]["sum"]) == 8 * sum(range(1, 11))
    assert batches.drawn == list(range(1, 11)), "nothing is drawn that is not trained on"
    assert saved.available_steps(tmp_path) == [4, 8, 10]
    assert [line["step"] for line in lines_of(tmp_path)] == [3, 6, 9, 10]


def test_a_checkpoint_knows_the_batch_trained_last_not_the_one_read_ahead(tmp_path):
    train(tmp_path)
    for step in (4, 8, 10):
        assert saved.read_metadata(tmp_path, step)[1].data_position == {"next_step": step + 1}


def test_the_loop_goes_on_while_a_save_is_written(tmp_path):
    seen = {}

    class Watch(Hook):
        def on_step(self, step, line):
            seen[step] = time.monotonic()

        def on_save(self, step):
            if step == 4:
                time.sleep(1)
                seen["saved"] = time.monotonic()

    train(tmp_path, hooks=[Watch()])
    assert seen[7] < seen["saved"], "until the next save nothing waits"


def test_a_save_that_fails_ends_the_run(tmp_path):
    class Broken(Hook):
        def on_save(self, step):
            raise OSError("no space left")

    with pytest.raises(TryAgain, match=r"checkpoint could not be written below .*no space left"):
        train(tmp_path, hooks=[Broken()])


def test_lines_after_the_checkpoint_are_written_again(tmp_path):
    """What kill -9 leaves: lines of steps that no checkpoint has, the last one cut short."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
        train(folder)
    for step in ("8", "10"):
        shutil.rmtree(cut / "checkpoints" / step)
    text = (cut / "metrics.jsonl").read_text()
    (cut / "metrics.jsonl").write_text(text[: len(text) - 40])
    _, batches = train(cut)
    assert batches.drawn[0] == 5
    assert lines_of(cut) == lines_of(whole)


def test_a_bad_step_is_reported_with_its_records(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        train(tmp_path, bad=[5])
    assert "step 5 skipped" in caplog.text and "record-5" in caplog.text
    assert [line["skipped_steps"] for line in lines_of(tmp_path)] == [0, 1, 1, 1]
    assert all(line["loss"] is not None for line in lines_of(tmp_path))


def test_a_run_of_bad_steps_ends_with_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(loops, "MAX_CONSECUTIVE_BAD_STEPS", 3)
    with pytest.raises(ValueError, match="3 steps in a row up to step 6 were not finite"):
        train(tmp_path, bad=[2, 4, 5, 6])


def test_evaluations_reach_hooks_and_their_file(tmp_path):
    watch = At()
    train(
        tmp_path,
        config_of(eval_every_steps=4),
        hooks=[watch],
        evaluate=lambda state, step, is_stopping: {"sum": float(state["params"]["sum"])},
    )
    assert watch.evaluations == {4: {"sum": 80.0}, 8: {"sum": 288.0}}
    assert watch.steps == list(range(1, 11))
    written = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert written == [{"step": 4, "sum": 80.0}, {"step": 8, "sum": 288.0}]


def test_the_step_is_traced_once(tmp_path):
    num_traces = 0

    def counted(state, batch, rate):
        nonlocal num_traces
        num_traces += 1
        return toy_step.__wrapped__(state, batch, rate)

    train(tmp_path, step=jax.jit(counted))
    assert num_traces == 1


def test_each_step_gets_the_rate_of_its_own_number_also_after_a_resume(tmp_path):
    train(tmp_path, dataclasses.replace(config_of(), total_steps=5, log_every_steps=1))
    train(tmp_path, dataclasses.replace(config_of(), total_steps=8, log_every_steps=1))
    rates = [line["learning_rate"] for line in lines_of(tmp_path)]
    assert rates == [pytest.approx(0.1 * step) for step in range(1, 9)]


def test_a_step_that_can_be_loaded_is_not_compiled(tmp_path):
    class Uncompilable:
        def lower(self, *_):
            raise AssertionError("compiled")

    class Loaded:
        def __call__(self, state, batch, rate):
            return toy_step(state, batch, rate)

        def memory_analysis(self):
            return None

    train(tmp_path / "compiled")
    train(tmp_path / "loaded", step=Uncompilable(), load=Loaded)
    assert lines_of(tmp_path / "loaded") == lines_of(tmp_path / "compiled")


def test_a_batch_of_another_shape_is_an_error_not_a_recompilation(tmp_path):
    class Growing(CountedBatches):
        def __next__(self):
            return np.ones((2, 4 if super().__next__()[0, 0] < 3 else 5), np.int32)

    with pytest.raises(TypeError):
        train(tmp_path, batches=Growing())


def test_a_longer_run_goes_on_from_a_finished_one(tmp_path):
    train(tmp_path)
    result, batches = train(tmp_path, dataclasses.replace(config_of(), total_steps=13))
    assert result.step == 13
    assert batches.drawn == [11, 12, 13]


def test_lines_say_how_fast_it_went(tmp_path):
    train(tmp_path)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert line["step_seconds"] > 0 and line["data_wait_seconds"] >= 0
    assert line["mfu"] == pytest.approx(line["tokens_per_second"])


def test_a_start_says_how_long_its_first_step_took_and_every_line_how_long_saving_stopped_the_loop(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        train(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert 0 < lines[0]["compile_seconds"] < lines[0]["first_step_seconds"]
    assert caplog.text.count("first step after") == 1
    assert not any("first_step_seconds" in line for line in lines[1:])
    # Saves after steps 4 and 8 belong to the lines of 6 and 9.
    assert [line["save_stall_seconds"] > 0 for line in lines] == [False, True, True, False]


class Clock:
    """Time that passes only where a test says so; stands in for the module `time`."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.monotonic = self.time = lambda: self.now
        monkeypatch.setattr(loops, "time", self)
        monkeypatch.setattr(metrics, "time", self)

    def passes(self, seconds):
        self.now += seconds


class TimedStep:
    """Compiles for 100 s and runs for 2."""

    def __init__(self, clock):
        self._clock = clock

    def lower(self, *_):
        return self

    def compile(self):
        self._clock.passes(100)
        return self

    def memory_analysis(self):
        return None

    def __call__(self, state, batch, rate):
        self._clock.passes(2)
        return toy_step(state, batch, rate)


class TimedBatches(CountedBatches):
    """Each batch is waited for for 1 s."""

    def __init__(self, clock, bad=()):
        super().__init__(bad)
        self._clock = clock

    def __next__(self):
        self._clock.passes(1)
        return super().__next__()


class TimedSave(Hook):
    """A save takes 10 s."""

    def __init__(self, clock):
        self._clock = clock

    def on_save(self, step):
        self._clock.passes(10)


def timed_train(workdir, clock, bad=()):
    def evaluate(state, step, is_stopping):
        clock.passes(50)
        return {}

    train(
        workdir,
        config_of(
            total_steps=6,
            log_every_steps=2,
            eval_every_steps=3,
            checkpoint=CheckpointConfig(2, 5, 0, asynchronous=False),
        ),
        hooks=[TimedSave(clock)],
        evaluate=evaluate,
        step=TimedStep(clock),
        batches=TimedBatches(clock, bad),
    )
    return [json.loads(line)["goodput"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_goodput_is_the_time_of_steps_by_all_time(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    shares = timed_train(tmp_path, clock)
    # Six steps, a compilation, six batches, two evaluations, three saves.
    assert clock.now == 6 * 2 + 100 + 6 * 1 + 2 * 50 + 3 * 10
    # The last line is written before the evaluation and the save after the last step.
    assert shares[-1] == pytest.approx(12 / (clock.now - 60))
    # Metrics come one step late, and here a step is over as soon as it is asked for: three are, and four batches.
    assert shares[0] == pytest.approx(6 / (100 + 6 + 4))


def test_goodput_counts_what_a_crash_threw_away_and_the_time_until_the_restart_as_lost(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    timed_train(tmp_path, clock)
    for step in ("4", "6"):
        shutil.rmtree(tmp_path / "checkpoints" / step)
    clock.passes(1000)
    shares = timed_train(tmp_path, clock)
    # Six steps, and the third a second time: it was over when the checkpoint of the second was written.
    assert shares[-1] == pytest.approx(14 / (clock.now - 60))
    assert len(shares) == 3


def test_a_step_that_is_not_finite_is_not_productive(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    shares = timed_train(tmp_path, clock, bad=[5])
    assert shares[-1] == pytest.approx(10 / (clock.now - 60))
