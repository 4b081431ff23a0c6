"""Compiling the real train step for a TPU that is not here, and counting what it moves."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

from aromni_jax import partitioning
from aromni_jax.config import TrainConfig, from_mapping
from aromni_jax.models.config import num_parameters, resolve_model
from aromni_jax.train import estimate
from launch.flags import load_config
from tests.fixtures.source_tree import ROOT

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed"
)


def config(*overrides):
    loaded = load_config(argparse.Namespace(config="configs/pretrain.py:debug", config_overrides=list(overrides)))
    return from_mapping(TrainConfig, loaded)


def interconnect(train, remat="none"):
    model = resolve_model({"size": "debug", "remat": remat}, 256, 16)
    mesh = partitioning.make_mesh(train.mesh, jax.devices())
    return model, estimate._interconnect_seconds(model, train, mesh, estimate.Chip(1, 1.0, 1.0))


def test_fsdp_gathers_weights_in_every_pass_and_scatters_gradients():
    model, seconds = interconnect(config())
    assert seconds == pytest.approx(7 / 8 * num_parameters(model) * (2 * 4 + 4))
    model, seconds = interconnect(config("--config.gradient_accumulation_steps=2"), remat="full")
    assert seconds == pytest.approx(7 / 8 * 2 * num_parameters(model) * (3 * 4 + 4))


def test_one_copy_per_device_only_sums_gradients():
    model, seconds = interconnect(config("--config.mesh.data=8", "--config.mesh.fsdp=1"))
    assert seconds == pytest.approx(2 * 7 / 8 * num_parameters(model) * 4)


def test_unknown_devices_are_refused():
    train = config()
    with pytest.raises(ValueError, match="nothing is known about 'cpu'"):
        estimate.plan(resolve_model("debug", 256, 0), train, None, {}, jax.devices())


def run_plan(*words):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS", None)
    return subprocess.run(
        [sys.executable, "-m", "launch.plan", "--config=configs/pretrain.py:debug", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
    )


@needs_compiler
def test_wrong_topology_is_answered_in_one_line():
    done = run_plan("--topology=v5e:3x5")
    assert done.returncode == 1
    assert "no TPU topology 'v5e:3x5'" in done.stderr.splitlines()[-1]


@needs_compiler
@pytest.mark.slow
def test_debug_step_compiles_for_eight_v5e_chips(tmp_path):
    done = run_plan("--topology=v5e:2x4", f"--json={tmp_path}/plan.json")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "fits" in done.stdout
    result = json.loads((tmp_path / "plan.json").read_text())
    assert result["devices"] == 8 and result["mesh"]["fsdp"] == 8
    assert result["fits"] and result["hbm_bytes"]["peak"] >= result["hbm_bytes"]["arguments"] > 0
    # Float32 weights and two moments, an eighth of each on every chip, and little besides.
    state = 12 * result["parameters"] / 8
    assert state < result["hbm_bytes"]["arguments"] < 2 * state
    assert result["bound_by"] in ("compute", "memory", "interconnect")
