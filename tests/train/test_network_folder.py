"""Two processes that do not see one folder alike restore one step, or both say why not."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.fixtures.free_port import free_port
from tests.fixtures.source_tree import ROOT


def restored(workdir: pathlib.Path, kind: str) -> list[dict]:
    """What each of the two processes of `tests.fixtures.network_folder` says."""
    port = free_port()
    command = [sys.executable, "-m", "tests.fixtures.network_folder"]
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_NUM_CPU_DEVICES": "1"}
    processes = [
        subprocess.Popen([*command, number, port, workdir, kind], cwd=ROOT, env=kept, stdout=subprocess.PIPE, text=True)
        for number in "01"
    ]
    answers = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return [json.loads(answer.splitlines()[-1]) for answer in answers]


@pytest.mark.parametrize("kind, step", [("late", 2), ("damaged", 1)])
def test_all_processes_take_the_same_step(tmp_path, kind, step):
    """A step that one sees late is waited for; one that nobody can read is set aside."""
    assert restored(tmp_path, kind) == [{"weights": step, "run": step}] * 2
    assert (tmp_path / "checkpoints" / "2.damaged").is_dir() == (kind == "damaged")


def test_what_one_process_cannot_read_is_not_damaged(tmp_path):
    """Both end, and the checkpoint stays."""
    for said in restored(tmp_path, "unreadable"):
        assert f"not every process can read {tmp_path}/checkpoints/2" in said["error"]
    assert (tmp_path / "checkpoints" / "2").is_dir()
