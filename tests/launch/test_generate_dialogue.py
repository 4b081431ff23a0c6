"""A file of chats is answered dialogue by dialogue, over one cache each, and says what every turn cost."""

from __future__ import annotations

import argparse
import dataclasses
import json
import types

import numpy as np
import pytest
import soundfile
from PIL import Image as PilImage

from launch import cli, generate, loading
from tests.inference.test_conversation import TEMPLATES, TEXT, VOCAB, model  # noqa: F401  (fixture)


class Sound:
    """A codec of ten samples a frame."""

    sample_rate_hz, codes_per_second = 1000, 100

    def stream_decoder(self):
        return self

    def start(self):
        return 0

    def step(self, state, codes_KU):
        return state, np.zeros(10 * codes_KU.shape[1], np.float32)

    def finish(self, state):
        return np.zeros(0, np.float32)


class Picture:
    def decode(self, codes_BP):
        return np.zeros((len(codes_BP), 2, 2, 3), np.uint8)

    def prepare(self, path):
        return np.asarray(PilImage.open(path))

    def encode(self, pixels_BHWC):
        return np.zeros((len(pixels_BHWC), VOCAB.tokens_per_image), np.int32)


@pytest.fixture
def loaded(model, monkeypatch):  # noqa: F811
    bundle = types.SimpleNamespace(text=TEXT, image=Picture(), speech=Sound())
    made = loading.LoadedModel(model, bundle, TEMPLATES, step=3)
    monkeypatch.setattr(loading, "load_model", lambda directory, **rest: made)
    return made


def run(tmp_path, rows, *flags):
    """`aromni generate chat` on `rows`; returns the lines of `result.json`."""
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    lines, output = tmp_path / "in.jsonl", tmp_path / "out"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    PilImage.new("RGB", (2, 2)).save(tmp_path / "a.png")
    args = parser.parse_args(
        [
            "chat",
            "--model=m",
            f"--input={lines}",
            f"--output={output}",
            "--max_text_tokens=8",
            "--max_seconds=0.1",
            *flags,
        ]
    )
    args.config_overrides = ["--config.text_budget=4", "--config.speech_budget_frames=3"]
    assert generate.main(args) == 0
    return json.loads((output / "result.json").read_text())["answers"]


def test_turns_of_a_dialogue_share_a_cache_whatever_stands_between_them(tmp_path, loaded, capsys):
    one = [{"conversation": "x", "text": f"question {i}"} | ({"image": "a.png"} if i == 3 else {}) for i in range(12)]
    other = [{"conversation": "2", "text": "question 0"}]
    mixed = run(tmp_path, [one[0], {"text": "alone"}, *other, *one[1:]], "--budget=100")
    assert "chat: " in capsys.readouterr().out
    alone = run(tmp_path, one, "--budget=100", "--stream", "--overwrite")
    assert "0011_chat: " in capsys.readouterr().out
    assert "turn" not in mixed[1] and mixed[2]["turn"]["conversation"] == "2"
    together = [mixed[0], *mixed[3:]]
    for number, (line, wanted) in enumerate(zip(together, alone, strict=True)):
        assert line["turn"] == wanted["turn"] and line["text"] == wanted["text"]
        turn = line["turn"]
        assert turn["number"] == number and turn["budget_tokens"] == 100
        assert turn["answer_tokens"] == 2 * 4 + 3 * 2 + VOCAB.tokens_per_image + 8  # text, frames, picture, delimiters
        assert turn["occupancy_tokens"] <= 100 and turn["tokens_made"] == line["latency"]["tokens"]
        assert 0 < line["latency"]["first_token_seconds"] <= line["latency"]["seconds"]
    assert sum(line["turn"]["evicted_turns"] for line in alone) > 3
    assert mixed[2]["text"] == mixed[0]["text"]  # the same question, seed and place in its dialogue
    heard = [name for line in alone for name in line["files"] if name.endswith(".wav")]
    assert heard and all(len(soundfile.read(tmp_path / "out" / name)[0]) % 10 == 0 for name in heard)


def test_a_turn_that_does_not_fit_loses_no_other(tmp_path, loaded):
    rows = [{"conversation": "x", "text": text} for text in ("short", "y" * 90, "short")]
    with pytest.raises(ValueError, match="1 of 3 .* this question has 100 tokens, but a budget of 100"):
        run(tmp_path, rows, "--budget=100")
    answers = json.loads((tmp_path / "out" / "result.json").read_text())["answers"]
    assert [answer["turn"]["number"] for answer in (answers[0], answers[2])] == [0, 1]
    assert "error" in answers[1] and "turn" not in answers[1]
    with pytest.raises(ValueError, match="line 1: only a chat is a turn of a conversation, not question"):
        run(tmp_path, [{"task": "question", "text": "who?", "conversation": "x"}])


def test_a_small_budget_holds_a_dialogue_and_a_smaller_one_is_named(tmp_path, loaded, monkeypatch):
    """The budget that the error asks for holds turns of one character, each forgotten for the next."""
    rows = [{"conversation": "x", "text": "?"} for _ in range(5)]
    for impossible in (23, 3, 0, -5):
        with pytest.raises(ValueError, match=f"^--budget={impossible} holds no turn.*; give at least 24$"):
            run(tmp_path, rows, f"--budget={impossible}")
    answers = run(tmp_path, rows, "--budget=24")
    assert all(answer["turn"]["occupancy_tokens"] <= 24 for answer in answers)
    assert sum(answer["turn"]["evicted_turns"] for answer in answers) > 0
    short = dataclasses.replace(loaded, model=dataclasses.replace(loaded.model, max_positions=50))
    monkeypatch.setattr(loading, "load_model", lambda directory, **rest: short)
    with pytest.raises(ValueError, match="^--budget=51 is more than the 50 positions of the model"):
        run(tmp_path, rows, "--budget=51", "--overwrite")


def test_the_benchmark_holds_a_dialogue(loaded, monkeypatch, tmp_path, capsys):
    made_for = dataclasses.replace(loaded, model=dataclasses.replace(loaded.model, max_positions=160))
    monkeypatch.setattr(loading, "load_model", lambda directory: made_for)
    assert cli.run("bench", ["dialogue", "--model=m", "--repeats=1", f"--json={tmp_path / 'bench.json'}"]) == 0
    result = json.loads((tmp_path / "bench.json").read_text())["dialogue"]
    assert result["turns"] == 200 and result["occupancy_tokens_most"] <= result["budget_tokens"] == 160
    assert result["evicted_turns"] > 100
    assert result["ratio_last_to_first"] == result["turn_seconds_last"] / result["turn_seconds_first"] > 0
    assert 0 <= result["device_bytes_growth"] < 1000 < result["device_bytes"]
    assert "turns evicted" in capsys.readouterr().out
    assert cli.run("bench", ["dialogue"]) == 1
    assert "--model" in capsys.readouterr().err
