"""Judges on pictures and sounds drawn here: they name what is there, and nothing where nothing is."""

from __future__ import annotations

import numpy as np
import pytest

from aromni_jax.evaluation.judges import NOTHING, PictureJudge, SpeechJudge, log_mel

RATE_HZ = 16_000
COLOURS = {"red": (220, 30, 30), "blue": (40, 60, 230)}


def scene(colour: str, shape: str, rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[:64, :64]
    cy, cx, radius = *rng.uniform(24, 40, 2), rng.uniform(11, 18)
    if shape == "circle":
        mask = (y - cy) ** 2 + (x - cx) ** 2 < radius**2
    else:
        mask = (abs(y - cy) < radius / 3) & (abs(x - cx) < radius) | (abs(x - cx) < radius / 3) & (abs(y - cy) < radius)
    picture = np.full((64, 64, 3), rng.choice([0, 105, 255]), np.float64)
    picture[mask] = COLOURS[colour]
    return np.clip(picture + rng.normal(0, 6, picture.shape), 0, 255).astype(np.uint8)


def digit(label: str, rng: np.random.Generator) -> np.ndarray:
    picture = np.zeros((64, 64, 3))
    left = rng.integers(24, 32)
    picture[10:54, left : left + 8] = 230
    if label == "7":
        picture[10:18, 12 : left + 8] = 230
    return picture.astype(np.uint8)


def pictures(seed: int, count: int) -> tuple[list[np.ndarray], list[str]]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        found += [(digit(label, rng), label) for label in ("1", "7")]
        found += [(scene(c, s, rng), f"{c} {s}") for c in COLOURS for s in ("circle", "cross")]
    return [p for p, _ in found], [label for _, label in found]


def test_picture_judge_names_what_is_there():
    judge = PictureJudge(*pictures(0, 12))
    unseen, labels = pictures(1, 8)
    verdicts = [judge(picture) for picture in unseen]
    assert np.mean([v == label for v, label in zip(verdicts, labels, strict=True)]) > 0.95
    assert judge(np.full((64, 64, 3), 128, np.uint8)) == NOTHING
    with pytest.raises(ValueError, match="at least two different digits"):
        PictureJudge(*([part[i] for i in (0, 2, 3, 4, 5)] for part in pictures(0, 1)))


def word(pitches_hz: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """Two tones after each other, of varied length and loudness, in silence."""
    tones = [np.sin(2 * np.pi * hz * np.arange(int(rng.integers(2000, 3500))) / RATE_HZ) for hz in pitches_hz]
    silence = np.zeros(int(rng.integers(500, 3000)))
    sound = np.concatenate([silence, *tones, silence]) * rng.uniform(0.1, 0.8)
    return (sound + rng.normal(0, 1e-4, len(sound))).astype(np.float32)


def test_speech_judge_names_what_is_said():
    rng = np.random.default_rng(0)
    spoken = {"up": (300, 1200), "down": (1200, 300), "flat": (600, 600)}
    training = [(word(pitches, rng), name) for name, pitches in spoken.items() for _ in range(10)]
    judge = SpeechJudge([w for w, _ in training], [name for _, name in training], RATE_HZ)
    for name, pitches in spoken.items():
        assert [judge(word(pitches, rng)) for _ in range(5)] == [name] * 5
    assert judge(np.zeros(8000, np.float32)) == NOTHING and judge(np.zeros(0, np.float32)) == NOTHING
    with pytest.raises(ValueError, match="different labels"):
        SpeechJudge([training[0][0]], ["up"], RATE_HZ)


def test_log_mel_peaks_where_the_tone_is():
    tone = np.sin(2 * np.pi * 1000 * np.arange(RATE_HZ) / RATE_HZ)
    mel = log_mel(tone, RATE_HZ)
    mel_of_tone = 2595 * np.log10(1 + 1000 / 700)
    low, high = 2595 * np.log10(1 + np.array([60, 7600]) / 700)
    expected_band = (mel_of_tone - low) / (high - low) * 41 - 1
    assert abs(mel.mean(0).argmax() - expected_band) < 1.5
    assert log_mel(np.zeros(10), RATE_HZ).shape == (1, 40)
