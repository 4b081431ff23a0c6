"""Word errors against jiwer, and by hand."""

from __future__ import annotations

import jiwer
import numpy as np

from aromni_jax.evaluation.wer import WordErrors, corpus_errors, word_errors, words_of


def test_random_corpora_equal_jiwer():
    rng = np.random.default_rng(0)
    words = ["red", "blue", "a", "star", "seven", "ring"]
    for _ in range(50):
        truths = [" ".join(rng.choice(words, rng.integers(1, 9))) for _ in range(5)]
        told = [" ".join(rng.choice(words, rng.integers(0, 9))) for _ in range(5)]
        assert corpus_errors(zip(truths, told, strict=True)).rate == jiwer.wer(truths, told)


def test_counts_by_hand():
    assert word_errors(["a", "red", "star"], ["a", "star"]) == WordErrors(0, 1, 0, 3)
    assert word_errors(["a"], ["a", "a", "b"]) == WordErrors(0, 0, 2, 1)
    assert word_errors(["one", "two"], ["one", "three"]) == WordErrors(1, 0, 0, 2)
    assert word_errors([], []).rate == 0 and word_errors([], ["x"]).rate == float("inf")


def test_words_ignore_case_and_punctuation():
    assert words_of("A red, RED star; it's big!") == ["a", "red", "red", "star", "it's", "big"]
