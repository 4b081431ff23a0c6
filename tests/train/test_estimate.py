"""Compiling the real train step for a TPU that is not here, and counting what it moves."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

import jax
import pytest

from aromni_jax.config import TrainConfig, from_mapping
from aromni_jax.models.config import resolve_model
from aromni_jax.train import estimate
from launch import plan_search
from launch.flags import load_config
from tests.fixtures.source_tree import ROOT
from tests.fixtures.tpu_compiler import needs_tpu_compiler


def config(*overrides):
    loaded = load_config(argparse.Namespace(config="configs/pretrain.py:debug", config_overrides=list(overrides)))
    return from_mapping(TrainConfig, loaded)


@pytest.mark.parametrize("num_slices, between", [(1, 0), (2, 1), (4, 3), (8, 7)])
def test_between_slices_the_data_axis_is_slow(num_slices, between):
    """Of 8 devices on data each sends 7/4 of a sum; beside another slice only its quarter goes between them, twice."""
    second = estimate.BETWEEN_SLICES_BYTES_PER_SECOND
    sent = {"data": 7 * second, "fsdp": 4 * second, "context": second, "tensor": second}
    seconds = estimate._interconnect_seconds(sent, 8, num_slices, estimate.Chip(1, 1.0, 2 * second))
    assert seconds == pytest.approx(between + (7 - between + 6) / 2)


def test_unknown_devices_are_refused():
    train = config()
    with pytest.raises(ValueError, match="nothing is known about 'cpu'"):
        estimate.plan(resolve_model("debug", 256, 0), train, None, {}, jax.devices())


def fake_plan(calls):
    """Memory and time that grow with rows; policies that keep more need more and are faster."""

    def plan(config, topology, num_slices):
        calls.append(config)
        place, ways = plan_search.REMATS.index(config["model"]["remat"]), config["mesh"]["tensor"]
        if ways > 1:
            raise ValueError("this mesh does not suit")
        peak = config["global_batch_size"] * (len(plan_search.REMATS) - place)
        return {
            "fits": peak <= 8 * 12,
            "hbm_bytes": {"peak": peak},
            "global_batch_size": config["global_batch_size"],
            "sequence_length": 1,
            "step_seconds_roofline": config["global_batch_size"] * (1.0 + place),
        }

    return plan


def test_search_doubles_rows_until_they_do_not_fit_and_keeps_what_nothing_beats():
    calls, lines = [], []
    base = {"mesh": {"tensor": 1}, "gradient_accumulation_steps": 2, "model": "debug", "global_batch_size": 3}
    model = {"num_heads": 4, "num_kv_heads": 4}
    points = plan_search.search(base, model, "v5e:2x4", 1, 8, fake_plan(calls), lines.append)
    assert sum("left out" in line for line in lines) == len(plan_search.REMATS)
    assert {call["global_batch_size"] % 8 for call in calls} == {0}
    assert {call["gradient_accumulation_steps"] for call in calls} == {1} and base["model"] == "debug"
    best = plan_search.frontier(points)
    # One row needs 32 of 96 at most, two rows 64; four rows fit from the second policy on, eight in the last alone.
    assert [(point["rows_per_chip"], point["step_seconds_roofline"]) for point in best] == [
        (8, 64 * 4.0),
        (4, 32 * 2.0),
        (2, 16 * 1.0),
    ]


def test_a_plan_asked_again_is_not_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def plan(config, topology, num_slices):
        calls.append(topology)
        return {"devices": 8}

    for topology in ("v5e:2x4", "v5e:2x4", "v5e:4x4"):
        assert plan_search.cached("compiled", plan)({"seed": 0}, topology, 1) == {"devices": 8}
    assert calls == ["v5e:2x4", "v5e:4x4"]
    plan_search.cached("compiled", plan)({"seed": 1}, "v5e:2x4", 1)
    plan_search.cached("assigned", plan)({"seed": 0}, "v5e:2x4", 1)
    assert len(calls) == 4


def run_plan(cache, *words):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache)}
    environment.pop("XLA_FLAGS", None)
    return subprocess.run(
        [sys.executable, "-m", "launch.plan", "--config=configs/pretrain.py:debug", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
    )


@needs_tpu_compiler
def test_wrong_topology_is_answered_in_one_line(tmp_path):
    done = run_plan(tmp_path, "--topology=v5e:3x5")
    assert done.returncode == 1
    assert "no TPU topology 'v5e:3x5'" in done.stderr.splitlines()[-1]


@needs_tpu_compiler
@pytest.mark.slow
def test_debug_step_compiles_for_eight_v5e_chips(tmp_path):
    # Seven rows do not divide over eight chips.
    words = ("--topology=v5e:2x4", f"--json={tmp_path}/plan.json", "--config.global_batch_size=7")
    done = run_plan(tmp_path, *words, "--compile")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "fits" in done.stdout and "compiled to the end" in done.stdout
    assert "batch: 8 rows of 128 (the config's 7 do not divide" in done.stdout
    result = json.loads((tmp_path / "plan.json").read_text())
    assert result["devices"] == 8 and result["mesh"]["fsdp"] == 8
    assert result["fits"] and result["hbm_bytes"]["peak"] >= result["hbm_bytes"]["arguments"] > 0
    # Float32 weights and two moments, an eighth of each on every chip, and little besides.
    state = 12 * result["parameters"] / 8
    assert state < result["hbm_bytes"]["arguments"] < 2 * state
    assert result["bound_by"] in ("compute", "memory", "interconnect")

    # The same step, in a process that ends when the compiler has assigned memory.
    done = run_plan(tmp_path, *words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "by the compiler's memory report" in done.stdout
    assigned = json.loads((tmp_path / "plan.json").read_text())
    assert (result["memory_from"], assigned["memory_from"]) == ("executable", "memory report")
    assert assigned["hbm_bytes"]["peak"] == pytest.approx(result["hbm_bytes"]["peak"], rel=0.02)
    assert assigned["hbm_bytes"]["arguments"] == pytest.approx(result["hbm_bytes"]["arguments"], rel=0.05)


@needs_tpu_compiler
@pytest.mark.slow
@pytest.mark.parametrize("topology, devices, limit_gib", [("v5e:16x16", 256, 6.8), ("v5p:4x4x4", 64, 8.8)])
def test_full_remat_of_7b_keeps_to_its_memory(topology, devices, limit_gib):
    """Four rows of 4096 a chip: 6.61 and 8.56 GiB when this was written. MaxText 0.2.5 takes 7.71 and 10.08."""
    train = load_config(argparse.Namespace(config="configs/pretrain.py:7b", config_overrides=[])).to_dict()
    result = plan_search.assigned_memory_plan(train | {"global_batch_size": 4 * devices}, topology, 1)
    assert result["remat"] == "full" and result["fits"]
    assert result["hbm_bytes"]["peak"] / (1 << 30) < limit_gib
