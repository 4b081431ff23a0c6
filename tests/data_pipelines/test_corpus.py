"""The embedded corpus: the same bytes for the same seed, resumable, and nothing held out leaks into training."""

from __future__ import annotations

import hashlib
import json
import pathlib

import numpy as np
import pytest
import soundfile
from PIL import Image as PilImage

from aromni_jax.structs import Task
from data_pipelines import scenes
from data_pipelines.corpus import HELD_OUT_VOICES, TRAIN_VOICES, CorpusSizes, build_corpus
from data_pipelines.sources import ManifestSource

SMALL = CorpusSizes(
    train_scenes=64,
    heldout_scenes=8,
    digit_utterances_per_voice=2,
    phrase_utterances=16,
    heldout_digit_utterances_per_voice=4,
    heldout_phrases_per_voice=4,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return build_corpus(tmp_path_factory.mktemp("corpus") / "first", sizes=SMALL)


def lines_of(manifest: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in manifest.read_text().splitlines()]


def digest(root: pathlib.Path) -> str:
    total = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        total.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return total.hexdigest()


def test_interrupted_build_ends_with_the_same_bytes(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    class Stop(Exception):
        pass

    def stop_after_scenes(event: dict) -> None:
        if event["part"] == "scenes":
            raise Stop

    with pytest.raises(Stop):
        build_corpus(tmp_path / "again", sizes=SMALL, progress=stop_after_scenes)
    (tmp_path / "again" / ".tmp-speech_000").mkdir()
    events: list[dict] = []
    manifest = build_corpus(tmp_path / "again", sizes=SMALL, progress=events.append)
    assert digest(manifest.parent) == digest(corpus.parent)
    assert {event["part"] for event in events} == {"digits", "scenes", "speech", "manifest"}
    assert build_corpus(tmp_path / "again", sizes=SMALL) == manifest


def test_another_seed_in_the_same_directory_is_an_error(corpus: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="another directory"):
        build_corpus(corpus.parent, seed=1, sizes=SMALL)


def test_every_task_and_file_is_there(corpus: pathlib.Path) -> None:
    for split in ("train", "heldout"):
        source = ManifestSource(corpus, split=split)
        conversations = [source[i] for i in range(len(source))]
        assert {c.task for c in conversations} == set(Task) - {Task.CHAT}
        assert all(file.path.is_file() for c in conversations for file in c.media())
    keys = [line["key"] for line in lines_of(corpus)]
    assert len(set(keys)) == len(keys)


def test_nothing_held_out_reaches_training(corpus: pathlib.Path) -> None:
    lines = lines_of(corpus)
    train = [line for line in lines if line["split"] == "train"]
    heldout = [line for line in lines if line["split"] == "heldout"]
    assert {line["facts"]["holdout"] for line in heldout} == {"scan", "combination", "sample", "voice"}
    assert {line["facts"]["holdout"] for line in train} == {""}
    assert {line["facts"].get("voice") for line in train} <= {None, *TRAIN_VOICES}
    assert {line["facts"]["voice"] for line in heldout if line["facts"]["holdout"] == "voice"} == set(HELD_OUT_VOICES)

    def media(split: list[dict]) -> set[str]:
        parts = [part for line in split for message in line["messages"] for part in message["parts"]]
        return {value for part in parts for kind, value in part.items() if kind != "text"}

    assert not media(train) & media(heldout)
    text = "\n".join(part.get("text", "") for line in train for m in line["messages"] for part in m["parts"])
    assert not any(f"{colour} {shape}" in text for colour, shape in scenes.HELD_OUT_COMBINATIONS)
    assert not {line["facts"]["label"] for line in train} & {" ".join(pair) for pair in scenes.HELD_OUT_COMBINATIONS}


def test_media_are_what_the_facts_say(corpus: pathlib.Path) -> None:
    for line in lines_of(corpus)[::7]:
        for part in (part for message in line["messages"] for part in message["parts"]):
            if "image" in part:
                pixels = np.asarray(PilImage.open(corpus.parent / part["image"]))
                assert pixels.shape == (64, 64, 3) and pixels.dtype == np.uint8
                facts = line["facts"]
                if facts["kind"] == "scene" and "background" in facts:
                    distance = np.abs(pixels.astype(int) - scenes.COLOURS[facts["colour"]]).sum(-1)
                    assert (distance < 8).sum() > 60, line["key"]
                    assert (
                        np.abs(pixels.astype(int) - scenes.BACKGROUNDS[facts["background"]]).sum(-1) < 8
                    ).sum() > 500
            elif "speech" in part:
                waveform, rate = soundfile.read(corpus.parent / part["speech"])
                assert rate == 16_000 and 0.1 < len(waveform) / rate < 3.5
                assert abs(len(waveform) / rate - line["facts"]["seconds"]) < 0.01
                assert 0.7 < np.abs(waveform).max() <= 0.81


def test_questions_have_true_answers() -> None:
    rng = np.random.default_rng(0)
    for index in range(300):
        scene = scenes.random_scene(rng, held_out=False, index=index)
        question, answer = scenes.question(scene, rng)
        if answer in ("yes", "no"):
            word = question.rstrip("?").split()[-1]
            assert (word in (scene.colour, scene.shape)) == (answer == "yes")
        else:
            assert answer in dataclass_values(scene)


def dataclass_values(scene: scenes.Scene) -> tuple[str, ...]:
    return scene.colour, scene.shape, scene.size, scene.place, scene.background
