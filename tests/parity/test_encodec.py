"""Codes and sound of EnCodec equal those of `transformers.EncodecModel` at random weights, at every bandwidth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from aromni_jax.interop.encodec_files import load_encodec
from aromni_jax.peers.encodec import random_encodec, sound
from aromni_jax.tokenizers.speech import SpeechTokenizer

TOLERANCE = 1e-4
SAME_CODES = 0.999
CODEBOOKS = (2, 4, 8, 16, 32)
SHAPES = {
    "published, thin": {},
    "zeros beyond the ends": dict(pad_mode="constant"),
    "not causal": dict(use_causal_conv=False),
    "identity beside residual units": dict(use_conv_shortcut=False, num_residual_layers=2, compress=1),
}


def thin_model(**changes) -> transformers.EncodecModel:
    return random_encodec(**{"num_filters": 4, "hidden_size": 16, "codebook_size": 64, **changes})


def their_codes(model, waveform_T: np.ndarray, num_codebooks: int) -> np.ndarray:
    bits_per_frame = model.config.frame_rate * model.config.codebook_nbits
    with torch.no_grad():
        encoded = model.encode(
            torch.from_numpy(waveform_T[None, None]), bandwidth=num_codebooks * bits_per_frame / 1000
        )
    return encoded.audio_codes[0, 0].numpy()


def their_sound(model, codes_KU: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model.decode(torch.from_numpy(codes_KU[None, None].astype(np.int64)), [None]).audio_values[0, 0].numpy()


def same_codes(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """Share of equal codes, where the codebooks before agree: after a tie, later codes are of another rest."""
    same_KU = np.concatenate([a == b for a, b in zip(found, expected)], axis=1)
    agreed_KU = np.cumprod(np.vstack([np.ones_like(same_KU[:1]), same_KU[:-1]]), axis=0).astype(bool)
    assert agreed_KU.mean() > 0.98
    return float(same_KU[agreed_KU].mean())


def compare(model, tokenizer: SpeechTokenizer, lengths: list[int], counts=CODEBOOKS) -> None:
    waveforms = [sound(length, seed=i) for i, length in enumerate(lengths)]
    every = tokenizer.encode(waveforms)
    for count in counts:
        ours = tokenizer.with_codebooks(count)
        found = [codes_KU[:count] for codes_KU in every]
        expected = [their_codes(model, waveform_T, count) for waveform_T in waveforms]
        assert [codes.shape for codes in found] == [codes.shape for codes in expected]
        agreement = same_codes(found, expected)
        assert agreement >= SAME_CODES, f"{count} codebooks: {agreement:.5f} of the codes agree"
        assert len(np.unique(np.concatenate([codes.ravel() for codes in expected]))) > 16, "codes that vary"
        for waveform_T, codes_KU in zip(ours.decode(expected), expected):
            theirs_T = their_sound(model, codes_KU)
            assert np.abs(theirs_T).max() > 0.05, "sound that could differ"
            np.testing.assert_allclose(waveform_T, theirs_T, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", SHAPES)
def test_codes_and_sound_equal_transformers(tmp_path, name):
    bandwidths = [75 * 6 * count / 1000 for count in CODEBOOKS]
    model = thin_model(target_bandwidths=bandwidths, **SHAPES[name])
    model.save_pretrained(tmp_path)
    tokenizer = load_encodec(tmp_path)
    assert (tokenizer.num_codebooks, tokenizer.num_codes, tokenizer.codes_per_second) == (32, 64, 75)
    # Whole hops and not, one sample, shorter than the first layer's padding; then longer than the smallest bucket.
    lengths = [320 * 60, 1, 5, 319, 321, 1501, 19_001]
    compare(model, tokenizer, lengths, counts=CODEBOOKS if name == "published, thin" else (32,))
    if name == "published, thin":
        compare(model, tokenizer, [320 * 70 + 7], counts=(4,))
        waveforms = [sound(length) for length in lengths]
        for few, many in zip(tokenizer.with_codebooks(2).encode(waveforms), tokenizer.encode(waveforms)):
            np.testing.assert_array_equal(few, many[:2])


def test_codes_and_sound_equal_transformers_at_the_published_size(tmp_path):
    model = random_encodec()
    model.save_pretrained(tmp_path)
    tokenizer = load_encodec(tmp_path)
    assert (tokenizer.num_codebooks, tokenizer.num_codes, tokenizer.sample_rate_hz) == (32, 1024, 24_000)
    compare(model, tokenizer, [12_000], counts=(2, 32))
