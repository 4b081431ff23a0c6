"""Asked to stop at any moment, a run saves at once and goes on later as if nothing had been."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading

import jax
import pytest

from aromni_jax.config import CheckpointConfig
from aromni_jax.train import loop as loops
from aromni_jax.train import saved
from tests.fixtures.toy_run import At, SlowSave, config_of, lines_of, train


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [1, 4, 8])
def test_a_signal_finishes_the_step_saves_and_the_run_goes_on_bit_by_bit(tmp_path, number, step):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    expected, _ = train(whole)
    stop = At(step, lambda: os.kill(os.getpid(), number))
    stopped, _ = train(cut, hooks=[stop])
    assert stopped.is_interrupted and step < stopped.step < 10
    assert stop.ended
    assert saved.available_steps(cut)[-1] == stopped.step
    resumed, batches = train(cut)
    assert resumed.step == 10
    assert batches.drawn == list(range(stopped.step + 1, 11))
    assert lines_of(cut) == lines_of(whole)
    assert resumed.state == expected.state
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "handlers are put back"


def test_a_signal_during_a_save_waits_for_it_and_saves_again(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    expected, _ = train(whole)
    slow = SlowSave(4)
    stopped, _ = train(cut, hooks=[slow])
    assert stopped.is_interrupted and 4 < stopped.step < 10
    assert saved.available_steps(cut)[0] == 4 and saved.available_steps(cut)[-1] == stopped.step
    assert threading.main_thread() not in slow.threads, "the loop writes nothing itself"
    resumed, batches = train(cut)
    assert batches.drawn == list(range(stopped.step + 1, 11))
    assert lines_of(cut) == lines_of(whole) and resumed.state == expected.state


def test_processes_that_agree_to_stop_count_from_this_start(monkeypatch):
    """jax lets all stop at one more than the highest number it has heard: before the first step of a resume, at 1."""
    asked = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        loops.multihost_utils, "reached_preemption_sync_point", lambda number: asked.append(number) or number == 2
    )
    for _ in range(2):
        stop = loops.StopRequest()
        assert [stop.agreed() for _ in range(3)] == [False, True, True]
    assert asked == [1, 2, 3] * 2


def test_who_is_asked_to_stop_while_it_evaluates_saves_at_once_and_evaluates_at_the_next_start(tmp_path):
    config = config_of(eval_every_steps=3, checkpoint=CheckpointConfig(100, 5, 0, asynchronous=True))
    begun, watch = [], At()

    def evaluate(state, step, is_stopping):
        begun.append(step)
        for _ in range(3):
            if begun == [3, 6]:
                os.kill(os.getpid(), signal.SIGTERM)
            if is_stopping():
                return None
        return {"sum": float(state["params"]["sum"])}

    stopped, _ = train(tmp_path, config, hooks=[watch], evaluate=evaluate)
    assert (stopped.step, stopped.is_interrupted) == (6, True)
    assert saved.available_steps(tmp_path) == [6] and watch.evaluations == {3: {"sum": 48.0}}
    result, _ = train(tmp_path, config, hooks=[watch], evaluate=evaluate, is_evaluated=False)
    assert (result.step, result.is_interrupted) == (10, False)
    assert begun == [3, 6, 6, 9] and watch.evaluations[6] == {"sum": 168.0}


def test_a_stop_in_the_evaluation_that_a_start_owes_trains_no_step(tmp_path):
    config = config_of(total_steps=4, eval_every_steps=3)
    train(tmp_path, dataclasses.replace(config, total_steps=3))

    def evaluate(state, step, is_stopping):
        os.kill(os.getpid(), signal.SIGTERM)
        return None if is_stopping() else {}

    stopped, _ = train(tmp_path, config, evaluate=evaluate, is_evaluated=False)
    assert (stopped.step, stopped.is_interrupted) == (3, True)


def test_a_second_interrupt_does_not_wait(tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, hooks=[At(2, twice)])
