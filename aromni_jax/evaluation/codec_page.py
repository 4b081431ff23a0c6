"""One page on an image or speech tokenizer: its numbers, originals and what is left of them. It loads nothing."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
import soundfile

from aromni_jax.evaluation.markup import escape, page, section, table, tag
from aromni_jax.evaluation.spectrogram import NUM_MELS, coloured, mel_levels_db

_EXPLAINED = {
    "psnr_db": "PSNR, mean over pictures",
    "psnr_db_of_mean_error": "PSNR of the mean error",
    "ssim": "structural similarity",
    "si_sdr_db": "SI-SDR in dB, mean over utterances",
    "mel_distance": "mel distance, mean over utterances",
    "stoi": "STOI",
    "codes_per_second": "codes per codebook in a second of sound",
    "codes_used": "codes that occur",
    "perplexity": "perplexity of the codes",
    "encode_codes_per_second": "codes a second, encoding",
    "decode_codes_per_second": "codes a second, decoding",
}
_SHOWN_SECONDS = 20
"""A page carries its sound within itself: of longer utterances it has the beginning."""


def image_codec_page(
    numbers: Mapping[str, Any],
    originals_BHWC: np.ndarray,
    decoded_BHWC: np.ndarray,
    names: Sequence[str],
    psnr_db_B: np.ndarray,
) -> str:
    """HTML with the table of `numbers`, and each uint8 original beside its reconstruction, in the order given.

    Raises:
      ValueError: not as many names or reconstructions as originals.
    """
    if not len(originals_BHWC) == len(decoded_BHWC) == len(names) == len(psnr_db_B):
        raise ValueError(f"{len(originals_BHWC)} pictures, {len(decoded_BHWC)} reconstructions, {len(names)} names")
    pairs = [
        tag("figure", _picture(original, f"{name}, original"))
        + tag(
            "figure",
            _picture(decoded, f"{name}, through codes"),
            tag("figcaption", escape(f"{name}: {decibels:.1f} dB")),
        )
        for original, decoded, name, decibels in zip(originals_BHWC, decoded_BHWC, names, psnr_db_B)
    ]
    pictures = section(
        "Pictures",
        "Each original, and beside it what its codes alone give back. The first ones, not the best.",
        tag("div", *pairs, css="pictures"),
    )
    return _page("Image tokenizer", "Of all pictures that were read.", numbers, pictures)


def speech_codec_page(
    numbers: Mapping[str, Any],
    originals: Sequence[np.ndarray],
    decoded: Sequence[np.ndarray],
    names: Sequence[str],
    measures: Sequence[Mapping[str, Any]],
    sample_rate_hz: int,
) -> str:
    """HTML with the table of `numbers`, and for each utterance spectrogram and player of both sounds.

    Args:
      numbers: the whole table, name -> number or None.
      originals: float32 waveforms [T] in [-1, 1] at `sample_rate_hz`.
      decoded: what their codes give back, each as long as its original.
      names: one a sound; any text.
      measures: numbers of each utterance, name -> number.

    Raises:
      ValueError: not as many of one as of the others.
    """
    if not len(originals) == len(decoded) == len(names) == len(measures):
        raise ValueError(f"{len(originals)} sounds, {len(decoded)} reconstructions, {len(names)} names")
    out = []
    for original, ours, name, measured in zip(originals, decoded, names, measures):
        told = [f"{len(original) / sample_rate_hz:.2f} s"]
        told += [f"{_EXPLAINED.get(key, key).partition(',')[0]} {_number(value)}" for key, value in measured.items()]
        shown = [sound[: _SHOWN_SECONDS * sample_rate_hz] for sound in (original, ours)]
        levels = [mel_levels_db(sound, sample_rate_hz) for sound in shown]
        # Both in the colours of the original, so that what is lost looks lost.
        top_db = float(levels[0].max())
        figures = [
            tag(
                "figure",
                _picture(coloured(level, top_db), f"{name}, {kind}, spectrogram"),
                _player(sound, sample_rate_hz, f"{name}, {kind}"),
                tag("figcaption", kind),
            )
            for sound, level, kind in zip(shown, levels, ("original", "through codes"))
        ]
        out.append(tag("h3", escape(name)) + tag("p", escape(" \u00b7 ".join(told)), css="note"))
        out.append(tag("div", *figures, css="spectra"))
    note = (
        f"Each original, and beside it what its codes alone give back: {NUM_MELS} mel bands from 0 to "
        f"{sample_rate_hz / 2000:g} kHz, low ones below, light is loud, both in the scale of the original. "
        "The first ones, not the best"
    )
    cut = any(len(sound) > _SHOWN_SECONDS * sample_rate_hz for sound in originals)
    note += f"; of long ones the first {_SHOWN_SECONDS} s." if cut else "."
    return _page("Speech tokenizer", "Of all sounds that were read.", numbers, section("Sounds", note, *out))


def _page(title: str, note: str, numbers: Mapping[str, Any], rest: str) -> str:
    rows = [(escape(_EXPLAINED.get(name, name.replace("_", " "))), _number(value)) for name, value in numbers.items()]
    return page(title, tag("h1", escape(title)), section("Numbers", note, table(("", ""), rows, numbers=(1,))), rest)


def _picture(pixels_HWC: np.ndarray, alt: str) -> str:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels_HWC).save(buffer, format="PNG")
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _player(waveform_T: np.ndarray, sample_rate_hz: int, label: str) -> str:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(waveform_T, -1, 1), sample_rate_hz, format="WAV", subtype="PCM_16")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<audio controls preload="none" aria-label="{escape(label)}" src="data:audio/wav;base64,{data}"></audio>'


def _number(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "\u2013"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return escape(value)
