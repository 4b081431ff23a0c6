"""How near a picture is to another: peak signal-to-noise ratio and structural similarity."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import correlate1d

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def psnr_db(pixels_BHWC: np.ndarray, truth_BHWC: np.ndarray) -> np.ndarray:
    """dB of each uint8 picture [B], 10 log10(255^2 / mean squared error); identical pictures have 78 dB."""
    difference = pixels_BHWC.astype(np.float64) - truth_BHWC
    return 10 * np.log10(255**2 / np.maximum(np.square(difference).mean(axis=(1, 2, 3)), 1e-3))


def ssim(pixels_BHWC: np.ndarray, truth_BHWC: np.ndarray) -> np.ndarray:
    """Structural similarity of each uint8 picture [B], 1 for identical ones, the mean over colours.

    Gaussian window of 11 pixels, sigma 1.5; places where the window leaves the picture do not count. Source: Wang et
    al. 2004, "Image Quality Assessment".

    Raises:
      ValueError: pictures of less than 11 pixels on a side.
    """
    if min(truth_BHWC.shape[1:3]) < _WINDOW:
        raise ValueError(f"structural similarity needs pictures of at least {_WINDOW} pixels on a side")
    x, y = pixels_BHWC.astype(np.float64), truth_BHWC.astype(np.float64)
    mean_x, mean_y = _blurred(x), _blurred(y)
    variance_x, variance_y = _blurred(x * x) - mean_x**2, _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    structure = (2 * covariance + _C2) / (variance_x + variance_y + _C2)
    return (luminance * structure).mean(axis=(1, 2, 3))


def _blurred(x_BHWC: np.ndarray) -> np.ndarray:
    weights = np.exp(-0.5 * (np.arange(_WINDOW) - _WINDOW // 2) ** 2 / _SIGMA**2)
    weights /= weights.sum()
    edge = _WINDOW // 2
    blurred = correlate1d(correlate1d(x_BHWC, weights, axis=1), weights, axis=2)
    return blurred[:, edge:-edge, edge:-edge]
