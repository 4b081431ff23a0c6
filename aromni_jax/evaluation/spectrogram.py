"""Sound as a picture: mel bands over time, in colours that grow lighter with level and read on any background."""

from __future__ import annotations

import math

import numpy as np

from aromni_jax.tokenizers.nets.spectral import hann_window, mel_filters

NUM_MELS = 80
_WINDOW_SECONDS, _HOP_SECONDS = 0.05, 0.005
_RANGE_DB = 70.0
_SILENCE_DB = -120.0
_STOPS = np.array([0.0, 0.3, 0.6, 0.82, 1.0])
_COLOURS = np.array([(14, 14, 34), (70, 30, 110), (196, 62, 86), (242, 156, 70), (252, 244, 204)], np.float64)
"""Night, violet, red, amber, cream: luminance rises all the way, so that levels survive a print in grey."""


def mel_levels_db(waveform_T: np.ndarray, sample_rate_hz: int) -> np.ndarray:
    """Level in dB of 80 mel bands [M, frames], low bands first; a frame each 5 ms, in the middle of its window.

    A full-scale sine has about 0 dB in its band, some 5 dB more where bands are many bins wide.

    Raises:
      ValueError: a waveform of no samples.
    """
    if waveform_T.ndim != 1 or not waveform_T.size:
        raise ValueError(f"a spectrogram is of a waveform with samples, not of shape {waveform_T.shape}")
    window = 1 << math.ceil(math.log2(_WINDOW_SECONDS * sample_rate_hz))
    hop = max(1, round(_HOP_SECONDS * sample_rate_hz))
    padded = np.pad(waveform_T.astype(np.float64), window // 2)
    frames_UW = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop]
    taper = hann_window(window)
    magnitude_UF = np.abs(np.fft.rfft(frames_UW * taper)) / (taper.sum() / 2)
    level_UM = magnitude_UF @ mel_filters(sample_rate_hz, window, NUM_MELS)
    return 20 * np.log10(np.maximum(level_UM, 10 ** (_SILENCE_DB / 20))).T


def coloured(levels_db: np.ndarray, top_db: float) -> np.ndarray:
    """uint8 picture [M, frames, 3] with the high bands on top: `top_db` is lightest, 70 dB below it darkest."""
    share = np.clip((levels_db[::-1] - top_db) / _RANGE_DB + 1, 0, 1)
    return np.stack([np.interp(share, _STOPS, channel) for channel in _COLOURS.T], axis=-1).round().astype(np.uint8)
