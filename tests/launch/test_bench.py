"""`aromni bench`: two sides in turn, without codecs of full size."""

from __future__ import annotations

import json

import numpy as np
import pytest

from aromni_jax.config import TrainConfig, from_mapping
from aromni_jax.peers.wavtokenizer import SMALL, WavTokenizerTorch
from aromni_jax.vocab import JointVocab
from configs.bench import get_config as bench_config
from launch import bench_checkpoint, bench_tokenizer, cli
from launch.training_data import open_data


def test_sides_take_turns_and_the_table_has_the_fixed_keys(tmp_path, monkeypatch, capsys):
    asked = []

    def ask(worker, question):
        asked.append((worker, question))
        if question != "amount":
            np.save(f"{worker[1]}/{worker[0]}_{question}.npy", np.arange(4))
        return {"amount": 6.0, "encode": 2.0, "decode": 3.0}[question] / (2 if worker[0] == "ours" else 1)

    class Worker(tuple):
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(bench_tokenizer, "ask", ask)
    monkeypatch.setattr(
        bench_tokenizer, "_worker", lambda side, family, items, directory, cores: Worker((side, directory))
    )
    path = tmp_path / "bench.json"
    assert cli.run("bench", ["tokenizer", "--family=encodec", "--repeats=2", f"--json={path}"]) == 0
    sides = [worker[0] for worker, question in asked if question == "encode"]
    assert sides == ["peer", "ours", "ours", "peer", "ours", "peer"]
    result = json.loads(path.read_text())["encodec/encode"]
    fixed = {"ours", "limit", "peer", "ratio_to_limit", "ratio_to_peer", "unit", "shape", "device", "peer_name"}
    assert fixed <= result.keys()
    assert (result["ours"], result["peer"], result["ratio_to_peer"], result["limit"]) == (6.0, 3.0, 2.0, None)
    assert "ratio 2.00" in capsys.readouterr().out


def test_wrong_numbers_are_named(capsys):
    assert cli.run("bench", ["tokenizer", "--num_cores=0"]) == 1
    assert "--num_cores" in capsys.readouterr().err


@pytest.mark.parametrize("length", [3, 40])
def test_the_reference_is_the_same_in_batches(length):
    """What speed is compared with computes what parity is compared with."""
    model = WavTokenizerTorch()
    rng = np.random.default_rng(0)
    codes_BU = rng.integers(0, 128, (2, length))
    waveform_BT = (0.3 * rng.normal(size=(2, length * SMALL.encoder.hop))).astype(np.float32)
    for row in range(2):
        expected_T = model.decode(codes_BU[row])
        np.testing.assert_allclose(model.decode_batch(codes_BU)[row], expected_T, atol=1e-5, rtol=0)
        assert (model.encode_batch(waveform_BT)[row] == model.encode(waveform_BT[row])).mean() > 0.95


def test_data_beside_grains_packer(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("launch.bench_data._DOCUMENTS", 1500)
    monkeypatch.setattr("launch.bench_data._PLANNED_DOCUMENTS", 3000)
    monkeypatch.setattr("launch.bench_data._BATCHES_A_TURN", 2)
    path, corpus = tmp_path / "bench.json", tmp_path / "recipe"
    assert cli.run("bench", ["data", "--repeats=2", f"--json={path}", f"--data={corpus}"]) == 0
    result = json.loads(path.read_text())["data"]
    fixed = {"ours", "limit", "peer", "ratio_to_limit", "ratio_to_peer", "unit", "shape", "device", "peer_name"}
    assert fixed <= result.keys()
    assert result["ratio_to_peer"] == pytest.approx(result["ours"] / result["peer"])
    assert 1.5 < result["bytes_per_token"] < 3 and result["fill"] > result["fill_peer"] > 0.9
    assert "M documents per CPU second" in capsys.readouterr().out

    config = bench_config()
    with config.ignore_type():
        config.data.mixture = {"recipe": {"path": str(corpus)}}
    config.loss.perceptual_weight = 0.0
    data = open_data(from_mapping(TrainConfig, config), np.arange(1))
    assert data.vocab == JointVocab.released()
    assert next(data.batches).inputs_BL.shape == (1, config.sequence_length)


def test_checkpoints_beside_the_disk_and_torch(tmp_path, monkeypatch, capsys):
    def tiny():
        from configs.pretrain import get_config

        config = get_config("debug")
        config.sequence_length = 32
        config.mesh.fsdp = 8
        return config

    monkeypatch.setattr("launch.bench_checkpoint.CASES", (bench_checkpoint.Case("tiny", tiny, 5, 2),))
    monkeypatch.setattr("launch.bench_checkpoint.keep_freed_memory_on_cpu", lambda: None)
    path = tmp_path / "bench.json"
    assert cli.run("bench", ["checkpoint", f"--json={path}"]) == 0
    results = json.loads(path.read_text())
    assert results.keys() == {"tiny/stall", "tiny/save", "tiny/restore"}
    fixed = {"ours", "limit", "peer", "ratio_to_limit", "ratio_to_peer", "unit", "shape", "device", "peer_name"}
    for row in results.values():
        assert fixed <= row.keys()
        assert row["ratio_to_limit"] == pytest.approx(row["ours"] / row["limit"])
    stall = results["tiny/stall"]
    assert stall["stall_ratio"] == stall["ratio_to_limit"] and stall["saves"] == 2
    assert results["tiny/save"]["bytes_written"] > 4 * results["tiny/restore"]["parameters"]
    assert "a step that saves" in capsys.readouterr().out


def test_which_steps_save_and_which_are_their_neighbours():
    """Step 11 saves step 10: 5 s instead of 1 s; 12 runs while files are written: 2 s."""
    lengths = {step: {11: 5.0, 12: 2.0}.get(step, 1.0) for step in range(1, 21)}
    ended = {step: sum(lengths[earlier] for earlier in range(1, step + 1)) for step in lengths}
    saved, whole = {10: ended[10], 20: ended[20]}, {10: ended[12] - 0.5, 20: ended[20] + 9.0}
    steps = bench_checkpoint.describe_steps(ended, saved, whole)
    assert steps == {"saving": 5.0, "first": 5.0, "neighbours": 1.0, "quiet": 1.0, "until_whole": 7.75}


def test_an_unknown_config_to_save_is_named(capsys):
    assert cli.run("bench", ["checkpoint", "--case=7b"]) == 1
    assert "quickstart, 100m" in capsys.readouterr().err
