"""One flipped bit, at any place of any file of a data set: it is found and named, or changes nothing that is read."""

from __future__ import annotations

import contextlib
import pathlib
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from data_pipelines.records import TokenDataset, read_marker, read_vocab
from tests.fixtures.data_fakes import make_dataset

SHARDS, RECORDS = 3, 30


@contextlib.contextmanager
def flipped(path: pathlib.Path, position: int, bit: int) -> Iterator[None]:
    """`path` with one bit changed in place, put right again afterwards."""
    with path.open("r+b", buffering=0) as file:

        def turn() -> None:
            file.seek(position)
            (byte,) = file.read(1)
            file.seek(position)
            file.write(bytes([byte ^ 1 << bit]))

        turn()
        try:
            yield
        finally:
            turn()


def places(path: pathlib.Path, count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """`count` bits of a file: half of them anywhere, half where it is not zeros (ArrayRecord pads to 64 KiB)."""
    data = np.frombuffer(path.read_bytes(), np.uint8)
    written = np.flatnonzero(data)
    chosen = [*rng.integers(0, len(data), count // 2), *rng.choice(written, count - count // 2)]
    return [(int(position), int(rng.integers(8))) for position in chosen]


def everything(data: pathlib.Path) -> tuple[dict[int, Any], list[str], list[bytes]]:
    """(record index -> what it holds, errors of the others, what the data set says about itself) of a fresh open."""
    dataset = TokenDataset(data, read_vocab(data))
    records, errors = {}, []
    for index in range(len(dataset)):
        try:
            stored = dataset[index]
        except ValueError as error:
            assert f"{dataset.where(index)} " in str(error)
            errors.append(str(error))
        else:
            arrays = (stored.tokens_L.tobytes(), stored.spans_S6.tobytes())
            records[index] = (stored.key, stored.task, *arrays, stored.facts)
    about = [dataset.lengths_N, dataset.tasks_N, dataset.hashes_N, dataset.unigram_V, dataset.counts_TMR]
    return records, errors, [*(array.tobytes() for array in about), repr(dataset.dataset).encode()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return make_dataset(tmp_path_factory.mktemp("flips"), RECORDS, records_per_shard=RECORDS // SHARDS)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("shard_00001.array_record", 240),
        ("shard_00001.npz", 60),
        ("dataset.json", 240),
        ("vocab.json", 120),
        ("unigram.npy", 120),
    ],
)
def test_a_flipped_bit_is_named_or_changes_nothing(data: pathlib.Path, name: str, count: int) -> None:
    whole = everything(data)
    assert len(whole[0]) == RECORDS and not whole[1]
    outcomes: Counter[str] = Counter()
    for position, bit in places(data / name, count, np.random.default_rng(0)):
        with flipped(data / name, position, bit):
            try:
                records, errors, about = everything(data)
            except ValueError as error:
                assert re.search(r"shard_00001|dataset\.json|unigram\.npy|vocab\.json|vocabulary", str(error)), error
                outcomes["refused"] += 1
                continue
        assert about == whole[2], f"{name}: bit {bit} of byte {position} changed what the data set says of itself"
        # A record that reads is the one that was written, whatever happened to the others.
        assert all(records[index] == whole[0][index] for index in records)
        assert len(records) + len(errors) == RECORDS
        outcomes["record named" if errors else "harmless"] += 1
    assert everything(data) == whole
    if name.endswith((".npz", ".npy")):
        assert outcomes == {"refused": count}  # a hash covers every byte
    elif name.endswith(".array_record"):
        assert outcomes["record named"] + outcomes["refused"] > count // 4
    else:
        assert outcomes["refused"] > count // 2  # the rest is white space


def test_a_flipped_bit_in_a_marker_never_finalizes_a_data_set(data: pathlib.Path) -> None:
    marker = read_marker(data, 1)
    refused = 0
    for position, bit in places(data / "shard_00001.json", 240, np.random.default_rng(1)):
        with flipped(data / "shard_00001.json", position, bit):
            try:
                assert read_marker(data, 1) == marker
            except ValueError as error:
                assert "shard_00001.json is not a whole shard marker" in str(error)
                refused += 1
    assert refused > 120


def test_verify_finds_every_flipped_bit_of_a_shard(data: pathlib.Path) -> None:
    path = data / "shard_00002.array_record"
    for position, bit in places(path, 60, np.random.default_rng(2)):
        with flipped(path, position, bit), pytest.raises(ValueError, match="shard_00002.array_record is damaged"):
            TokenDataset(data, verify=True)
    TokenDataset(data, verify=True)
