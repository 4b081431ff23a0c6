"""The watchdog: heartbeats that are whole, hangs that end with stacks and a status, stragglers that are named."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from aromni_jax.train.watchdog import (
    EXIT_HELD,
    EXIT_TRY_AGAIN,
    Heartbeat,
    Watchdog,
    describe_stragglers,
    read_heartbeats,
)
from tests.fixtures.source_tree import ROOT

BEAT = Heartbeat(0, "host-0", 1, "step", 50, 0.0, 1.0, 0.01, 0.05)


def beats(*changes, now=1000.0):
    """Heartbeats of as many processes as there are dicts of changes; `age` is how long ago one was written."""
    made = []
    for process, change in enumerate(changes):
        age = change.pop("age", 0.0)
        made.append((now - age, dataclasses.replace(BEAT, process=process, host=f"host-{process}", **change)))
    return made


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_heartbeat_says_where_the_process_is(tmp_path):
    with Watchdog(tmp_path, 0.4, process=3, num_processes=4) as watchdog:
        watchdog.step_done(7, 2.0, 0.5, 0.75)
        watchdog.enter("save")
        wait_for(lambda: [beat.step for _, beat in read_heartbeats(tmp_path)] == [7])
    ((_, beat),) = read_heartbeats(tmp_path)
    assert (beat.process, beat.pid, beat.phase) == (3, os.getpid(), "save")
    assert (beat.step_seconds, beat.data_wait_seconds, beat.host_seconds) == (2.0, 0.5, 0.75)
    assert [path.name for path in (tmp_path / "heartbeats").iterdir()] == ["00003.json"], "no temporary file stays"


def test_heartbeats_of_processes_that_are_no_more_are_removed(tmp_path):
    for process in (1, 2):
        with Watchdog(tmp_path, 1.0, process):
            wait_for(lambda: read_heartbeats(tmp_path))
    (tmp_path / "heartbeats" / "00009.json").write_text("{")
    with Watchdog(tmp_path, 1.0, process=0, num_processes=2):
        pass
    assert {beat.process for _, beat in read_heartbeats(tmp_path)} <= {0, 1}
    assert not (tmp_path / "heartbeats" / "00009.json").exists()


def test_zero_watches_nothing(tmp_path):
    with Watchdog(tmp_path, 0) as watchdog:
        watchdog.step_done(1, 1.0, 0.0, 0.0)
    assert not list(tmp_path.iterdir())


def test_steps_keep_it_quiet_and_long_phases_get_longer(tmp_path):
    left = []
    with Watchdog(tmp_path, 0.3, leave=left.append) as watchdog:
        for step in range(10):
            watchdog.step_done(step, 0.1, 0.0, 0.0)
            time.sleep(0.05)
        watchdog.enter("save")
        time.sleep(0.8)
        assert not left
        watchdog.enter("data")
        wait_for(lambda: left)
    assert left == [EXIT_TRY_AGAIN]


def test_a_hang_ends_the_process_with_the_stacks_of_all_threads(tmp_path):
    """A loop whose data never comes, in a process of its own; another process of the run is further behind."""
    program = f"""
import pathlib, threading
from aromni_jax.train.watchdog import Watchdog
def waits_for_data_that_never_comes():
    threading.Event().wait()
with Watchdog(pathlib.Path({str(tmp_path)!r}), 0.5, process=1, num_processes=2) as watchdog:
    watchdog.step_done(12, 0.1, 0.0, 0.0)
    watchdog.enter("data")
    waits_for_data_that_never_comes()
"""
    (tmp_path / "heartbeats").mkdir()
    other = dataclasses.asdict(dataclasses.replace(BEAT, step=11, phase="data"))
    (tmp_path / "heartbeats" / "00000.json").write_text(json.dumps(other))
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == EXIT_TRY_AGAIN == 75
    assert time.monotonic() - start < 20
    written = (tmp_path / "heartbeats" / "hang_00001.txt").read_text()
    for text in (done.stderr, written):
        assert "aromni train: error: no step ended for" in text and "watchdog_seconds=0.5" in text
        assert "in phase 'data' after step 12" in text
        assert "process 0 (host-0) in phase 'data' after step 11" in text
        assert "waits_for_data_that_never_comes" in text and "_give_up" in text, "stacks of both threads"


def test_a_process_that_holds_the_interpreter_is_ended_with_a_status_that_is_restarted(tmp_path):
    """`ctypes.PyDLL` calls C without letting go of the interpreter: no thread of Python runs any more."""
    program = f"""
import ctypes, pathlib
from aromni_jax.train.watchdog import Watchdog
def held_by_c():
    ctypes.PyDLL(None).sleep(60)
with Watchdog(pathlib.Path({str(tmp_path)!r}), 0.2) as watchdog:
    held_by_c()
"""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == EXIT_HELD > 2, "launchers take 1 and 2 for errors of the user"
    assert time.monotonic() - start < 40
    assert "held_by_c" in done.stderr and "_watch" in done.stderr, "stacks of both threads"


def test_the_alarm_is_put_back(tmp_path):
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    try:
        with Watchdog(tmp_path, 5.0):
            wait_for(lambda: signal.getitimer(signal.ITIMER_REAL)[0] > 5)
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
        os.kill(os.getpid(), signal.SIGALRM)  # still ignored
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def test_an_end_in_time_leaves_no_thread(tmp_path):
    with Watchdog(tmp_path, 5.0):
        assert "watchdog" in {thread.name for thread in threading.enumerate()}
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"age": 50.0}, "process 2 (host-2) in phase 'step' after step 50: silent for 50 s"),
        ({"step": 20, "phase": "data"}, "process 2 (host-2) in phase 'data' after step 20: 30 steps behind"),
        (
            {"host_seconds": 0.6, "data_wait_seconds": 0.5},
            "its host takes 0.60 s of each step, 0.50 s of them for data",
        ),
    ],
)
def test_stragglers_are_named(change, said):
    lines = describe_stragglers(beats({}, {}, change, {"step_seconds": 1.5}), 15.0)
    assert said in lines[0]
    assert lines[1:] == ["a step takes 1.00 to 1.50 s on 4 processes"]


def test_nothing_is_said_where_all_keep_up():
    assert not describe_stragglers(beats({}, {"age": 14.0, "step": 40}, {}), 15.0)
    assert not describe_stragglers(beats({}), 15.0)
    assert not describe_stragglers(beats({"step_seconds": 0.0}, {"step_seconds": 0.0}), 15.0)
