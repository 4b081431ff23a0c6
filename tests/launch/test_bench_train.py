"""`aromni bench train`: both sides really train, on the same documents, to the same losses."""

from __future__ import annotations

import json

import numpy as np
import pytest

from launch import cli
from launch.bench_train import _bound_by, _judge
from launch.bench_train_side import micro_batches
from tests.fixtures.data_fakes import make_dataset

FIXED = {"ours", "limit", "peer", "ratio_to_limit", "ratio_to_peer", "unit", "shape", "device", "peer_name"}
MODEL = {"num_layers": 2, "d_model": 32, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "mlp_dim": 48}


def test_documents_come_back_from_rows_and_are_padded_to_the_longest():
    """Rows | a a a b b . | and | c c c c d . |: documents of 3, 2, 4 and 1."""
    batch = {
        "inputs_BL": np.array([[1, 2, 3, 4, 5, 0], [6, 7, 8, 9, 10, 0]], np.int32),
        "targets_BL": np.array([[2, 3, 0, 5, 0, 0], [7, 8, 9, 0, 0, 0]], np.int32),
        "segment_ids_BL": np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 2, 0]], np.int32),
    }
    (first, first_targets), (second, second_targets) = micro_batches(batch, among=4)
    np.testing.assert_array_equal(first, [[1, 2, 3, 0], [4, 5, 0, 0]])
    np.testing.assert_array_equal(first_targets, [[2, 3, 0, -100], [5, 0, -100, -100]])
    np.testing.assert_array_equal(second, [[6, 7, 8, 9], [10, 0, 0, 0]])
    np.testing.assert_array_equal(second_targets, [[7, 8, 9, 0], [0, -100, -100, -100]])
    assert [inputs.shape for inputs, _ in micro_batches(batch, among=2)] == [(2, 3), (2, 4)]


def test_the_part_that_loses_most_is_named():
    parts = {"attention": {"seconds": 2.0, "flops": 100.0}, "update": {"seconds": 1.5, "flops": 0.0}}
    assert _bound_by(parts, peak=100.0) == "update"
    judged = _judge(parts, peak=100.0)
    assert judged["attention"]["share_of_peak"] == 0.5 and judged["update"]["share_of_peak"] is None


def test_both_sides_train_to_the_same_losses(tmp_path, one_device_elsewhere, capfd):
    data = make_dataset(tmp_path)
    path = tmp_path / "bench.json"
    overrides = ["--config.sequence_length=256", "--config.global_batch_size=4", f"--config.model={MODEL}"]
    assert cli.run("bench", ["train", "--repeats=1", f"--data={data}", f"--json={path}", *overrides]) == 0
    results = json.loads(path.read_text())
    dense, packed = results["dense"], results["packed"]
    assert dense.keys() >= FIXED and packed.keys() >= FIXED
    # Cross-entropy starts near log(vocabulary), about 6: agreement to 1e-4 after an update means the same gradients.
    assert dense["largest_loss_difference"] < 1e-4
    assert dense["fill"] == dense["fill_peer"] == 1.0
    assert packed["fill_peer"] <= packed["fill_micro_batch_padding"] < packed["fill"]
    for result in (dense, packed):
        assert result["ratio_to_peer"] == pytest.approx(result["ours"] / result["peer"])
        assert result["ratio_to_limit"] == pytest.approx(result["ours"] / result["limit"])
    assert set(dense["parts"]) == {"attention", "loss", "layers", "update"} and dense["bound_by"] in dense["parts"]
    printed = capfd.readouterr().out
    assert "losses of the first 3 steps" in printed and "padded only to the longer of each 2" in printed


def test_a_peer_that_keeps_memory_trains_the_same(tmp_path, one_device_elsewhere):
    path = tmp_path / "bench.json"
    overrides = ["--config.sequence_length=128", "--config.global_batch_size=2", f"--config.model={MODEL}"]
    flags = ["--case=dense", "--repeats=1", "--keep_peer_memory", f"--data={make_dataset(tmp_path)}", f"--json={path}"]
    assert cli.run("bench", ["train", *flags, *overrides]) == 0
    dense = json.loads(path.read_text())["dense"]
    assert dense["largest_loss_difference"] < 1e-4
    assert dense["peer_name"].endswith("which keeps freed memory")


def test_more_cores_than_there_are(capsys):
    assert cli.run("bench", ["train", "--num_cores=4096"]) == 1
    assert "--num_cores must be in 1.." in capsys.readouterr().err


def test_a_case_that_is_not_measured(capsys):
    assert cli.run("bench", ["train", "--case=quickstart"]) == 1
    assert "--case=quickstart is not measured; known: dense, packed" in capsys.readouterr().err
