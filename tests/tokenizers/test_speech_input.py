"""Sound of every kind to float32 mono: said when converted, in pieces when long, named when it cannot be read."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import soundfile
from scipy.signal import resample_poly

from aromni_jax.tokenizers import speech, speech_input
from aromni_jax.tokenizers.speech import SpeechTokenizer
from aromni_jax.tokenizers.speech_codecs import VocosCodec
from aromni_jax.tokenizers.speech_input import prepare_sound
from tests.tokenizers import test_speech


def noise(num_samples: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.9, 0.9, num_samples).astype(np.float32)


def test_conversions_are_said(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.stack([noise(500)] * 2, axis=1), 8000)
    lines: list[str] = []
    prepare_sound(tmp_path / "a.wav", None, 4000, lines.append)
    assert lines == [f"{tmp_path}/a.wav: 8000 Hz, 2 channels, converted to 4000 Hz mono"]
    prepare_sound(noise(500), 4000, 4000, lines.append)
    assert len(lines) == 1
    prepare_sound(noise(500), 22050, 4000, lines.append)
    assert lines[1] == "sound: 22050 Hz, 1 channel, converted to 4000 Hz mono"


@pytest.mark.parametrize(
    ("rate", "target"), [(44100, 16000), (8000, 24000), (22050, 24000), (16000, 16000), (16000, 8000)]
)
@pytest.mark.parametrize("extra", [0, 1, 1234])
def test_blocks_are_the_whole(monkeypatch, rate, target, extra):
    """Sound longer than a block is resampled in pieces; the pieces are those of the whole."""
    monkeypatch.setattr(speech_input, "_BLOCK_SECONDS", 1)
    sound = noise(3 * rate + extra)
    divisor = np.gcd(rate, target)
    expected = resample_poly(sound.astype(np.float64), target // divisor, rate // divisor)
    found = prepare_sound(sound, rate, target)
    assert found.dtype == np.float32 and found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_files_in_blocks(monkeypatch, tmp_path):
    monkeypatch.setattr(speech_input, "_BLOCK_SECONDS", 1)
    stereo = np.stack([noise(20_000), noise(20_000)[::-1]], axis=1)
    for suffix in ("wav", "flac"):
        soundfile.write(tmp_path / f"a.{suffix}", stereo, 8000, subtype="PCM_16")
        found = prepare_sound(tmp_path / f"a.{suffix}", None, 4000)
        np.testing.assert_allclose(found, resample_poly(stereo.mean(axis=1), 1, 2), atol=1e-4)


def test_sound_that_is_cut_short_is_named(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(8000), 8000)
    whole = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "cut.wav").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut.wav is cut short: it announces 16044 bytes and holds 8022"):
        prepare_sound(tmp_path / "cut.wav", None, 8000)
    (tmp_path / "head.wav").write_bytes(whole[:20])
    with pytest.raises(ValueError, match="head.wav"):
        prepare_sound(tmp_path / "head.wav", None, 8000)
    # A program that wrote to a pipe could not go back to fill in the size; that is no damage.
    unknown = bytearray(whole)
    unknown[4:8] = b"\xff" * 4
    (tmp_path / "pipe.wav").write_bytes(unknown)
    assert len(prepare_sound(tmp_path / "pipe.wav", None, 8000)) == 8000
    soundfile.write(tmp_path / "a.flac", noise(80_000), 8000)
    whole = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut.flac"):
        prepare_sound(tmp_path / "cut.flac", None, 8000)


def test_wrong_magic_bytes_and_lengths(tmp_path, monkeypatch):
    for name, content in (("a.wav", b"RIFF"), ("b.flac", b"\x89PNG\r\n\x1a\n" * 9), ("c.ogg", b""), ("d.wav", b"ID3")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be read as sound"):
            prepare_sound(tmp_path / name, None, 8000)
    with pytest.raises(ValueError, match=r"lasts 7\.0 h; at most 6 h are read"):
        prepare_sound(np.broadcast_to(np.float32(0), 7 * 3600 * 100), 100, 4000)
    with pytest.raises(ValueError, match=r"has shape \(2, 2, 2\)"):
        prepare_sound(np.zeros((2, 2, 2)), 100, 4000)
    monkeypatch.setattr(speech_input, "_BLOCK_SECONDS", 1)
    sound = noise(30_000)
    sound[20_001] = np.inf
    with pytest.raises(ValueError, match="not a number .sample 20001"):
        prepare_sound(sound, 8000, 4000)


@pytest.fixture(scope="module")
def untrained():
    codec = VocosCodec(test_speech.TINY.net, test_speech.TINY.num_codes)
    rng = np.random.default_rng(0)
    shapes = codec.shapes()

    params = jax.tree.map(lambda leaf: (0.2 * rng.normal(size=leaf.shape)).astype(np.float32), shapes["params"])
    return SpeechTokenizer(test_speech.TINY, params, rng.normal(size=shapes["codebook_CE"].shape))


def test_an_hour_of_sound(untrained, tmp_path):
    """Read in blocks, coded as a stream, decoded as a stream: sizes and values stay defined."""
    one_minute = (0.3 * noise(60 * 4000)).astype(np.float32)
    with soundfile.SoundFile(tmp_path / "hour.wav", "w", 4000, 1, "PCM_16") as file:
        for _ in range(60):
            file.write(one_minute)
    waveform = untrained.prepare(tmp_path / "hour.wav")
    assert len(waveform) == 3600 * 4000
    (codes,) = untrained.encode([waveform])
    assert codes.shape == (1, 3600 * 50)
    (start,) = untrained.encode([waveform[: 60 * 4000]])
    assert (codes[:, : start.shape[1]] == start).mean() > 0.999
    assert codes.shape[1] > speech._LONGEST_CALL
    (decoded,) = untrained.decode([codes[:, :10_000]])
    assert decoded.shape == (10_000 * untrained.hop,) and np.isfinite(decoded).all()


def test_silence_and_single_samples(untrained):
    for waveform in (np.zeros(1, np.float32), np.zeros(4000, np.float32), np.ones(1, np.float32)):
        (codes,) = untrained.encode([waveform])
        (decoded,) = untrained.decode([codes])
        assert np.isfinite(decoded).all() and np.abs(decoded).max() <= 1
