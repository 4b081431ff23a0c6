"""How near a sound is to another: scale-invariant signal-to-distortion ratio, and intelligibility (STOI)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_LIMIT_DB = 100.0
"""Nothing measured in float32 is nearer or further than this; it stands for infinity, so that means exist."""
_SHORTEST_STOI_SECONDS = 1.5


def si_sdr_db(estimate_T: np.ndarray, truth_T: np.ndarray) -> float:
    """Scale-invariant signal-to-distortion ratio in dB, within +-100; NaN where `truth_T` is constant, such as silence.

    `estimate_T` is split into the multiple of `truth_T` that is nearest to it and the rest; the ratio is that of their
    energies. Means are taken off first. Sample t is compared with sample t: no shift is searched for. Phase counts, so
    codecs that make up a new one score low however alike they sound.

        truth 1 -1 1 -1, estimate 2.5 -2.5 1.5 -1.5: scale 2, rest .5 -.5 -.5 .5, 10 log10(16 / 1) = 12 dB

    Source: Le Roux et al. 2019, "SDR - half-baked or well done?".

    Raises:
      ValueError: waveforms of different length, or of no length.
    """
    if estimate_T.shape != truth_T.shape or truth_T.ndim != 1 or not truth_T.size:
        raise ValueError(f"SI-SDR compares waveforms of one length, not {estimate_T.shape} with {truth_T.shape}")
    estimate, truth = (x.astype(np.float64) - x.mean(dtype=np.float64) for x in (estimate_T, truth_T))
    energy = truth @ truth
    # What rounding leaves of a constant is no signal.
    if energy <= 1e-12 * np.square(truth_T, dtype=np.float64).sum():
        return float("nan")
    target = (estimate @ truth / energy) * truth
    rest = estimate - target
    limit = 10 ** (_LIMIT_DB / 10)
    signal, noise = target @ target, rest @ rest
    if signal == noise == 0:
        return -_LIMIT_DB
    return float(10 * np.log10(np.clip(signal / max(noise, signal / limit), 1 / limit, limit)))


def mean_stoi(pairs: Sequence[tuple[np.ndarray, np.ndarray]], sample_rate_hz: int) -> float | None:
    """Mean STOI of (truth_T, decoded_T) pairs, joined to stretches of 1.5 s: single words are too short for it.

    None where all of them together are shorter. Source: Taal et al. 2011 (the `pystoi` library, MIT).

    Raises:
      ValueError: `pystoi` is not installed.
    """
    try:
        from pystoi import stoi
    except ImportError as error:
        raise ValueError("STOI needs pystoi: pip install 'aromni-jax[eval]'") from error
    scores: list[float] = []
    stretch: list[tuple[np.ndarray, np.ndarray]] = []
    for pair in pairs:
        stretch.append(pair)
        if sum(len(truth) for truth, _ in stretch) >= _SHORTEST_STOI_SECONDS * sample_rate_hz:
            truth, ours = (np.concatenate(side) for side in zip(*stretch))
            scores.append(float(stoi(truth, ours, sample_rate_hz)))
            stretch = []
    return float(np.mean(scores)) if scores else None
