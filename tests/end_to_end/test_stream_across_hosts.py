"""Hosts on loopback draw the global batches that one host draws, whatever their number and that of their workers."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from runs import ROOT, environment

from tests.fixtures.data_fakes import fake_bundle, make_dataset
from tests.fixtures.free_port import free_port

BATCH, LENGTH = 4, 128


def draw(
    output: pathlib.Path,
    cache: pathlib.Path,
    mixture: dict[str, Any],
    *,
    hosts: int,
    workers: int,
    steps: int,
    state: dict[str, Any] | None,
) -> tuple[list[np.ndarray], dict[str, Any]]:
    """`steps` global batches, leaf by leaf, and the state after them."""
    job = {"mixture": mixture, "vocab": fake_bundle().vocab().to_json(), "length": LENGTH, "batch": BATCH}
    job |= {"num_hosts": hosts, "coordinator": f"127.0.0.1:{free_port()}", "workers": workers, "steps": steps}
    job |= {"state": state, "output": str(output)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.fixtures.stream_host", json.dumps(job | {"host": host})],
            cwd=ROOT,
            env=environment(cache),
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in range(hosts)
    ]
    for process in processes:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
    said = json.loads(pathlib.Path(f"{output}.json").read_text())
    assert said["hosts"] == hosts
    with np.load(f"{output}.npz") as arrays:
        return [arrays[name] for name in arrays.files], said["state"]


@pytest.mark.slow
def test_one_two_and_four_hosts_with_any_workers_draw_one_stream(tmp_path, cache):
    """A resume in the middle changes the number of hosts and of workers, twice."""
    mixture = {
        "big": {"path": str(make_dataset(tmp_path, 60, 0, "big")), "weight": 1.0},
        "small": {"path": str(make_dataset(tmp_path, 25, 1, "small")), "weight": 1.0},
    }
    reference, end = draw(tmp_path / "whole", cache, mixture, hosts=1, workers=0, steps=12, state=None)
    parts, state = [], None
    for hosts, workers, steps in ((2, 1, 4), (4, 4, 3), (1, 1, 2), (2, 0, 3)):
        name = tmp_path / f"part{len(parts)}"
        part, state = draw(name, cache, mixture, hosts=hosts, workers=workers, steps=steps, state=state)
        parts.append(part)
    assert state == end and end["segment"] > 0, "more than one pass was drawn"
    for found, expected in zip(zip(*parts, strict=True), reference, strict=True):
        np.testing.assert_array_equal(np.concatenate(found), expected)
