"""Common Voice as it is published, in MP3: read through the source and a tokenizer's own preparation."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
import soundfile

from aromni_jax.tokenizers.speech_input import prepare_sound
from data_pipelines.source_kinds import open_source

RATE_HZ = 32_000


def common_voice(root: pathlib.Path, **encoding: object) -> tuple[pathlib.Path, np.ndarray]:
    """A language of one clip that is half silent and half a tone; and the tone at 16 kHz."""
    seconds = np.arange(2 * RATE_HZ) / RATE_HZ
    tone = np.where(seconds < 1, 0, 0.5 * np.sin(2 * np.pi * 440 * seconds)).astype(np.float32)
    (root / "clips").mkdir(parents=True)
    soundfile.write(root / "clips" / "a.mp3", tone, RATE_HZ, format="MP3", **encoding)
    (root / "validated.tsv").write_text("client_id\tpath\tsentence\nspeaker\ta.mp3\tA tone.\n")
    return root / "clips" / "a.mp3", tone[::2]


def prepared(root: pathlib.Path) -> np.ndarray:
    """The clip as a tokenizer of 16 kHz gets it."""
    (clip,) = open_source(f"common_voice:{root}", tasks="speech_to_text")[0].media()
    with clip.on_disk() as path:
        return prepare_sound(path, None, 16_000)


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_a_clip_is_heard_as_it_was(mode: str, tmp_path: pathlib.Path) -> None:
    path, tone = common_voice(tmp_path / "corpus", bitrate_mode=mode)
    assert path.read_bytes()[:2] == b"\xff\xfb"  # really MP3
    found = prepared(tmp_path / "corpus")
    assert found.shape == tone.shape and np.abs(found[:15_000]).max() < 0.01
    assert np.corrcoef(found[17_000:31_000], tone[17_000:31_000])[0, 1] > 0.999


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.2])
def test_a_clip_cut_short_is_named(keep: float, tmp_path: pathlib.Path) -> None:
    path, _ = common_voice(tmp_path / "corpus")
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(ValueError, match=r"a.mp3 is cut short: it announces 64000 samples and holds \d+"):
        prepared(tmp_path / "corpus")
    for broken in (b"", data[:40], b"garbage" * 999):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="a.mp3 cannot be read as sound"):
            prepared(tmp_path / "corpus")


def test_a_clip_that_does_not_say_its_length_is_read_to_its_end(tmp_path: pathlib.Path) -> None:
    """Some writers leave out the frame that counts the others, behind text about the sound or not."""
    path, tone = common_voice(tmp_path / "corpus", bitrate_mode="VARIABLE")
    data = path.read_bytes()
    second = data.index(b"\xff\xfb", 4)
    whole = len(prepared(tmp_path / "corpus"))
    path.write_bytes(b"ID3\x04\x00\x00\x00\x00\x02\x00" + bytes(256) + data)
    assert len(prepared(tmp_path / "corpus")) == whole == len(tone)
    path.write_bytes(data[second:])
    # libsndfile guesses from the quiet beginning that it lasts longer than it does.
    assert soundfile.info(path).frames > 1.1 * 64_000
    assert abs(len(prepared(tmp_path / "corpus")) - len(tone)) < 2_000
