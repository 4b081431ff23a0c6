"""PSNR and structural similarity against values that can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from aromni_jax.evaluation.picture_quality import psnr_db, ssim


def noise(seed: int, count: int = 2, side: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def test_psnr():
    flat = np.full((1, 16, 16, 3), 100, np.uint8)
    assert psnr_db(flat + np.uint8(5), flat)[0] == pytest.approx(10 * np.log10(255**2 / 25))
    assert psnr_db(flat, flat)[0] > 77
    both = psnr_db(np.concatenate([flat, flat]), np.concatenate([flat + np.uint8(1), flat + np.uint8(10)]))
    assert both[0] == pytest.approx(both[1] + 20)


def test_ssim_of_flat_pictures_is_the_luminance_term():
    dark, light = (np.full((1, 16, 16, 3), value, np.uint8) for value in (50, 200))
    c1 = (0.01 * 255) ** 2
    assert ssim(dark, light)[0] == pytest.approx((2 * 50 * 200 + c1) / (50**2 + 200**2 + c1))
    assert ssim(dark, dark)[0] == pytest.approx(1)


def test_ssim_at_one_place_equals_the_definition():
    """Pictures of 11 pixels have one place for the window: weighted means written out there."""
    x, y = noise(0, 1, 11), noise(1, 1, 11)
    line = np.exp(-0.5 * (np.arange(11) - 5) ** 2 / 1.5**2)
    weights = np.outer(line, line) / line.sum() ** 2
    scores = []
    for channel in range(3):
        a, b = x[0, ..., channel].astype(float), y[0, ..., channel].astype(float)
        mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
        var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
        cov = (weights * (a - mean_a) * (b - mean_b)).sum()
        c1, c2 = 2.55**2, 7.65**2
        scores.append(
            (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
        )
    assert ssim(x, y)[0] == pytest.approx(np.mean(scores))


def test_ssim_orders_damage_and_is_symmetric():
    x = noise(0)
    near = np.clip(x.astype(int) + np.random.default_rng(2).integers(-10, 11, x.shape), 0, 255).astype(np.uint8)
    far = np.clip(x.astype(int) + np.random.default_rng(2).integers(-80, 81, x.shape), 0, 255).astype(np.uint8)
    assert np.all(ssim(near, x) > ssim(far, x)) and np.all(ssim(far, x) > ssim(noise(5), x))
    np.testing.assert_allclose(ssim(far, x), ssim(x, far))
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(noise(0, 1, 8), noise(1, 1, 8))
