"""The page on an image tokenizer: every picture is in it as it was, and nothing is fetched from elsewhere."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import PIL.Image
import pytest

from aromni_jax.evaluation.codec_page import image_codec_page


def test_pictures_stand_beside_their_reconstructions():
    rng = np.random.default_rng(0)
    originals, decoded = rng.integers(0, 256, (2, 3, 8, 8, 3), np.uint8)
    page = image_codec_page(
        {"psnr_db": 31.4159, "codes": 512, "encode_codes_per_second": 12345.6},
        originals,
        decoded,
        ["a.png", "<b>.png", "c.png"],
        np.array([10.0, 20.0, 30.0]),
    )
    found = [
        np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(data))))
        for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    ]
    assert len(found) == 6
    for i in range(3):
        np.testing.assert_array_equal(found[2 * i], originals[i])
        np.testing.assert_array_equal(found[2 * i + 1], decoded[i])
    assert "31.42" in page and "12,346" in page and "20.0 dB" in page and "&lt;b&gt;.png" in page
    assert not re.search(r'(src|href)="(?!data:)', page) and "<script" not in page
    with pytest.raises(ValueError, match="3 pictures, 2 reconstructions"):
        image_codec_page({}, originals, decoded[:2], ["a", "b", "c"], np.zeros(3))
