"""Codecs of several codebooks in the joint vocabulary: a span each, interleaved frame by frame, there and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aromni_jax.structs import Message, Modality, Speech, Task, Text
from aromni_jax.tokenizers import joint
from aromni_jax.tokenizers.bundle import TokenizerBundle
from aromni_jax.tokenizers.prompts import load_templates
from aromni_jax.tokenizers.text import ByteText
from tests.tokenizers.test_speech_stream import CAUSAL, NUM_CODES, noise, random_tokenizer

NUM_CODEBOOKS = 3


@pytest.fixture(scope="module")
def bundle() -> TokenizerBundle:
    return TokenizerBundle(ByteText(), None, random_tokenizer(CAUSAL["encodec"][0], NUM_CODEBOOKS))


def test_vocabulary_has_a_span_per_codebook(bundle, tmp_path):
    vocab = bundle.vocab()
    assert [span.size for span in vocab.speech] == [NUM_CODES] * NUM_CODEBOOKS
    assert [span.start - vocab.speech[0].start for span in vocab.speech] == [0, NUM_CODES, 2 * NUM_CODES]
    bundle.save(tmp_path)
    loaded = TokenizerBundle.load(tmp_path)
    assert loaded.vocab().fingerprint == vocab.fingerprint
    (tmp_path / "fewer").mkdir()
    fewer = TokenizerBundle(bundle.text, None, bundle.speech.with_codebooks(2))
    assert len(fewer.vocab().speech) == 2 and fewer.fingerprints["speech"] != bundle.fingerprints["speech"]


@given(st.integers(0, 9).flatmap(lambda n: st.lists(st.integers(0, NUM_CODES - 1), min_size=3 * n, max_size=3 * n)))
def test_codes_interleave_frame_by_frame_and_come_back(bundle, numbers):
    codes_KU = np.array(numbers, np.int32).reshape(NUM_CODEBOOKS, -1)
    vocab, text = bundle.vocab(), bundle.text
    messages = [Message("user", (Text("say it"),)), Message("assistant", (Speech(codes_KU=codes_KU),))]
    example = joint.encode(messages, Task.TEXT_TO_SPEECH, vocab, text, load_templates("quickstart"))
    (span,) = [span for span in example.spans if span.modality == Modality.SPEECH and span.part >= 0]
    rows = example.tokens_L[span.start + 1 : span.start + span.length - 1]
    for position, row in enumerate(rows):
        frame, codebook = divmod(position, NUM_CODEBOOKS)
        assert row in vocab.speech[codebook] and row - vocab.speech[codebook].start == codes_KU[codebook, frame]
    answer = joint.decode(example, vocab, text)[-1].parts[0]
    np.testing.assert_array_equal(answer.codes_KU, codes_KU)
    (written,) = joint.parts_of(example.tokens_L[span.start :], vocab, text)
    np.testing.assert_array_equal(written.codes_KU, codes_KU)


def test_sound_to_tokens_to_sound(bundle):
    waveform_T = noise(20 * bundle.speech.hop)
    (codes_KU,) = bundle.speech.encode([waveform_T])
    assert codes_KU.shape == (NUM_CODEBOOKS, 20)
    rows = bundle.vocab().speech_to_rows(codes_KU)
    (decoded_T,) = bundle.speech.decode([bundle.vocab().rows_to_speech(rows)])
    assert decoded_T.shape == waveform_T.shape
    with pytest.raises(ValueError, match="speech has 2 codebooks, this vocabulary has 3"):
        bundle.vocab().speech_to_rows(codes_KU[:2])
