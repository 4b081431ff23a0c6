"""Four processes of two devices each, on loopback: one is killed, the others end, and the run goes on as if it had
not been, with as many processes or with half of them."""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import subprocess
import time

import pytest
from runs import ROOT, environment, finish, lines, reproducible, when

from aromni_jax.train import saved

STEPS, SAVE = 12, 4
OVERRIDES = (
    "--config.mesh.data=2",
    "--config.mesh.fsdp=4",
    f"--config.total_steps={STEPS}",
    "--config.log_every_steps=1",
    f"--config.checkpoint.save_every_steps={SAVE}",
    "--config.sequence_length=32",
    "--config.loss.perceptual_weight=0.0",
    "--config.model={'size': 'debug', 'num_layers': 1}",
)
HEARTBEAT_SECONDS = 10
# Every process compiles for itself, and what it compiles runs for seconds only.
FAST_COMPILE = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def launch(workdir: pathlib.Path, cache: pathlib.Path, processes: int) -> subprocess.Popen[str]:
    """Eight devices in so many processes."""
    command = ["bash", "launch/multiprocess.sh", str(processes), "--", "train", "--config=configs/pretrain.py:debug"]
    command += [f"--workdir={workdir}", f"--heartbeat_timeout_seconds={HEARTBEAT_SECONDS}", *OVERRIDES]
    settings = environment(cache) | FAST_COMPILE | {"DEVICES": str(8 // processes)}
    return subprocess.Popen(
        command, cwd=ROOT, env=settings, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def workers(launcher: subprocess.Popen[str]) -> list[int]:
    children = pathlib.Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text()
    return [int(child) for child in children.split()]


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_the_run_goes_on_exactly(tmp_path, cache):
    cut = tmp_path / "four"
    launcher = launch(cut, cache, 4)
    assert when(launcher, lambda: bool(saved.available_steps(cut)) and len(lines(cut)) > SAVE), finish(launcher, None)
    os.kill(workers(launcher)[2], signal.SIGKILL)
    killed = time.monotonic()
    message = finish(launcher, None)
    # The launcher waits for all of them, and jax's own timeout would be 100 s.
    assert time.monotonic() - killed < 90
    assert launcher.returncode != 0
    # The one who notices first says so; the runtime itself may be quicker and end all of them with its own words.
    ours = "lost another process" in message and "leaving with status 75: start all of them again" in message
    assert ours or "JAX distributed service detected fatal errors" in message, message[-3000:]
    written = reproducible(cut)
    assert len(written) < STEPS

    halved = tmp_path / "two"
    shutil.copytree(cut, halved)
    for workdir, processes in ((cut, 4), (halved, 2)):
        error = finish(launch(workdir, cache, processes))
        assert "going on after step" in error
        assert [line["step"] for line in lines(workdir)] == list(range(1, STEPS + 1))
        # The lines after the checkpoint, written again, are those the killed run wrote.
        assert reproducible(workdir)[: len(written)] == written
    assert reproducible(cut) == reproducible(halved)
