"""Judges that say what a picture shows or an utterance says, trained on real training data and on nothing generated.

A judge is only as good as its accuracy on real held-out data, which every report shows beside its verdicts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

NOTHING = "nothing"
"""Verdict on a picture without anything in it, or on silence."""


def _classifier(features: np.ndarray, labels: Sequence[str]) -> SVC:
    return make_pipeline(StandardScaler(with_std=False), SVC(C=10.0, gamma="scale")).fit(features, list(labels))


def _pooled(grey_HW: np.ndarray, size: int) -> np.ndarray:
    """Means over a size x size grid of any rectangle, flattened."""
    rows = np.linspace(0, grey_HW.shape[0], size + 1)
    columns = np.linspace(0, grey_HW.shape[1], size + 1)
    # Sums over fractional boxes from a table of cumulative sums, read with linear interpolation.
    table = np.pad(grey_HW.cumsum(0).cumsum(1), ((1, 0), (1, 0)))

    def at(y: np.ndarray, x: np.ndarray) -> np.ndarray:
        y0, x0 = np.minimum(y.astype(int), len(table) - 2), np.minimum(x.astype(int), table.shape[1] - 2)
        dy, dx = (y - y0)[:, None], (x - x0)[None]
        corner = table[np.ix_(y0, x0)] * (1 - dy) * (1 - dx) + table[np.ix_(y0 + 1, x0)] * dy * (1 - dx)
        return corner + table[np.ix_(y0, x0 + 1)] * (1 - dy) * dx + table[np.ix_(y0 + 1, x0 + 1)] * dy * dx

    sums = np.diff(np.diff(at(rows, columns), axis=0), axis=1)
    return (sums / (np.diff(rows)[:, None] * np.diff(columns)[None])).ravel()


class PictureJudge:
    """Names the digit ("7"), or the colour and shape ("red star"), that a uint8 [H, W, 3] picture shows.

    What stands out from the picture's border is the thing. A coloured thing is a scene: the nearest training colour
    names its colour, a classifier of its outline its shape. Anything else is read as a digit.
    """

    def __init__(self, pixels_NHWC: Sequence[np.ndarray], labels: Sequence[str]) -> None:
        """Trains on real pictures with their labels; digits are one word, scenes "colour shape".

        Raises:
          ValueError: fewer than two different digits, colours or shapes to tell apart.
        """
        digits = [(p, label) for p, label in zip(pixels_NHWC, labels, strict=True) if " " not in label]
        scenes = [(p, label.split()) for p, label in zip(pixels_NHWC, labels, strict=True) if " " in label]
        for kind, found in (
            ("digits", {label for _, label in digits}),
            ("colours", {words[0] for _, words in scenes}),
            ("shapes", {words[1] for _, words in scenes}),
        ):
            if len(found) < 2:
                raise ValueError(f"a picture judge learns from at least two different {kind}, found {len(found)}")
        digit_features = np.stack([self._digit_features(p) for p, _ in digits])
        self._digits = _classifier(digit_features, [label for _, label in digits])
        things = [(self._thing(p), words) for p, words in scenes]
        things = [(thing, words) for thing, words in things if thing is not None]
        self._shapes = _classifier(np.stack([outline for (_, outline), _ in things]), [words[1] for _, words in things])
        self._colours = sorted({words[0] for _, words in things})
        self._palette = np.stack(
            [np.mean([rgb for (rgb, _), words in things if words[0] == name], axis=0) for name in self._colours]
        )
        digit_things = [thing for thing in (self._thing(p) for p, _ in digits) if thing is not None]
        # Midway between what digits and what scenes typically show.
        self._coloured = (
            np.median([_saturation(rgb) for rgb, _ in digit_things])
            + np.median([_saturation(rgb) for (rgb, _), _ in things])
        ) / 2

    def __call__(self, pixels_HWC: np.ndarray) -> str:
        thing = self._thing(pixels_HWC)
        if thing is None:
            return NOTHING
        rgb, outline = thing
        if _saturation(rgb) < self._coloured:
            return str(self._digits.predict(self._digit_features(pixels_HWC)[None])[0])
        colour = self._colours[int(np.abs(self._palette - rgb).sum(1).argmin())]
        return f"{colour} {self._shapes.predict(outline[None])[0]}"

    @staticmethod
    def _digit_features(pixels_HWC: np.ndarray) -> np.ndarray:
        return _pooled(np.asarray(pixels_HWC, np.float64).mean(-1) / 255, 12)

    @staticmethod
    def _thing(pixels_HWC: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """(RGB of the thing, its outline on a 14 x 14 grid over its bounding box), or None where nothing stands out."""
        pixels = np.asarray(pixels_HWC, np.float64)
        border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, :2].reshape(-1, 3)])
        distance_HW = np.abs(pixels - np.median(border, axis=0)).sum(-1)
        mask_HW = distance_HW > max(0.5 * np.quantile(distance_HW, 0.98), 60.0)
        if mask_HW.sum() < 20:
            return None
        # One stray speck must not stretch the box: rows and columns count from three pixels on.
        rows, columns = (np.flatnonzero(mask_HW.sum(axis) >= 3) for axis in (1, 0))
        if not len(rows) or not len(columns):
            return None
        box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        return np.median(pixels[mask_HW], axis=0), _pooled(mask_HW[box].astype(np.float64), 14)


def _saturation(rgb: np.ndarray) -> float:
    return float((rgb.max() - rgb.min()) / max(rgb.max(), 1.0))


class SpeechJudge:
    """Names which of the words it was trained on an utterance says: digits as one word, scenes as "colour shape".

    Features are log-mel energies of the utterance without its silent ends, averaged over a fixed number of stretches
    of time, so that speakers of any rate compare; each word position has a classifier of its own.
    """

    def __init__(self, waveforms: Sequence[np.ndarray], labels: Sequence[str], sample_rate_hz: int) -> None:
        """Trains on real utterances (float32 mono) and the label each one says.

        Raises:
          ValueError: fewer than two different labels, or labels of different numbers of words.
        """
        words = [label.split() for label in labels]
        if len(set(labels)) < 2 or len({len(w) for w in words}) != 1:
            raise ValueError(f"a speech judge needs different labels of one length, found {sorted(set(labels))[:5]}")
        self._rate = sample_rate_hz
        features = np.stack([self._features(w) for w in waveforms])
        self._constant = [{w[i] for w in words} for i in range(len(words[0]))]
        self._parts = [
            _classifier(features, [w[i] for w in words]) if len(self._constant[i]) > 1 else None
            for i in range(len(words[0]))
        ]

    def __call__(self, waveform_T: np.ndarray) -> str:
        if not len(waveform_T) or np.abs(waveform_T).max() < 1e-3:
            return NOTHING
        features = self._features(waveform_T)[None]
        return " ".join(
            str(part.predict(features)[0]) if part else next(iter(only))
            for part, only in zip(self._parts, self._constant, strict=True)
        )

    def _features(self, waveform_T: np.ndarray) -> np.ndarray:
        mel_TM = log_mel(waveform_T, self._rate)
        loud = mel_TM.mean(1)
        speech = np.flatnonzero(loud > np.max(loud) - 5.0)
        mel_TM = mel_TM[speech[0] : speech[-1] + 1]
        mel_TM = mel_TM - mel_TM.mean()
        return np.concatenate([_pooled(mel_TM, 20), [np.log(len(mel_TM))]])


def log_mel(waveform_T: np.ndarray, sample_rate_hz: int, num_bands: int = 40) -> np.ndarray:
    """Log energies [frames, bands] of 25 ms Hann windows every 10 ms; triangular bands, even in mel, 60 to 7600 Hz."""
    window, hop = int(0.025 * sample_rate_hz), int(0.010 * sample_rate_hz)
    waveform_T = np.pad(np.asarray(waveform_T, np.float64), (0, max(0, window - len(waveform_T))))
    frames = np.lib.stride_tricks.sliding_window_view(waveform_T, window)[::hop] * np.hanning(window)
    power = np.abs(np.fft.rfft(frames)) ** 2
    top_hz = min(7600.0, sample_rate_hz / 2)
    low_mel, high_mel = 2595 * np.log10(1 + np.array([60.0, top_hz]) / 700)
    edges_mel = np.linspace(low_mel, high_mel, num_bands + 2)
    edges_hz = 700 * (10 ** (edges_mel / 2595) - 1)
    bins_hz = np.fft.rfftfreq(window, 1 / sample_rate_hz)
    rising = (bins_hz - edges_hz[:-2, None]) / np.diff(edges_hz)[:-1, None]
    falling = (edges_hz[2:, None] - bins_hz) / np.diff(edges_hz)[1:, None]
    filters = np.maximum(0, np.minimum(rising, falling))
    return np.log(power @ filters.T + 1e-6)
