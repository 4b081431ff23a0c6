"""The pack plan: every document once, no row too full, good fill, the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.pack_plan import make_plan


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 64), min_size=0, max_size=300), st.integers(64, 90), st.integers(0, 3), st.integers(1, 60)
)
def test_every_document_stands_in_one_row(lengths: list[int], row_length: int, seed: int, window: int) -> None:
    lengths_N = np.array(lengths, np.int64)
    plan = make_plan(lengths_N, row_length, seed=seed, window=window)
    assert sorted(plan.documents_N.tolist()) == list(range(len(lengths)))
    used = [int(lengths_N[plan[row]].sum()) for row in range(plan.num_rows)]
    assert all(0 < u <= row_length for u in used) and sum(used) == plan.num_tokens
    again = make_plan(lengths_N, row_length, seed=seed, window=window)
    np.testing.assert_array_equal(plan.documents_N, again.documents_N)
    np.testing.assert_array_equal(plan.starts_R, again.starts_R)


def test_fill_on_the_lengths_of_the_released_recipe() -> None:
    rng = np.random.default_rng(0)
    kind = rng.choice(3, 40_000, p=np.array([0.5, 1, 2]) / 3.5)
    ranges = ((50, 501), (1030, 1101), (100, 801))
    lengths_N = np.choose(kind, [rng.integers(low, high, len(kind)) for low, high in ranges])
    plan = make_plan(lengths_N, 4096, seed=0)
    assert plan.fill > 0.995


def test_data_that_cannot_fill_rows_does_not_pile_up() -> None:
    plan = make_plan(np.full(20_000, 1050), 4096, seed=0)
    assert plan.num_rows == -(-20_000 // 3)


def test_another_seed_packs_otherwise() -> None:
    lengths_N = np.random.default_rng(0).integers(5, 60, 500)
    first, second = make_plan(lengths_N, 100, seed=0), make_plan(lengths_N, 100, seed=1)
    assert first.documents_N.tolist() != second.documents_N.tolist()


def test_a_document_longer_than_a_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="document 1 has 101 targets, a row has room for 100"):
        make_plan(np.array([5, 101]), 100, seed=0)
