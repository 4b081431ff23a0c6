"""`aromni plan --executable` and `aromni train --executable` as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.end_to_end import runs
from tests.fixtures.tpu_compiler import needs_tpu_compiler

CONFIG = "--config=configs/pretrain.py:debug"


def plan(cache, *words, devices=1):
    command = [sys.executable, "-m", "launch.cli", "plan", CONFIG, *words]
    environment = runs.environment(cache, devices) | {"XDG_CACHE_HOME": str(cache)}
    return subprocess.run(command, cwd=runs.ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_a_run_from_a_file_is_the_compiled_run(tmp_path, devices):
    """Written for 20 steps of the config's own rate, used for 6 of another; the cache has the step by then."""
    cache, file = tmp_path / "cache", tmp_path / "step.bin"
    other = ("--config.total_steps=6", "--config.optimizer.learning_rate=0.01", "--config.optimizer.warmup_steps=2")
    runs.run(tmp_path / "compiled", cache, *other, devices=devices)
    done = plan(cache, "--topology=local", f"--executable={file}", devices=devices)
    assert done.returncode == 0 and f"compiled for {devices} x cpu" in done.stdout, done.stderr
    runs.run(tmp_path / "loaded", cache, *other, f"--executable={file}", devices=devices)
    expected = runs.reproducible(tmp_path / "compiled")
    assert len(expected) == 6 and runs.reproducible(tmp_path / "loaded") == expected
    assert {line["learning_rate"] for line in expected} != {expected[0]["learning_rate"]}
    refused = runs.run(
        tmp_path / "refused",
        cache,
        "--config.global_batch_size=16",
        f"--executable={file}",
        devices=devices,
        expected=1,
    )
    assert "global_batch_size: 8 in the file, 16 here" in refused.splitlines()[-1]


def test_flags_that_do_not_go_together_are_refused(tmp_path):
    for words, message in (
        (("--topology=local",), "--topology=local goes with --executable alone"),
        (("--topology=v5e:2x4", "--search", f"--executable={tmp_path}/step.bin"), "give one of them"),
    ):
        done = plan(tmp_path, *words)
        assert done.returncode == 1 and message in done.stderr.splitlines()[-1]


@pytest.mark.slow
@needs_tpu_compiler
def test_a_step_for_chips_that_are_not_here_is_written_and_refused_elsewhere(tmp_path):
    file = tmp_path / "step.bin"
    done = plan(tmp_path, "--topology=v5e:2x4", f"--executable={file}")
    assert done.returncode == 0 and f"written: {file}" in done.stdout, done.stderr
    with file.open("rb") as stream:
        header = json.loads(stream.readline())
        assert len(stream.read()) == header["payload_bytes"] > 1_000_000
    assert header["facts"]["device_kind"] == "TPU v5 lite" and len(header["facts"]["device_ids"]) == 8
    refused = runs.run(tmp_path / "run", tmp_path, f"--executable={file}", expected=1)
    assert 'device_kind: "TPU v5 lite" in the file, "cpu" here' in refused.splitlines()[-1]
    undivided = plan(tmp_path, "--topology=v5e:2x4", "--config.global_batch_size=7", f"--executable={tmp_path}/none")
    assert undivided.returncode == 1 and "does not divide over 8 devices; 8 does" in undivided.stderr.splitlines()[-1]
    assert not (tmp_path / "none").exists()
