"""Mixtures: shares in examples and in tokens, repeats, and errors that name the key."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from aromni_jax.config import DataConfig
from data_pipelines.mixing import Mixture
from tests.fixtures.data_fakes import fake_bundle, make_dataset

VOCAB = fake_bundle().vocab()


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("mixture")
    return str(make_dataset(root, 60, 0, "big")), str(make_dataset(root, 25, 1, "small"))


def mixture_of(datasets: tuple[str, str], weights: tuple, unit: str = "examples", seed: int = 0) -> Mixture:
    entries = {
        name: {"path": path} | ({} if weight is None else {"weight": weight})
        for name, path, weight in zip(("big", "small"), datasets, weights, strict=True)
    }
    return Mixture(DataConfig(entries, unit, 0, 1), VOCAB, seed=seed)  # type: ignore[arg-type]


def test_without_weights_every_record_stands_once(datasets: tuple[str, str]) -> None:
    mixture = mixture_of(datasets, (None, None))
    keys = [(int(mixture._dataset_N[i]), mixture[i].example.key) for i in range(len(mixture))]
    assert len(keys) == len(set(keys)) == 85
    assert mixture.counts_TMR.sum() == mixture.lengths_N.sum()


def test_weights_in_examples_and_in_tokens(datasets: tuple[str, str]) -> None:
    half = mixture_of(datasets, (1.0, 1.0))
    assert half.shares["big"] == pytest.approx(
        {"examples": 0.5, "repeats": 1.0, "tokens": half.shares["big"]["tokens"]}
    )
    assert half.shares["small"]["repeats"] == pytest.approx(60 / 25)
    _, counts = np.unique(half._index_N[half._dataset_N == 1], return_counts=True)
    assert len(counts) == 25 and set(counts) == {2, 3}

    tokens = mixture_of(datasets, (1.0, 3.0), unit="tokens")
    assert tokens.shares["small"]["tokens"] == pytest.approx(0.75, abs=0.02)
    assert tokens.shares["big"]["repeats"] == 1.0
    assert abs(tokens.counts_TMR.sum() - tokens.lengths_N.sum()) < 0.05 * tokens.lengths_N.sum()


def test_fingerprints_follow_data_and_weights(datasets: tuple[str, str]) -> None:
    prints = {mixture_of(datasets, weights).fingerprint for weights in ((None, None), (1.0, 1.0), (1.0, 2.0))}
    assert len(prints) == 3
    assert mixture_of(datasets, (1.0, 1.0)).fingerprint == mixture_of(datasets, (2.0, 2.0)).fingerprint


@pytest.mark.parametrize(
    ("weights", "message"),
    [((1.0, None), "small.weight"), ((-1.0, 1.0), "big.weight"), ((1e-9, 1.0), "repeated")],
)
def test_weights_that_make_no_sense(datasets: tuple[str, str], weights: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixture_of(datasets, weights)


def test_entries_are_checked(datasets: tuple[str, str], tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'data.mixture.a.weight'"):
        Mixture(DataConfig({"a": {"path": datasets[0], "wieght": 1.0}}, "examples", 0, 1), VOCAB, seed=0)
    with pytest.raises(ValueError, match="not a finished data set"):
        Mixture(DataConfig({"a": {"path": str(tmp_path)}}, "examples", 0, 1), VOCAB, seed=0)
    with pytest.raises(ValueError, match="names no data set"):
        Mixture(DataConfig("synthetc", "examples", 0, 1), VOCAB, seed=0)


def test_plans_are_stored_and_made_again_when_stale_or_damaged(tmp_path: pathlib.Path) -> None:
    data = make_dataset(tmp_path, 40)
    mixture = Mixture(DataConfig({"a": {"path": str(data)}}, "examples", 0, 1), VOCAB, seed=0)
    plan, digest = mixture.plan(128, seed=0)
    (stored,) = (data / "plans").glob("*.npz")
    assert stored.stem == digest
    stored.write_bytes(stored.read_bytes()[:50])
    again, same = mixture.plan(128, seed=0)
    assert same == digest and (again.documents_N == plan.documents_N).all()
    _, other = mixture.plan(160, seed=0)
    assert other != digest and len(list((data / "plans").glob("*.npz"))) == 2


def test_a_record_longer_than_the_row_is_named(datasets: tuple[str, str]) -> None:
    mixture = mixture_of(datasets, (None, None))
    longest = int(mixture.lengths_N.argmax())
    with pytest.raises(ValueError, match=f"record '{mixture[longest].example.key}'.*sequence_length 30 holds 31"):
        mixture.plan(30, seed=0)
