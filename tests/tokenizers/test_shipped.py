"""The tokenizers that come with the package: small, whole, ours, and as good on held-out data as their card says."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from pystoi import stoi
from sklearn.svm import SVC

from aromni_jax.evaluation.picture_quality import psnr_db
from aromni_jax.tokenizers import shipped, storage
from aromni_jax.tokenizers.image import QUICKSTART as PICTURES
from aromni_jax.tokenizers.image import ImageTokenizer
from aromni_jax.tokenizers.speech import QUICKSTART as SOUNDS
from aromni_jax.tokenizers.speech import SpeechTokenizer
from data_pipelines.corpus import CorpusSizes, build_corpus
from launch.cli import run

SIZES = CorpusSizes(
    train_scenes=0,
    heldout_scenes=24,
    digit_utterances_per_voice=0,
    phrase_utterances=0,
    heldout_digit_utterances_per_voice=2,
    heldout_phrases_per_voice=12,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Facts of every picture and utterance of a small corpus, with the path of its file."""
    root = build_corpus(tmp_path_factory.mktemp("corpus"), sizes=SIZES).parent
    found = []
    for part in sorted(root.glob("*/part.jsonl")):
        found += [json.loads(line) | {"path": part.parent / json.loads(line)["name"]} for line in part.open()]
    return found


@pytest.fixture(scope="module")
def pictures():
    return ImageTokenizer.load(shipped.shipped_directory("image"))


def through(tokenizer: ImageTokenizer, records: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.stack([tokenizer.prepare(record["path"]) for record in records])
    return pixels, tokenizer.decode(tokenizer.encode(pixels))


def test_they_are_the_quickstart_nets_in_at_most_six_megabytes(pictures):
    sounds = SpeechTokenizer.load(shipped.shipped_directory("speech"))
    assert (pictures.config.net, pictures.num_codes) == (PICTURES.net, PICTURES.num_codes)
    assert sounds.codec.net == SOUNDS.net and sounds.num_codes == SOUNDS.num_codes
    files = [file for kind in shipped.KINDS for file in shipped.shipped_directory(kind).iterdir()]
    assert {file.name for file in files} == {"config.json", "params.safetensors"}
    assert sum(file.stat().st_size for file in files) <= 6_000_000
    for kind, tokenizer in (("image", pictures), ("speech", sounds)):
        card = shipped.shipped_card(kind)
        assert card["fingerprint"] == tokenizer.fingerprint and card["license"] == "Apache-2.0"
        recipe = storage.read_json(shipped.shipped_directory(kind) / "config.json")["recipe"]
        assert f"--total_steps={recipe['total_steps']}" in card["command"]


def test_a_changed_file_is_refused(tmp_path, monkeypatch):
    shutil.copytree(shipped.shipped_directory("image").parent, tmp_path / "weights")
    monkeypatch.setattr(shipped, "_WEIGHTS", tmp_path / "weights")
    with open(tmp_path / "weights" / "image" / "params.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\1")
    with pytest.raises(ValueError, match="params.safetensors is missing or not the file that was shipped"):
        shipped.shipped_directory("image")
    shipped.shipped_directory("speech")
    (tmp_path / "weights" / "speech" / "config.json").unlink()
    with pytest.raises(ValueError, match="install the package again"):
        shipped.shipped_directory("speech")
    with pytest.raises(ValueError, match="no text tokenizer comes with the package"):
        shipped.shipped_directory("text")


def test_held_out_pictures(corpus, pictures):
    real, rebuilt = through(pictures, [record for record in corpus if record["split"] == "heldout" and "path" in record
                                       and record["path"].suffix == ".png"])  # fmt: skip
    claimed = shipped.shipped_card("image")["heldout"]["psnr_db"]
    assert psnr_db(rebuilt, real).mean() > claimed - 1.0


def test_a_classifier_of_real_digits_reads_reconstructed_ones(corpus, pictures):
    scans = [record for record in corpus if record["path"].parent.name == "digits"]
    train = [record for record in scans if record["split"] == "train"]
    heldout = [record for record in scans if record["split"] == "heldout"]

    def features(pixels: np.ndarray) -> np.ndarray:
        return pixels[..., 0].reshape(len(pixels), 16, 4, 16, 4).mean((2, 4)).reshape(len(pixels), -1) / 255

    judge = SVC(C=10.0).fit(
        features(np.stack([pictures.prepare(record["path"]) for record in train])),
        [record["facts"]["label"] for record in train],
    )
    real, rebuilt = through(pictures, heldout)
    labels = [record["facts"]["label"] for record in heldout]
    accuracy = judge.score(features(real), labels)
    assert accuracy > 0.95 and judge.score(features(rebuilt), labels) >= 0.9 * accuracy


def test_held_out_speech_is_intelligible(corpus):
    sounds = SpeechTokenizer.load(shipped.shipped_directory("speech"))
    spoken = [record for record in corpus if record["path"].suffix == ".wav" and record["scene"]]
    for unheard in (False, True):
        chosen = [record for record in spoken if (record["holdout"] == "voice") == unheard]
        assert len(chosen) >= 12
        real = [sounds.prepare(record["path"]) for record in chosen]
        rebuilt = [made[: len(truth)] for made, truth in zip(sounds.decode(sounds.encode(real)), real)]
        # Phrases are short for STOI, so they stand one after another.
        assert stoi(np.concatenate(real), np.concatenate(rebuilt), sounds.sample_rate_hz) >= 0.8, unheard


def test_the_command_reads_them_and_does_not_write_them(tmp_path, capsys):
    codes = tmp_path / "codes.npy"
    np.save(codes, np.zeros((1, 64), np.int32))
    flags = ["--kind=image", "--tokenizer=shipped"]
    assert run("tokenizer", ["decode", *flags, f"--input={codes}", f"--output={tmp_path / 'picture.png'}"]) == 0
    assert (tmp_path / "picture.png").exists()
    assert run("tokenizer", ["train", *flags, f"--input={tmp_path}"]) != 0
    assert "comes with the package" in capsys.readouterr().err
