"""Codes and sound of WavTokenizer equal those of a torch build of it, through a checkpoint with the published names."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from aromni_jax.interop.wavtokenizer_files import load_wavtokenizer
from aromni_jax.peers.wavtokenizer import NUM_CODES, SMALL, WavTokenizerTorch
from aromni_jax.tokenizers.nets.wavtokenizer import SMALL_600_24KHZ_4096, WavTokenizer

TOLERANCE = 1e-4
LENGTHS = (24_000, 1, 7, 599, 601, 13_001, 38_400)
SHAPES = {"small": (SMALL, NUM_CODES), "published": (SMALL_600_24KHZ_4096, 4096)}


@pytest.fixture(scope="module", params=SHAPES)
def pair(request, tmp_path_factory):
    shape, num_codes = SHAPES[request.param]
    model = WavTokenizerTorch(shape, num_codes)
    path = tmp_path_factory.mktemp("published") / "wavtokenizer.ckpt"
    model.save(path)
    tokenizer = load_wavtokenizer(path, shape)
    path.unlink()  # as large as the published one
    return model, tokenizer


def noises() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [(0.3 * rng.normal(size=length) * np.linspace(0.2, 1, length)).astype(np.float32) for length in LENGTHS]


def test_latents_and_codes_equal_the_reference(pair):
    model, tokenizer = pair
    assert (tokenizer.codes_per_second, tokenizer.num_codes, tokenizer.num_codebooks) == (
        40,
        len(tokenizer.codebook),
        1,
    )
    waveforms = noises()
    expected = [model.latents(waveform_T) for waveform_T in waveforms]
    rows = np.zeros((len(waveforms), 64 * tokenizer.hop), np.float32)
    for row, waveform_T in zip(rows, waveforms):
        row[: len(waveform_T)] = waveform_T
    latents_BUE = jax.jit(lambda params, *batch: WavTokenizer(model.cfg).apply(params, *batch, method="encode"))(
        {"params": tokenizer.params}, rows, np.array([len(waveform_T) for waveform_T in waveforms])
    )
    for ours_UE, theirs_UE in zip(np.asarray(latents_BUE), expected):
        np.testing.assert_allclose(ours_UE[: len(theirs_UE)], theirs_UE, atol=1e-5 * np.abs(theirs_UE).max(), rtol=0)

    found = tokenizer.encode(waveforms)
    assert [codes.shape[1] for codes in found] == [len(theirs_UE) for theirs_UE in expected]
    found = np.concatenate([codes[0] for codes in found])
    theirs = np.concatenate([model.encode(waveform_T) for waveform_T in waveforms])
    assert len(np.unique(theirs)) > 16
    # No code is a tie: in float64 the second nearest is farther by more than a hundred roundings of float32.
    latents_XE, table_CE = np.concatenate(expected).astype(np.float64), tokenizer.codebook.astype(np.float64)
    squares_X = np.square(latents_XE).sum(axis=1)
    distances_XC = squares_X[:, None] + np.square(table_CE).sum(axis=1) - 2 * latents_XE @ table_CE.T
    nearest = np.sort(distances_XC, axis=1)[:, :2]
    assert (nearest[:, 1] - nearest[:, 0] > 1e-5 * squares_X).all()
    assert np.mean(found == theirs) >= 0.999


def test_sound_equals_the_reference(pair):
    model, tokenizer = pair
    rng = np.random.default_rng(2)
    codes = [rng.integers(0, tokenizer.num_codes, length) for length in (1, 2, 3, 40, 64)]
    for waveform_T, codes_U in zip(tokenizer.decode([codes_U[None] for codes_U in codes]), codes):
        expected_T = model.decode(codes_U)
        assert np.abs(expected_T).max() > 0.05
        np.testing.assert_allclose(waveform_T, expected_T, atol=TOLERANCE, rtol=0)
