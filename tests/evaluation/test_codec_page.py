"""The page on an image tokenizer: every picture is in it as it was, and nothing is fetched from elsewhere."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import PIL.Image
import pytest
import soundfile
import test_report

from aromni_jax.evaluation.codec_page import image_codec_page, speech_codec_page


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


def test_sounds_stand_beside_their_reconstructions():
    """Both sides can be seen and heard, long ones from their beginning; the page is balanced and loads nothing."""
    rate_hz = 8000
    time = np.arange(30 * rate_hz) / rate_hz
    originals = [np.sin(2 * np.pi * 440 * time[:4000]) / 2, np.sin(2 * np.pi * 1000 * time) / 2]
    decoded = [np.zeros(4000), 3 * originals[1]]
    page = speech_codec_page(
        {"si_sdr_db": -3.25, "stoi": None, "utterances": 2},
        originals,
        decoded,
        ["<script>a.wav", "b.wav"],
        [{"si_sdr_db": float("nan")}, {"si_sdr_db": 99.5}],
        rate_hz,
    )
    checker = test_report.Checker()
    checker.feed(page)
    assert checker.open == [] and "script" not in checker.tags
    assert len(checker.addresses) == 8 and all(address.startswith("data:") for address in checker.addresses)
    sounds = [
        soundfile.read(io.BytesIO(base64.b64decode(data)))
        for data in re.findall(r'src="data:audio/wav;base64,([^"]+)"', page)
    ]
    assert [len(samples) for samples, rate in sounds if rate == rate_hz] == [4000, 4000, 160_000, 160_000]
    np.testing.assert_allclose(sounds[0][0], originals[0], atol=1e-4)
    assert sounds[3][0].max() == pytest.approx(1, abs=1e-3)
    pictures = [
        np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(data))))
        for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    ]
    assert [picture.shape for picture in pictures] == [(80, 101, 3)] * 2 + [(80, 4001, 3)] * 2
    assert pictures[0].max() > 200 and (pictures[1] == pictures[1][0, 0]).all()
    for shown in (
        "&lt;script&gt;a.wav",
        "0.50 s \u00b7 SI-SDR in dB \u2013",
        "99.5",
        "-3.25",
        "the first 20 s",
        "0 to 4 kHz",
    ):
        assert shown in page
    with pytest.raises(ValueError, match="2 sounds, 1 reconstructions"):
        speech_codec_page({}, originals, decoded[:1], ["a", "b"], [{}, {}], rate_hz)
