"""`aromni doctor`: numbers of every process, and one line for whatever is wrong."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import pytest

from launch import cli, doctor
from tests.fixtures.source_tree import ROOT


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    return doctor.examine(str(tmp_path_factory.mktemp("workdir")))


def two(healthy, **changes):
    """The same machine twice, the second one changed."""
    made = copy.deepcopy(healthy)
    (first,) = made["processes"]
    first["workdir_seen"] = 2
    made["processes"].append(copy.deepcopy(first) | {"process": 1, "host": "other"} | changes)
    return made


def test_a_healthy_machine_has_numbers_and_no_problems(healthy):
    assert doctor.problems(healthy) == []
    (process,) = healthy["processes"]
    assert process["devices"] == healthy["num_devices"] == 8
    assert process["matmul_flops"] > 0 and process["host_to_device_bytes_per_second"] > 0
    assert healthy["all_reduce_bytes_per_second"] > 0
    assert not list(doctor.pathlib.Path(healthy["workdir"]).iterdir()), "no probe stays"
    table = doctor.describe(healthy)
    assert f"jax {process['versions']['jax']}" in table and "8 x cpu in 1 process(es)" in table
    assert doctor.problems(two(healthy)) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"python": "3.10.0"}, "process 1 (other) has python 3.10.0"),
        ({"devices": 4}, "process 1 (other) has devices 4, process 0 has 8"),
        ({"device_kind": "TPU v5e", "matmul_flops": 1.0}, "process 1 (other) multiplies at 0% of the median rate"),
        ({"workdir": "workdir /x cannot be written"}, "process 1 (other): workdir /x cannot be written"),
        (
            {"unused_device": "A Google TPU may be present."},
            "process 1 (other) computes with its CPU: A Google TPU may",
        ),
        ({"workdir_seen": 1}, "process 1 (other) sees files of 1 of 2 processes"),
    ],
)
def test_what_differs_is_named(healthy, changes, said):
    assert any(said in line for line in doctor.problems(two(healthy, **changes)))


def test_clocks_devices_and_versions_are_compared(healthy):
    wrong = two(healthy) | {"clock_skew_seconds": 7.0}
    for process in wrong["processes"]:
        process["versions"]["jax"] = "0.9.1"
    found = "\n".join(doctor.problems(wrong, expected_devices=16))
    assert "jax 0.9.1 is older than 0.10.2" in found
    assert "8 devices are seen, expected 16" in found
    assert "clocks are 7.0 s apart" in found


def test_the_command_says_what_is_wrong_in_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    written = tmp_path / "doctor.json"
    assert cli.main(["doctor", f"--workdir={tmp_path / 'file' / 'run'}", f"--json={written}"]) == 1
    assert "cannot be written" in json.loads(written.read_text())["problems"][0]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("aromni doctor: error: process 0") and "cannot be written" in line


@pytest.mark.parametrize(("platforms", "status"), [("", 1), ("cpu", 0)])
def test_a_device_that_jax_leaves_alone_is_a_problem_unless_the_cpu_is_asked_for(platforms, status):
    program = (
        "import sys; from jax._src import hardware_utils; hardware_utils.has_visible_nvidia_gpu = lambda: True;"
        "from launch import cli; sys.exit(cli.run('doctor', []))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": platforms}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stderr
    assert "8 x cpu in 1 process(es)" in done.stdout
    lines = [line for line in done.stderr.splitlines() if "NVIDIA GPU" in line]
    assert len(lines) == status
    assert all("computes with its CPU" in line and "JAX_PLATFORMS=cpu" in line for line in lines)


@pytest.mark.slow
def test_two_processes_examine_each_other(tmp_path):
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = ["bash", "launch/multiprocess.sh", "2", "--", "doctor", f"--workdir={tmp_path / 'run'}"]
    command += ["--expected_devices=2", f"--json={tmp_path / 'doctor.json'}"]
    environment = kept | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "doctor.json").read_text())
    assert [process["process"] for process in result["processes"]] == [0, 1]
    assert [process["workdir_seen"] for process in result["processes"]] == [2, 2]
    assert result["clock_skew_seconds"] < 1 and result["all_reduce_bytes_per_second"] > 0
