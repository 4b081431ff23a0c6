"""Codes and sound of EnCodec equal those of `transformers.EncodecModel` at random weights, at every bandwidth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from aromni_jax.interop.encodec_files import load_encodec
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


def their_model(seed: int = 0, **changes) -> transformers.EncodecModel:
    """A model with codebooks and biases that matter: at birth both are zero, and every code would be 0."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = transformers.EncodecModel(transformers.EncodecConfig(**changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "original0" in name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.7, 1.3))
            elif "bias" in name:
                parameter.normal_(std=0.1)
        residual = model.encoder(torch.from_numpy(sound(24_000)[None, None]))
        for layer in model.quantizer.layers:
            mean, std = residual.mean((0, 2)), residual.std((0, 2))
            layer.codebook.embed.normal_().mul_(std).add_(mean)
            residual = residual - layer.decode(layer.encode(residual))
    return model


def sound(num_samples: int, seed: int = 0) -> np.ndarray:
    """A chord that swells, in noise."""
    rng = np.random.default_rng(seed)
    times = np.arange(num_samples) / 24_000
    tones = sum(np.sin(2 * np.pi * f * times + p) for f, p in zip(rng.uniform(90, 3000, 6), rng.uniform(0, 6, 6)))
    return (0.1 * tones * (0.3 + np.sin(3 * times) ** 2) + 0.02 * rng.normal(size=num_samples)).astype(np.float32)


def thin_model(**changes) -> transformers.EncodecModel:
    return their_model(**{"num_filters": 4, "hidden_size": 16, "codebook_size": 64, **changes})


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
    model = their_model()
    model.save_pretrained(tmp_path)
    tokenizer = load_encodec(tmp_path)
    assert (tokenizer.num_codebooks, tokenizer.num_codes, tokenizer.sample_rate_hz) == (32, 1024, 24_000)
    compare(model, tokenizer, [12_000], counts=(2, 32))
