"""Mixtures: shares in examples and in tokens, temperature, exhaustion, and errors that name the key."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np
import pytest

from aromni_jax.config import DataConfig
from data_pipelines.document_stream import Cursor
from data_pipelines.mixing import Mixture
from tests.fixtures.data_fakes import fake_bundle, make_dataset

VOCAB = fake_bundle().vocab()
DATA = DataConfig({}, "examples", 0, 1)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("mixture")
    return str(make_dataset(root, 60, 0, "big")), str(make_dataset(root, 25, 1, "small"))


def mixture_of(datasets: tuple[str, str], weights: tuple, unit: str = "examples", **changes: Any) -> Mixture:
    entries = {
        name: {"path": path} | ({} if weight is None else {"weight": weight})
        for name, path, weight in zip(("big", "small"), datasets, weights, strict=True)
    }
    return Mixture(dataclasses.replace(DATA, mixture=entries, weight_unit=unit, **changes), VOCAB)


def keys_of(mixture: Mixture, segments: int) -> list[tuple[int, str]]:
    stream, found = mixture.stream(seed=0), []
    for number in range(segments):
        documents = stream.segment(number)
        found += [(int(documents.dataset_N[i]), stream.read(documents, i).key) for i in range(len(documents))]
    return found


def test_without_weights_every_record_stands_once(datasets: tuple[str, str]) -> None:
    mixture = mixture_of(datasets, (None, None))
    keys = keys_of(mixture, 1)
    assert len(keys) == len(set(keys)) == 85
    assert mixture.counts_TMR.sum() == mixture.stream(seed=0).segment(0).lengths_N.sum()
    assert keys_of(mixture, 2)[85:] != keys and sorted(keys_of(mixture, 2)[85:]) == sorted(keys)


def test_weights_in_examples_and_in_tokens(datasets: tuple[str, str]) -> None:
    half = mixture_of(datasets, (1.0, 1.0))
    assert half.shares["big"] == pytest.approx(
        {"examples": 0.5, "repeats": 1.0, "tokens": half.shares["big"]["tokens"]}
    )
    assert half.shares["small"]["repeats"] == pytest.approx(60 / 25)
    documents = half.stream(seed=0).segment(0)
    _, counts = np.unique(documents.record_N[documents.dataset_N == 1], return_counts=True)
    assert len(counts) == 25 and set(counts) == {2, 3}

    tokens = mixture_of(datasets, (1.0, 3.0), unit="tokens")
    assert tokens.shares["small"]["tokens"] == pytest.approx(0.75, abs=0.02)
    assert tokens.shares["big"]["repeats"] == 1.0
    realised = tokens.stream(seed=0).segment(0).lengths_N.sum()
    assert abs(tokens.counts_TMR.sum() - realised) < 0.05 * realised


def test_the_recipe_of_the_paper_is_a_config(datasets: tuple[str, str], tmp_path: pathlib.Path) -> None:
    from configs.pretrain import PAPER_MIXTURE

    paths = [str(make_dataset(tmp_path, 20, seed, f"data{seed}")) for seed in range(3)]
    entries = {name: entry | {"path": path} for (name, entry), path in zip(PAPER_MIXTURE.items(), paths, strict=True)}
    shares = Mixture(dataclasses.replace(DATA, mixture=entries), VOCAB).shares
    assert [shares[name]["examples"] for name in ("text", "image", "speech")] == pytest.approx([1 / 7, 2 / 7, 4 / 7])


def test_temperature_flattens_sizes_and_weights(datasets: tuple[str, str]) -> None:
    by_size = mixture_of(datasets, (None, None), temperature=2.0).shares
    assert by_size["big"]["examples"] == pytest.approx(60**0.5 / (60**0.5 + 25**0.5), abs=0.01)
    by_weight = mixture_of(datasets, (9.0, 1.0), temperature=2.0).shares
    assert by_weight["big"]["examples"] == pytest.approx(0.75, abs=0.01)
    uniform = mixture_of(datasets, (None, None), unit="tokens", temperature=1e6).shares
    assert uniform["big"]["tokens"] == pytest.approx(0.5, abs=0.01)


def test_stopping_on_exhaustion(datasets: tuple[str, str]) -> None:
    stop = mixture_of(datasets, (1.0, 1.0), when_exhausted="stop")
    stream = stop.stream(seed=0)
    assert stream.num_segments == 1 and np.bincount(stream.segment(0).dataset_N).tolist() == [25, 25]
    twice = mixture_of(datasets, (None, None), when_exhausted="stop", epochs=2).stream(seed=0)
    assert twice.counts_D.tolist() == [120, 50]
    with pytest.raises(ValueError, match="'small' has been read 1 time"):
        stop.stream(seed=0, cursors=[Cursor(), Cursor(25)])


@pytest.mark.parametrize(
    ("weights", "message"),
    [((1.0, None), "small.weight"), ((-1.0, 1.0), "big.weight"), ((1e-9, 1.0), "repeated")],
)
def test_weights_that_make_no_sense(datasets: tuple[str, str], weights: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixture_of(datasets, weights)


def test_entries_are_checked(datasets: tuple[str, str], tmp_path: pathlib.Path) -> None:
    for entries, message in (
        ({"a": {"path": datasets[0], "wieght": 1.0}}, "did you mean 'data.mixture.a.weight'"),
        ({"a": {"path": str(tmp_path)}}, "not a finished data set"),
        ("synthetc", "names no data set"),
        ({"a": {"path": datasets[0]}, "b": {"path": datasets[0]}}, "'b' has the same records as 'a'"),
    ):
        with pytest.raises(ValueError, match=message):
            Mixture(dataclasses.replace(DATA, mixture=entries), VOCAB)  # type: ignore[arg-type]
