"""SI-SDR against values worked out by hand, and spectrograms of tones whose place is known."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from aromni_jax.evaluation.sound_quality import mean_stoi, si_sdr_db
from aromni_jax.evaluation.spectrogram import NUM_MELS, coloured, mel_levels_db


def test_si_sdr_by_hand():
    truth = np.array([1.0, -1.0, 1.0, -1.0])
    assert si_sdr_db(np.array([2.5, -2.5, 1.5, -1.5]), truth) == pytest.approx(10 * np.log10(16))
    assert si_sdr_db(np.array([1.0, 1.0, -1.0, -1.0]), truth) == -100
    assert si_sdr_db(np.zeros(4), truth) == -100


def test_si_sdr_is_blind_to_scale_sign_and_offset_and_sees_noise_and_shift():
    rng = np.random.default_rng(0)
    truth, noise = rng.normal(size=(2, 20_000)).astype(np.float32)
    for decibels in (0, 10, 20):
        noisy = truth + 10 ** (-decibels / 20) * noise
        measured = si_sdr_db(noisy, truth)
        assert measured == pytest.approx(decibels, abs=0.3)
        assert si_sdr_db(-3 * noisy + 2, truth + 1) == pytest.approx(measured, abs=1e-3)
    assert si_sdr_db(truth, truth) == 100
    assert si_sdr_db(np.roll(truth, 1), truth) < -20


def test_si_sdr_of_silence_is_undefined():
    for silence in (np.zeros(100, np.float32), np.full(100, 0.1, np.float32)):
        assert np.isnan(si_sdr_db(np.ones(100), silence))
    for shape in ((3,), (0,), (4, 1)):
        with pytest.raises(ValueError, match="waveforms of one length"):
            si_sdr_db(np.ones(shape), np.ones(4 if shape == (3,) else shape))


def test_stoi_joins_short_sounds(monkeypatch):
    sounds = np.random.default_rng(0).normal(size=(4, 8000))
    assert mean_stoi([(sound, sound) for sound in sounds], 10_000) == pytest.approx(1, abs=1e-3)
    assert mean_stoi([(sounds[0], sounds[0])], 10_000) is None
    monkeypatch.setitem(sys.modules, "pystoi", None)
    with pytest.raises(ValueError, match="pip install"):
        mean_stoi([], 10_000)


@pytest.mark.parametrize("rate_hz", [4000, 16_000, 24_000])
def test_a_tone_is_a_line_at_its_band(rate_hz):
    """A full-scale sine has about 0 dB in the band around it, within what triangles and neighbouring bins change."""
    tone = np.sin(2 * np.pi * 1000 * np.arange(rate_hz) / rate_hz)
    levels = mel_levels_db(tone, rate_hz)
    assert levels.shape == (NUM_MELS, 201)
    middle = levels[:, 100]
    edges = np.linspace(0, np.log10(1 + rate_hz / 2 / 700), NUM_MELS + 2)
    assert abs(int(middle.argmax()) - int(np.abs(edges[1:-1] - np.log10(1 + 1000 / 700)).argmin())) <= 1
    assert -7 < middle.max() < 6
    picture = coloured(levels, float(levels.max()))
    assert picture.shape == (NUM_MELS, 201, 3) and picture.dtype == np.uint8
    assert picture[NUM_MELS - 1 - middle.argmax(), 100].sum() > 600 > picture[0, 100].sum()


def test_short_and_silent_sounds_have_pictures():
    assert mel_levels_db(np.zeros(3), 16_000).shape == (NUM_MELS, 1)
    assert len(np.unique(coloured(mel_levels_db(np.zeros(1000), 8000), -120.0))) > 0
    with pytest.raises(ValueError, match="with samples"):
        mel_levels_db(np.zeros(0), 8000)


def test_colours_grow_lighter():
    ramp = coloured(np.linspace(-70, 0, 71)[:, None], 0.0)[::-1, 0].astype(int)
    assert (np.diff(ramp @ [2, 7, 1]) > 0).all()
