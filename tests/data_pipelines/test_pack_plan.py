"""The pack plan: every document once, no row too full, rows nearly full, the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.pack_plan import make_plan
from data_pipelines.recipe_corpus import recipe_lengths


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 64), min_size=0, max_size=300), st.integers(64, 200), st.integers(0, 3))
def test_every_document_stands_in_one_row(lengths: list[int], row_length: int, seed: int) -> None:
    lengths_N = np.array(lengths, np.int64)
    plan = make_plan(lengths_N, row_length, seed=seed)
    assert sorted(plan.documents_N.tolist()) == list(range(len(lengths)))
    places = [np.maximum(lengths_N[plan[row]], 1).sum() for row in range(plan.num_rows)]
    assert all(0 < used <= row_length for used in places) and lengths_N.sum() == plan.num_tokens
    again = make_plan(lengths_N, row_length, seed=seed)
    np.testing.assert_array_equal(plan.documents_N, again.documents_N)
    np.testing.assert_array_equal(plan.starts_R, again.starts_R)


@pytest.mark.parametrize("row_length", [2048, 4096, 8192])
def test_rows_of_the_released_recipe_are_full(row_length: int) -> None:
    """Text 50-500, pictures 1030-1100 and speech 100-800 tokens, 0.5 : 1 : 2; the issue asks for 99.5 %."""
    lengths_N, _ = recipe_lengths(60_000)
    plan = make_plan(lengths_N - 1, row_length, seed=0)
    assert plan.fill > 0.9995
    assert plan.num_rows <= -(-plan.num_tokens // row_length) + 3, "nearly no more rows than tokens need at least"


def test_few_documents_take_the_fewest_rows() -> None:
    lengths_N, _ = recipe_lengths(4096)
    plan = make_plan(lengths_N - 1, 4096, seed=0)
    assert plan.num_rows == -(-plan.num_tokens // 4096)


def test_documents_that_fill_a_row_exactly_are_found() -> None:
    """Longest fits alone would leave 7 + 2 of 10; the pair 7 + 3 is there, and one 5 is no pair."""
    plan = make_plan(np.array([7, 2, 3, 5, 2, 1]), 10, seed=0)
    rows = sorted(sorted(np.array([7, 2, 3, 5, 2, 1])[plan[row]].tolist()) for row in range(plan.num_rows))
    assert rows == [[1, 2, 2, 5], [3, 7]]


def test_pictures_alone_cannot_fill_rows() -> None:
    plan = make_plan(np.full(20_000, 1050), 4096, seed=0)
    assert plan.num_rows == -(-20_000 // 3)


def test_another_seed_packs_otherwise() -> None:
    lengths_N = np.random.default_rng(0).integers(5, 60, 500)
    first, second = make_plan(lengths_N, 100, seed=0), make_plan(lengths_N, 100, seed=1)
    assert first.documents_N.tolist() != second.documents_N.tolist()


def test_a_document_longer_than_a_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="document 1 has 101 targets, a row has room for 100"):
        make_plan(np.array([5, 101]), 100, seed=0)
