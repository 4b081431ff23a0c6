"""Token shards: round trip of any example, and every kind of damage is named."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aromni_jax.structs import Example, Modality, Role, Span, Task
from aromni_jax.vocab import JointVocab
from data_pipelines.records import StoredExample, TokenDataset, decode_record, encode_record
from tests.fixtures.data_fakes import fake_bundle, make_dataset


@st.composite
def stored_examples(draw: st.DrawFn) -> StoredExample:
    lengths = draw(st.lists(st.integers(0, 20), min_size=1, max_size=6))
    spans, start = [], 0
    for length in lengths:
        modality, role = draw(st.sampled_from(Modality)), draw(st.sampled_from(Role))
        spans.append(Span(start, length, modality, role, draw(st.integers(-1, 3)), draw(st.integers(-1, 3))))
        start += length
    largest = draw(st.sampled_from([255, 65_535, 65_536, 200_000]))
    tokens_L = np.array(draw(st.lists(st.integers(0, largest), min_size=start, max_size=start)), np.int32)
    example = Example(tokens_L, tuple(spans), draw(st.sampled_from(Task)), draw(st.text(max_size=8)))
    return StoredExample.of(example, {"label": draw(st.text(max_size=5)), "n": draw(st.integers(0, 9))})


@settings(deadline=None)
@given(stored_examples())
def test_record_round_trip(stored: StoredExample) -> None:
    found = decode_record(encode_record(stored))
    np.testing.assert_array_equal(found.example.tokens_L, stored.example.tokens_L)
    assert found.example.tokens_L.dtype == np.int32
    assert found.example.spans == stored.example.spans and found.facts == stored.facts
    assert (found.example.task, found.example.key) == (stored.example.task, stored.example.key)


@given(st.binary(max_size=60))
def test_garbage_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="damaged record"):
        decode_record(data)


@pytest.fixture
def dataset(tmp_path: pathlib.Path) -> pathlib.Path:
    return make_dataset(tmp_path, 40)


def test_reads_any_record(dataset: pathlib.Path) -> None:
    tokens = TokenDataset(dataset, fake_bundle().vocab(), verify=True)
    assert len(tokens) == 40 and len(tokens.markers) == 3
    keys = [stored.example.key for stored in tokens]
    assert keys[17].endswith("/17") and tokens[39].example.key == keys[39]
    assert [len(stored.example.tokens_L) for stored in tokens] == tokens.lengths_N.tolist()
    targets = np.concatenate([stored.example.tokens_L[1:] for stored in tokens])
    np.testing.assert_array_equal(np.bincount(targets, minlength=len(tokens.unigram_V)), tokens.unigram_V)
    counted = np.zeros_like(tokens.counts_TMR)
    for stored in tokens:
        np.add.at(counted[stored.task], (stored.example.modality_L[1:], stored.example.roles_L[1:]), 1)
    np.testing.assert_array_equal(counted, tokens.counts_TMR)
    assert tokens.counts_TMR.sum() == len(targets) == tokens.unigram_V.sum()
    with pytest.raises(IndexError):
        tokens[40]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "shard_00001.array_record is empty"),
        (lambda data: data[:-1], "shard_00001.array_record is truncated"),
        (lambda data: data + b"x", "shard_00001.array_record is changed"),
        (None, "shard_00001.array_record is missing"),
    ],
)
def test_a_shard_of_another_size_is_named_at_open(dataset: pathlib.Path, damage: object, message: str) -> None:
    path = dataset / "shard_00001.array_record"
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        TokenDataset(dataset)


def test_a_flipped_bit_anywhere_is_found_by_verify(dataset: pathlib.Path) -> None:
    path = dataset / "shard_00002.array_record"
    data = path.read_bytes()
    for position in np.linspace(0, len(data) - 1, 12).astype(int):
        path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        with pytest.raises(ValueError, match="shard_00002.array_record is damaged"):
            TokenDataset(dataset, verify=True)
    path.write_bytes(data)
    index = dataset / "shard_00000.npz"
    index.write_bytes(index.read_bytes()[:-1])
    with pytest.raises(ValueError, match="index .*shard_00000.npz"):
        TokenDataset(dataset)


def test_another_vocabulary_and_no_data_set(dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="made with vocabulary"):
        TokenDataset(dataset, JointVocab.build(text_size=300))
    with pytest.raises(ValueError, match="not a finished data set"):
        TokenDataset(tmp_path)
