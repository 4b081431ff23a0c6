"""Two processes on loopback train the run of one process; a notice to one of them stops both."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import time

import numpy as np
import pytest
from runs import ROOT, environment, finish, lines, run, start, when

from aromni_jax.train import saved
from configs.pretrain import get_config
from launch.training_data import open_data
from tests.fixtures.free_port import free_port

STEPS = 40
OVERRIDES = (
    f"--config.total_steps={STEPS}",
    "--config.log_every_steps=2",
    "--config.checkpoint.save_every_steps=100",
    "--config.sequence_length=64",
)


def launch(workdir: pathlib.Path, cache: pathlib.Path, *arguments: str) -> subprocess.Popen[str]:
    """Two processes with one device each, through the script; in a process group of their own."""
    command = ["bash", "launch/multiprocess.sh", *arguments, "2", "--", "train", "--config=configs/pretrain.py:debug"]
    command += [f"--workdir={workdir}", *OVERRIDES]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(cache), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def worker_ids(launcher: subprocess.Popen[str]) -> list[int]:
    children = pathlib.Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text()
    return [int(child) for child in children.split()]


def assert_lines_agree(found: list[dict], expected: list[dict]) -> None:
    """Same steps and batches; losses to float tolerance, because sums are added in another order."""
    assert found
    for line, other in zip(found, expected):
        assert line["step"] == other["step"]
        assert line["tokens_seen"] == other["tokens_seen"]
        for key in ("loss", "loss/text", "loss/image", "loss/speech", "loss/perceptual", "grad_norm"):
            assert line[key] == pytest.approx(other[key], rel=2e-4), (key, line["step"])
        for key in ("weight_share/text", "weight_share/image", "weight_share/speech"):
            assert line[key] == pytest.approx(other[key], rel=1e-6)


@pytest.mark.slow
def test_two_processes_train_the_run_of_one_and_stop_together(tmp_path, cache):
    run(tmp_path / "one", cache, *OVERRIDES, devices=2)

    together = tmp_path / "two"
    launcher = launch(together, cache)
    assert when(launcher, lambda: len(lines(together)) >= 3)
    # Only the process that writes nothing is told: the notice must reach the other one.
    os.kill(worker_ids(launcher)[1], signal.SIGTERM)
    message = finish(launcher)
    stopped = saved.available_steps(together)
    assert len(stopped) == 1 and 6 <= stopped[0] < STEPS, message
    assert f"stopped after step {stopped[0]} of {STEPS}" in message
    assert_lines_agree(lines(together), lines(tmp_path / "one"))

    run(together, cache, *OVERRIDES, devices=2)
    assert len(lines(together)) == STEPS // 2
    assert_lines_agree(lines(together), lines(tmp_path / "one"))
    alone, joined = saved.load_params(tmp_path / "one"), saved.load_params(together)
    np.testing.assert_allclose(alone["embedding"], joined["embedding"], atol=1e-3)


def test_processes_read_parts_of_the_same_batches():
    config = get_config("debug")
    config.sequence_length = 64
    from aromni_jax.config import TrainConfig, from_mapping

    typed = from_mapping(TrainConfig, config)
    whole = open_data(typed, np.arange(8)).batches
    parts = [open_data(typed, rows).batches for rows in (np.arange(4), np.arange(4, 8))]
    for _ in range(3):
        batch, pieces = next(whole), [next(part) for part in parts]
        joined = np.concatenate([piece.inputs_BL for piece in pieces])
        np.testing.assert_array_equal(batch.inputs_BL, joined)


def test_dry_run_prints_the_commands_and_runs_nothing(tmp_path, cache):
    launcher = launch(tmp_path / "run", cache, "--dry-run")
    output, _ = launcher.communicate(timeout=60)
    assert output.count("--process_id=") == 2
    assert "--num_processes=2" in output and "--coordinator_address=127.0.0.1:" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_processes=2"], "go together"),
        (["--coordinator_address=127.0.0.1:1", "--num_processes=2", "--process_id=2"], "not one of 0..1"),
    ],
)
def test_processes_named_halfway_are_refused(tmp_path, cache, flags, message):
    error = run(tmp_path / "run", cache, *flags, expected=1)
    assert message in error and "Traceback" not in error


@pytest.mark.slow
def test_an_error_of_one_process_before_the_first_step_ends_both(tmp_path, cache):
    """The data are missing on one host: that one says so, with the status of what a user can mend."""
    joined = (*OVERRIDES, f"--coordinator_address=localhost:{free_port()}", "--num_processes=2")
    joined += ("--heartbeat_timeout_seconds=10",)
    missing = "--config.data.mixture={'a': {'path': '/not/here', 'weight': 1.0}}"
    began = time.monotonic()
    other = start(tmp_path / "run", cache, *joined, "--process_id=0")
    guilty = start(tmp_path / "run", cache, *joined, "--process_id=1", missing)
    assert "/not/here" in finish(guilty, expected=1)
    assert finish(other, expected=None) and other.returncode not in (0, 1, 2)
    assert time.monotonic() - began < 100
