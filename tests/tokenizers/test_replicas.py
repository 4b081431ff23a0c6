"""Batches on one device and on eight: equal codes, equal sound and pictures, one compilation for each bucket."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from aromni_jax.tokenizers import speech
from aromni_jax.tokenizers.image import ImageTokenizer
from aromni_jax.tokenizers.nets.seanet import ENCODEC_24KHZ
from aromni_jax.tokenizers.nets.wavtokenizer import WavTokenizerConfig
from aromni_jax.tokenizers.speech import SpeechTokenizer
from aromni_jax.tokenizers.speech_codecs import SeanetCodec, VocosCodec, WavTokenizerCodec
from tests.fixtures import vqgan_tokenizer

SHORT = dataclasses.replace(ENCODEC_24KHZ, filters=4, ratios=(2, 4), code_dim=8, lstm_layers=1)
CODECS = {
    "vocos": VocosCodec(speech.QUICKSTART.net, 64),
    "seanet": SeanetCodec("seanet", SHORT, 32, 3),
    "wavtokenizer": WavTokenizerCodec(
        "wavtokenizer",
        WavTokenizerConfig(
            encoder=dataclasses.replace(SHORT, causal=False),
            width=32,
            mlp_dim=48,
            num_layers=1,
            num_conditions=4,
            num_groups=8,
            window=16 + 8,
        ),
        32,
    ),
}


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """What is compiled meanwhile, by the device's compiler."""
    seen: list[str] = []

    def listen(event: str, seconds: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def random_speech(codec, devices) -> SpeechTokenizer:
    rng = np.random.default_rng(0)
    tree = jax.tree.map(lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(np.float32), codec.shapes())
    config = codec
    if isinstance(codec, VocosCodec):
        config = dataclasses.replace(speech.QUICKSTART, net=codec.net, num_codes=codec.num_codes)
    return SpeechTokenizer(config, tree["params"], tree[codec.codebook_name], devices)


def test_there_are_devices_to_compare():
    assert jax.local_device_count() == 8


def test_pictures_do_not_depend_on_the_number_of_devices():
    some = vqgan_tokenizer.random_tokenizer()
    one, all_of_them = (
        ImageTokenizer(some.config, some.params, some.codebook_CE, devices)
        for devices in (jax.local_devices()[:1], None)
    )
    pixels = np.random.default_rng(0).integers(0, 256, (8 * 16 + 5, 16, 16, 3), np.uint8)
    with compilations() as compiled:
        codes_BP = all_of_them.encode(pixels)
        assert len(compiled) == 1
        np.testing.assert_array_equal(all_of_them.encode(pixels[40:41]), codes_BP[40:41])
        assert len(compiled) == 1, "a lone picture runs in the same program"
        decoded = all_of_them.decode(codes_BP)
        assert len(compiled) == 2
    np.testing.assert_array_equal(one.encode(pixels), codes_BP)
    np.testing.assert_array_equal(one.decode(codes_BP), decoded)
    assert len(np.unique(codes_BP)) > 8
    order = np.random.default_rng(1).permutation(len(pixels))
    np.testing.assert_array_equal(all_of_them.encode(pixels[order]), codes_BP[order])


@pytest.mark.parametrize("name", CODECS)
def test_speech_does_not_depend_on_the_number_of_devices(name, monkeypatch):
    monkeypatch.setattr(speech, "_CODES_PER_DEVICE", 2 * 64)
    codec = CODECS[name]
    one, all_of_them = (random_speech(codec, devices) for devices in (jax.local_devices()[:1], None))
    rng = np.random.default_rng(0)
    # More than eight devices hold at once.
    lengths = rng.integers(1, 64 * codec.hop, 8 * 2 + 3)
    waveforms = [(0.3 * rng.normal(size=length)).astype(np.float32) for length in lengths]
    drawn = [rng.integers(0, codec.num_codes, (codec.num_codebooks, length // codec.hop + 1)) for length in lengths]
    with compilations() as compiled:
        codes = all_of_them.encode(waveforms)
        np.testing.assert_array_equal(all_of_them.encode(waveforms[7:8])[0], codes[7])
        assert len(compiled) == 1, "a lone utterance runs in the same program"
        sounds = all_of_them.decode(drawn)
        np.testing.assert_array_equal(all_of_them.decode(drawn[7:8])[0], sounds[7])
        assert len(compiled) == 2
    assert len(np.unique(np.concatenate([codes_KU.ravel() for codes_KU in codes]))) > 1
    for found, expected in ((one.encode(waveforms), codes), (one.decode(drawn), sounds)):
        assert len(found) == len(expected)
        assert all(np.array_equal(a, b) for a, b in zip(found, expected))
