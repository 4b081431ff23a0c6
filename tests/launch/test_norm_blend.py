"""A Swin-Norm run that begins with pre-norm weights, from `init_from` to the export."""

from __future__ import annotations

import argparse
import json

import pytest

from aromni_jax.config import TrainConfig, from_mapping
from launch.export import export_workdir
from launch.flags import load_config
from launch.train import run_training


def train(workdir, norm_position, **changes):
    config = load_config(argparse.Namespace(config="configs/pretrain.py:debug", config_overrides=[]))
    with config.unlocked(), config.ignore_type():
        config.model = dict(size="debug", norm_position=norm_position)
        config.optimizer.warmup_steps = 0
        config.checkpoint = dict(config.checkpoint) | dict(save_every_steps=1, keep_last=4)
        config.update(dict(sequence_length=64, global_batch_size=8, eval_every_steps=0, log_every_steps=1) | changes)
    return run_training(from_mapping(TrainConfig, config), workdir, with_progress=False)


@pytest.fixture(scope="module")
def pre_norm_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("pre") / "run"
    train(workdir, "pre", total_steps=1)
    return workdir


def test_blended_run_ends_as_a_swin_norm_model(tmp_path, pre_norm_run):
    train(tmp_path / "run", "swin", init_from=str(pre_norm_run), total_steps=3, norm_blend_steps=2)
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    train(tmp_path / "same", "pre", init_from=str(pre_norm_run), total_steps=1)
    same = json.loads((tmp_path / "same" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(same["loss"], rel=1e-5)
    with pytest.raises(ValueError, match="step 1 of norm_blend_steps = 2, .*take a step from 2 on"):
        export_workdir(tmp_path / "run", tmp_path / "early", step=1)
    export_workdir(tmp_path / "run", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["swin_norm"] is True


def test_what_cannot_be_blended_is_refused(tmp_path, pre_norm_run):
    swin = tmp_path / "swin"
    train(swin, "swin", total_steps=1)
    with pytest.raises(ValueError, match="begins with a pre-norm model, but .* norm_position = 'swin'"):
        train(tmp_path / "run", "swin", init_from=str(swin), total_steps=3, norm_blend_steps=2)
    with pytest.raises(ValueError, match="norm_blend_steps.*name it with init_from"):
        train(tmp_path / "run", "swin", total_steps=3, norm_blend_steps=2)
    with pytest.raises(ValueError, match="norm_blend_steps.*from 0 to total_steps = 3, not 4"):
        train(tmp_path / "run", "swin", init_from=str(pre_norm_run), total_steps=3, norm_blend_steps=4)


def test_weights_that_meet_norms_in_other_places_are_pointed_out(tmp_path, pre_norm_run, caplog):
    train(tmp_path / "run", "swin", init_from=str(pre_norm_run), total_steps=1)
    assert "norm_position 'pre', this run 'swin'" in caplog.text and "norm_blend_steps" in caplog.text
