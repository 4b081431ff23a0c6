"""Two processes with a local tier are killed: they go on from it together, or from the shared one when one lost its
disk; the lines are those of one run either way."""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import subprocess

import pytest
from runs import ROOT, environment, finish, lines, reproducible, when
from test_lost_process import FAST_COMPILE, workers

from aromni_jax.train import saved

STEPS, SHARED = 16, 6
OVERRIDES = (
    "--config.mesh.fsdp=2",
    f"--config.total_steps={STEPS}",
    "--config.log_every_steps=2",
    f"--config.checkpoint.save_every_steps={SHARED}",
    "--config.checkpoint.local_every_steps=1",
    "--config.sequence_length=32",
    "--config.loss.perceptual_weight=0.0",
    "--config.model={'size': 'debug', 'num_layers': 1}",
)


def launch(folder: pathlib.Path, cache: pathlib.Path) -> subprocess.Popen[str]:
    """Two processes with the workdir `folder/run` and the local disks `folder/local/RUN/PROCESS`."""
    command = ["bash", "launch/multiprocess.sh", "2", "--", "train", "--config=configs/pretrain.py:debug"]
    command += [f"--workdir={folder / 'run'}", f"--config.checkpoint.local_directory={folder / 'local'}", *OVERRIDES]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(cache) | FAST_COMPILE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def local_steps(folder: pathlib.Path) -> list[set[int]]:
    """Steps on the disk of each process."""
    disks = sorted(disk for run in (folder / "local").glob("*") for disk in run.iterdir())
    return [{int(file.stem) for file in disk.glob("*.safetensors") if file.stem.isdigit()} for disk in disks]


@pytest.mark.slow
def test_all_go_on_from_their_disks_or_none(tmp_path, cache):
    killed = tmp_path / "killed"
    launcher = launch(killed, cache)

    def is_ahead() -> bool:
        steps = local_steps(killed)
        return bool(saved.available_steps(killed / "run")) and len(steps) == 2 and min(map(max, steps)) > SHARED + 2

    assert when(launcher, is_ahead), finish(launcher, None)
    for process in workers(launcher):
        os.kill(process, signal.SIGKILL)
    finish(launcher, None)
    common = set.intersection(*local_steps(killed))
    shared = max(saved.available_steps(killed / "run"))
    assert max(common) > shared

    halved = tmp_path / "halved"
    shutil.copytree(killed, halved)
    (lost,) = (halved / "local").glob("*/00001")
    shutil.rmtree(lost)
    for folder, step in ((killed, max(common)), (halved, shared)):
        message = finish(launch(folder, cache))
        assert f"going on after step {step} of {STEPS}" in message
        assert ("using the local checkpoint" in message) == (folder == killed)
        first = next(line for line in lines(folder / "run") if line["step"] > step)
        assert first["restore_seconds"] > 0 and first["restored_bytes"] > 0
        assert [line["step"] for line in lines(folder / "run")] == list(range(2, STEPS + 1, 2))
        assert all(STEPS - 1 in steps for steps in local_steps(folder))
    assert reproducible(killed / "run") == reproducible(halved / "run")
