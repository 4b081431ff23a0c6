"""The joint vocabulary: layouts, conversions and fingerprints."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aromni_jax.structs import Modality
from aromni_jax.vocab import SPECIALS, CodeSpan, JointVocab

layouts = st.builds(
    JointVocab.build,
    text_size=st.integers(1, 3000),
    image_codes=st.just(64),
    tokens_per_image=st.sampled_from([4, 64]),
    speech_codes=st.lists(st.integers(1, 300), max_size=4).map(tuple),
    pad_to_multiple=st.sampled_from([1, 128]),
)


@given(layouts)
def test_every_row_has_at_most_one_meaning_and_codes_round_trip(vocab):
    expected = len(SPECIALS) + vocab.text.size + vocab.image.size + sum(span.size for span in vocab.speech)
    assert vocab.valid_mask_V.sum() == expected
    assert JointVocab.from_json(vocab.to_json()) == vocab
    codes_P = np.arange(vocab.tokens_per_image, dtype=np.int32) % vocab.image.size
    np.testing.assert_array_equal(vocab.rows_to_image(vocab.image_to_rows(codes_P)), codes_P)
    if vocab.speech:
        codes_KU = np.stack([np.arange(5, dtype=np.int32) % span.size for span in vocab.speech])
        rows = vocab.speech_to_rows(codes_KU)
        np.testing.assert_array_equal(vocab.rows_to_speech(rows), codes_KU)
        assert set(vocab.modality_V[rows]) == {Modality.SPEECH}


def test_fingerprint_follows_layout_and_tokenizers():
    vocab = JointVocab.build(text_size=100, fingerprints={"text": "a"})
    assert vocab.fingerprint == JointVocab.from_json(vocab.to_json()).fingerprint
    assert vocab.fingerprint != JointVocab.build(text_size=101, fingerprints={"text": "a"}).fingerprint
    assert vocab.fingerprint != JointVocab.build(text_size=100, fingerprints={"text": "b"}).fingerprint
    with pytest.raises(ValueError, match="shard-00001 was made with vocabulary"):
        vocab.check_fingerprint("0" * 16, "shard-00001")


def test_released_layout_is_chameleons():
    vocab = JointVocab.released()
    assert vocab.size == 65536
    assert vocab.image_to_rows(np.arange(1024))[[0, -1]].tolist() == [4, 1027]
    assert vocab.speech_to_rows(np.array([[0, 4095]])).tolist() == [8724, 12819]
    assert vocab.text_to_rows([16384]).tolist() == [16384]
    assert vocab.pad != vocab.eos


@pytest.mark.parametrize(
    "codes, message",
    [(np.full(63, 1), "63 codes"), (np.full(64, 64), "image code 64 is outside the codebook 0..63")],
)
def test_wrong_image_codes_are_named(codes, message):
    vocab = JointVocab.build(text_size=10, image_codes=64, tokens_per_image=64)
    with pytest.raises(ValueError, match=message):
        vocab.image_to_rows(codes)


def test_foreign_text_ids_and_overlapping_layouts_are_errors():
    vocab = JointVocab.build(text_size=10)
    with pytest.raises(ValueError, match="text id 10 has row"):
        vocab.text_to_rows([3, 10])
    with pytest.raises(ValueError, match="more than one meaning"):
        dataclasses.replace(vocab, text=CodeSpan(0, 10))
    with pytest.raises(ValueError, match="not a joint vocabulary"):
        JointVocab.from_json("{}")
