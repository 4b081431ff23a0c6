"""Held-out losses between training steps, from the command's own config keys."""

from __future__ import annotations

import json
import os
import pathlib
import signal
from typing import Any

import numpy as np
import pytest

from aromni_jax.config import TrainConfig, from_mapping
from aromni_jax.train.metrics import MetricsWindow
from aromni_jax.train.observe import Hook
from aromni_jax.train.saved import available_steps
from aromni_jax.train.step import make_eval_step
from configs.common import set_mixture
from configs.pretrain import get_config
from launch import heldout
from launch.train import run_training
from tests.fixtures.data_fakes import make_dataset


def config_for(data: pathlib.Path, evaluation: dict[str, str], **changes: Any) -> TrainConfig:
    config = get_config("debug")
    set_mixture(config, {"all": {"path": str(data), "weight": 1.0}})
    config.update(dict(total_steps=4, sequence_length=128, global_batch_size=8, log_every_steps=2) | changes)
    config.optimizer.warmup_steps = 1
    config.loss.perceptual_weight = 0.0
    with config.data.ignore_type():
        config.data.evaluation = evaluation
    return from_mapping(TrainConfig, config)


def test_losses_on_named_sets_are_written_and_the_sets_may_change(tmp_path):
    data, unseen = make_dataset(tmp_path, name="data"), make_dataset(tmp_path, seed=1, name="unseen")
    workdir = tmp_path / "run"
    config = config_for(data, {"seen": str(data), "unseen": str(unseen)}, eval_every_steps=2)
    run_training(config, workdir, with_progress=False)
    lines = [json.loads(line) for line in (workdir / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    for name in ("seen", "unseen"):
        losses = [line[f"{name}/loss/text"] for line in lines]
        assert all(np.isfinite(losses)) and losses[1] < losses[0]
        assert lines[0][f"{name}/loss/caption"] > 0
    assert lines[0]["seen/loss/text"] != lines[0]["unseen/loss/text"]

    longer = config_for(data, {"unseen": str(unseen)}, eval_every_steps=3, total_steps=6)
    run_training(longer, workdir, with_progress=False)
    last = json.loads((workdir / "evaluations.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 6 and "seen/loss/text" not in last


@pytest.mark.parametrize("when", ["before", "during"])
def test_who_is_stopped_saves_at_once_and_evaluates_at_the_next_start(tmp_path, monkeypatch, when):
    """SIGTERM arrives while step 2 runs, after which an evaluation is due, or in that evaluation's first batch."""

    class Stop(Hook):
        def on_step(self, step, line):
            if step == 1 and when == "before":
                os.kill(os.getpid(), signal.SIGTERM)

    batches = []

    def make_stopping_step(*args):
        def step(*inputs):
            batches.append(inputs)
            if len(batches) == 1 and when == "during":
                os.kill(os.getpid(), signal.SIGTERM)
            return evaluated(*inputs)

        evaluated = make_eval_step(*args)
        return step

    monkeypatch.setattr(heldout, "make_eval_step", make_stopping_step)
    data, workdir = make_dataset(tmp_path, name="data"), tmp_path / "run"
    config = config_for(data, {"seen": str(data)}, eval_every_steps=2)
    stopped = run_training(config, workdir, [Stop()], with_progress=False)
    assert stopped.is_interrupted and available_steps(workdir) == [2] == [stopped.step]
    assert len(batches) == (when == "during")
    file = workdir / "evaluations.jsonl"
    assert not file.exists() or not file.read_text()
    run_training(config, workdir, with_progress=False)
    run_training(config_for(data, {"seen": str(data)}, eval_every_steps=2, total_steps=6), workdir, with_progress=False)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [2, 4, 6]


def test_an_evaluation_of_nothing_is_refused(tmp_path):
    data = make_dataset(tmp_path)
    with pytest.raises(ValueError, match=r"'data.evaluation' names no data set"):
        run_training(config_for(data, {}, eval_every_steps=2), tmp_path / "run", with_progress=False)


def test_an_evaluation_is_divided_once_over_all_its_batches():
    """Two batches of unlike sizes: the mean is over targets, not over batches."""

    def batch(loss_sum: float, count: float) -> dict[str, Any]:
        from aromni_jax.structs import Modality, Task, WeightedSum

        cells = np.zeros((len(Task), len(Modality)))
        cells[Task.TEXT, Modality.TEXT] = 1
        zero = WeightedSum(np.zeros(()), np.zeros(()))
        return {
            "next_token": WeightedSum(loss_sum, count),
            "z_loss": zero,
            "perceptual": zero,
            "modality": WeightedSum(loss_sum * cells.sum(0), count * cells.sum(0)),
            "task": WeightedSum(loss_sum * cells.sum(1), count * cells.sum(1)),
            "accuracy": WeightedSum(0 * cells, count * cells),
            "weight_share": cells,
            "num_tokens": count,
            "num_pairs": count,
            "num_rows_tokens": count,
        }

    line = MetricsWindow.of_evaluation([batch(2.0, 1.0), batch(3.0, 9.0)], config_for(pathlib.Path(), {}).loss)
    assert line["loss/text"] == pytest.approx(0.5)
