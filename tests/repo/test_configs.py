"""Every shipped config, in every variant, builds what its command wants, and none of them needs jax to be read."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import pytest

from aromni_jax.config import TrainConfig, from_mapping
from aromni_jax.inference.policy import DecodingConfig
from aromni_jax.models.config import ModelConfig, resolve_model
from aromni_jax.structs import Modality, Task
from configs.pretrain import MESHES
from data_pipelines.pretokenize import PretokenizeConfig
from launch.flags import load_config
from launch.quickstart_job import QuickstartConfig
from tests.fixtures.source_tree import ROOT

SIZES = ("debug", "100m", "1b", "7b", "34b")
TRAINING = {
    "pretrain": (
        *SIZES,
        "7b,mesh=v5p-128",
        "1b,weighting=uniform",
        "1b,weighting=response",
        "debug,weighting=balanced",
    ),
    "sft": SIZES,
    "bench": ("", "1b"),
}
OTHER = {
    "decode": {"": DecodingConfig, "ours": DecodingConfig, "released": DecodingConfig},
    "pretokenize": {"train": PretokenizeConfig, "heldout": PretokenizeConfig},
    "quickstart": {"": QuickstartConfig, "tiny": QuickstartConfig},
}
NOT_CONFIGS = {"__init__", "common"}


def targets(variants):
    return [target(name, variant) for name, all_ in variants.items() for variant in all_]


def target(name, variant):
    return f"configs/{name}.py" + (f":{variant}" if variant else "")


def load(target):
    return load_config(argparse.Namespace(config=target, config_overrides=[]))


def test_every_config_file_is_tested_here():
    files = {path.stem for path in (ROOT / "configs").glob("*.py")} - NOT_CONFIGS
    assert files == TRAINING.keys() | OTHER.keys()


@pytest.mark.parametrize("shipped", targets(TRAINING))
def test_training_configs_build(shipped):
    check_training(from_mapping(TrainConfig, load(shipped)))


@pytest.mark.parametrize("name", [name for name in MESHES if name != "local"])
@pytest.mark.parametrize("size", ["1b", "7b", "34b"])
def test_rows_divide_over_the_chips_of_every_named_pod(size, name):
    """v5p counts cores, two a chip; the others count chips."""
    kind, number = name.split("-")
    chips = int(number) // (2 if kind == "v5p" else 1)
    config = from_mapping(TrainConfig, load(f"configs/pretrain.py:{size},mesh={name}"))
    fixed = config.mesh.data * config.mesh.context * config.mesh.tensor
    assert chips % fixed == 0
    ways = config.mesh.data * chips // fixed
    assert config.global_batch_size % (ways * config.gradient_accumulation_steps) == 0


def check_training(config):
    assert isinstance(resolve_model(config.model, vocab_size=1024, perceptual_dim=8), ModelConfig)
    for task, weights in config.loss.task_modality_weights.items():
        assert Task.from_name(task).label == task
        assert set(weights) <= {modality.label for modality in Modality}
    assert config.optimizer.warmup_steps < config.total_steps


@pytest.mark.parametrize("name", OTHER)
def test_other_configs_build(name):
    for variant, kind in OTHER[name].items():
        config = from_mapping(kind, load(target(name, variant)))
        if kind is QuickstartConfig:
            check_training(config.train)


def test_configs_load_without_jax():
    program = """
import json, sys
from launch.flags import read_config
for target in json.loads(sys.argv[1]):
    read_config(target)
    loaded = [name for name in ("jax", "flax", "numpy", "torch") if name in sys.modules]
    assert not loaded, f"{target} imports {loaded}"
"""
    wanted = json.dumps(targets(TRAINING) + targets(OTHER))
    done = subprocess.run([sys.executable, "-c", program, wanted], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
