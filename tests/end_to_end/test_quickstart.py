"""`aromni quickstart` at toy sizes: interrupted and killed on the way, it ends with a page and a model that answers."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import soundfile
from PIL import Image


def start(workdir: pathlib.Path, *overrides: str) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "launch.cli",
        "quickstart",
        "--config=configs/quickstart.py:tiny",
        "--tokenizers=train",
    ]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return subprocess.Popen(
        [*command, f"--workdir={workdir}", *overrides],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def stop_when(process: subprocess.Popen, words: str, number: signal.Signals) -> str:
    """Sends the signal when a line contains `words`; returns everything that was said."""
    assert process.stdout is not None
    said = []
    timer = threading.Timer(400, process.kill)
    timer.start()
    for line in process.stdout:
        said.append(line)
        if words in line:
            os.kill(process.pid, number)
            words = "\0"
    process.wait()
    timer.cancel()
    return "".join(said)


@pytest.mark.slow
def test_interrupted_killed_and_finished(tmp_path):
    workdir = tmp_path / "job"
    said = stop_when(start(workdir), "corpus: done", signal.SIGINT)
    assert "the same command goes on" in said
    said = stop_when(start(workdir), "pretokenize: done", signal.SIGKILL)
    assert "corpus: done" not in said and "tokenizers: done" in said
    assert not (workdir / "report.html").exists()

    process = start(workdir)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert "tokenizers: done" not in said and "train: done" in said and "report.html" in said
    page = (workdir / "report.html").read_text()
    for shown in ("Pictures from text", "Speech from text", "Held-out loss", "Time per stage", str(workdir / "export")):
        assert shown in page
    results = json.loads((workdir / "results.json").read_text())
    assert {score["task"] for score in results["scores"]} == {
        "text_to_image", "speech_to_image", "text_to_speech", "speech_to_text", "caption", "question",
    }  # fmt: skip
    assert all(np.isfinite(line["loss"]) for line in results["losses"])

    # Nothing is left to do; other settings are refused.
    process = start(workdir)
    assert "done in" in process.communicate()[0] and process.returncode == 0
    process = start(workdir, "--config.tokenizers.image_steps=31")
    assert "image_steps" in process.communicate()[0] and process.returncode == 1

    answers_of_the_export(workdir, tmp_path)


def answers_of_the_export(workdir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """`aromni generate` on what was exported: a picture, speech, the same again from the same seed, and streamed."""
    sound = next((workdir / "corpus").glob("speech_*/*.wav"))
    requests = [
        {"task": "text-to-image", "text": "a red star"},
        {"task": "text-to-speech", "text": "seven"},
        {"task": "speech-to-image", "speech": str(sound)},
        {"task": "speech-to-text", "speech": str(sound)},
    ]
    lines = tmp_path / "requests.jsonl"
    lines.write_text("".join(json.dumps(request) + "\n" for request in requests))
    made = []
    for name, more in (("a", []), ("b", []), ("streamed", ["--stream"])):
        command = [sys.executable, "-m", "launch.cli", "generate", f"--model={workdir / 'export'}", f"--input={lines}"]
        subprocess.run(
            [*command, f"--output={tmp_path / name}", "--max_seconds=1", "--max_text_tokens=8", *more],
            check=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        )
        made.append(json.loads((tmp_path / name / "result.json").read_text()))
    assert made[0]["answers"] == made[1]["answers"]
    drawn, spoken, drawn_too, written = made[0]["answers"]
    for line in (drawn, drawn_too):
        assert Image.open(tmp_path / "a" / line["files"][0]).size == (64, 64)
    waveform, rate_hz = soundfile.read(tmp_path / "a" / spoken["files"][0])
    assert 0 < len(waveform) <= rate_hz and np.isfinite(waveform).all()
    assert len(written["text"]) == 1 and written["files"] == []

    latencies = [line.pop("latency") for line in made[2]["answers"]]
    assert made[2]["answers"] == made[0]["answers"]
    streamed, _ = soundfile.read(tmp_path / "streamed" / spoken["files"][0])
    np.testing.assert_allclose(streamed, waveform, atol=2e-4)  # 16 bits round to 3e-5.
    assert latencies[1]["audio_seconds"] == len(waveform) / rate_hz and latencies[1]["rtf"] > 0
    assert 0 < latencies[1]["ftl_seconds"] <= latencies[1]["ttfa_seconds"] < latencies[1]["seconds"]
    assert latencies[0]["audio_seconds"] == 0 and latencies[0]["ttfa_seconds"] is None
