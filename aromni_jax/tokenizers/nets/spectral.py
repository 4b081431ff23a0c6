"""Short-time spectra with causal frames: frame u ends where hop u ends, and sees nothing after it.

All functions take waveforms whose length is a multiple of the hop, and windows that are a multiple of the hop.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np

from aromni_jax.arrays import FloatArray


@functools.lru_cache(maxsize=32)
def hann_window(size: int) -> np.ndarray:
    """Periodic Hann window, float32."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)).astype(np.float32)


@functools.lru_cache(maxsize=32)
def mel_filters(sample_rate_hz: int, window: int, num_mels: int) -> np.ndarray:
    """Triangular filters [window/2 + 1, num_mels] on the mel scale of O'Shaughnessy, each of height 1."""
    top = 2595 * np.log10(1 + sample_rate_hz / 2 / 700)
    edges_hz = 700 * (10 ** (np.linspace(0, top, num_mels + 2) / 2595) - 1)
    bins_hz = np.linspace(0, sample_rate_hz / 2, window // 2 + 1)[:, None]
    left, centre, right = edges_hz[:-2], edges_hz[1:-1], edges_hz[2:]
    rising, falling = (bins_hz - left) / (centre - left), (right - bins_hz) / (right - centre)
    return np.clip(np.minimum(rising, falling), 0, None).astype(np.float32)


def causal_frames(waveform_BT: FloatArray, window: int, hop: int) -> FloatArray:
    """[B, U*hop] to [B, U, window]; frame u holds samples (u+1)*hop - window to (u+1)*hop, zeros before the start.

    hop 2, window 4, samples 1 2 3 4:  frame 0 = 0 0 1 2,  frame 1 = 1 2 3 4
    """
    batch, length = waveform_BT.shape
    parts, num_frames = window // hop, length // hop
    hops = jnp.pad(waveform_BT, ((0, 0), (window - hop, 0))).reshape(batch, num_frames + parts - 1, hop)
    return jnp.concatenate([hops[:, part : part + num_frames] for part in range(parts)], axis=-1)


def overlap_add(frames_BUW: FloatArray, hop: int) -> FloatArray:
    """[B, U, window] to [B, U*hop]: the sum of frames at the places `causal_frames` takes them from."""
    batch, num_frames, window = frames_BUW.shape
    parts = window // hop
    frames = jnp.pad(frames_BUW, ((0, 0), (0, parts - 1), (0, 0)))
    hops = sum(
        frames[:, parts - 1 - part : parts - 1 - part + num_frames, part * hop : (part + 1) * hop]
        for part in range(parts)
    )
    return jnp.reshape(hops, (batch, num_frames * hop))


def overlap_add_all(frames_BUW: FloatArray, hop: int) -> FloatArray:
    """[B, U, window] to [B, U*hop + window - hop]: the sum of frames, the first of which begins the result."""
    parts = frames_BUW.shape[2] // hop
    return overlap_add(jnp.pad(frames_BUW, ((0, 0), (parts - 1, 0), (0, 0))), hop)


def magnitudes(waveform_BT: FloatArray, window: int, hop: int) -> FloatArray:
    """Hann-windowed magnitude spectra [B, U, window/2 + 1]; the gradient is finite at silence."""
    spectra = jnp.fft.rfft(causal_frames(waveform_BT, window, hop) * hann_window(window), axis=-1)
    return jnp.sqrt(jnp.square(spectra.real) + jnp.square(spectra.imag) + 1e-9)


def log_mel(waveform_BT: FloatArray, sample_rate_hz: int, window: int, hop: int, num_mels: int) -> FloatArray:
    """Natural logarithm of mel magnitudes [B, U, num_mels], floored at 1e-3."""
    mel = magnitudes(waveform_BT, window, hop) @ mel_filters(sample_rate_hz, window, num_mels)
    return jnp.log(jnp.maximum(mel, 1e-3))


def inverse_frames(spectra_BUF: FloatArray, window: int, hop: int) -> FloatArray:
    """Inverse STFT of causal frames: complex [B, U, window/2 + 1] to waveform [B, U*hop].

    Windowed overlap-add divided by the steady overlap of squared windows, so no frame's weight depends on how many
    follow: the last window - hop samples fade out instead.
    """
    hann = hann_window(window)
    frames = jnp.fft.irfft(spectra_BUF, n=window, axis=-1) * hann
    overlap_hop = np.square(hann).reshape(window // hop, hop).sum(axis=0)
    waveform_BT = overlap_add(frames, hop)
    return (waveform_BT.reshape(*spectra_BUF.shape[:2], hop) / overlap_hop).reshape(waveform_BT.shape)


def inverse_frames_onward(
    carry_BT: FloatArray, spectra_BUF: FloatArray, window: int, hop: int
) -> tuple[FloatArray, FloatArray]:
    """`inverse_frames` of a stream: (carry, spectra of the next frames) -> (carry, waveform [B, U*hop]).

    The waveform comes window - hop samples late; the carry holds that many samples, zeros at the start.
    """
    hann = hann_window(window)
    sums_BT = overlap_add_all(jnp.fft.irfft(spectra_BUF, n=window, axis=-1) * hann, hop)
    sums_BT = sums_BT.at[:, : window - hop].add(carry_BT)
    batch, num_frames, _ = spectra_BUF.shape
    overlap_hop = np.square(hann).reshape(window // hop, hop).sum(axis=0)
    final_BT = (sums_BT[:, : num_frames * hop].reshape(batch, num_frames, hop) / overlap_hop).reshape(batch, -1)
    return sums_BT[:, num_frames * hop :], final_BT
