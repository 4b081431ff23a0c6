"""The speech tokenizer: lengths, causality, independence of batching, resuming, sound that cannot be read."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import soundfile

from aromni_jax.tokenizers import speech, training
from aromni_jax.tokenizers.nets import spectral
from aromni_jax.tokenizers.speech import SpeechTokenizer, SpeechTokenizerConfig, prepare_sound, train_speech_tokenizer

TINY = SpeechTokenizerConfig(
    net=dataclasses.replace(
        speech.QUICKSTART.net,
        sample_rate_hz=4000,
        hop=80,
        window=160,
        num_mels=20,
        encoder_dim=16,
        encoder_layers=2,
        decoder_dim=16,
        decoder_layers=2,
        code_dim=8,
    ),
    num_codes=32,
    mel_weight=1.0,
    spectral_weight=1.0,
    crop_codes=32,
    recipe=dataclasses.replace(speech.QUICKSTART.recipe, total_steps=40, batch_size=4, log_every_steps=5),
)
HOP = TINY.net.hop


def sounds(count: int = 6, seed: int = 0) -> list[np.ndarray]:
    """Decaying tones of random pitch and length."""
    rng = np.random.default_rng(seed)
    times = [np.arange(rng.integers(3000, 9000)) / 4000 for _ in range(count)]
    return [(0.5 * np.sin(2 * np.pi * rng.uniform(150, 900) * t) * np.exp(-t)).astype(np.float32) for t in times]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    log = []
    tokenizer = train_speech_tokenizer(sounds(), TINY, 0, tmp_path_factory.mktemp("work"), log.append)
    return tokenizer, log


def test_training_learns_and_reports(trained):
    _, log = trained
    assert log[-1]["step"] == log[-1]["total_steps"] == 40
    assert log[-1]["loss"] < log[0]["loss"]
    assert {"mel_distance", "perplexity"} <= log[-1].keys()


@pytest.mark.parametrize("length", [1, HOP - 1, HOP, HOP + 1, 63 * HOP, 64 * HOP, 64 * HOP + 1, 300 * HOP - 7])
def test_lengths(trained, length):
    tokenizer, _ = trained
    codes = tokenizer.encode([np.zeros(length, np.float32)])[0]
    assert codes.shape == (1, -(-length // HOP)) and codes.dtype == np.int32
    waveform = tokenizer.decode([codes])[0]
    assert waveform.shape == (codes.shape[1] * HOP,) and waveform.dtype == np.float32
    assert np.isfinite(waveform).all()


def test_codes_and_sound_do_not_depend_on_neighbours(trained):
    tokenizer, _ = trained
    many = sounds(40, seed=3)
    codes = tokenizer.encode(many)
    decoded = tokenizer.decode(codes)
    for i in (0, 7, 39):
        np.testing.assert_array_equal(tokenizer.encode([many[i]])[0], codes[i])
        np.testing.assert_array_equal(tokenizer.decode([codes[i]])[0], decoded[i])
    reverse = tokenizer.encode(many[::-1])[::-1]
    assert all(np.array_equal(a, b) for a, b in zip(codes, reverse))
    assert tokenizer.encode([]) == [] and tokenizer.decode([]) == []


def test_encoder_sees_no_future(trained):
    tokenizer, _ = trained
    sound = np.concatenate(sounds(3))[: 60 * HOP]
    other = sound.copy()
    other[41 * HOP :] = np.random.default_rng(0).normal(size=19 * HOP)
    whole, changed = tokenizer.encode([sound, other])
    np.testing.assert_array_equal(whole[:, :41], changed[:, :41])
    assert (whole != changed).any()
    np.testing.assert_array_equal(tokenizer.encode([sound[: 41 * HOP]])[0], whole[:, :41])


def test_decoder_sees_only_the_stated_lookahead(trained):
    tokenizer, _ = trained
    codes = np.random.default_rng(0).integers(0, 32, (1, 60), dtype=np.int32)
    other = codes.copy()
    other[:, 40:] = (other[:, 40:] + 5) % 32
    first, second = tokenizer.decode([codes, other])
    final = (40 - tokenizer.lookahead_codes) * HOP
    assert tokenizer.lookahead_codes == 1
    np.testing.assert_array_equal(first[:final], second[:final])
    assert np.abs(first[final : 40 * HOP] - second[final : 40 * HOP]).max() > 0
    np.testing.assert_array_equal(tokenizer.decode([codes[:, :40]])[0][:final], first[:final])


def test_interrupted_training_ends_with_the_same_tokenizer(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_SAVE_EVERY_SECONDS", 0.0)

    def stop(entry):
        if entry["step"] == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_speech_tokenizer(sounds(), TINY, 0, tmp_path, stop)
    assert train_speech_tokenizer(sounds(), TINY, 0, tmp_path).fingerprint == trained[0].fingerprint


def test_save_and_load(trained, tmp_path):
    tokenizer, _ = trained
    tokenizer.save(tmp_path)
    loaded = SpeechTokenizer.load(tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint and loaded.codes_per_second == 50
    codes = tokenizer.encode(sounds())
    assert all(np.array_equal(a, b) for a, b in zip(codes, loaded.encode(sounds())))


def test_other_rates_channels_and_types_are_converted(tmp_path):
    tone = np.sin(2 * np.pi * 200 * np.arange(8000) / 8000).astype(np.float32)
    half = prepare_sound(tone, 8000, 4000)
    assert half.dtype == np.float32 and half.shape == (4000,)
    assert np.abs(half[200:-200] - tone[::2][200:-200]).max() < 0.01
    stereo = np.stack([tone, -tone], axis=1)
    assert np.abs(prepare_sound(stereo, 4000, 4000)).max() == 0
    integers = prepare_sound((tone * 32767).astype(np.int16), 8000, 8000)
    assert np.abs(integers - tone).max() < 1e-3
    assert np.abs(prepare_sound(np.array([0, 128, 255], np.uint8), 8000, 8000) - [-1, 0, 0.992]).max() < 1e-3
    soundfile.write(tmp_path / "tone.wav", stereo[:, :1], 8000)
    np.testing.assert_allclose(prepare_sound(tmp_path / "tone.wav", None, 4000), half, atol=1e-3)


def test_bad_sound_is_named(trained, tmp_path):
    tokenizer, _ = trained
    (tmp_path / "fake.wav").write_bytes(b"not a sound")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, np.float32), 8000)
    for name, message in (("fake.wav", "fake.wav cannot be read"), ("empty.wav", "empty.wav has no samples")):
        with pytest.raises(ValueError, match=message):
            tokenizer.prepare(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="none.wav"):
        tokenizer.prepare(tmp_path / "none.wav")
    with pytest.raises(ValueError, match="not a number .sample 2"):
        tokenizer.prepare(np.array([0, 0, np.nan]), 4000)
    with pytest.raises(ValueError, match="sample rate None"):
        tokenizer.prepare(np.zeros(10))
    with pytest.raises(ValueError, match="waveform 1 has no samples"):
        tokenizer.encode([np.zeros(10), np.zeros(0)])
    with pytest.raises(ValueError, match=r"codes 0 must lie in 0\.\.31"):
        tokenizer.decode([np.full((1, 4), 32)])
    with pytest.raises(ValueError, match="expected .1, number of frames."):
        tokenizer.decode([np.zeros((2, 4), np.int32)])
    with pytest.raises(ValueError, match="no utterances"):
        train_speech_tokenizer([], TINY, 0, tmp_path)


def test_frames_end_where_their_hop_ends():
    x = np.arange(1, 9, dtype=np.float32)[None]
    frames = np.asarray(spectral.causal_frames(x, 4, 2))
    np.testing.assert_array_equal(frames[0, :2], [[0, 0, 1, 2], [1, 2, 3, 4]])


@pytest.mark.parametrize("overlap", [2, 4])
def test_inverse_of_spectra_is_the_waveform(overlap):
    hop = 16
    window = overlap * hop
    x = np.random.default_rng(0).normal(size=(2, 20 * hop)).astype(np.float32)
    spectra = np.fft.rfft(np.asarray(spectral.causal_frames(x, window, hop)) * spectral.hann_window(window), axis=-1)
    y = np.asarray(spectral.inverse_frames(spectra.astype(np.complex64), window, hop))
    final = x.shape[1] - (window - hop)
    np.testing.assert_allclose(y[:, :final], x[:, :final], atol=1e-5)
