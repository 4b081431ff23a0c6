"""Any sound to the one form codecs take: float32, mono, at their rate. What cannot be read is named."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import resample_poly


def prepare_sound(sound: np.ndarray | str | Path, rate_hz: int | None, target_rate_hz: int) -> np.ndarray:
    """Sound as float32 mono at `target_rate_hz`: channels averaged, integers scaled to [-1, 1], rate converted.

    Args:
      sound: samples [T] or [T, channels], integer or float; or the path of a WAV, FLAC or Ogg file.
      rate_hz: rate of an array; a file knows its own.

    Raises:
      ValueError: naming the file: not a sound file, no samples, NaN or infinity, no rate.
    """
    name = "sound"
    if isinstance(sound, (str, Path)):
        name = str(sound)
        if not Path(sound).exists():
            raise FileNotFoundError(f"{name} does not exist")
        try:
            sound, rate_hz = soundfile.read(sound, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise ValueError(f"{name} cannot be read as sound: {error}") from error
    samples = np.asarray(sound)
    if rate_hz is None or rate_hz < 1:
        raise ValueError(f"{name}: sample rate {rate_hz} is not a positive number of hertz")
    if np.issubdtype(samples.dtype, np.integer):
        # Unsigned samples, as in 8-bit WAV, are silent in the middle of their range.
        half_range = 2.0 ** (8 * samples.dtype.itemsize - 1)
        middle = half_range if np.issubdtype(samples.dtype, np.unsignedinteger) else 0.0
        samples = (samples.astype(np.float64) - middle) / half_range
    if samples.ndim == 2 and samples.size:
        samples = samples.mean(axis=1)
    waveform = checked_waveform(samples.astype(np.float64), name)
    if rate_hz != target_rate_hz:
        divisor = math.gcd(int(rate_hz), target_rate_hz)
        waveform = resample_poly(waveform, target_rate_hz // divisor, int(rate_hz) // divisor)
    return waveform.astype(np.float32)


def checked_waveform(waveform: np.ndarray, name: str) -> np.ndarray:
    waveform = np.asarray(waveform)
    if waveform.size == 0:
        raise ValueError(f"{name} has no samples")
    if waveform.ndim != 1:
        raise ValueError(f"{name} has shape {waveform.shape}, expected one dimension of samples")
    if not np.isfinite(waveform).all():
        bad = int(np.flatnonzero(~np.isfinite(waveform))[0])
        raise ValueError(f"{name} has a value that is not a number (sample {bad})")
    return waveform
