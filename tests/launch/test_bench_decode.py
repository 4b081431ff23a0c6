"""`aromni bench decode`: both sides answer with the same weights; floors and latency are told."""

from __future__ import annotations

import json

import pytest

from launch import cli
from launch.bench_decode import _describe, _median_record

FIXED = {"ours", "limit", "peer", "ratio_to_limit", "ratio_to_peer", "unit", "shape", "device", "peer_name"}
MODEL = {"num_layers": 2, "d_model": 32, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "mlp_dim": 48}


def test_random_weights_of_a_config(tmp_path, one_device_elsewhere, capfd):
    path = tmp_path / "bench.json"
    assert cli.run("bench", ["decode", "--repeats=1", f"--config.model={MODEL}", f"--json={path}"]) == 0
    results = json.loads(path.read_text())
    assert results.keys() == {"text", "speech"}
    for result in results.values():
        assert result.keys() >= FIXED
        assert result["ours"] > 0 and result["ratio_to_limit"] == pytest.approx(result["ours"] / result["limit"])
        assert result["bound_by"] in ("memory", "compute") and result["first_token_seconds"] > 0
    text, speech = results["text"], results["speech"]
    assert text["ratio_to_peer"] == pytest.approx(text["ours"] / text["peer"]) and speech["peer"] is None
    # Two layers of 4 * 32 * 32 + 3 * 32 * 48 weights and their norms, the last norm, and the rows that are read.
    layers = 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32 + 4 * 32) + 32
    assert text["bytes_per_token"] == 4 * (layers + 65_536 * 32)
    assert speech["bytes_per_token"] == 4 * (layers + (4096 + 12) * 32)
    assert "bound by memory" in capfd.readouterr().out


def test_int8_weights_are_a_quarter_of_float32_to_read(tmp_path, one_device_elsewhere):
    path = tmp_path / "bench.json"
    words = ["decode", "--repeats=1", f"--config.model={MODEL}", "--weights=int8", f"--json={path}"]
    assert cli.run("bench", words) == 0
    results = json.loads(path.read_text())
    # A byte a weight; and in float32 the norms, and a scale for each output: q, k, v, o, gate, up, down, a row.
    layers = 2 * (4 * 32 * 32 + 3 * 32 * 48 + 4 * (2 * 32 + 4 * 32) + 4 * (5 * 32 + 2 * 48)) + 4 * 32
    assert results["text"]["bytes_per_token"] == layers + 65_536 * (32 + 4)
    assert results["speech"]["bytes_per_token"] == layers + (4096 + 12) * (32 + 4)
    assert "int8" in results["text"]["shape"] and results["text"]["ours"] > 0


def test_streams_are_told_by_their_medians():
    records = [
        {"rtf": rtf, "first_token_seconds": 0.01, "ttfa_seconds": 0.1, "audio_seconds": 2.0, "underruns": 1}
        for rtf in (0.2, 0.9, 0.3)
    ]
    result = _median_record(records) | {"repeats": 3}
    assert result["ours"] == result["rtf"] == 0.3 and result["underruns"] == 3 and result["peer"] is None
    assert _describe("stream", result) == (
        "stream: first token after 10 ms, first sound after 100 ms, real-time factor 0.300, "
        "3 underruns in 3 answers of 2.0 s"
    )


def test_a_directory_that_is_no_export(tmp_path, capfd):
    assert cli.run("bench", ["decode", f"--model={tmp_path}"]) == 1
    assert "stopped" in capfd.readouterr().err
