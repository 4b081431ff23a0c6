"""One page on an image tokenizer: its numbers, and pictures beside what is left of them. It loads nothing."""

from __future__ import annotations

import base64
import importlib.resources
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image

from aromni_jax.evaluation.markup import escape, section, table, tag

_EXPLAINED = {
    "psnr_db": "PSNR, mean over pictures",
    "psnr_db_of_mean_error": "PSNR of the mean error",
    "ssim": "structural similarity",
    "codes_used": "codes that occur",
    "perplexity": "perplexity of the codes",
    "encode_codes_per_second": "codes a second, encoding",
    "decode_codes_per_second": "codes a second, decoding",
}


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
    rows = [(escape(_EXPLAINED.get(name, name.replace("_", " "))), _number(value)) for name, value in numbers.items()]
    pairs = [
        tag("figure", _picture(original, f"{name}, original"))
        + tag(
            "figure",
            _picture(decoded, f"{name}, through codes"),
            tag("figcaption", escape(f"{name}: {decibels:.1f} dB")),
        )
        for original, decoded, name, decibels in zip(originals_BHWC, decoded_BHWC, names, psnr_db_B)
    ]
    css = importlib.resources.files("aromni_jax.evaluation").joinpath("assets/report.css").read_text(encoding="utf-8")
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Image tokenizer</title><style>{css}</style>"
    )
    body = tag(
        "main",
        tag("h1", "Image tokenizer"),
        section("Numbers", "Of all pictures that were read.", table(("", ""), rows, numbers=(1,))),
        section(
            "Pictures",
            "Each original, and beside it what its codes alone give back. The first ones, not the best.",
            tag("div", *pairs, css="pictures"),
        ),
    )
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def _picture(pixels_HWC: np.ndarray, alt: str) -> str:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels_HWC).save(buffer, format="PNG")
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return escape(value)
