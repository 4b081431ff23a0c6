"""The bundle: one directory, its joint vocabulary, and tokenizers that were swapped behind its back."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import test_image
import test_speech

from aromni_jax.tokenizers.bundle import TokenizerBundle
from aromni_jax.tokenizers.image import ImageTokenizer
from aromni_jax.tokenizers.nets.vocos import Vocos
from aromni_jax.tokenizers.nets.vqgan import VQGAN
from aromni_jax.tokenizers.speech import SpeechTokenizer
from aromni_jax.tokenizers.text import ByteText, SentencePieceText


def untrained(seed: int) -> TokenizerBundle:
    key, rng = jax.random.key(seed, impl="rbg"), np.random.default_rng(seed)
    image_net, speech_net = test_image.TINY.net, test_speech.TINY.net
    size = image_net.image_size
    image_params = jax.jit(VQGAN(image_net).init)(key, np.zeros((1, size, size, 3), np.float32))["params"]
    speech_params = jax.jit(Vocos(speech_net).init)(key, np.zeros((1, 8 * speech_net.hop), np.float32))["params"]
    return TokenizerBundle(
        ByteText(),
        ImageTokenizer(test_image.TINY, image_params, rng.normal(size=(32, image_net.code_dim))),
        SpeechTokenizer(test_speech.TINY, speech_params, rng.normal(size=(32, speech_net.code_dim))),
    )


@pytest.fixture(scope="module")
def bundle() -> TokenizerBundle:
    return untrained(0)


def test_vocabulary_has_a_span_for_each(bundle):
    vocab = bundle.vocab()
    assert vocab.image.size == 32 and vocab.tokens_per_image == 16
    assert [span.size for span in vocab.speech] == [32] and vocab.text.size == 256
    assert dict(vocab.tokenizer_fingerprints) == bundle.fingerprints
    assert vocab.size % 128 == 0 and bundle.vocab(pad_to_multiple=7).size % 7 == 0


def test_save_and_load(bundle, tmp_path):
    bundle.save(tmp_path)
    loaded = TokenizerBundle.load(tmp_path)
    assert loaded.fingerprints == bundle.fingerprints
    assert loaded.vocab().fingerprint == bundle.vocab().fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image", "speech", "text", "vocab.json"]


def test_text_alone(tmp_path):
    text = SentencePieceText.train(["some words to learn from"], 300)
    TokenizerBundle(text).save(tmp_path)
    loaded = TokenizerBundle.load(tmp_path)
    assert loaded.image is None and loaded.speech is None and loaded.fingerprints == {"text": text.fingerprint}


def test_swapped_tokenizer_is_refused(bundle, tmp_path):
    bundle.save(tmp_path)
    untrained(1).speech.save(tmp_path / "speech")
    with pytest.raises(ValueError, match="the speech tokenizer does not match"):
        TokenizerBundle.load(tmp_path)
    with pytest.raises(ValueError, match="the given vocabulary"):
        bundle.save(tmp_path, vocab=untrained(1).vocab())


def test_missing_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="vocab.json is missing"):
        TokenizerBundle.load(tmp_path)
